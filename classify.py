"""Linear, attentive and nearest-neighbour probes of a frozen encoder: parts (CUB, COCO), ImageNet, class folders.

    python classify.py --model ibot --weights random --probe linear knn    nothing downloaded: synthetic, untrained
    python classify.py --model ibot --dataset cub --data-path CUB_200_2011 --probe linear attentive knn
    torchrun --nproc-per-node 8 classify.py --model mae --dataset imagenet --data-path imagenet --resume

Where the transform is deterministic every image is encoded once, whatever the number of epochs, probes, learning rates
and seeds; ImageNet's training images get random crops and are encoded as they come. Protocol: sections 4.1, 4.2 and A.4
of the paper, numbers as in its authors' code.
"""

import argparse
import resource
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn

from datasets.classification import (
    CLASSIFICATION_IMAGES,
    CLASSIFICATION_PARTS,
    hold_out,
    images_with,
    open_classification,
)
from datasets.patches import PatchDataset, RandomViews, random_crop_flip
from models import METHODS, load_encoder
from models.encoder import Encoder
from models.features import (
    Batch,
    Features,
    decoded_ids,
    encode_batch_size,
    encode_features,
    encode_tokens,
    encoder_identity,
)
from models.probe_training import RECIPES, Probe, Recipe
from models.probes import HEADS, NEIGHBOURS, build_heads, head_of, knn_predict
from utils import UserError
from utils.distributed import all_reduce, any_process, gather_rows, is_main, rank, world_size
from utils.drawing import draw_confusion, draw_curves, require_matplotlib
from utils.ending import Checkpoint, ending, exit_with_one_line_errors, save_or_warn
from utils.provenance import check_same, digest
from utils.results import append_result, is_finished, run_slug, run_title, settings_of, start_line
from utils.run import (
    OneLineParser,
    Progress,
    add_common_arguments,
    add_patch_arguments,
    log_waiting,
    non_negative_float,
    positive_float,
    positive_int,
    setup,
)
from utils.storage import load_checked, require_room
from utils.tables import paper_tables

CHOSEN_BY = {"test": "the test set, as in the paper", "held-out": "a held-out tenth of the training images"}


@torch.no_grad()
def confusion_of_heads(heads: nn.Module, features: Features, ids: torch.Tensor, num_classes: int,
                     authors_defects: bool = False, names: Sequence[str] | None = None) -> torch.Tensor:
    """int64 [K, classes, classes] of the patches with these ids, over all processes: row = label, column = prediction.

    authors_defects: batch norm by the statistics of test batches of 256, which also move the running ones.
    names: of the K heads, in messages. Raises UserError, on all processes, for logits that are not finite.
    """
    heads.train(authors_defects)
    matrix, finite = None, True
    batches = features.batches(ids.split(256 if authors_defects else 1024), heads.all_tokens)
    for tokens, rows, labels in batches:
        logits = heads.classify(tokens, rows)
        predicted, finite = logits.argmax(-1), logits.isfinite().flatten(1).all(1) & finite
        if matrix is None:
            matrix = labels.new_zeros(len(predicted), num_classes * num_classes)
        matrix.scatter_add_(1, labels * num_classes + predicted, torch.ones_like(predicted))
    heads.train()
    if wrong := all_reduce((~finite).int()).nonzero().flatten().tolist():
        listing = ", ".join(names[head] if names else f"number {head}" for head in wrong)
        raise UserError(f"{heads.kind} head ({listing}): its logits are not finite; lower --lr, or name another head")
    return all_reduce(matrix.view(-1, num_classes, num_classes)).cpu()


def accuracy(matrix: torch.Tensor) -> torch.Tensor:
    """Percent correct from confusion matrices [..., C, C]."""
    return 100 * matrix.diagonal(dim1=-2, dim2=-1).sum(-1).double() / matrix.sum((-2, -1)).clamp(min=1)


def most_frequent(labels: torch.Tensor) -> float:
    """Percent correct by always the most frequent of the labels [n]."""
    return 100 * labels.bincount().max().item() / len(labels)


def shuffled(ids: torch.Tensor, seed: int, epoch: int) -> torch.Tensor:
    """The ids in the order of an epoch, the same whatever the number of processes."""
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed * 100_003 + epoch))]


def train_on_features(probe: Probe, features: Features, order: torch.Tensor, epoch: int) -> None:
    steps = probe.steps(order)
    for index, batch in enumerate(features.batches(steps, probe.heads.all_tokens)):
        probe.step(batch, epoch + index / len(steps))


def train_on_views(probes: Sequence[Probe], encoder: Encoder, views: RandomViews, order: torch.Tensor, epoch: int,
                   precision: str, workers: int, log: Callable[[str], None] = print) -> int:
    """One epoch over images that are encoded as they come. order: ids (one per image) in the order of this epoch.
    Returns how many of them, over all processes, could not be decoded. Raises UserError where none could.

    Each process encodes every world_size-th image of the order, so an equal share of every probe's batches, whose sizes
    may differ. A batch is trained on as soon as all that lies before its end has been encoded.
    """
    views.epoch, device = epoch, next(encoder.parameters()).device
    position = torch.empty(views.num_patches, dtype=torch.int64)
    position[order] = torch.arange(len(order))
    # The same on every process: (end of a batch, number of the probe, share of the epoch before it).
    ends = []
    for number, probe in enumerate(probes):
        count = len(probe.steps(order))
        ends += [(min((index + 1) * probe.batch_size, len(order)), number, index / count) for index in range(count)]
    ends.sort()
    waiting = [[] for _ in probes]
    nothing = (torch.zeros(0, 1, encoder.embed_dim, device=device), views.labels[:0].to(device))

    def train_up_to(reached):
        while ends and ends[0][0] <= reached:
            _, number, share = ends.pop(0)
            tokens, ids = zip(*(waiting[number] or [nothing]), strict=True)
            probes[number].step(Batch(torch.cat(tokens), None, torch.cat(ids)), epoch + share)
            waiting[number].clear()

    progress, decoded = Progress(len(order) // world_size(), f"epoch {epoch + 1}", "images"), torch.tensor([0])
    batches = views.batches(order[rank()::world_size()].tolist(), encode_batch_size(device), workers,
                            pin_memory=device.type == "cuda")
    for images, ids in log_waiting(batches, f"epoch {epoch + 1}", log):
        encoded, positions = encode_tokens(encoder, images.to(device, non_blocking=True), precision), position[ids]
        start = 0
        while start < len(ids):
            train_up_to(int(positions[start]))
            if not ends:
                break
            stop = start + int((positions[start:] < ends[0][0]).sum())
            for probe, rows in zip(probes, waiting, strict=True):
                tokens = encoded.tokens if probe.heads.all_tokens else encoded.cls[:, None]
                # A copy that blocks would wait for the encoder.
                labels = views.labels[ids[start:stop]].to(device, non_blocking=True)
                rows.append((tokens[start:stop], labels))
            start = stop
        decoded += len(ids)
        progress.update(len(ids))
    train_up_to(len(order))
    if not all_reduce(decoded):
        raise UserError("no training image could be decoded; restore the files")
    return len(order) - int(decoded)


class Subset(NamedTuple):
    """The patches of a training, held-out or test set whose images could be decoded."""
    features: Features
    ids: torch.Tensor


def run_knn(training: Subset, holding: Subset, testing: Subset, line: dict, log: Callable[[str], None]) -> dict:
    """The results line of nearest neighbours: percentages on the test set for every k; the best k is chosen on the
    held-out patches, or on the test set where there are none."""
    rows = training.features.rows(training.ids).to(training.features.cls.device)
    bank, labels = (gather_rows(values[rows]) for values in (training.features.cls, training.features.labels))

    def percent(features, ids):
        rows = features.rows(ids).to(features.cls.device)
        predicted = knn_predict(bank, labels, features.cls[rows], len(line["classes"]))
        hits = torch.stack([(predicted[k] == features.labels[rows]).sum() for k in NEIGHBOURS])
        return dict(zip(NEIGHBOURS, (100 * all_reduce(hits).double() / len(ids)).tolist(), strict=True))

    by_k = percent(*testing)
    scores = percent(*holding) if len(holding.ids) else by_k
    best = max(NEIGHBOURS, key=scores.get)
    log("knn: " + ", ".join(f"{value:.2f}% (k = {k})" for k, value in by_k.items())
        + f"; best {by_k[best]:.2f}%, k chosen on {CHOSEN_BY[line['select']]}")
    return line | {"probe": "knn", "feature": "cls", "acc1": by_k[20], "best_acc1": by_k[best], "best_epoch": 0,
                   "best_k": best, "acc1_by_k": by_k}


def per_class(matrix: torch.Tensor) -> dict:
    """The percentages by class and, up to 200 classes, the confusion matrix (row = label), for a results line."""
    by_class = 100 * matrix.diagonal().double() / matrix.sum(1).clamp(min=1)
    return {"per_class_accuracy": by_class.tolist()} | ({"confusion": matrix.tolist()} if len(matrix) <= 200 else {})


def memory_peak(device: torch.device) -> str:
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    gpu = f", {torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB on the GPU" if device.type == "cuda" else ""
    return f"memory peak {host:.2f} GB in this process{gpu}"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises UserError for values that cannot be."""
    parser = OneLineParser(__doc__)
    add_common_arguments(parser, METHODS, CLASSIFICATION_PARTS + CLASSIFICATION_IMAGES, batch_size=None)
    group = parser.add_argument_group("probing")
    group.add_argument("--probe", nargs="+", choices=(*HEADS, "knn"), default=["linear"],
                       help="one or several, on the same features (default: linear)")
    group.add_argument("--epochs", type=positive_int, default=90, help="(default: %(default)s)")
    group.add_argument("--lr", type=positive_float, nargs="+", metavar="LR",
                       help="one or several, for the batch size as it is (default: parts 0.4 linear, 0.04 attentive at "
                            "1024; images 6.4 linear at 16384, 0.4 attentive at 8192; in proportion at others)")
    group.add_argument("--seeds", type=positive_int, default=1, metavar="N",
                       help="heads for each learning rate, with initial weights from SEED, SEED + 1, ...")
    group.add_argument("--select", choices=("test", "held-out"), default="test",
                       help="what chooses epoch, learning rate and k: the test set, as in the paper (default), or a "
                            "tenth of the training images, which are then not trained on")
    group.add_argument("--no-augment", action="store_true",
                       help="images: train on the central crop, each image encoded once, in place of random crops")
    group.add_argument("--authors-defects", action="store_true",
                       help="attentive: test with the statistics of test batches, as the authors' code does; MAE: with "
                            "shuffled tokens")
    add_patch_arguments(parser, "one FILE for training and one for the test, or one, a fifth of whose images, drawn by "
                                "--seed, is the test set")
    group = parser.add_argument_group("cache and files")
    group.add_argument("--cache", choices=("auto", "gpu", "cpu", "disk"), default="auto",
                       help="where tokens live; auto: the first with room")
    group.add_argument("--cache-dir", type=Path, metavar="DIR", help="keep the features there for later runs")
    group.add_argument("--resume", action="store_true",
                       help="continue from the checkpoint in --output-dir, if there is one; repeat no finished run")
    group.add_argument("--checkpoint-seconds", type=non_negative_float, default=60, metavar="S",
                       help="write a checkpoint after an epoch if the last is older (default: 60)")
    group.add_argument("--evaluate", type=Path, metavar="HEAD", help="no training: test a head that was saved")
    group.add_argument("--save-plots", action="store_true", help="accuracy over epochs, confusion matrix, as PNG")
    args = parser.parse_args(arguments)
    # The numbers of a recipe may stand beside --evaluate and --probe knn: one command line serves all three.
    if args.evaluate:
        parser.check_used(args, "--evaluate", "resume", "save_plots", "select")
    elif args.probe == ["knn"]:
        parser.check_used(args, "--probe knn", "save_plots")
    if args.dataset in CLASSIFICATION_IMAGES:
        parser.check_used(args, f"--dataset {args.dataset}", "crop_scale")
    if args.no_augment and args.dataset in CLASSIFICATION_PARTS:
        raise UserError(f"--no-augment is for whole images; {args.dataset} is never augmented")
    if args.save_plots:
        require_matplotlib()
    return args


def open_head(path: Path, encoder: Encoder, classes: Sequence[str]) -> nn.Module:
    """A saved head. Raises UserError for a file that is none, and for a head of another encoder or other classes."""
    keys = ("kind", "num_heads", "head", "encoder", "classes", "model", "dataset", "best_epoch", "num_train")
    content = load_checked(path, "a head that classify.py saved", keys, option="--evaluate ")
    check_same(path, content["encoder"] | {"the list of classes": content["classes"]},
               encoder_identity(encoder) | {"the list of classes": list(classes)}, "--evaluate",
               f"use the encoder and the data set it was trained on, {content['model']} and {content['dataset']}")
    return head_of(content)


def encode_subsets(encode: Callable, train: PatchDataset, test: PatchDataset, held_out: torch.Tensor,
                   kinds: Sequence[str], augmented: bool) -> tuple[Subset, Subset, Subset, Subset]:
    """Encodes what the probes need, each image once: (training, held-out, choosing, test) subsets.

    encode: maps (data set, label, with all tokens) to Features. held_out: bool [patches of train]. The choosing subset
    selects epoch and learning rate: the held-out patches where there are any, else the test set. augmented: training
    images are encoded later, crop by crop; only kNN needs features of them, then of their central crops.
    """
    tokens, trained = any(HEADS[kind].all_tokens for kind in kinds if kind in HEADS), None
    tested = encode(test, "test", tokens)
    testing = Subset(tested, decoded_ids(test, tested))
    ids = torch.arange(train.num_patches)
    if not augmented or "knn" in kinds:
        trained = encode(train, "training set", tokens and not augmented)
        ids = decoded_ids(train, trained)
    training, holding = (Subset(trained, ids[side[ids]]) for side in (~held_out, held_out))
    choosing = holding if held_out.any() else testing
    if augmented and held_out.any() and set(kinds) != {"knn"}:
        images = images_with(train, held_out)
        chosen = encode(images, "held-out", tokens)
        choosing = Subset(chosen, decoded_ids(images, chosen))
        holding = holding if trained else choosing
    if not (len(training.ids) and len(choosing.ids)):
        raise UserError("no image to train on, or none to choose with, could be decoded; restore the files")
    return training, holding, choosing, testing


def make_probes(kinds: Sequence[str], recipes: dict[str, Recipe], batch_size: int | None, rates: Sequence[float] | None,
                seeds: Sequence[int], epochs: int, num_train: int, encoder: Encoder, num_classes: int,
                log: Callable[[str], None]) -> list[Probe]:
    """A Probe of each kind, with a head for every learning rate and seed. batch_size and rates: None = the recipe's,
    the batch no larger than the training set and the rate in proportion. Raises UserError for a larger batch_size, and
    for heads that do not fit in memory."""
    if batch_size and batch_size > num_train:
        raise UserError(f"--batch-size {batch_size} is larger than the training set ({num_train} patches); "
                        "use at most that, or leave it out")
    probes = []
    for kind in kinds:
        recipe = recipes[kind]
        size = batch_size or min(recipe.batch_size, num_train)
        chosen = rates or [recipe.lr * size / recipe.batch_size]
        log(f"{kind}: batches of {size} (published: {recipe.batch_size}), learning rates "
            f"{', '.join(f'{rate:g}' for rate in chosen)}, {len(seeds)} heads each, {epochs} epochs")
        # Weights, gradients, momentum, the best and a checkpoint's copy; and of a batch what its gradients are made of.
        width, rows, count = encoder.embed_dim, -(-size // world_size()), len(chosen) * len(seeds)
        weights, activations = num_classes * width, num_classes
        if kind == "attentive":
            weights, activations = weights + 4 * width ** 2, activations + 3 * encoder.num_heads * width
        require_room(4 * count * (5 * weights + 2 * rows * activations), encoder.mean.device,
                     f"{count} {kind} heads at batches of {size}",
                     lambda share, count=count: f"{int(share * count)} or fewer, by --seeds and --lr")
        probes.append(Probe(kind, recipe, size, chosen, seeds, epochs, width, num_classes, encoder.num_heads,
                            encoder.mean.device))
    return probes


def train_probes(probes: Sequence[Probe], encoder: Encoder, training: Subset, choosing: Subset, testing: Subset,
                 views: RandomViews | None, epochs: int, seed: int, precision: str, workers: int,
                 authors_defects: bool, checkpoint: Checkpoint, saved: dict, save_seconds: float,
                 log: Callable[[str], None]) -> int:
    """Trains every probe, tests it after each epoch, and saves the checkpoint every save_seconds, at the end and when a
    signal stops the run. saved: what the checkpoint holds, from which the run goes on; {} at its beginning.

    views: random crops of the training images, encoded as they come; None: the training subset's features are used.
    Returns how many of the views' images could not be decoded.
    """
    if saved:
        for probe, state in zip(probes, saved["probes"], strict=True):
            probe.load_state(state)
    first, left_out = saved.get("epoch", 0), saved.get("left_out", 0)
    progress, num_classes = Progress(epochs - first, "training", "epochs"), probes[0].heads.bias.shape[1]
    last_save = time.monotonic()
    for epoch in range(first, epochs):
        order = shuffled(training.ids, seed, epoch)
        if views:
            say = log if epoch == first else (lambda line: None)
            left_out = train_on_views(probes, encoder, views, order, epoch, precision, workers, say)
            if left_out and epoch == first:
                log(f"training set: {left_out} images are left out, they could not be decoded")
        else:
            for probe in probes:
                train_on_features(probe, training.features, order, epoch)
        for probe in probes:
            percent = accuracy(confusion_of_heads(probe.heads, *testing, num_classes, authors_defects, probe.names))
            score = percent if choosing is testing else accuracy(
                confusion_of_heads(probe.heads, *choosing, num_classes, authors_defects, probe.names))
            probe.record(score, percent)
        progress.update()
        if views or epoch % 10 == 9:
            shown = []
            for probe in probes:
                figures = [f"{value:.2f} ({name})" for value, name in zip(probe.test[-1], probe.names, strict=True)]
                shown.append(f"{probe.kind} {', '.join(figures)}")
            log(f"epoch {epoch + 1}: {'; '.join(shown)}")
        # A copy, which the next epoch leaves alone.
        content = {"probes": deepcopy([probe.state() for probe in probes]), "left_out": left_out}
        ending.save = partial(checkpoint.save, epoch + 1, content)
        if time.monotonic() - last_save >= save_seconds or epoch + 1 == epochs:
            ending.save()
            last_save = time.monotonic()
    ending.save = None
    return left_out


def report(probe: Probe, line: dict, testing: Subset, encoder: Encoder, authors_defects: bool, save_plots: bool,
           prefix: Path, log: Callable[[str], None]) -> dict:
    """Saves the chosen head as PREFIX_KIND_head.pth, with plots where asked for, and returns the whole results line."""
    summary, classes = probe.summary(), line["classes"]
    index = summary.pop("index")
    heads = build_heads(probe.kind, 1, encoder.embed_dim, len(classes), encoder.num_heads, probe.recipe.batch_norm)
    heads.load_state_dict({key: tensor[index:index + 1] for key, tensor in probe.best.items()})
    matrix = confusion_of_heads(heads.to(encoder.mean.device), *testing, len(classes), authors_defects,
                                [probe.names[index]])[0]
    line = line | {"probe": probe.kind, "feature": "all tokens" if heads.all_tokens else "cls",
                   "epochs": probe.epochs, "batch_size": probe.batch_size, **summary, **per_class(matrix)}
    path = Path(f"{prefix}_{probe.kind}_head.pth")
    info = ("classes", "model", "weights", "sha256", "dataset", "precision", "lr", "best_epoch", "num_train")
    save_or_warn(path, {"kind": probe.kind, "num_heads": encoder.num_heads, "head": heads.state_dict(),
                        "encoder": encoder_identity(encoder), "accuracy": accuracy(matrix).item(),
                        **{key: line[key] for key in info}})
    spread = f" +- {summary['best_acc1_std']:.2f}" if "best_acc1_std" in summary else ""
    log(f"{probe.kind}: best {summary['best_acc1']:.2f}%{spread} (epoch {summary['best_epoch']}, learning rate "
        f"{summary['lr']:g}; chosen on {CHOSEN_BY[line['select']]}), last {summary['acc1']:.2f}%; head in {path}")
    if save_plots and is_main():
        title = f"{run_title(line)}, {probe.kind}"
        curves = {}
        for k, rate in enumerate(probe.rates):
            curves.setdefault(f"lr {rate:g}", []).append([epoch[k] for epoch in probe.test])
        over = ", mean and range over seeds" if len(probe.seeds) > len(curves) else ""
        draw_curves(Path(f"{prefix}_{probe.kind}_accuracy.png"), f"{title}: test accuracy by epoch{over}", curves,
                    (f"lr {summary['lr']:g}", summary["best_epoch"]))
        draw_confusion(Path(f"{prefix}_{probe.kind}_confusion.png"), title, matrix, classes)
    return line


def evaluate(path: Path, encode: Callable, encoder: Encoder, test: PatchDataset, line: dict, authors_defects: bool,
             log: Callable[[str], None]) -> dict:
    """Tests a saved head and returns the whole results line."""
    heads = open_head(path, encoder, line["classes"]).to(encoder.mean.device)
    trained = {key: heads.info[key] for key in ("best_epoch", "num_train")}
    tested = encode(test, "test", heads.all_tokens)
    ids = decoded_ids(test, tested)
    matrix = confusion_of_heads(heads, tested, ids, len(line["classes"]), authors_defects, [str(path)])[0]
    percent = accuracy(matrix).item()
    log(f"{heads.kind} head {path}: {percent:.2f}% of {len(ids)} test patches")
    return line | {"probe": heads.kind, "acc1": percent, "best_acc1": percent, **trained, "num_test": len(ids),
                   "chance": most_frequent(test.labels[ids]), **per_class(matrix)}


def open_inputs(args: argparse.Namespace, device: torch.device, log: Callable[[str], None]) -> tuple:
    """(training set, test set, which training patches are held out, bool [patches], encoder). Raises UserError."""
    train, test = open_classification(args.dataset, args.data_path, args.crop_scale, args.skip_bad_images,
                                      args.image_size, args.keypoints, (args.annotations, args.images, args.category),
                                      args.seed)
    held_out = hold_out(train, args.seed) if args.select == "held-out" else torch.zeros(train.num_patches).bool()
    options = {"shuffle_patches": True} if args.authors_defects and args.model == "mae" else {}
    return train, test, held_out, load_encoder(args, device, log, projector=False, **options)


def main() -> None:
    """Encodes once, trains all probes on the features, and writes a head and a results line for each."""
    args, started = parse_arguments(), time.monotonic()
    if args.table:
        print(paper_tables(["classify"], args.output_dir, args.format))
        return
    device, log = setup(args)

    # Data and encoder
    train, test, held_out, encoder = open_inputs(args, device, log)
    encode = partial(encode_features, encoder, precision=args.precision, workers=args.workers, tier=args.cache,
                     folder=args.cache_dir or args.output_dir, keep=args.cache_dir, log=log, image_size=args.image_size)
    line = start_line("classify", args, encoder) | {"select": args.select, "classes": train.classes}
    log(f"{run_title(line)}: {train.num_patches} training and {test.num_patches} test patches of "
        f"{len(train.classes)} classes")

    # A saved head is only tested
    if args.evaluate:
        line = evaluate(args.evaluate, encode, encoder, test, line, args.authors_defects, log)
        log.open(args.output_dir)
        append_result(args.output_dir, line | {"seconds": time.monotonic() - started})
        return

    # Probes, new or as the checkpoint of a stopped run left them
    num_train, whole_images = int((~held_out).sum()), args.dataset in CLASSIFICATION_IMAGES
    recipes = RECIPES["images" if whole_images else "parts"]
    probes = make_probes([kind for kind in args.probe if kind != "knn"], recipes, args.batch_size, args.lr,
                         range(args.seed, args.seed + args.seeds), args.epochs, num_train, encoder, len(train.classes),
                         log)
    settings = settings_of(args) | encoder_identity(encoder)
    settings |= train.identity("training set") | test.identity("test set")
    line["made_with"] = digest(settings)
    prefix = args.output_dir / f"{run_slug(args.name)}_{args.dataset}"
    if args.resume and any_process(all(is_finished(args.output_dir, kind, line) for kind in args.probe)):
        log(f"{run_title(line)}: finished already, its lines are in {args.output_dir / 'results.jsonl'}")
        return
    checkpoint = Checkpoint(Path(f"{prefix}_checkpoint.pth"), "a checkpoint of classify.py", "epoch", settings)
    saved = checkpoint.load(args.resume, ["probes", "left_out"], log)

    # Features
    augmented = whole_images and not args.no_augment
    training, holding, choosing, testing = encode_subsets(encode, train, test, held_out, args.probe, augmented)
    log.open(args.output_dir)
    line |= {"num_train": len(training.ids), "num_held_out": len(holding.ids), "num_test": len(testing.ids),
             "chance": most_frequent(test.labels[testing.ids]), "seconds_features": time.monotonic() - started}
    log(f"features are ready after {line['seconds_features']:.1f} s")

    # Training
    if probes:
        views = RandomViews(train, random_crop_flip(args.image_size), args.seed) if augmented else None
        line["num_train"] -= train_probes(probes, encoder, training, choosing, testing, views, args.epochs, args.seed,
                                          args.precision, args.workers, args.authors_defects, checkpoint, saved,
                                          args.checkpoint_seconds, log)
    line["seconds_training"] = time.monotonic() - started - line["seconds_features"]
    log(f"trained in {line['seconds_training']:.1f} s; {memory_peak(device)}")

    # Report
    log(f"chance, always the most frequent class: {line['chance']:.2f}%")
    lines = [report(probe, line, testing, encoder, args.authors_defects, args.save_plots, prefix, log)
             for probe in probes]
    if "knn" in args.probe:
        lines.append(run_knn(training, holding, testing, line, log))
    ending.unsaved.pop(checkpoint.path, None)  # no longer needed
    append_result(args.output_dir, *(one | {"seconds": time.monotonic() - started} for one in lines))
    checkpoint.close(delete=True)


if __name__ == "__main__":
    exit_with_one_line_errors(main)
