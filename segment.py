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
import math
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F

from datasets import segmentation as data
from datasets.files import shared_images
from datasets.label_maps import check_labels, require_labelled
from datasets.segmentation_pictures import draw_figure6, figure6_panels, save_picture
from datasets.segmentation_store import PixelStore, training_batches
from datasets.segmentation_transforms import rescale_size, resize_image
from models import METHODS, Encoder, choose_layers, load_encoder
from models import knn_segmentation as knn
from models import segmentation_probe as linear
from models.segmentation_head import LinearHead, PatchSegmenter
from utils import UserError, drawing, results, run
from utils.distributed import all_reduce, shard, world_size
from utils.storage import prefetched, save
from utils.tables import paper_tables

MEANS = ("mIoU", "mAcc", "aAcc")
# The study decays the bias too, but not in its configurations of these methods.
NO_BIAS_DECAY = ("mae", "beit", "cae")
# A linear head may be resumed with others of these.
KNN_ARGUMENTS = ("probe", "memory_size", "neighbours", "passes")


def parse_arguments() -> argparse.Namespace:
    """The command line, with the data set's scales. Raises UserError for values that cannot be."""
    parser = run.OneLineParser(__doc__, prog="segment.py")
    run.add_common_arguments(parser, METHODS, tuple(data.PROTOCOLS), batch_size=16)
    group = parser.add_argument_group("probes")
    group.add_argument("--probe", nargs="+", choices=("linear", "knn"), default=["linear"],
                       help="a trained linear head, nearest neighbours among patches of the training images, or both")
    group.add_argument("--memory-size", type=run.positive_int, default=1_024_000, metavar="N",
                       help="knn: patches kept (default: %(default)s)")
    group.add_argument("--neighbours", type=run.positive_int, default=knn.NEIGHBOURS, help="knn (default: %(default)s)")
    group.add_argument("--passes", type=run.positive_int, default=2,
                       help="knn: over the training images, in other crops (default: %(default)s)")
    add_training_arguments(parser)
    group = parser.add_argument_group("sizes (default: the data set's in the paper)")
    group.add_argument("--base-scale", type=run.positive_int, nargs=2, metavar=("LONG", "SHORT"), help="training")
    group.add_argument("--crop-size", type=run.positive_int, help="training crops and test windows")
    group.add_argument("--test-scale", type=run.positive_int, nargs=2, metavar=("LONG", "SHORT"), help="test images")
    group.add_argument("--stride", type=run.positive_int, help="of the test windows")
    group.add_argument("--num-images", type=run.positive_int, metavar="N",
                       help="a first try: that many training and test images, drawn by the seed")
    group = parser.add_argument_group("test")
    group.add_argument("--evaluate", type=Path, metavar="HEAD", help="no training: test this checkpoint's head")
    group.add_argument("--save-pictures", type=run.non_negative_int, default=0, metavar="N",
                       help="image, truth and prediction of the first N test images, and the predicted label maps")
    group.add_argument("--figure6", type=Path, metavar="FILE",
                       help="no run: draw figure 6 with the results beside it (.png or .pdf)")
    args = parser.parse_args()
    # The numbers of a recipe may stand beside --evaluate and --probe knn: one command line serves all three.
    training = ("norm", "batch_norm", "select")
    if args.evaluate:
        parser.check_used(args, "--evaluate", "resume", *training, *KNN_ARGUMENTS)
    elif args.probe == ["knn"]:
        parser.check_used(args, "--probe knn", *training)
    elif "knn" not in args.probe:
        parser.check_used(args, "--probe linear", *KNN_ARGUMENTS[1:])
    if args.save_pictures or args.figure6:
        drawing.require_matplotlib()
    protocol = data.PROTOCOLS[args.dataset]
    args.base_scale, args.test_scale = args.base_scale or protocol.base_scale, args.test_scale or protocol.test_scale
    crop_size, stride = args.crop_size or protocol.crop_size, args.stride or protocol.stride
    if stride > crop_size:
        raise UserError(f"--stride {stride} is above --crop-size {crop_size}: pixels between the windows would have no "
                        f"logits; use --stride {max(1, crop_size * 2 // 3)}")
    return args


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training of the linear head")
    group.add_argument("--layers", nargs="+", metavar="BLOCK",
                       help="blocks whose tokens are concatenated, counted from 0, or last, or last4 (default: the "
                            "paper's, 3 5 7 11 of 12, and the same shares of another depth)")
    group.add_argument("--norm", action="store_true", help="apply the encoder's final norm to these tokens")
    group.add_argument("--batch-norm", action="store_true", help="batch normalisation of the tokens before the head")
    group.add_argument("--iterations", type=run.positive_int,
                       help="(default: 160,000; of --dataset folder from the number of images, 2,000 at least)")
    group.add_argument("--lr", type=run.positive_float, nargs="+", default=[4e-4],
                       help="one or several: a head for each pair with --weight-decay (default: 4e-4)")
    group.add_argument("--weight-decay", type=run.non_negative_float, nargs="+", default=[0.05], help="(default: 0.05)")
    group.add_argument("--select", choices=("test", "held-out"), default="test",
                       help="what chooses among several heads: the test images (default), or a tenth of the training "
                            "images, which are then not trained on")
    group.add_argument("--warmup-iterations", type=run.non_negative_int,
                       help="(default: 1500, but at most a tenth of the iterations)")
    group.add_argument("--cache", choices=("auto", "gpu", "cpu", "disk"), default="auto",
                       help="where decoded images live; auto: the first with room")
    group.add_argument("--checkpoint-every", type=run.positive_int, default=1000, metavar="N", help="(default: 1000)")
    group.add_argument("--resume", action="store_true",
                       help="continue from the checkpoint in --output-dir, if there is one; repeat no finished run")


def window_boxes(height: int, width: int, crop_size: int, stride: int) -> list[tuple[int, int, int, int]]:
    """(top, left, bottom, right) of the test windows; the last ones are shifted inwards, small images have one."""
    def starts(side):
        count = max(side - crop_size + stride - 1, 0) // stride + 1
        return [max(min(i * stride, side - crop_size), 0) for i in range(count)]
    return [(top, left, min(top + crop_size, height), min(left + crop_size, width))
            for top in starts(height) for left in starts(width)]


def slide_inference(model: Callable, images: torch.Tensor, crop_size: int, stride: int,
                    window_batch: int = 8) -> torch.Tensor:
    """Sliding windows over images: logits are summed and divided by how many windows saw a pixel.

    model: maps [B, 3, h, w] to logits [B, K, h, w]. images: [B, 3, H, W] -> returns [B, K, H, W]. window_batch: windows
    in one call of the model. Raises ValueError for a stride above crop_size, which would leave pixels without logits.
    """
    if not 0 < stride <= crop_size:
        raise ValueError(f"stride {stride} is not from 1 to the crop size, {crop_size}")
    windows = [(number, slice(top, bottom), slice(left, right)) for number in range(len(images))
               for top, left, bottom, right in window_boxes(*images.shape[2:], crop_size, stride)]
    counts = torch.zeros_like(images[:, :1])
    for first in range(0, len(windows), window_batch):
        part = windows[first:first + window_batch]
        logits = model(torch.stack([images[number, :, rows, columns] for number, rows, columns in part]))
        if first == 0:
            sums = logits.new_zeros(len(images), logits.shape[1], *images.shape[2:])
        for one, (number, rows, columns) in zip(logits, part, strict=True):
            sums[number, :, rows, columns] += one
            counts[number, :, rows, columns] += 1
    return sums.div_(counts)


def upsampled_argmax(logits: torch.Tensor, size: tuple[int, int], together: int = 32) -> torch.Tensor:
    """argmax over classes of logits [K, h, w] after bilinear upsampling to size: int64 [H, W]. Only that many classes
    are upsampled together, as an image may be large."""
    found = [F.interpolate(part[None], size=size, mode="bilinear", align_corners=False)[0].max(0)
             for part in logits.split(together)]
    best = torch.stack([values for values, _ in found]).argmax(0, keepdim=True)
    return torch.stack([index for _, index in found]).gather(0, best)[0] + together * best[0]


def confusion_matrix(pred: torch.Tensor, label: torch.Tensor, num_classes: int,
                     ignore_index: int = 255) -> torch.Tensor:
    """Pixel counts, int64 [K, K], row = label, column = prediction. pred, label: integers of one shape.

    Pixels labelled ignore_index, or anything else that is no class, are left out; predictions are below num_classes.
    """
    counted = (label != ignore_index) & (label >= 0) & (label < num_classes)
    cells = torch.where(counted, label.long() * num_classes + pred.long(), num_classes ** 2)
    return torch.bincount(cells.flatten(), minlength=num_classes ** 2 + 1)[:-1].view(num_classes, num_classes)


def segmentation_metrics(confusion: torch.Tensor) -> dict:
    """mIoU, mAcc, aAcc (floats), iou_per_class, acc_per_class (float64 [K]) in percent, NaN where 0 / 0.

    Means are over the classes where the ratio is defined. confusion: int64 [K, K] as from confusion_matrix.
    """
    labelled, predicted, correct = confusion.sum(1), confusion.sum(0), confusion.diag()
    iou = 100 * correct.double() / (labelled + predicted - correct)
    acc = 100 * correct.double() / labelled
    return {"mIoU": iou.nanmean().item(), "mAcc": acc.nanmean().item(),
            "aAcc": (100 * correct.sum().double() / labelled.sum()).item(), "iou_per_class": iou, "acc_per_class": acc}


@torch.inference_mode()
def evaluate(segmenter: PatchSegmenter, split, test_scale: tuple[int, int], crop_size: int, stride: int, workers: int,
             num_pictures: int = 0, pictures: list | None = None) -> dict:
    """mIoU, mAcc and aAcc of a split at full resolution, each image once over all processes; as "chance" those of the
    largest class everywhere; iou_per_class by name, None where 0 / 0; and num_images.

    pictures: gets (name, image, truth, prediction) of this process's among the first num_pictures images. Raises
    UserError, on all processes, for logits that are not finite, and where no pixel of the split has a class."""
    segmenter.eval()
    mean, std = segmenter.encoder.mean, segmenter.encoder.std
    device, classes = mean.device, split.num_classes
    # CUDA's interpolation counts the logits of one call in 32 bits.
    window_batch = max(1, min(8, (2**31 - 1) // (classes * crop_size**2)))
    confusion = torch.zeros(classes, classes, dtype=torch.int64, device=device)
    broken, share = torch.zeros((), dtype=torch.int64, device=device), shard(len(split))
    progress = run.Progress(len(share), "testing", "images")
    for index, (image, truth) in zip(share, data.in_order(split.load, share, workers), strict=True):
        scaled = resize_image(torch.from_numpy(image).to(device), *rescale_size(*truth.shape, test_scale))
        logits = slide_inference(segmenter, (scaled / 255 - mean) / std, crop_size, stride, window_batch)[0]
        broken += ~logits.sum().isfinite()  # one that is not finite makes the sum so; isfinite of each takes longer
        pred = upsampled_argmax(logits, truth.shape)
        confusion += confusion_matrix(pred, torch.from_numpy(truth).to(device), classes)
        if index < num_pictures:
            pictures.append((split.name(index), image, truth, pred.cpu().numpy()))
        progress.update()
    if all_reduce(broken):
        raise UserError("the logits are not finite, so there is no prediction; use --precision fp32, or another head")
    confusion = all_reduce(confusion).cpu()
    labelled = confusion.sum(1)
    require_labelled(labelled.tolist(), "test")
    largest = torch.zeros_like(confusion)
    largest[:, labelled.argmax()] = labelled
    metrics, chance = segmentation_metrics(confusion), segmentation_metrics(largest)
    iou = zip(split.names, metrics["iou_per_class"].tolist(), strict=True)
    return {**{name: metrics[name] for name in MEANS}, "chance": {name: chance[name] for name in MEANS},
            "num_images": len(split), "iou_per_class": {name: None if math.isnan(one) else one for name, one in iou}}


def open_data(args: argparse.Namespace, log: run.Log) -> tuple:
    """(training, held-out and test split, how many test images are training images too): no training split and no
    such number with --evaluate, no held-out one where the test images choose. Sets the iterations in args. Raises
    UserError."""
    open_split = partial(data.open_segmentation, args.dataset, args.data_path, num_images=args.num_images,
                         seed=args.seed)
    test_split, train_split, held_out, shared = open_split("val"), None, None, None
    if args.data_path:
        test_split.sizes(args.workers)  # a damaged file shows before training, not after
    if not args.evaluate:
        train_split = open_split("train")
        if train_split.names != test_split.names:
            raise UserError(f"the training and the test split below {args.data_path} have different names.txt")
        shared = shared_images(train_split, test_split, args.dataset == "folder")
        if args.select == "held-out":
            train_split, held_out = data.hold_out(train_split, args.seed)
        if "knn" in args.probe and args.memory_size < (crops := args.passes * len(train_split)):
            raise UserError(f"--memory-size {args.memory_size}: use one patch for each of {crops} training crops at "
                            "least")
    if args.dataset == "folder":
        check_labels(train_split, test_split, args.workers, log, held_out)
    for note in dict.fromkeys([*test_split.notes, *(train_split.notes if train_split else ())]):
        log(note)
    if shared:
        log(f"{shared} of {len(test_split)} test images are training images too")
    if args.iterations is None and args.dataset == "folder" and train_split:
        args.iterations = data.default_iterations(len(train_split), args.batch_size)
        args.changed.append("iterations")  # a mark in tables
        log(f"{args.iterations} iterations, for {len(train_split)} training images; --iterations gives others")
    args.iterations = args.iterations or 160_000
    if args.warmup_iterations is None:
        args.warmup_iterations = min(1500, args.iterations // 10)
    log(f"{len(test_split.names)} classes, {len(train_split or ())} training and {len(test_split)} test images")
    return train_split, held_out, test_split, shared


def open_encoder(args: argparse.Namespace, device: torch.device, log: run.Log) -> Encoder:
    """The encoder; sets the layers, crop size and stride in args that fit it. Raises UserError."""
    if args.batch_size < world_size():
        raise UserError(f"--batch-size {args.batch_size} is less than the number of processes, {world_size()}")
    encoder = load_encoder(args, device, log, projector=False)
    args.layers = choose_layers(args.layers, encoder.depth)
    protocol, patch = data.PROTOCOLS[args.dataset], encoder.patch_size
    args.crop_size, args.stride = data.fit_windows(args.crop_size, args.stride, protocol, patch)
    for name, usual in (("crop_size", protocol.crop_size), ("stride", protocol.stride)):
        if vars(args)[name] != usual and name not in args.changed:
            log(f"{name.replace('_', ' ')} {vars(args)[name]}, the nearest to {usual} that patches of {patch} divide")
            args.changed.append(name)
    return encoder


def train_linear(args: argparse.Namespace, encoder: Encoder, batches: Callable, names: Sequence[str], settings: dict,
                 test: Callable, log: run.Log) -> tuple[linear.Segmenter, dict]:
    """Trains a head for every pair of a learning rate and a weight decay, and chooses one.

    batches: the training batches of a range of iterations. settings: what a resumed run must share. test: segmenter ->
    metrics, on the images that choose. Returns a segmenter with the chosen head, and what a results line says of it.
    Raises UserError where a loss is not finite.
    """
    head = LinearHead(len(args.layers) * encoder.embed_dim, len(names))
    segmenter = linear.Segmenter(encoder, head, args.layers, args.precision, args.norm, args.batch_norm)
    segmenter.to(encoder.mean.device).train()
    probe = linear.LinearProbe(segmenter, args.lr, args.weight_decay, args.model not in NO_BIAS_DECAY, args.seed,
                               args.compile)
    path, total, done = output_path(args, "segment.pt"), args.iterations, 0
    if args.resume and (saved := results.resume_from(path, settings, ("iteration", *probe.state()), log)):
        probe.load_state(saved)
        done = saved["iteration"]
        log(f"resumed after iteration {done}")

    def write():
        save(path, {"settings": settings, "iteration": done, "class_names": list(names), **probe.state()})

    progress, losses = run.Progress(total - done, "training", "iterations"), []
    for iteration, (images, labels) in enumerate(batches(range(done, total)), done):
        schedule = partial(linear.linear_learning_rate, iteration, total, args.warmup_iterations)
        losses.append(probe.step(images, labels, args.batch_size, schedule))
        done = iteration + 1
        if len(losses) == 50 or done == total:
            means, losses = all_reduce(torch.stack(losses).mean(0)).tolist(), []
            shown = ", ".join(f"{mean:.4f} ({name})" for mean, name in zip(means, probe.names, strict=True))
            if not all(map(math.isfinite, means)):
                raise UserError(f"the loss is {shown} near iteration {done}; lower --lr, or use --precision fp32")
            log(f"iteration {done}/{total}: loss {shown}; learning rates at {schedule(1.0):.3g} of these")
        progress.update()
        if done % args.checkpoint_every == 0 or done == total:
            write()
    found = choose_head(args, probe, test, log)
    write()
    return segmenter, found | {name: vars(args)[name] for name in ("iterations", "layers", "norm", "batch_norm")}


def choose_head(args: argparse.Namespace, probe: linear.LinearProbe, test: Callable, log: run.Log) -> dict:
    """Gives the segmenter the head of the best mIoU. Returns what a results line says of the choice. test: segmenter ->
    metrics."""
    heads = [{"lr": lr, "weight_decay": decay} for lr, decay in probe.pairs]
    if len(heads) == 1:
        return heads[0]
    for name, head, about in zip(probe.names, probe.heads, heads, strict=True):
        probe.segmenter.head = head
        about["mIoU"] = test(probe.segmenter)["mIoU"]
        log(f"{name}: mIoU {about['mIoU']:.2f}")
    best = max(range(len(heads)), key=lambda number: heads[number]["mIoU"])
    probe.segmenter.head = probe.heads[best]
    log(f"chosen on the {args.select} images: {probe.names[best]}")
    return {name: heads[best][name] for name in ("lr", "weight_decay")} | {"heads": heads}


def fill_knn(args: argparse.Namespace, encoder: Encoder, batches: Callable, num_images: int, num_classes: int,
             log: run.Log) -> tuple[knn.KNNSegmenter, dict]:
    """Nearest neighbours among patches of the training images, in --passes passes with other random crops: what
    train_linear returns."""
    crops, size = args.passes * num_images, args.batch_size
    memory, labels = knn.fill_memory(encoder, batches(range(-(-crops // size))), crops, size, args.memory_size // crops,
                                     num_classes, args.seed, args.precision, log)
    segmenter = knn.KNNSegmenter(encoder, memory, labels, args.precision, args.neighbours)
    return segmenter, {"iterations": 0, "memory": len(memory)}


def output_path(args: argparse.Namespace, ending: str) -> Path:
    return args.output_dir / f"{results.run_slug(f'{args.name}_{args.dataset}')}_{ending}"


def main() -> None:
    """Trains or loads a linear head, or fills a memory of patches, tests, and writes a results line for each probe."""
    args, started = parse_arguments(), time.monotonic()
    if args.table:
        print(paper_tables(["segment"], args.output_dir, args.format))
    if args.figure6:
        draw_figure6(args.figure6, figure6_panels(args.output_dir))
    if args.table or args.figure6:
        return
    device, log = run.setup(args)

    # Data and encoder
    train_split, held_out, test_split, shared = open_data(args, log)
    encoder = open_encoder(args, device, log)
    names = test_split.names
    line = results.start_line("segment", args, encoder) | {"num_test_in_training": shared}
    settings = {name: value for name, value in results.settings_of(args).items() if name not in KNN_ARGUMENTS}
    settings |= train_split.identity("training set") if train_split else {}
    line["made_with"] = results.digest({**results.settings_of(args), "probe": None}, settings,
                                       test_split.identity("test set"))
    settings["the encoder"] = encoder.signature

    @cache  # decoded once for both probes, and only where one is trained or filled
    def store():
        return PixelStore(train_split, args.base_scale, device, args.output_dir, args.cache, args.workers, log)

    def batches(iterations):
        return prefetched(training_batches(store(), iterations, args.batch_size, args.base_scale, args.crop_size,
                                           encoder.mean, encoder.std, args.seed), device) if iterations else ()

    def test(segmenter, split=test_split, **options):
        return evaluate(segmenter, split, args.test_scale, args.crop_size, args.stride, args.workers, **options)

    # Each probe: trained, loaded or filled, then tested
    for probe in args.probe:
        if args.resume and results.is_finished(args.output_dir, probe, line):
            log(f"{results.run_title(line)}, {probe}: finished already, its line is in {args.output_dir}/results.jsonl")
            continue
        if args.evaluate:
            segmenter, found = linear.load_segmenter(args.evaluate, encoder, names, args.precision)
        elif probe == "linear":
            segmenter, found = train_linear(args, encoder, batches, names, settings,
                                            partial(test, split=held_out or test_split), log)
        else:
            segmenter, found = fill_knn(args, encoder, batches, len(train_split), len(names), log)
        pictures = []
        metrics = test(segmenter, num_pictures=args.save_pictures, pictures=pictures)
        log(f"{results.run_title(line)}, {probe}: mIoU {metrics['mIoU']:.2f}, mAcc {metrics['mAcc']:.2f}, "
            f"aAcc {metrics['aAcc']:.2f} ({metrics['num_images']} images)")
        results.append_result(args.output_dir, line | {"probe": probe} | found | metrics
                              | {"seconds": time.monotonic() - started})
        folder = output_path(args, "knn_pictures" if probe == "knn" else "pictures")
        for name, *picture in pictures:
            save_picture(folder / f"{name}.png", *picture, names, int(not test_split.background))


if __name__ == "__main__":
    run.run_main(main)
