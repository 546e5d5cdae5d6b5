"""Linear semantic segmentation: one 1 x 1 convolution on the frozen blocks of an encoder.

    python segment.py --model ibot --weights random --iterations 300      nothing downloaded: synthetic parts, control
    python segment.py --model ibot --dataset ade20k-part --data-path data
    torchrun --nproc-per-node 8 segment.py --model dino --dataset lip --data-path data --resume
    python segment.py --model ibot --dataset lip --data-path data --evaluate outputs/ibot_lip_segment.pt
    python segment.py --table --figure6 figure6.png                       tables 2, 4, 5, 6 and figure 6

Protocol: paper, sections 4.1 and 4.2, appendix A.4; numbers as in its authors' configurations. Every sample is a
pure function of seed, iteration and place in the batch, so neither the number of processes nor a kill changes what is
trained on.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from datasets.segmentation import PROTOCOLS, in_order, open_segmentation
from datasets.segmentation_pictures import figure6, save_picture, tables
from datasets.segmentation_store import PixelStore, prefetched, training_batches
from datasets.segmentation_transforms import rescale_size, resize_image
from models import METHODS, Encoder, load_encoder
from models.segmentation_head import LinearHead, upsampled_cross_entropy
from utils import UserError
from utils.distributed import all_reduce, is_main, shard, world_size
from utils.results import append_result, args_to_json, caveats
from utils.run import (
    Log,
    OneLineParser,
    Progress,
    add_common_arguments,
    autocast,
    exit_with_one_line_errors,
    non_negative_int,
    positive_int,
    setup,
)
from utils.storage import atomic_write

BLOCKS = (3, 5, 7, 11)
# The study decays the bias too, but not in its configurations of these methods.
NO_BIAS_DECAY = ("mae", "beit", "cae")
# Logits of one pass over sliding windows, in bytes.
WINDOW_BYTES = {"cuda": 8 << 30, "cpu": 512 << 20}
# What a checkpoint must agree on with the run that resumes it.
SETTINGS = ("model", "dataset", "layers", "iterations", "batch_size", "lr", "weight_decay", "warmup_iterations",
            "base_scale", "crop_size", "seed", "precision")


def parse_arguments() -> argparse.Namespace:
    parser = OneLineParser(__doc__, prog="segment.py")
    add_common_arguments(parser, METHODS, tuple(PROTOCOLS), batch_size=16)
    group = parser.add_argument_group("training")
    group.add_argument("--layers", type=non_negative_int, nargs="+", metavar="BLOCK",
                       help="blocks, counted from 0 (default: 3 5 7 11)")
    group.add_argument("--iterations", type=positive_int, default=160_000, help="(default: %(default)s)")
    group.add_argument("--lr", type=float, default=4e-4, help="(default: %(default)s)")
    group.add_argument("--weight-decay", type=float, default=0.05, help="(default: %(default)s)")
    group.add_argument("--warmup-iterations", type=non_negative_int,
                       help="(default: 1500, but at most a tenth of the iterations)")
    group.add_argument("--cache", choices=("auto", "gpu", "cpu", "disk"), default="auto",
                       help="where decoded images live; auto: the first with room")
    group.add_argument("--checkpoint-every", type=positive_int, default=1000, metavar="N", help="(default: 1000)")
    group.add_argument("--resume", action="store_true",
                       help="continue from the checkpoint in --output-dir, if there is one")
    group = parser.add_argument_group("sizes (default: the data set's in the paper)")
    group.add_argument("--base-scale", type=positive_int, nargs=2, metavar=("LONG", "SHORT"), help="training images")
    group.add_argument("--crop-size", type=positive_int, help="training crops and test windows")
    group.add_argument("--test-scale", type=positive_int, nargs=2, metavar=("LONG", "SHORT"), help="test images")
    group.add_argument("--stride", type=positive_int, help="of the test windows")
    group = parser.add_argument_group("test")
    group.add_argument("--evaluate", type=Path, metavar="HEAD", help="no training: test this checkpoint's head")
    group.add_argument("--eval-every", type=positive_int, metavar="N", help="test every N iterations, and at the end")
    group.add_argument("--save-pictures", type=non_negative_int, default=0, metavar="N",
                       help="image, truth and prediction of the first N test images")
    group.add_argument("--authors-defects", action="store_true",
                       help="test as the authors' code does: a label equal to the class count counts as the last "
                            "class, and a window smaller than the crop repeats the window before it")
    group.add_argument("--figure6", type=Path, metavar="PNG", help="no run: draw figure 6 with the results beside it")
    args = parser.parse_args()
    protocol = PROTOCOLS[args.dataset]
    for name in ("base_scale", "test_scale", "crop_size", "stride"):
        setattr(args, name, getattr(args, name) or getattr(protocol, name))
    if args.warmup_iterations is None:
        args.warmup_iterations = min(1500, args.iterations // 10)
    if args.seed < 0:
        parser.error("--seed is negative; take a whole number from 0")
    return args


class Segmenter(nn.Module):
    """Frozen encoder and trainable head: normalised images [B, 3, h, w] -> logits float32 [B, K, h, w], any h and w."""

    def __init__(self, encoder: Encoder, head: LinearHead, layers: Sequence[int], precision: str):
        super().__init__()
        self.encoder, self.head, self.layers, self.precision = encoder, head, layers, precision

    def patch_logits(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, h, w], divisible by the patch size -> [B, K, h/p, w/p]; gradients reach the head only."""
        with torch.inference_mode(), autocast(images.device, self.precision):
            blocks = self.encoder.get_intermediate_layers(images, n=self.layers, reshape=True, norm=False)
        return self.head(blocks)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        height, width = images.shape[2:]
        patch = self.encoder.patch_size
        # As training pads: zeros, after normalisation, to the right and below.
        padded = F.pad(images, (0, -width % patch, 0, -height % patch))
        logits = F.interpolate(self.patch_logits(padded), size=padded.shape[2:], mode="bilinear", align_corners=False)
        return logits[:, :, :height, :width]


def linear_learning_rate(iteration: int, lr: float, total: int, warmup: int, warmup_ratio: float = 1e-6) -> float:
    """Linear to 0 over total iterations, times a linear rise from warmup_ratio over the first warmup ones."""
    regular = lr * (1 - iteration / total)
    return regular * (1 - (1 - iteration / warmup) * (1 - warmup_ratio)) if iteration < warmup else regular


def train(segmenter: Segmenter, optimizer: torch.optim.Optimizer, batches: Iterator, iterations: range, batch_size: int,
          lr: float, warmup: int, after_iteration: Callable[[int], None], log: Log) -> None:
    """The training loop, from iterations.start to the end of the schedule, iterations.stop.

    after_iteration is called with the number of iterations done. Raises UserError when the loss is not finite.
    """
    head, progress, losses = segmenter.head, Progress(len(iterations), "training", "iterations"), []
    for iteration, (images, labels) in zip(iterations, batches, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = linear_learning_rate(iteration, lr, iterations.stop, warmup)
        pixels = batch_size * labels.shape[1] * labels.shape[2]
        loss = upsampled_cross_entropy(segmenter.patch_logits(images), labels, total_pixels=pixels)
        optimizer.zero_grad()
        loss.backward()
        # The loss is divided by the pixels of the global batch, so that the processes' gradients add up.
        for parameter in head.parameters():
            all_reduce(parameter.grad)
        optimizer.step()
        losses.append(loss.detach())
        done = iteration + 1
        if len(losses) == 50 or done == iterations.stop:
            mean = all_reduce(torch.stack(losses).mean()).item()
            log(f"iteration {done}/{iterations.stop}: loss {mean:.4f}, lr {optimizer.param_groups[0]['lr']:.2e}")
            if not np.isfinite(mean):
                raise UserError(f"the loss is {mean} near iteration {done}; lower --lr, or take --precision fp32")
            losses = []
        progress.update()
        after_iteration(done)


def window_boxes(height: int, width: int, crop_size: int, stride: int) -> list[tuple[int, int, int, int]]:
    """(top, left, bottom, right) of the test windows; the last ones are shifted inwards, small images have one."""
    def starts(side):
        count = max(side - crop_size + stride - 1, 0) // stride + 1
        return [max(min(i * stride, side - crop_size), 0) for i in range(count)]
    return [(top, left, min(top + crop_size, height), min(left + crop_size, width))
            for top in starts(height) for left in starts(width)]


def slide_inference(model: Callable, images: torch.Tensor | Sequence[torch.Tensor], crop_size: int, stride: int,
                    window_batch: int = 8) -> torch.Tensor | list[torch.Tensor]:
    """Sliding windows over images, batched across them; logits are summed and divided by how many windows saw a pixel.

    model: maps [B, 3, h, w] to logits [B, K, h, w]. images: [B, 3, H, W] -> returns [B, K, H, W]; or a list of
    [3, H, W] of any sizes -> a list of [K, H, W]. window_batch: windows in one call of the model.
    """
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
             authors_defects: bool = False, picture_folder: Path | None = None, num_pictures: int = 0) -> dict:
    """segmentation_metrics of a split at full resolution, each image once over all processes, and num_images.

    The first num_pictures images are written to picture_folder."""
    mean, std = segmenter.encoder.mean, segmenter.encoder.std
    device, classes = mean.device, split.num_classes
    window_batch = min(32, max(1, WINDOW_BYTES[device.type] // (4 * classes * crop_size ** 2)))
    model = RepeatsSmallWindows(segmenter, crop_size, classes) if authors_defects else segmenter
    bins = classes + authors_defects
    confusion = torch.zeros(bins, bins, dtype=torch.int64, device=device)
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
            pred = upsampled_argmax(one, truth.shape)
            confusion += confusion_matrix(pred, torch.from_numpy(truth).to(device), bins)
            if number < num_pictures:
                path = picture_folder / f"{split.name(number)}.png"
                save_picture(path, picture, truth, pred.cpu().numpy(), split.names)
            progress.update()
        group, num_windows = [], 0
    metrics = segmentation_metrics(all_reduce(confusion).cpu(), classes if authors_defects else None)
    return metrics | {"num_images": len(split)}


def save_checkpoint(path: Path, head: LinearHead, optimizer: torch.optim.Optimizer, iteration: int, info: dict) -> None:
    """Written whole by the main process. Raises UserError where it cannot be; the previous file is then as it was."""
    if not is_main():
        return
    content = {"head": head.state_dict(), "optimizer": optimizer.state_dict(), "iteration": iteration, **info}
    try:
        atomic_write(path, lambda temporary: torch.save(content, temporary))
    except (OSError, RuntimeError) as error:
        raise UserError(f"checkpoint {path} could not be written ({error}); what was there before is unchanged; make "
                        "room and go on with --resume") from None


def load_checkpoint(path: Path) -> dict:
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist; name one that segment.py wrote")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        return {name: checkpoint[name] for name in ("head", "optimizer", "iteration", "settings", "class_names")}
    except Exception as error:  # torch.load raises many kinds on a file that is none of its own
        raise UserError(f"{path} is not a checkpoint of segment.py ({type(error).__name__}); name another") from None


def check_head(path: Path, checkpoint: dict, settings: dict, names: Sequence[str], must_agree: Sequence[str]) -> None:
    """Raises UserError where a checkpoint belongs to other classes or to another run."""
    count = len(checkpoint["head"]["bias"])
    if count != len(names):
        raise UserError(f"{path} is a head for {count} classes; {settings['dataset']} has {len(names)}")
    different = [f"{name} {checkpoint['settings'][name]} there and {settings[name]} here" for name in must_agree
                 if checkpoint["settings"][name] != settings[name]]
    if different:
        raise UserError(f"{path} was made by another run: {', '.join(different)}; give the same arguments")


def json_number(value: float) -> float | None:
    """JSON has no NaN."""
    return None if np.isnan(value) else value


def main() -> None:
    started = time.monotonic()
    args = parse_arguments()
    if args.table or args.figure6:
        if args.table:
            print(tables(args.output_dir))
        if args.figure6:
            figure6(args.figure6, args.output_dir)
        return
    device, log = setup(args)
    output = args.output_dir
    if args.batch_size < world_size():
        raise UserError(f"--batch-size {args.batch_size} is less than the number of processes, {world_size()}")

    test_split = open_segmentation(args.dataset, args.data_path, "val", extra_label=args.authors_defects)
    names = test_split.names
    if not args.evaluate:
        train_split = open_segmentation(args.dataset, args.data_path, "train")
        if train_split.names != names:
            raise UserError(f"the training and the test split below {args.data_path} have different names.txt")
    encoder = load_encoder(args, device, log, projector=False)
    if args.crop_size % encoder.patch_size:
        raise UserError(f"--crop-size {args.crop_size} is not divisible by the patch size {encoder.patch_size}")
    name = f"{args.model}_{args.dataset}".replace("/", "-")
    path = args.evaluate or output / f"{name}_segment.pt"
    checkpoint = load_checkpoint(path) if args.evaluate or (args.resume and path.exists()) else None
    args.layers = args.layers or (checkpoint["settings"]["layers"] if checkpoint else list(BLOCKS))
    if max(args.layers) >= encoder.depth:
        raise UserError(f"--layers {max(args.layers)}: {args.model} has blocks 0 to {encoder.depth - 1}")
    settings = {key: args_to_json(args)[key] for key in SETTINGS} | {"sha256": encoder.sha256}
    log(f"{args.model} from {encoder.weights} (SHA-256 {encoder.sha256}), blocks {args.layers}; {args.dataset}: "
        f"{len(names)} classes, {len(test_split)} test images")

    generator = torch.Generator().manual_seed(args.seed)
    head = LinearHead(len(args.layers) * encoder.embed_dim, len(names), generator).to(device)
    segmenter = Segmenter(encoder, head, args.layers, args.precision)
    bias_decay = 0.0 if args.model in NO_BIAS_DECAY else args.weight_decay
    optimizer = torch.optim.AdamW([{"params": [head.weight]}, {"params": [head.bias], "weight_decay": bias_decay}],
                                  lr=args.lr, weight_decay=args.weight_decay, fused=device.type == "cuda")
    done = 0
    if checkpoint:
        must_agree = ("model", "sha256", "layers") if args.evaluate else settings
        check_head(path, checkpoint, settings, names, must_agree)
        head.load_state_dict(checkpoint["head"])
        done = checkpoint["iteration"]
    if args.resume and not args.evaluate:
        if checkpoint:
            optimizer.load_state_dict(checkpoint["optimizer"])
        log(f"resumed after iteration {done}" if checkpoint else f"{path} does not exist yet: from the beginning")

    def test(pictures=0):
        metrics = evaluate(segmenter, test_split, args.test_scale, args.crop_size, args.stride, args.workers,
                           args.authors_defects, output / f"{name}_pictures", pictures)
        log(f"{args.dataset}: mIoU {metrics['mIoU']:.2f}, mAcc {metrics['mAcc']:.2f}, aAcc {metrics['aAcc']:.2f} "
            f"({metrics['num_images']} images)")
        return metrics

    def after_iteration(done):
        if done % args.checkpoint_every == 0 or done == args.iterations:
            save_checkpoint(path, head, optimizer, done, {"settings": settings, "class_names": list(names)})
        if args.eval_every and done % args.eval_every == 0 and done < args.iterations:
            test()

    if not args.evaluate and done < args.iterations:
        store = PixelStore(train_split, args.base_scale, device, output, args.cache, args.workers, log)
        log.open(output)
        batches = training_batches(store, range(done, args.iterations), args.batch_size, args.base_scale,
                                   args.crop_size, encoder.mean, encoder.std, args.seed)
        train(segmenter, optimizer, prefetched(batches, device), range(done, args.iterations), args.batch_size, args.lr,
              args.warmup_iterations, after_iteration, log)
        del store, batches
    metrics = test(args.save_pictures)
    log.open(output)
    if is_main():
        result = {"task": "segment", "model": args.model, "weights": encoder.weights, "sha256": encoder.sha256,
                  "dataset": args.dataset, "world_size": world_size(), "precision": args.precision, "seed": args.seed,
                  "seconds": time.monotonic() - started, "iterations": done if args.evaluate else args.iterations,
                  **{key: json_number(metrics[key]) for key in ("mIoU", "mAcc", "aAcc")},
                  "iou_per_class": dict(zip(names, map(json_number, metrics["iou_per_class"].tolist()), strict=True)),
                  "num_images": metrics["num_images"],
                  "args": args_to_json(args)}
        marks = caveats(result)
        shown = {key: value for key, value in result.items() if key != "args"}
        log(json.dumps(shown) + (f" [{marks}]" if marks else ""))
        append_result(output, result)


if __name__ == "__main__":
    exit_with_one_line_errors(main)
