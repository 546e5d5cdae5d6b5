"""Linear, attentive and nearest-neighbour probes of a frozen encoder: parts (CUB, COCO), ImageNet, class folders.

    python classify.py --model ibot --weights random --probe linear knn    nothing downloaded: synthetic, untrained
    python classify.py --model ibot --dataset cub --data-path CUB_200_2011 --probe linear attentive knn
    torchrun --nproc-per-node 8 classify.py --model mae --dataset imagenet --data-path imagenet --resume

Where the transform is deterministic every image is encoded once, whatever the number of epochs, probes, learning rates
and seeds; ImageNet's training images get random crops and are encoded as they come. Published data sets have the
published recipes: sections 4.1, 4.2 and A.4 of the paper, numbers as in its authors' code. Data of one's own, and
samples (--num-images), have one that does not depend on their size (models/probe_training.py).
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from copy import copy
from functools import partial
from pathlib import Path

import torch

from datasets import classification as data
from datasets.files import shared_images
from datasets.patches import PatchDataset, RandomViews, random_crop_flip
from models import METHODS, load_encoder
from models.encoder import Encoder
from models.features import ENCODE_BATCH, Features, encode_features, encode_tokens
from models.probe_training import RECIPES, Probe, accuracy, batch_and_epochs, confusion_of_heads, shuffled
from models.probes import HEADS, NEIGHBOURS, build_heads, head_of, knn_predict
from utils import results, run
from utils.distributed import all_reduce, gather_rows, is_main, rank, world_size
from utils.drawing import draw_curves, require_matplotlib
from utils.storage import load, save
from utils.tables import paper_tables

CHECKPOINT_SECONDS = 60
CHOSEN_BY = {"test": "the test set, as in the paper", "held-out": "a held-out tenth of the training images"}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises UserError for values that cannot be."""
    parser = run.OneLineParser(__doc__)
    run.add_common_arguments(parser, METHODS, data.CLASSIFICATION_PARTS + data.CLASSIFICATION_IMAGES, batch_size=None)
    group = parser.add_argument_group("probing")
    group.add_argument("--probe", nargs="+", choices=(*HEADS, "knn"), default=["linear"],
                       help="one or several, on the same features (default: linear)")
    group.add_argument("--epochs", type=run.positive_int, help="(default: the recipe's; published: 90)")
    group.add_argument("--lr", type=run.positive_float, nargs="+", metavar="LR",
                       help="one or several, for the batch size as it is (default: the recipe's; published: parts 0.4 "
                            "linear, 0.04 attentive at 1024, images 6.4 and 0.4 at 16384 and 8192, in proportion)")
    group.add_argument("--seeds", type=run.positive_int, default=1, metavar="N",
                       help="heads for each learning rate, with initial weights from SEED, SEED + 1, ...")
    group.add_argument("--select", choices=("test", "held-out"),
                       help="what chooses epoch, learning rate and k: the test set, as in the paper (default for "
                            "published data sets), or a tenth of the training images, which are then not trained on "
                            "(default for your own and for samples)")
    group.add_argument("--augment", action=argparse.BooleanOptionalAction,
                       help="images: train on random crops, encoded anew in every epoch (default for imagenet), or on "
                            "the central crop, encoded once (default for your own and for samples)")
    group.add_argument("--num-images", type=run.positive_int, metavar="N",
                       help="a first try: that many training and test images, drawn by the seed")
    group.add_argument("--authors-defects", action="store_true",
                       help="attentive: test with the statistics of test batches, as the authors' code does; MAE: with "
                            "shuffled tokens")
    run.add_patch_arguments(parser, "one FILE for training and one for the test, or one, a fifth of whose images, "
                                    "drawn by --seed, is the test set")
    group = parser.add_argument_group("files")
    group.add_argument("--cache", choices=("auto", "gpu", "cpu", "disk"), default="auto",
                       help="where tokens live; auto: the first with room")
    group.add_argument("--resume", action="store_true",
                       help="continue from the checkpoint in --output-dir, if there is one; repeat no finished run")
    group.add_argument("--evaluate", type=Path, metavar="HEAD", help="no training: test a head that was saved")
    group.add_argument("--save-plots", action="store_true", help="accuracy over epochs, of the published recipes")
    group.add_argument("--plot-format", choices=("png", "pdf"), default="png", help="(default: png)")
    args = parser.parse_args(arguments)
    # The numbers of a recipe may stand beside --evaluate and --probe knn: one command line serves all three.
    if args.evaluate:
        parser.check_used(args, "--evaluate", "resume", "save_plots", "select")
    elif args.probe == ["knn"]:
        parser.check_used(args, "--probe knn", "save_plots")
    whole_images = args.dataset in data.CLASSIFICATION_IMAGES
    parser.check_used(args, f"--dataset {args.dataset}", "crop_scale" if whole_images else "augment")
    args.ours = args.dataset in ("folder", "keypoints") or args.num_images is not None
    if args.ours:
        mode = "--num-images" if args.num_images else f"--dataset {args.dataset}"
        parser.check_used(args, f"{mode}, whose recipe measures the last epoch alone", "save_plots")
    if args.save_plots:
        require_matplotlib()
    args.select = args.select or ("held-out" if args.ours else "test")
    if args.augment is None:
        args.augment = whole_images and not args.ours
    return args


def per_class(matrix: torch.Tensor) -> dict:
    """The percentages by class and, up to 200 classes, the confusion matrix (row = label), for a results line."""
    by_class = 100 * matrix.diagonal().double() / matrix.sum(1).clamp(min=1)
    return {"per_class_accuracy": by_class.tolist()} | ({"confusion": matrix.tolist()} if len(matrix) <= 200 else {})


def train_on_views(probes: Sequence[Probe], encoder: Encoder, views: RandomViews, order: torch.Tensor, epoch: int,
                   precision: str, workers: int) -> None:
    """One epoch over images that are encoded as they come, once for all probes, whose batches may differ in size.
    order: ids (one per image) in the order of this epoch. Each process encodes every world_size-th image of the order,
    so an equal share of every batch."""
    views.epoch, device = epoch, encoder.mean.device
    # All steps of all probes: where in the order its batch ends, the probe, where it begins, the share of the epoch
    # before it. The same on every process, so that all meet in the collectives.
    steps = []
    for number, probe in enumerate(probes):
        batches = probe.steps(order)
        for index, ids in enumerate(batches):
            begin = index * probe.batch_size
            steps.append((begin + len(ids), number, begin, index / len(batches)))
    steps.sort()
    mine = order[:steps[-1][0]][rank()::world_size()]
    labels = views.labels[mine].to(device)
    batches = views.batches(mine.tolist(), ENCODE_BATCH[device.type], workers, pin_memory=device.type == "cuda")
    progress = run.Progress(len(mine), f"epoch {epoch + 1}", "images")
    waiting, encoded = [[] for _ in probes], 0  # by probe: tokens that it has not been trained on; how many of mine
    for end, number, begin, share in steps:
        start, stop = (len(range(rank(), count, world_size())) for count in (begin, end))  # of mine
        while encoded < stop:
            images, _ = next(batches)
            cls, tokens = encode_tokens(encoder, images.to(device, non_blocking=True), precision)
            for probe, rows in zip(probes, waiting, strict=True):
                rows.append(tokens if probe.heads.all_tokens else cls[:, None])
            encoded += len(images)
            progress.update(len(images))
        # Where no image is this process's, it takes part in the step with none.
        batch = torch.cat(waiting[number] or [torch.zeros(0, 1, encoder.embed_dim, device=device)])
        waiting[number] = [batch[stop - start:].clone()] if waiting[number] else []
        probes[number].step(batch[:stop - start], None, labels[start:stop], epoch + share)
        del batch  # gigabytes, while the next images are encoded


def make_probes(args: argparse.Namespace, num_train: int, encoder: Encoder, num_classes: int,
                log: run.Log) -> list[Probe]:
    """A Probe of each kind that is trained, with a head for every learning rate and seed."""
    images = args.dataset in data.CLASSIFICATION_IMAGES
    recipes, probes = RECIPES["ours" if args.ours else "images" if images else "parts"], []
    for kind in (kind for kind in args.probe if kind != "knn"):
        recipe = recipes[kind]
        size, epochs = batch_and_epochs(recipe, num_train, args.batch_size)
        rates = args.lr or [rate if recipe.ours else rate * size / recipe.batch_size for rate in recipe.rates]
        log(f"{kind}, {'our recipe' if recipe.ours else 'the published recipe'}: batches of {size}, learning rates "
            f"{', '.join(f'{rate:g}' for rate in rates)}, {args.seeds} heads each, {args.epochs or epochs} epochs")
        heads = build_heads(kind, len(rates) * args.seeds, encoder.embed_dim, num_classes, encoder.num_heads,
                            recipe.batch_norm).to(encoder.mean.device)
        seeds = range(args.seed, args.seed + args.seeds)
        probes.append(Probe(heads, recipe, size, rates, seeds, args.epochs or epochs))
    return probes


def train_probes(args: argparse.Namespace, probes: Sequence[Probe], encoder: Encoder, train: PatchDataset,
                 train_ids: torch.Tensor, parts: tuple[Features | None, Features, Features],
                 checkpoint: tuple[Path, dict], log: run.Log) -> None:
    """Trains every probe and measures it: after each epoch, in our recipe after the last.

    train_ids: of the patches of train that are trained on. parts: their features (None: encoded in every epoch), those
    of what chooses, and of the test set. checkpoint: its path, and the settings that a resumed run must share; written
    after the first epoch that is a minute past the last one.
    """
    (path, settings), (training, choosing, testing), first = checkpoint, parts, 0
    views = RandomViews(train, random_crop_flip(args.image_size), args.seed) if args.augment else None
    if args.resume and (saved := results.resume_from(path, settings, ("epoch", "probes"), log)):
        for probe, state in zip(probes, saved["probes"], strict=True):
            probe.load_state(state)
        first = saved["epoch"]
        log(f"resumed after epoch {first}")
    for probe in probes:
        if probe.recipe.ours and probe.recipe.batch_norm and not views:
            probe.heads.norm.fix(training.cls[training.rows(train_ids)])
    epochs, last_save = probes[0].epochs, time.monotonic()
    progress = run.Progress(epochs - first, "training", "epochs")
    for epoch in range(first, epochs):
        order = shuffled(train_ids, args.seed, epoch)
        for probe in probes:
            probe.hits.zero_()
            if not views:
                probe.train(training, order, epoch)
        if views:
            train_on_views(probes, encoder, views, order, epoch, args.precision, args.workers)
        for probe in probes:
            if probe.recipe.ours and epoch + 1 < epochs:
                continue
            percent = [accuracy(confusion_of_heads(probe.heads, features, probe.names, args.authors_defects))
                       for features in ([testing] if choosing is testing else [testing, choosing])]
            probe.record(percent[-1], percent[0])
            if views or epoch % 10 == 9:
                figures = zip(probe.test[-1], probe.names, strict=True)
                log(f"epoch {epoch + 1}: {probe.kind} {', '.join(f'{value:.2f} ({name})' for value, name in figures)}")
        progress.update()
        if time.monotonic() - last_save >= CHECKPOINT_SECONDS or epoch + 1 == epochs:
            save(path, {"settings": settings, "epoch": epoch + 1, "probes": [probe.state() for probe in probes]})
            last_save = time.monotonic()


def run_knn(args: argparse.Namespace, features: Features, train_ids: torch.Tensor, held_ids: torch.Tensor,
            testing: Features, num_classes: int, log: run.Log) -> dict:
    """Nearest neighbours: percentages on the test set for every k; the best k is chosen on the held-out patches, or on
    the test set. features: of both, under the test set's transform."""
    fit, held = features.rows(train_ids), features.rows(held_ids)
    bank, labels = (gather_rows(values[fit]) for values in (features.cls, features.labels))

    def percent(cls, truth, total):
        predicted = knn_predict(bank, labels, cls, num_classes)
        hits = torch.stack([(predicted[k] == truth).sum() for k in NEIGHBOURS])
        return dict(zip(NEIGHBOURS, (100 * all_reduce(hits).double() / total).tolist(), strict=True))

    by_k = scores = percent(testing.cls, testing.labels, len(testing.ids))
    if len(held_ids):
        scores = percent(features.cls[held], features.labels[held], len(held_ids))
    best = max(NEIGHBOURS, key=scores.get)
    log("knn: " + ", ".join(f"{value:.2f}% (k = {k})" for k, value in by_k.items())
        + f"; best {by_k[best]:.2f}%, k chosen on {CHOSEN_BY[args.select]}")
    return {"probe": "knn", "recipe": "ours" if args.ours else "published", "feature": "cls", "acc1": by_k[20],
            "best_acc1": by_k[best], "best_epoch": 0, "best_k": best, "acc1_by_k": by_k}


def report(args: argparse.Namespace, probe: Probe, line: dict, testing: Features, encoder: Encoder, prefix: Path,
           frequent: float, neighbours: float, log: run.Log) -> dict:
    """Saves the chosen head as PREFIX_KIND_head.pth and returns the whole results line.

    Says and marks which head is no measurement of the encoder: one no better in training than always the most frequent
    class, which is right on that many percent; one whose weights are the random ones that it began with, changed by
    less than a tenth; and one under the nearest neighbours' percentage on the test set (0: not known) by ten points and
    two standard errors of the difference.
    """
    summary, index, edge = probe.summary()
    content = {"kind": probe.kind, "num_heads": encoder.num_heads, "signature": encoder.signature,
               "head": {key: tensor[index:index + 1] for key, tensor in probe.best.items()}}
    heads = head_of(content).to(encoder.mean.device)
    matrix = confusion_of_heads(heads, testing, [probe.names[index]], args.authors_defects)[0]
    line = line | {"probe": probe.kind, "feature": "all tokens" if heads.all_tokens else "cls", "epochs": probe.epochs,
                   "recipe": "ours" if probe.recipe.ours else "published", "batch_size": probe.batch_size,
                   **summary, **per_class(matrix)}
    path = Path(f"{prefix}_{probe.kind}_head.pth")
    info = ("classes", "model", "weights", "sha256", "dataset", "precision", "lr", "best_epoch", "num_train")
    save(path, content | {"head": heads.state_dict(), "accuracy": accuracy(matrix).item()}
         | {key: line[key] for key in info})
    spread = f" +- {summary['best_acc1_std']:.2f}" if "best_acc1_std" in summary else ""
    epochs = ", ".join(map(str, summary["best_epochs"]))
    log(f"{probe.kind}: best {summary['best_acc1']:.2f}%{spread} ({'epochs' if spread else 'epoch'} {epochs}, learning "
        f"rate {summary['lr']:g}; chosen on {CHOSEN_BY[args.select]}), last {summary['acc1']:.2f}%; head in {path}")
    if edge:
        log(f"{probe.kind}: the learning rate is the first or the last of its grid; --lr tries others")
    best = line["best_acc1"]
    error = math.sqrt((best * (100 - best) + neighbours * (100 - neighbours)) / line["num_test"])
    if line["train_acc1"] <= frequent or line["weights_moved"] < 0.1 or neighbours - best > max(10, 2 * error):
        line["undertrained"] = True
        log(f"{probe.kind}: this head is no measurement ({line['train_acc1']:.1f}% of the training patches right, the "
            f"most frequent class {frequent:.1f}%; weights moved by {line['weights_moved']:.2g} of the norm they had; "
            f"test {best:.1f}%, nearest neighbours {neighbours:.1f}%): more --epochs, another --lr or a smaller "
            "--batch-size")
    return line


def draw_plot(path: Path, probe: Probe, line: dict) -> None:
    """Test accuracy by epoch, of every learning rate."""
    title, curves = f"{results.run_title(line)}, {probe.kind}: test accuracy by epoch", {}
    for k, rate in enumerate(probe.rates):
        curves.setdefault(f"lr {rate:g}", []).append([epoch[k] for epoch in probe.test])
    chosen = [head for head in line["heads"] if head["lr"] == line["lr"]]
    draw_curves(path, title, curves, (f"lr {line['lr']:g}", [head["best_epoch"] for head in chosen],
                                      [head["best_acc1"] for head in chosen]))


def evaluate(args: argparse.Namespace, encoder: Encoder, encode: Callable[..., Features], test: PatchDataset,
             line: dict, log: run.Log) -> dict:
    """Tests a saved head and returns the whole results line. Raises UserError for a file that is none, and for a head
    of another encoder or other classes."""
    keys = ("kind", "num_heads", "head", "signature", "classes", "model", "dataset", "best_epoch", "num_train")
    content = load(args.evaluate, "a head that classify.py saved", keys, "--evaluate ")
    results.check_same(args.evaluate, {"the encoder": content["signature"], "the list of classes": content["classes"]},
                       {"the encoder": encoder.signature, "the list of classes": line["classes"]}, "--evaluate",
                       f"use those that it was trained on, {content['model']} and {content['dataset']}")
    heads = head_of(content).to(encoder.mean.device)
    testing = encode(test, "test set", heads.all_tokens)
    matrix = confusion_of_heads(heads, testing, [str(args.evaluate)], args.authors_defects)[0]
    percent = accuracy(matrix).item()
    log(f"{heads.kind} head {args.evaluate}: {percent:.2f}% of {len(testing.ids)} test patches")
    return line | {"probe": heads.kind, "acc1": percent, "best_acc1": percent, "best_epoch": content["best_epoch"],
                   "num_train": content["num_train"], **per_class(matrix)}


def open_data(args: argparse.Namespace,
              log: run.Log) -> tuple[PatchDataset, PatchDataset, torch.Tensor, torch.Tensor, dict]:
    """(training set, test set, ids of the training patches that are trained on, and of those held out, what a results
    line says of them). Raises UserError."""
    train, test = data.open_classification(args.dataset, args.data_path, args.crop_scale, args.image_size,
                                           args.keypoints, (args.annotations, args.images, args.category), args.seed,
                                           args.num_images)
    train_ids, held_ids = torch.arange(train.num_patches), torch.empty(0, dtype=torch.int64)
    if args.select == "held-out":
        held_out = data.hold_out(train, args.seed)
        train_ids, held_ids = train_ids[~held_out], train_ids[held_out]
    about = {"select": args.select, "classes": train.classes, "num_train": len(train_ids),
             "num_held_out": len(held_ids), "num_test": test.num_patches,
             "chance": 100 * test.labels.bincount().max().item() / test.num_patches,
             "num_outside": train.num_outside + test.num_outside,
             "num_test_in_training": shared_images(train, test, args.dataset in ("folder", "keypoints"))}
    for note in dict.fromkeys([*train.notes, *test.notes]):
        log(note)
    if about["num_test_in_training"]:
        log(f"{about['num_test_in_training']} of {len(test)} test images are training images too")
    log(f"{about['num_train']} training, {about['num_held_out']} held-out and {test.num_patches} test patches of "
        f"{len(train.classes)} classes; always the most frequent class: {about['chance']:.2f}%")
    return train, test, train_ids, held_ids, about


def main() -> None:
    """Encodes once, trains all probes on the features, and writes a head and a results line for each."""
    args, started = parse_arguments(), time.monotonic()
    if args.table:
        print(paper_tables(["classify"], args.output_dir, args.format))
        return
    device, log = run.setup(args)

    # Data and encoder
    train, test, train_ids, held_ids, about = open_data(args, log)
    options = {"shuffle_patches": True} if args.authors_defects and args.model == "mae" else {}
    encoder = load_encoder(args, device, log, projector=False, **options)
    line = results.start_line("classify", args, encoder) | about
    settings = results.settings_of(args) | train.identity("training set") | test.identity("test set")
    line["made_with"] = results.digest(settings)
    encode = partial(encode_features, encoder, precision=args.precision, workers=args.workers, tier=args.cache,
                     folder=args.output_dir, log=log)
    if args.evaluate:
        line = evaluate(args, encoder, encode, test, line, log)
        results.append_result(args.output_dir, line | {"seconds": time.monotonic() - started})
        return
    if args.resume and all(results.is_finished(args.output_dir, kind, line) for kind in args.probe):
        log(f"{results.run_title(line)}: finished already, its lines are in {args.output_dir / 'results.jsonl'}")
        return

    # Features
    probes = make_probes(args, about["num_train"], encoder, len(train.classes), log)
    with_tokens = any(probe.heads.all_tokens for probe in probes)
    testing = choosing = encode(test, "test set", with_tokens)
    # Random crops are encoded in every epoch.
    training = None if args.augment or not probes else encode(train, "training set", with_tokens)
    if probes and len(held_ids) and training:
        choosing = training._replace(ids=held_ids)
    elif probes and len(held_ids):
        held_images = train.image_index[held_ids].unique().tolist()
        choosing = encode(train.subset(held_images), "held-out images", with_tokens)
    line["seconds_features"] = time.monotonic() - started

    # Training, and what came of it
    prefix = args.output_dir / f"{results.run_slug(args.name)}_{args.dataset}"
    checkpoint, neighbours = Path(f"{prefix}_checkpoint.pth"), []
    if probes:
        train_probes(args, probes, encoder, train, train_ids, (training, choosing, testing),
                     (checkpoint, settings | {"the encoder": encoder.signature}), log)
        line["seconds_training"] = time.monotonic() - started - line["seconds_features"]
    if "knn" in args.probe:
        if training is None or args.dataset in data.CLASSIFICATION_PARTS:
            like_test = copy(train)
            like_test.transform = test.transform
            training = encode(like_test, "training set under the test transform", False)
        neighbours = [line | run_knn(args, training, train_ids, held_ids, testing, len(train.classes), log)]
    frequent = 100 * train.labels[train_ids].bincount().max().item() / len(train_ids)
    best = neighbours[0]["best_acc1"] if neighbours else 0
    lines = [report(args, probe, line, testing, encoder, prefix, frequent, best, log) for probe in probes] + neighbours
    results.append_result(args.output_dir, *(one | {"seconds": time.monotonic() - started} for one in lines))
    if is_main():
        checkpoint.unlink(missing_ok=True)
        for probe, one in zip(probes if args.save_plots else (), lines, strict=False):
            draw_plot(Path(f"{prefix}_{probe.kind}_accuracy.{args.plot_format}"), probe, one)


if __name__ == "__main__":
    run.run_main(main)
