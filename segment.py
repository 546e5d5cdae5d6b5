"""Linear semantic segmentation: one 1 x 1 convolution on the frozen blocks of an encoder.

    python segment.py --model ibot --weights random --iterations 300      nothing downloaded: synthetic parts, control
    python segment.py --model ibot --dataset ade20k-part --data-path data
    torchrun --nproc-per-node 8 segment.py --model dino --dataset lip --data-path data --resume
    python segment.py --model ibot --dataset lip --data-path data --evaluate outputs/ibot_lip_segment.pt
    python segment.py --table --figure6 figure6.png                       tables 2, 4, 5, 6 and figure 6

Protocol: paper, sections 4.1 and 4.2, appendix A.4; numbers as in its authors' configurations. Every sample is a
pure function of seed, iteration and position in the batch, so neither the number of processes nor a kill changes what
is trained on. --probe knn fills a memory with patches instead of training a head (models/knn_segmentation.py).
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from datasets.segmentation import (
    PARTIMAGENET_NOTE,
    PROTOCOLS,
    FolderSplit,
    Protocol,
    SyntheticSplit,
    in_order,
    open_segmentation,
)
from datasets.segmentation_store import PixelStore, training_batches
from datasets.segmentation_transforms import rescale_size, resize_image
from models import METHODS, Encoder, choose_layers, load_encoder
from models.features import encoder_identity, require_batch_room
from models.knn_segmentation import NEIGHBOURS, KNNSegmenter, fill_memory, plan_memory
from models.segmentation_probe import Segmenter, linear_probe, load_segmenter, summary
from utils import UserError
from utils.distributed import all_reduce, any_process, shard, world_size
from utils.drawing import draw_figure6, save_picture
from utils.ending import exit_with_one_line_errors
from utils.formats import text_table
from utils.provenance import digest
from utils.results import append_result, is_finished, run_slug, run_title, settings_of, start_line
from utils.run import (
    OneLineParser,
    Progress,
    add_common_arguments,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
    setup,
)
from utils.storage import prefetched
from utils.tables import figure6_panels, paper_tables

# Logits of one pass over sliding windows, in bytes.
WINDOW_BYTES = {"cuda": 8 << 30, "cpu": 512 << 20}
# A linear head may be resumed with others of these.
KNN_ARGUMENTS = ("probe", "memory_size", "neighbours", "passes")


def parse_arguments() -> argparse.Namespace:
    """The command line, with the data set's scales. Raises UserError for values that cannot be."""
    parser = OneLineParser(__doc__, prog="segment.py")
    add_common_arguments(parser, METHODS, tuple(PROTOCOLS), batch_size=16)
    group = parser.add_argument_group("probes")
    group.add_argument("--probe", nargs="+", choices=("linear", "knn"), default=["linear"],
                       help="a trained linear head, nearest neighbours among patches of the training images, or both")
    group.add_argument("--memory-size", type=positive_int, default=1_024_000, metavar="N",
                       help="knn: patches kept (default: %(default)s)")
    group.add_argument("--neighbours", type=positive_int, default=NEIGHBOURS, help="knn: (default: %(default)s)")
    group.add_argument("--passes", type=positive_int, default=2,
                       help="knn: over the training images, in other crops (default: %(default)s)")
    group = parser.add_argument_group("training of the linear head")
    group.add_argument("--layers", nargs="+", metavar="BLOCK",
                       help="blocks whose tokens are concatenated, counted from 0, or last, or last4 (default: the "
                            "paper's, 3 5 7 11 of 12, and the same shares of another depth)")
    group.add_argument("--norm", action="store_true", help="apply the encoder's final norm to these tokens")
    group.add_argument("--batch-norm", action="store_true", help="batch normalisation of the tokens before the head")
    group.add_argument("--iterations", type=positive_int, default=160_000, help="(default: %(default)s)")
    group.add_argument("--lr", type=positive_float, nargs="+", default=[4e-4],
                       help="one or several: a head for each pair with --weight-decay (default: 4e-4)")
    group.add_argument("--weight-decay", type=non_negative_float, nargs="+", default=[0.05], help="(default: 0.05)")
    group.add_argument("--select", choices=("test", "held-out"), default="test",
                       help="what chooses among several heads: the test images (default), or a tenth of the training "
                            "images, which are then not trained on")
    group.add_argument("--warmup-iterations", type=non_negative_int,
                       help="(default: 1500, but at most a tenth of the iterations)")
    group.add_argument("--cache", choices=("auto", "gpu", "cpu", "disk"), default="auto",
                       help="where decoded images live; auto: the first with room")
    group.add_argument("--checkpoint-every", type=positive_int, default=1000, metavar="N", help="(default: 1000)")
    group.add_argument("--resume", action="store_true",
                       help="continue from the checkpoint in --output-dir, if there is one; repeat no finished run")
    group = parser.add_argument_group("sizes (default: the data set's in the paper)")
    group.add_argument("--base-scale", type=positive_int, nargs=2, metavar=("LONG", "SHORT"), help="training images")
    group.add_argument("--crop-size", type=positive_int, help="training crops and test windows")
    group.add_argument("--test-scale", type=positive_int, nargs=2, metavar=("LONG", "SHORT"), help="test images")
    group.add_argument("--stride", type=positive_int, help="of the test windows")
    group = parser.add_argument_group("test")
    group.add_argument("--evaluate", type=Path, metavar="HEAD", help="no training: test this checkpoint's head")
    group.add_argument("--eval-every", type=positive_int, metavar="N", help="test every N iterations, and at the end")
    group.add_argument("--save-pictures", type=non_negative_int, default=0, metavar="N",
                       help="image, truth and prediction of the first N test images, and the predicted label maps")
    group.add_argument("--authors-defects", action="store_true",
                       help="test as the authors' code does: a label equal to the class count counts as the last "
                            "class, and a window smaller than the crop repeats the window before it")
    group.add_argument("--figure6", type=Path, metavar="FILE",
                       help="no run: draw figure 6 with the results beside it (.png or .pdf)")
    args = parser.parse_args()
    # The numbers of a recipe may stand beside --evaluate and --probe knn: one command line serves all three.
    training = ("norm", "batch_norm", "select", "eval_every")
    if args.evaluate:
        parser.check_used(args, "--evaluate", "resume", *training, *KNN_ARGUMENTS)
    elif args.probe == ["knn"]:
        parser.check_used(args, "--probe knn", *training)
    elif "knn" not in args.probe:
        parser.check_used(args, "--probe linear", *KNN_ARGUMENTS[1:])
    protocol = PROTOCOLS[args.dataset]
    args.base_scale, args.test_scale = args.base_scale or protocol.base_scale, args.test_scale or protocol.test_scale
    if args.warmup_iterations is None:
        args.warmup_iterations = min(1500, args.iterations // 10)
    crop_size, stride = args.crop_size or protocol.crop_size, args.stride or protocol.stride
    if stride > crop_size:
        raise UserError(f"--stride {stride} is above --crop-size {crop_size}: pixels between the windows would have no "
                        f"logits; use --stride {max(1, crop_size * 2 // 3)}")
    return args


def fit_windows(crop_size: int | None, stride: int | None, protocol: Protocol, patch: int) -> tuple[int, int]:
    """Crop size and stride: those given, else the data set's, or where the patch does not divide its crop the nearest
    multiples of the patch. Raises UserError for a given crop size that is none."""
    def nearest(size):
        return max(1, round(size / patch)) * patch
    if crop_size and crop_size % patch:
        raise UserError(f"--crop-size {crop_size} is not divisible by the patch size {patch}; "
                        f"use --crop-size {nearest(crop_size)}")
    fits = protocol.crop_size % patch == 0
    return (crop_size or (protocol.crop_size if fits else nearest(protocol.crop_size)),
            stride or (protocol.stride if fits else nearest(protocol.stride)))


def window_boxes(height: int, width: int, crop_size: int, stride: int) -> list[tuple[int, int, int, int]]:
    """(top, left, bottom, right) of the test windows; the last ones are shifted inwards, small images have one."""
    def starts(side):
        count = max(side - crop_size + stride - 1, 0) // stride + 1
        return [max(min(i * stride, side - crop_size), 0) for i in range(count)]
    return [(top, left, min(top + crop_size, height), min(left + crop_size, width))
            for top in starts(height) for left in starts(width)]


def windows_together(device: torch.device, num_classes: int, crop_size: int) -> int:
    """Windows in one call of the model: within WINDOW_BYTES of logits, and below 2^31 of them, which CUDA's
    interpolation counts in 32 bits."""
    return min(32, max(1, min(WINDOW_BYTES[device.type] // 4, 2**31 - 1) // (num_classes * crop_size**2)))


def slide_inference(model: Callable, images: torch.Tensor | Sequence[torch.Tensor], crop_size: int, stride: int,
                    window_batch: int = 8) -> torch.Tensor | list[torch.Tensor]:
    """Sliding windows over images, batched across them; logits are summed and divided by how many windows saw a pixel.

    model: maps [B, 3, h, w] to logits [B, K, h, w]. images: [B, 3, H, W] -> returns [B, K, H, W]; or a list of
    [3, H, W] of any sizes -> a list of [K, H, W]. window_batch: windows in one call of the model. Raises ValueError
    for a stride above crop_size, which would leave pixels without logits.
    """
    if not 0 < stride <= crop_size:
        raise ValueError(f"stride {stride} is not from 1 to the crop size, {crop_size}")
    windows = [(index, box) for index, image in enumerate(images)
               for box in window_boxes(*image.shape[1:], crop_size, stride)]
    by_size = {}
    for index, (top, left, bottom, right) in windows:
        by_size.setdefault((bottom - top, right - left), []).append((index, (top, left, bottom, right)))
    sums, counts = [None] * len(images), [image.new_zeros(image.shape[1:]) for image in images]
    for group in by_size.values():
        for first in range(0, len(group), window_batch):
            part = group[first:first + window_batch]
            logits = model(torch.stack([images[index][:, top:bottom, left:right]
                                        for index, (top, left, bottom, right) in part]))
            for one, (index, (top, left, bottom, right)) in zip(logits, part, strict=True):
                if sums[index] is None:
                    sums[index] = one.new_zeros(len(one), *images[index].shape[1:])
                sums[index][:, top:bottom, left:right] += one
                counts[index][top:bottom, left:right] += 1
    means = [total.div_(count) for total, count in zip(sums, counts, strict=True)]
    return torch.stack(means) if isinstance(images, torch.Tensor) else means


def upsampled_argmax(logits: torch.Tensor, size: tuple[int, int], limit: int = 256 << 20) -> torch.Tensor:
    """argmax over classes of logits [K, h, w] after bilinear upsampling to size: int64 [H, W].

    Some classes at a time, so that no more than limit bytes of upsampled logits exist."""
    step = max(1, limit // (4 * size[0] * size[1]))
    best, classes = None, None
    for first in range(0, len(logits), step):
        part = F.interpolate(logits[None, first:first + step], size=size, mode="bilinear", align_corners=False)[0]
        value, index = part.max(0)
        if best is None:
            best, classes = value, index
        else:
            classes = torch.where(value > best, index + first, classes)
            best = torch.maximum(value, best)
    return classes


def confusion_matrix(pred: torch.Tensor, label: torch.Tensor, num_classes: int,
                     ignore_index: int = 255) -> torch.Tensor:
    """Pixel counts, int64 [K, K], row = label, column = prediction. pred, label: integers of one shape.

    Pixels labelled ignore_index, or anything else that is no class, are left out; predictions are below num_classes.
    """
    counted = (label != ignore_index) & (label >= 0) & (label < num_classes)
    cells = torch.where(counted, label.long() * num_classes + pred.long(), num_classes ** 2)
    return torch.bincount(cells.flatten(), minlength=num_classes ** 2 + 1)[:-1].view(num_classes, num_classes)


def segmentation_metrics(confusion: torch.Tensor, num_classes: int | None = None) -> dict:
    """mIoU, mAcc, aAcc (floats), iou_per_class, acc_per_class (float64 [K]) in percent, NaN where 0 / 0.

    Means are over the classes where the ratio is defined. confusion: int64 [K, K] as from confusion_matrix.
    num_classes: confusion has rows for labels that are no class, as the authors' metrics meet them: the label
    num_classes counts as labelled num_classes - 1 and as wrong, a larger one in what is predicted only.
    """
    labelled, predicted, correct = confusion.sum(1), confusion.sum(0), confusion.diag()
    if num_classes:
        excess = labelled[num_classes]
        labelled, predicted, correct = (counts[:num_classes].clone() for counts in (labelled, predicted, correct))
        labelled[-1] += excess
    iou = 100 * correct.double() / (labelled + predicted - correct)
    acc = 100 * correct.double() / labelled
    return {"mIoU": iou.nanmean().item(), "mAcc": acc.nanmean().item(),
            "aAcc": (100 * correct.sum().double() / labelled.sum()).item(), "iou_per_class": iou, "acc_per_class": acc}


class RepeatsSmallWindows:
    """The authors' sliding windows: one smaller than the crop gets the logits of the window before it (zeros at first).

    Wants the windows in their order, image by image; what came before depends on the number of processes."""

    def __init__(self, model: Callable, crop_size: int, num_classes: int):
        self.model, self.crop_size, self.num_classes, self.last = model, crop_size, num_classes, None

    def __call__(self, windows: torch.Tensor) -> torch.Tensor:
        count, _, height, width = windows.shape
        if min(height, width) == self.crop_size:
            logits = self.model(windows)
            self.last = logits[-1:]
            return logits
        if self.last is None:
            return windows.new_zeros(count, self.num_classes, height, width)
        return self.last[:, :, :height, :width].expand(count, -1, -1, -1)


@torch.inference_mode()
def evaluate(segmenter: Segmenter, split, test_scale: tuple[int, int], crop_size: int, stride: int, workers: int,
             authors_defects: bool = False, num_heads: int = 1, picture_folder: Path | None = None,
             num_pictures: int = 0) -> list[dict]:
    """For each head, segmentation_metrics of a split at full resolution, each image once over all processes,
    num_images, and chance, the metrics of the largest class everywhere.

    num_heads: whose logits the segmenter gives, one head's classes after another's. The first num_pictures images are
    written to picture_folder, as the last head sees them. Raises UserError, on all processes, for logits that are not
    finite."""
    segmenter.eval().all_finite = True
    mean, std = segmenter.encoder.mean, segmenter.encoder.std
    device, classes = mean.device, split.num_classes
    window_batch = windows_together(device, num_heads * classes, crop_size)
    model = RepeatsSmallWindows(segmenter, crop_size, num_heads * classes) if authors_defects else segmenter
    bins = classes + authors_defects
    confusions = torch.zeros(num_heads, bins, bins, dtype=torch.int64, device=device)
    share = shard(len(split))
    progress = Progress(len(share), "testing", "images")
    group, num_windows = [], 0
    for index, (image, label) in zip(share, in_order(split.load, share, workers), strict=True):
        scaled = resize_image(torch.from_numpy(image).to(device), *rescale_size(*label.shape, test_scale))
        group.append((index, image, label, ((scaled.float() / 255 - mean) / std)[0]))
        num_windows += len(window_boxes(*scaled.shape[1:], crop_size, stride))
        if num_windows < window_batch and index != share[-1] and not authors_defects:
            continue
        logits = slide_inference(model, [scaled for *_, scaled in group], crop_size, stride, window_batch)
        for (number, picture, truth, _), one in zip(group, logits, strict=True):
            label = torch.from_numpy(truth).to(device)
            for confusion, of_head in zip(confusions, one.split(classes), strict=True):
                pred = upsampled_argmax(of_head, truth.shape)
                confusion += confusion_matrix(pred, label, bins)
            if number < num_pictures:
                path = picture_folder / f"{split.name(number)}.png"
                save_picture(path, picture, truth, pred.cpu().numpy(), split.names, int(not split.background))
            progress.update()
        group, num_windows = [], 0
    if any_process(not segmenter.all_finite):
        raise UserError("the logits are not finite, so there is no prediction; use --precision fp32, or another head")
    confusions, rows = all_reduce(confusions).cpu(), classes if authors_defects else None
    labelled = confusions[0].sum(1)
    largest = torch.zeros_like(confusions[0])
    largest[:, labelled[:classes].argmax()] = labelled
    more = {"num_images": len(split), "chance": segmentation_metrics(largest, rows)}
    return [segmentation_metrics(confusion, rows) | more for confusion in confusions]


def knn_probe(encoder: Encoder, batches: Callable[[range], Iterator], num_images: int, num_classes: int, settings: dict,
              memory_size: int, neighbours: int, passes: int, log: Callable[[str], None]) -> tuple[nn.Module, dict]:
    """Nearest neighbours among patches of the training images (models/knn_segmentation.py): what linear_probe returns.
    passes: over the training images, each with other random crops."""
    crops, size = passes * num_images, settings["batch_size"]
    memory, labels = fill_memory(encoder, batches(range(-(-crops // size))), crops, size, settings["crop_size"],
                                 num_classes, memory_size, settings["seed"], settings["precision"], log)
    segmenter = KNNSegmenter(encoder, memory, labels, settings["precision"], neighbours)
    return segmenter, {"probe": "knn", "iterations": 0, "memory": len(memory)}


def open_training(dataset: str, data_path: Path | None, names: Sequence[str], select: str,
                  seed: int) -> tuple[FolderSplit | SyntheticSplit, FolderSplit | SyntheticSplit | None]:
    """(training split, held-out split): a seeded tenth of the training images, or None where the test images choose.
    Raises UserError where the classes are not the test split's, or too few images are left."""
    split = open_segmentation(dataset, data_path, "train")
    if split.names != names:
        raise UserError(f"the training and the test split below {data_path} have different names.txt")
    if select == "test":
        return split, None
    if len(split) < 2:
        raise UserError("--select held-out needs two training images at least")
    count = max(1, len(split) // 10)
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed)).tolist()
    return split.subset(sorted(order[count:])), split.subset(sorted(order[:count]))


def class_table(metrics: dict, names: Sequence[str], count: int = 5) -> str:
    """mIoU, mAcc and aAcc, and the classes of the largest and the smallest IoU, padded for a terminal."""
    iou, acc = metrics["iou_per_class"], metrics["acc_per_class"]
    known = [index for index in iou.argsort(descending=True).tolist() if not iou[index].isnan()]
    rows = [["mean of the classes", f"{metrics['mIoU']:.2f}", f"{metrics['mAcc']:.2f}"],
            ["all pixels", "", f"{metrics['aAcc']:.2f}"]]
    for title, chosen in (("best", known[:count]), ("worst", known[count:][-count:])):
        rows += [[f"{title}: {names[index]}", f"{iou[index]:.2f}", f"{acc[index]:.2f}"] for index in chosen]
    return text_table(["percent", "IoU", "accuracy"], rows)


def metrics_for_json(metrics: dict, names: Sequence[str]) -> dict:
    """The metrics of a results line; JSON has no NaN, so that what is undefined becomes None."""
    def plain(value):
        return None if np.isnan(value) else value
    means, chance = ({key: plain(found[key]) for key in ("mIoU", "mAcc", "aAcc")}
                     for found in (metrics, metrics["chance"]))
    return {**means, "chance": chance, "num_images": metrics["num_images"],
            "iou_per_class": dict(zip(names, map(plain, metrics["iou_per_class"].tolist()), strict=True))}


def open_inputs(args: argparse.Namespace, device: torch.device, log: Callable[[str], None]) -> tuple:
    """(encoder, training, held-out and test split): no training split with --evaluate, no held-out one where the test
    images choose. Sets the layers, crop size and stride in args that fit the encoder. Raises UserError, also where the
    run would not fit in memory."""
    if args.batch_size < world_size():
        raise UserError(f"--batch-size {args.batch_size} is less than the number of processes, {world_size()}")
    test_split = open_segmentation(args.dataset, args.data_path, "val", extra_label=args.authors_defects)
    if args.data_path:
        test_split.sizes(args.workers)  # a damaged file shows before training, not after
    train_split = held_out = None
    if not args.evaluate:
        train_split, held_out = open_training(args.dataset, args.data_path, test_split.names, args.select, args.seed)
    if args.dataset.startswith("partimagenet"):
        log(PARTIMAGENET_NOTE)

    encoder = load_encoder(args, device, log, projector=False)
    args.layers = choose_layers(args.layers, encoder.depth)
    protocol, patch = PROTOCOLS[args.dataset], encoder.patch_size
    args.crop_size, args.stride = fit_windows(args.crop_size, args.stride, protocol, patch)
    for name, usual in (("crop_size", protocol.crop_size), ("stride", protocol.stride)):
        if vars(args)[name] != usual and name not in args.changed:
            log(f"{name.replace('_', ' ')} {vars(args)[name]}, the nearest to {usual} that patches of {patch} divide")
            args.changed.append(name)
    if not args.evaluate:
        require_batch_room(encoder, args.crop_size, args.batch_size, "--crop-size")
    if "knn" in args.probe:
        plan_memory(encoder, args.passes * len(train_split), args.crop_size, test_split.num_classes, args.memory_size)
    return encoder, train_split, held_out, test_split


def main() -> None:
    """Trains or loads a linear head, or fills a memory of patches, tests, and writes a results line for each probe."""
    args, started = parse_arguments(), time.monotonic()
    if args.table:
        print(paper_tables(["segment"], args.output_dir, args.format))
    if args.figure6:
        draw_figure6(args.figure6, figure6_panels(args.output_dir))
    if args.table or args.figure6:
        return
    device, log = setup(args)

    # Data and encoder
    encoder, train_split, held_out, test_split = open_inputs(args, device, log)
    names, line = test_split.names, start_line("segment", args, encoder)
    settings = {name: value for name, value in settings_of(args).items() if name not in KNN_ARGUMENTS}
    settings |= encoder_identity(encoder) | (train_split.identity("training set") if train_split else {})
    line["made_with"] = digest({**settings_of(args), "probe": None}, settings, test_split.identity("test set"))
    log(f"{run_title(line)}: {len(names)} classes, {len(train_split or ())} training and {len(test_split)} test images")

    @cache
    def store():
        return PixelStore(train_split, args.base_scale, device, args.output_dir, args.cache, args.workers, log)

    def batches(iterations):
        made = training_batches(store(), iterations, args.batch_size, args.base_scale, args.crop_size, encoder.mean,
                                encoder.std, args.seed)
        log.open(args.output_dir)
        return prefetched(made, device)

    def test(segmenter, split=test_split, **options):
        return evaluate(segmenter, split, args.test_scale, args.crop_size, args.stride, args.workers,
                        args.authors_defects, **options)

    # Each probe: trained, loaded or filled, then tested
    for probe in args.probe:
        if args.resume and any_process(is_finished(args.output_dir, probe, line)):
            log(f"{run_title(line)}, {probe}: finished already, its line is in {args.output_dir / 'results.jsonl'}")
            continue
        prefix = run_slug(f"{args.name}_{args.dataset}_{probe}".removesuffix("_linear"))
        if args.evaluate:
            segmenter, about = load_segmenter(args.evaluate, encoder, names, args.precision)
        elif probe == "linear":
            segmenter, about = linear_probe(encoder, batches, names, settings, test,
                                            partial(test, split=held_out or test_split),
                                            args.output_dir / f"{prefix}_segment.pt", args.resume,
                                            args.checkpoint_every, args.eval_every, log)
        else:
            segmenter, about = knn_probe(encoder, batches, len(train_split), len(names), settings, args.memory_size,
                                         args.neighbours, args.passes, log)
        [metrics] = test(segmenter, picture_folder=args.output_dir / f"{prefix}_pictures",
                         num_pictures=args.save_pictures)
        log.open(args.output_dir)
        log(f"{run_title(line)}, {probe}: {summary(metrics)}")
        log(class_table(metrics, names))
        append_result(args.output_dir, line | about | metrics_for_json(metrics, names)
                      | {"seconds": time.monotonic() - started})


if __name__ == "__main__":
    exit_with_one_line_errors(main)
