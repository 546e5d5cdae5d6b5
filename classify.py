"""Linear and attentive probing of a frozen encoder: parts (CUB, COCO), ImageNet, any folder of class folders.

    torchrun classify.py --model ibot --dataset cub --data-path CUB_200_2011 --probe linear attentive knn

Also runs as plain `python classify.py`, on one GPU, several, or none. Where the transform is deterministic every image
is encoded once, whatever the number of epochs, probes, learning rates and seeds; ImageNet's training images are not.
Protocol: sections 4.1, 4.2 and A.4 of the paper, numbers as in its authors' code. Results: OUTPUT_DIR/results.jsonl.
"""

import argparse
import json
import resource
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn as nn

from datasets.classification import held_out_images, hold_out, open_classification
from datasets.patches import RandomViews, random_crop_flip
from models import METHODS, load_encoder
from models.encoder import Encoder
from models.features import Features, decoded_ids, encode_batch_size, encode_features, encode_tokens
from models.probe_training import RECIPES, Probe
from models.probes import build_heads, knn_predict, load_head
from utils import UserError
from utils.distributed import (
    all_reduce,
    barrier,
    gather_rows,
    is_main,
    rank,
    world_size,
)
from utils.drawing import draw_confusion, draw_curves
from utils.results import (
    PAPER_TABLES,
    append_result,
    args_to_json,
    beside_published,
    caveats,
    markdown_table,
    read_results,
)
from utils.run import (
    OneLineParser,
    Progress,
    add_common_arguments,
    exit_with_one_line_errors,
    positive_int,
    setup,
)
from utils.storage import atomic_write

PARTS = ("cub", "coco", "synthetic")
IMAGES = ("imagenet", "folder", "synthetic-species")
NEIGHBOURS = (10, 20, 100, 200)
# Arguments that may differ when a run is resumed: they do not change what it computes.
FREE_ON_RESUME = ("output_dir", "workers", "device", "cache", "cache_dir", "resume", "checkpoint_seconds", "save_plots",
                  "table")


@torch.no_grad()
def confusion_of_heads(heads: nn.Module, features: Features, ids: torch.Tensor, num_classes: int,
                     authors_defects: bool = False) -> torch.Tensor:
    """int64 [K, classes, classes] of the patches with these ids, over all processes: row = label, column = prediction.

    authors_defects: batch norm by the statistics of test batches of 256, which also move the running ones.
    """
    heads.train(authors_defects)
    matrix = None
    batches = features.batches(ids.split(256 if authors_defects else 1024), heads.kind == "attentive")
    for tokens, rstd, rows, labels in batches:
        predicted = heads(tokens, rstd, rows).argmax(-1)
        if matrix is None:
            matrix = labels.new_zeros(len(predicted), num_classes * num_classes)
        matrix.scatter_add_(1, labels * num_classes + predicted, torch.ones_like(predicted))
    heads.train()
    return all_reduce(matrix.view(-1, num_classes, num_classes)).cpu()


def accuracy(matrix: torch.Tensor) -> torch.Tensor:
    """Percent correct from confusion matrices [..., C, C]."""
    return 100 * matrix.diagonal(dim1=-2, dim2=-1).sum(-1).double() / matrix.sum((-2, -1)).clamp(min=1)


def shuffled(ids: torch.Tensor, seed: int, epoch: int) -> torch.Tensor:
    """The ids in the order of an epoch, the same whatever the number of processes."""
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed * 100_003 + epoch))]


def train_on_features(probe: Probe, features: Features, order: torch.Tensor, epoch: int) -> None:
    steps = probe.steps(order)
    for index, batch in enumerate(features.batches(steps, probe.kind == "attentive")):
        probe.step(*batch, epoch + index / len(steps))


def train_on_views(probes: Sequence[Probe], encoder: Encoder, views: RandomViews, order: torch.Tensor, epoch: int,
                   precision: str, workers: int) -> None:
    """One epoch over images that are encoded as they come. order: ids (one per image) in the order of this epoch.

    Each process encodes every world_size-th image of the order, so an equal share of every probe's batches, whose sizes
    may differ. A batch is trained on as soon as all that lies before its end has been encoded.
    """
    views.epoch, device = epoch, next(encoder.parameters()).device
    labels = views.labels.to(device)
    position = torch.empty(views.num_patches, dtype=torch.int64)
    position[order] = torch.arange(len(order))
    # The same on every process: (end of a batch, number of the probe, share of the epoch before it).
    ends = sorted((min((index + 1) * probe.batch_size, len(order)), number, index / len(steps))
                  for number, probe in enumerate(probes) for steps in [probe.steps(order)]
                  for index in range(len(steps)))
    waiting = [[] for _ in probes]
    nothing = (torch.zeros(0, 1, encoder.embed_dim, device=device), labels[:0])

    def train_up_to(place):
        while ends and ends[0][0] <= place:
            _, number, share = ends.pop(0)
            tokens, ids = zip(*(waiting[number] or [nothing]), strict=True)
            probes[number].step(torch.cat(tokens), None, None, torch.cat(ids), epoch + share)
            waiting[number].clear()

    progress = Progress(len(order) // world_size(), f"epoch {epoch + 1}", "images")
    for images, ids in views.batches(order[rank()::world_size()].tolist(), encode_batch_size(device), workers,
                                     pin_memory=device.type == "cuda"):
        tokens, places = encode_tokens(encoder, images.to(device, non_blocking=True), precision), position[ids]
        begin = 0
        while begin < len(ids):
            train_up_to(int(places[begin]))
            if not ends:
                break
            stop = begin + int((places[begin:] < ends[0][0]).sum())
            for probe, rows in zip(probes, waiting, strict=True):
                # A copy of the class tokens, so that the others are not held back.
                part = tokens[begin:stop] if probe.kind == "attentive" else tokens[begin:stop, :1].clone()
                rows.append((part, labels[ids[begin:stop].to(device)]))
            begin = stop
        progress.update(len(ids))
    train_up_to(len(order))


def run_knn(train: Features, train_ids: torch.Tensor, held_out_ids: torch.Tensor, test: Features,
            test_ids: torch.Tensor, num_classes: int) -> dict:
    """k by the held-out ids, or by the test set where there are none; percentages on the test set for every k."""
    rows = train.rows(train_ids).to(train.cls.device)
    bank, labels = gather_rows(train.cls[rows]), gather_rows(train.labels[rows])

    def percent(features, ids):
        rows = features.rows(ids).to(features.cls.device)
        predicted = knn_predict(bank, labels, features.cls[rows], num_classes, NEIGHBOURS)
        hits = torch.stack([(predicted[k] == features.labels[rows]).sum() for k in NEIGHBOURS])
        return dict(zip(NEIGHBOURS, (100 * all_reduce(hits).double() / len(ids)).tolist(), strict=True))

    by_k = percent(test, test_ids)
    scores = percent(train, held_out_ids) if len(held_out_ids) else by_k
    best = max(NEIGHBOURS, key=scores.get)
    return {"acc1": by_k[20], "best_acc1": by_k[best], "best_k": best, "acc1_by_k": by_k}


def per_class(matrix: torch.Tensor) -> dict:
    """The percentages by class and, up to 200 classes, the confusion matrix (row = label), for a results line."""
    by_class = 100 * matrix.diagonal().double() / matrix.sum(1).clamp(min=1)
    return {"per_class_accuracy": by_class.tolist()} | ({"confusion": matrix.tolist()} if len(matrix) <= 200 else {})


def memory_peak(device: torch.device) -> str:
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    gpu = f", {torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB on the GPU" if device.type == "cuda" else ""
    return f"memory peak {host:.2f} GB in this process{gpu}"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(__doc__)
    add_common_arguments(parser, METHODS, PARTS + IMAGES, batch_size=None)
    group = parser.add_argument_group("probing")
    group.add_argument("--probe", nargs="+", choices=("linear", "attentive", "knn"), default=["linear"],
                       help="one or several, on the same features (default: linear)")
    group.add_argument("--epochs", type=positive_int, default=90, help="(default: %(default)s)")
    group.add_argument("--lr", type=float, nargs="+", metavar="LR",
                       help="one or several, for the batch size as it is (default: parts 0.4 linear, 0.04 attentive at "
                            "1024; images 6.4 linear at 16384, 0.4 attentive at 8192; in proportion at others)")
    group.add_argument("--seeds", type=positive_int, default=1, metavar="N",
                       help="heads for each learning rate, with initial weights from SEED, SEED + 1, ...")
    group.add_argument("--select", choices=("test", "held-out"), default="test",
                       help="what chooses epoch, learning rate and k: the test set, as in the paper (default), or a "
                            "tenth of the training images, which are then not trained on")
    group.add_argument("--crop-scale", type=float, default=0.5,
                       help="side of a part patch / distance to the next keypoint (default: 0.5, the authors' code; "
                            "the paper's text: 1.0)")
    group.add_argument("--no-augment", action="store_true",
                       help="images: train on the central crop, each image encoded once, in place of random crops")
    group.add_argument("--authors-defects", action="store_true",
                       help="attentive: test with the statistics of test batches, as the authors' code does; MAE: with "
                            "shuffled tokens")
    group.add_argument("--skip-bad-images", action="store_true", help="leave out images that cannot be decoded")
    group = parser.add_argument_group("cache and files")
    group.add_argument("--cache", choices=("auto", "gpu", "cpu", "disk"), default="auto",
                       help="where tokens live; auto: the first with room")
    group.add_argument("--cache-dir", type=Path, metavar="DIR", help="keep the features there for later runs")
    group.add_argument("--resume", action="store_true", help="continue the run whose checkpoint lies in --output-dir")
    group.add_argument("--checkpoint-seconds", type=float, default=60, metavar="S",
                       help="write a checkpoint after an epoch if the last is older (default: 60)")
    group.add_argument("--evaluate", type=Path, metavar="HEAD", help="no training: test a head that was saved")
    group.add_argument("--save-plots", action="store_true", help="accuracy over epochs, confusion matrix, as PNG")
    return check_arguments(parser.parse_args(arguments))


def check_arguments(args: argparse.Namespace) -> argparse.Namespace:
    args.probe = list(dict.fromkeys(args.probe))
    if args.lr and (min(args.lr) <= 0 or len(set(args.lr)) < len(args.lr)):
        raise UserError(f"--lr {' '.join(map(str, args.lr))}: learning rates must be positive and differ")
    if args.crop_scale <= 0:
        raise UserError(f"--crop-scale {args.crop_scale} must be positive")
    if args.no_augment and args.dataset in PARTS:
        raise UserError(f"--no-augment is for whole images; {args.dataset} is never augmented")
    return args


def row_of(result: dict) -> str:
    marks = caveats(result)
    return f"{result['model']} ({marks})" if marks else result["model"]


def print_table(folder: Path) -> None:
    """Table 1 and the right half of table 3: published, ours (the last run), difference."""
    published = json.loads(PAPER_TABLES.read_text())
    results = [result for result in read_results(folder, "classify") if result.get("best_acc1") is not None]
    parts, images = published["table3_part_classification_top1"], published["table1_imagenet_top1"]
    images = {model: {"imagenet": numbers} for model, numbers in images.items()}
    for title, datasets, numbers in (("Table 3, part classification", ("cub", "coco"), parts),
                                     ("Table 1, ImageNet-1k", ("imagenet",), images)):
        columns = [(dataset, probe) for dataset in datasets for probe in ("linear", "attentive")]
        rows, remarks = [], []
        # A control has a row of its own: it must not take the place of a result.
        ours = {(row_of(result), result["dataset"], result["probe"]): result for result in results}
        others = (row_of(result) for result in results if result["dataset"] in datasets)
        for model in dict.fromkeys((*METHODS, *others)):
            cells = []
            for dataset, probe in columns:
                result = ours.get((model, dataset, probe))
                cells += beside_published(numbers.get(model, {}).get(dataset, {}).get(probe),
                                          result and result["best_acc1"])
                marks = [mark for mark in (result["select"] == "held-out" and "chosen held out",
                         result["args"]["authors_defects"] and "authors' defects",
                         result["args"]["crop_scale"] != 0.5 and f"crop scale {result['args']['crop_scale']}",
                         f"{result['num_train']} training patches") if mark] if result else []
                if marks:
                    remarks.append(f"{model}, {dataset} {probe}: {', '.join(marks)}")
            rows.append([model, *cells])
        header = ["model", *(f"{dataset} {probe} {what}" for dataset, probe in columns
                             for what in ("published", "ours", "difference"))]
        print(f"{title}: best test accuracy over epochs, percent\n\n{markdown_table(header, rows)}\n")
        print("".join(f"* {remark}\n" for remark in remarks))


def save_checkpoint(path: Path, fixed: dict, epoch: int, probes: Sequence[Probe]) -> None:
    content = {"fixed": fixed, "epoch": epoch, "probes": [probe.state() for probe in probes]}
    if is_main():
        atomic_write(path, lambda temporary: torch.save(content, temporary))


def load_checkpoint(path: Path, fixed: dict, probes: Sequence[Probe]) -> int:
    """Restores the probes and returns the number of epochs done. Raises UserError where the run is another one."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        saved = content["fixed"]
    except Exception as error:
        raise UserError(f"{path} is not a checkpoint of this script ({type(error).__name__}); remove it") from None
    for name, value in fixed.items():
        if saved.get(name) != value:
            raise UserError(f"--resume: {name} was {saved.get(name)} when {path} was written and is {value} now; "
                            "give the same arguments, or start without --resume")
    for probe, state in zip(probes, content["probes"], strict=True):
        probe.load_state(state)
    return content["epoch"]


def save_head(path: Path, kind: str, num_heads: int, state: dict, info: dict) -> None:
    """One head as plain tensors (models.probes.load_head reads it)."""
    content = {"kind": kind, "num_heads": num_heads, "head": state, **info}
    if is_main():
        atomic_write(path, lambda temporary: torch.save(content, temporary))


def open_head(path: Path, encoder: Encoder, classes: Sequence[str], device: torch.device) -> nn.Module:
    """Raises UserError for a file that is no head, and for a head of another width or of other classes."""
    try:
        heads = load_head(path)
    except FileNotFoundError:
        raise UserError(f"--evaluate {path} does not exist; name a *_head.pth that classify.py saved") from None
    except Exception as error:
        raise UserError(f"--evaluate {path} is not a head that classify.py saved ({type(error).__name__})") from None
    width, known = heads.weight.shape[2], heads.info["classes"]
    if width != encoder.embed_dim:
        raise UserError(f"--evaluate {path}: the head takes features of width {width}, the encoder gives "
                        f"{encoder.embed_dim}; name the encoder it was trained on, {heads.info['model']}")
    if known != list(classes):
        raise UserError(f"--evaluate {path}: the head knows {len(known)} classes ({', '.join(known[:4])}, ...), "
                        f"the data set has {len(classes)} ({', '.join(classes[:4])}, ...); name the data set it was "
                        f"trained on, {heads.info['dataset']}")
    return heads.to(device)


def main() -> None:
    started = time.monotonic()
    args = parse_arguments()
    if args.table:
        print_table(args.output_dir)
        return
    device, log = setup(args)
    output = args.output_dir

    train, test = open_classification(args.dataset, args.data_path, args.crop_scale, args.skip_bad_images)
    classes = train.classes
    held_out = hold_out(train, args.seed) if args.select == "held-out" else torch.zeros(train.num_patches).bool()
    num_train = int((~held_out).sum())
    if args.batch_size and args.batch_size > num_train:
        raise UserError(f"--batch-size {args.batch_size} is larger than the training set ({num_train} patches); "
                        "take at most that, or leave it out")
    augmented = args.dataset in IMAGES and not args.no_augment
    options = {"shuffle_patches": True} if args.authors_defects and args.model == "mae" else {}
    encoder = load_encoder(args, device, log, projector=False, **options)
    result = {"task": "classify", "model": args.model, "weights": encoder.weights, "sha256": encoder.sha256,
              "dataset": args.dataset, "world_size": world_size(), "precision": args.precision, "seed": args.seed,
              "select": args.select, "num_train": num_train, "num_held_out": int(held_out.sum()),
              "num_test": test.num_patches, "classes": classes, "args": args_to_json(args)}
    marks = caveats(result)
    log(f"{args.model} from {encoder.weights} (SHA-256 {encoder.sha256}); {args.dataset}: {train.num_patches} training "
        f"and {test.num_patches} test patches of {len(classes)} classes" + (f" [{marks}]" if marks else ""))
    name = f"{args.model}_{args.dataset}".replace("/", "-")

    def features(dataset, label, with_tokens):
        return encode_features(encoder, dataset, label, with_tokens, args.precision, args.workers, args.cache,
                               args.cache_dir or output, args.cache_dir, log)

    if args.evaluate:
        heads = open_head(args.evaluate, encoder, classes, device)
        tested = features(test, "test", heads.kind == "attentive")
        ids = decoded_ids(test, tested)
        matrix = confusion_of_heads(heads, tested, ids, len(classes), args.authors_defects)[0]
        result |= {"probe": heads.kind, "acc1": accuracy(matrix).item(), "num_test": len(ids), **per_class(matrix),
                   "seconds": time.monotonic() - started}
        log.open(output)
        log(f"{heads.kind} head {args.evaluate}: {result['acc1']:.2f}% of {len(ids)} test patches")
        if is_main():
            append_result(output, result)
        return

    kinds = [kind for kind in args.probe if kind != "knn"]
    probes = []
    for kind in kinds:
        recipe = RECIPES["images" if args.dataset in IMAGES else "parts"][kind]
        batch_size = args.batch_size or min(recipe.batch_size, num_train)
        rates = args.lr or [recipe.lr * batch_size / recipe.batch_size]
        log(f"{kind}: batches of {batch_size} (published: {recipe.batch_size}), learning rates "
            f"{', '.join(f'{rate:g}' for rate in rates)}, {args.seeds} heads each, {args.epochs} epochs")
        probes.append(Probe(kind, recipe, batch_size, rates, range(args.seed, args.seed + args.seeds), args.epochs,
                            encoder.embed_dim, len(classes), encoder.num_heads, device))
    fixed = {key: value for key, value in args_to_json(args).items() if key not in FREE_ON_RESUME}
    fixed |= {"the weights' SHA-256": encoder.sha256, "the number of training patches": num_train}
    checkpoint, first_epoch = output / f"{name}_checkpoint.pth", 0
    if args.resume and checkpoint.is_file():
        first_epoch = load_checkpoint(checkpoint, fixed, probes)
        log(f"resumed after epoch {first_epoch}")
    elif args.resume:
        log(f"{checkpoint} does not exist: starting from the beginning")

    attentive = "attentive" in kinds
    tested = features(test, "test", attentive)
    test_ids = decoded_ids(test, tested)
    trained = None
    if not augmented or "knn" in args.probe:
        trained = features(train, "training set", attentive and not augmented)
    usable = decoded_ids(train, trained) if trained else torch.arange(train.num_patches)
    train_ids, held_out_ids = usable[~held_out[usable]], usable[held_out[usable]]
    choosing, choosing_ids = (tested, test_ids) if args.select == "test" else (trained, held_out_ids)
    if augmented and args.select == "held-out" and kinds:
        subset = held_out_images(train, held_out)
        choosing = features(subset, "held-out", attentive)
        choosing_ids = decoded_ids(subset, choosing)
    result |= {"num_train": len(train_ids), "num_held_out": len(held_out_ids), "num_test": len(test_ids)}
    encoded = time.monotonic()
    log.open(output)
    log(f"features are ready after {encoded - started:.1f} s")

    chosen_by = "the test set, as in the paper" if args.select == "test" else "a held-out tenth of the training images"
    views = RandomViews(train, random_crop_flip(), args.seed) if augmented else None
    progress, saved = Progress(args.epochs, "training", "epochs"), time.monotonic()
    progress.update(first_epoch)
    for epoch in range(first_epoch, args.epochs if probes else 0):
        order = shuffled(train_ids, args.seed, epoch)
        if augmented:
            train_on_views(probes, encoder, views, order, epoch, args.precision, args.workers)
        else:
            for probe in probes:
                train_on_features(probe, trained, order, epoch)
        for probe in probes:
            percent = accuracy(confusion_of_heads(probe.heads, tested, test_ids, len(classes), args.authors_defects))
            score = percent if args.select == "test" else accuracy(confusion_of_heads(
                probe.heads, choosing, choosing_ids, len(classes), args.authors_defects))
            probe.record(score, percent)
        progress.update()
        if augmented or epoch % 10 == 9:
            log(f"epoch {epoch + 1}: " + "; ".join(
                f"{probe.kind} " + " ".join(f"{value:.2f}" for value in probe.test[-1]) for probe in probes))
        if time.monotonic() - saved >= args.checkpoint_seconds and epoch + 1 < args.epochs:
            save_checkpoint(checkpoint, fixed, epoch + 1, probes)
            saved = time.monotonic()
    result |= {"seconds_features": encoded - started, "seconds_training": time.monotonic() - encoded}
    log(f"trained in {result['seconds_training']:.1f} s; {memory_peak(device)}")

    results = []
    for probe in probes:
        summary = probe.summary()
        index = summary.pop("index")
        heads = build_heads(probe.kind, 1, encoder.embed_dim, len(classes), encoder.num_heads, probe.recipe.batch_norm)
        heads.load_state_dict({key: tensor[index:index + 1] for key, tensor in probe.best.items()})
        matrix = confusion_of_heads(heads.to(device), tested, test_ids, len(classes), args.authors_defects)[0]
        line = result | {"probe": probe.kind, "feature": "cls" if probe.kind == "linear" else "all tokens",
                         "epochs": args.epochs, "batch_size": probe.batch_size, **summary, **per_class(matrix)}
        path = output / f"{name}_{probe.kind}_head.pth"
        info = ("classes", "model", "weights", "sha256", "dataset", "precision", "lr", "best_epoch")
        save_head(path, probe.kind, encoder.num_heads, heads.state_dict(),
                  {key: line[key] for key in info} | {"accuracy": accuracy(matrix).item()})
        spread = f" +- {summary['best_acc1_std']:.2f} over {args.seeds} seeds" if args.seeds > 1 else ""
        log(f"{probe.kind}: best {summary['best_acc1']:.2f}%{spread} (epoch {summary['best_epoch']}, learning rate "
            f"{summary['lr']:g}; chosen on {chosen_by}), last {summary['acc1']:.2f}%; head in {path}")
        results.append(line)
        if args.save_plots and is_main():
            curves = {f"lr {rate:g}, seed {seed}": [epoch[k] for epoch in probe.test]
                      for k, (rate, seed) in enumerate(zip(probe.rates, probe.seeds, strict=True))}
            title = f"{args.model}, {args.dataset}, {probe.kind}" + (f" [{marks}]" if marks else "")
            draw_curves(output / f"{name}_{probe.kind}_accuracy.png", f"{title}: test accuracy by epoch", curves)
            draw_confusion(output / f"{name}_{probe.kind}_confusion.png", title, matrix, classes)
    if "knn" in args.probe:
        line = run_knn(trained, train_ids, held_out_ids, tested, test_ids, len(classes))
        log("knn: " + ", ".join(f"{percent:.2f}% (k = {k})" for k, percent in line["acc1_by_k"].items())
            + f"; best {line['best_acc1']:.2f}%, k chosen on {chosen_by}")
        results.append(result | {"probe": "knn", "feature": "cls", **line})
    if is_main():
        for line in results:
            append_result(output, line | {"seconds": time.monotonic() - started})
        checkpoint.unlink(missing_ok=True)
    barrier()


if __name__ == "__main__":
    exit_with_one_line_errors(main)
