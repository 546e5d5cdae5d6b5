"""How long an iteration of segment.py takes, stage by stage, and how fast its data path is beside PIL and NumPy.

    python tests/bench_segment.py                        on a GPU: batch 16, crops of 512, 209 classes, ViT-B/16
    python tests/bench_segment.py --device cpu           batch 1

The images are noise of ADE20K's usual size, 512 x 683. Not a test: pytest does not collect it.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from datasets.segmentation import PROTOCOLS
from datasets.segmentation_store import PixelStore, training_batches
from datasets.segmentation_transforms import draw_augmentation, rescale_size, training_batch
from models import build_model
from models.segmentation_head import LinearHead, upsampled_cross_entropy
from models.segmentation_probe import LinearProbe, Segmenter
from utils.storage import prefetched

SIZE = (512, 683)
# Of ViT-B/16 on one 512 x 512 crop; the published batch of 16 is 3.47 TFLOP.
ENCODER_TFLOP = 3.47 / 16
PROTOCOL = PROTOCOLS["ade20k-part"]


class Noise:
    """A split of smooth noise with blobs of labels."""

    def __init__(self, count, num_classes):
        self.count, self.num_classes, self.names = count, num_classes, [str(label) for label in range(num_classes)]

    def __len__(self):
        return self.count

    def sizes(self, workers):
        return [SIZE] * self.count

    def load(self, index):
        generator = np.random.default_rng(index)
        coarse = Image.fromarray(generator.integers(0, 256, (32, 43, 3), dtype=np.uint8))
        image = coarse.resize(SIZE[::-1], Image.Resampling.BICUBIC)
        label = Image.fromarray(generator.integers(0, self.num_classes, (6, 8), dtype=np.uint8)).resize(SIZE[::-1], 0)
        return np.array(image), np.array(label)


def milliseconds(function, device, repeats):
    """Median over repeats, after two to warm up."""
    times = []
    for _ in range(repeats + 2):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return sorted(times[2:])[repeats // 2]


def with_pil_and_numpy(image, label, one, mean, std):
    """The same steps for one image by PIL and NumPy: what a data loader's process would do."""
    size = rescale_size(*label.shape, tuple(int(side * one.ratio) for side in PROTOCOL.base_scale))
    crop = PROTOCOL.crop_size
    image = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))
    label = np.asarray(Image.fromarray(label).resize(size[::-1], Image.Resampling.NEAREST))
    for y, x in one.offsets:
        top, left = int(y * (max(size[0] - crop, 0) + 1)), int(x * (max(size[1] - crop, 0) + 1))
        box = (slice(top, top + crop), slice(left, left + crop))
        counts = np.bincount(label[box].ravel(), minlength=256)[:255]
        if np.count_nonzero(counts) > 1 and counts.max() < 0.75 * counts.sum():
            break
    image, label = image[box], label[box]
    if one.flip:
        image, label = image[:, ::-1], label[:, ::-1]

    def change(image, factor, shift):
        return np.clip(image.astype(np.float32) * factor + shift, 0, 255).astype(np.uint8)

    if one.brightness:
        image = change(image, 1, one.brightness)
    if one.contrast_first and one.contrast != 1:
        image = change(image, one.contrast, 0)
    for saturation, hue in ((one.saturation, None), (None, one.hue)):
        if saturation is not None or hue is not None:
            hsv = np.array(Image.fromarray(np.ascontiguousarray(image)).convert("HSV"))
            if saturation is not None:
                hsv[..., 1] = change(hsv[..., 1], saturation, 0)
            else:
                hsv[..., 0] = (hsv[..., 0].astype(int) + hue) % 256
            image = np.array(Image.fromarray(hsv, "HSV").convert("RGB"))
    if not one.contrast_first and one.contrast != 1:
        image = change(image, one.contrast, 0)
    out, out_label = np.zeros((3, crop, crop), np.float32), np.full((crop, crop), 255, np.uint8)
    height, width = label.shape
    out[:, :height, :width] = (image.astype(np.float32).transpose(2, 0, 1) - 255 * mean) / (255 * std)
    out_label[:height, :width] = label
    return out, out_label


def compare_data_paths(batch_size, repeats):
    """Images per second on one CPU thread, ours and PIL and NumPy, on the same images and augmentations."""
    threads, cpu = torch.get_num_threads(), torch.device("cpu")
    torch.set_num_threads(1)
    split = Noise(batch_size, 209)
    store = PixelStore(split, PROTOCOL.base_scale, cpu, Path(), "cpu", 0, lambda line: None)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    images = [split.load(index) for index in range(batch_size)]
    batch, sizes = store.batch(range(batch_size), cpu)

    def ours(augmentations):
        training_batch(batch, sizes, augmentations, PROTOCOL.base_scale, PROTOCOL.crop_size, mean, std)

    def theirs(augmentations):
        for pair, one in zip(images, augmentations, strict=True):
            with_pil_and_numpy(*pair, one, mean[0].numpy(), std[0].numpy())

    seconds = {"ours": 0.0, "PIL and NumPy": 0.0}
    for iteration in range(repeats + 1):
        augmentations = [draw_augmentation(0, iteration, position) for position in range(batch_size)]
        for name, function in (("ours", ours), ("PIL and NumPy", theirs)):
            # Time of this thread: others may share the core.
            start = time.thread_time()
            function(augmentations)
            if iteration:
                seconds[name] += time.thread_time() - start
    torch.set_num_threads(threads)
    for name, value in seconds.items():
        count = repeats * batch_size
        print(f"data path on one CPU thread, {name}: {count / value:.1f} images/s")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, help="(default: 16, on a CPU 1)")
    parser.add_argument("--classes", type=int, default=209)
    parser.add_argument("--repeats", type=int, help="(default: 20, on a CPU 3)")
    parser.add_argument("--only-data", action="store_true", help="the comparison on the CPU and nothing else")
    args = parser.parse_args()
    args.batch_size = args.batch_size or (16 if args.device == "cuda" else 1)
    args.repeats = args.repeats or (20 if args.device == "cuda" else 3)
    compare_data_paths(4, min(args.repeats, 5))
    if args.only_data:
        return
    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device(args.device)
    encoder = build_model("ibot", "random").to(device)
    head = LinearHead(4 * encoder.embed_dim, args.classes)
    precision = "bf16" if device.type == "cuda" else "fp32"
    segmenter = Segmenter(encoder, head, (3, 5, 7, 11), precision).to(device).train()
    probe = LinearProbe(segmenter, [4e-4], [0.05], decay_bias=True, seed=0)
    store = PixelStore(Noise(16 if device.type == "cpu" else 64, args.classes), PROTOCOL.base_scale, device, Path(),
                       "cpu" if device.type == "cpu" else "gpu", 0, lambda line: None)

    def batches(count):
        return training_batches(store, range(count), args.batch_size, PROTOCOL.base_scale, PROTOCOL.crop_size,
                                encoder.mean, encoder.std, seed=0)

    def step(images, labels):
        probe.step(images, labels, args.batch_size, lambda lr: lr)

    endless = batches(10 ** 9)
    images, labels = next(endless)
    logits = segmenter.patch_logits(images)

    def loss():
        upsampled_cross_entropy(logits, labels, dtype=probe.loss_dtype).backward(retain_graph=True)

    stages = {"data": lambda: next(endless), "encoder and 1 x 1 convolution": lambda: segmenter.patch_logits(images),
              "loss and gradient": loss, "a step, all but the data": lambda: step(images, labels)}
    for name, function in stages.items():
        print(f"{name}: {milliseconds(function, device, args.repeats):.2f} ms at batch {args.batch_size}", flush=True)
    if device.type == "cuda":
        matrix = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
        rate = 2 * 8192 ** 3 / milliseconds(lambda: matrix @ matrix, device, args.repeats) / 1e9  # TFLOP per second
        print(f"floor: {1000 * ENCODER_TFLOP * args.batch_size / rate:.2f} ms of encoder at {rate:.0f} TFLOP/s in bf16")
        del matrix
        torch.cuda.reset_peak_memory_stats()
        for count in (20, 20 + 10 * args.repeats):  # the first to warm up
            start = time.perf_counter()
            for batch in prefetched(batches(count), device):
                step(*batch)
            torch.cuda.synchronize()
            spent = 1000 * (time.perf_counter() - start) / count
        print(f"training, everything together: {spent:.2f} ms an iteration, {spent * 160_000 / 60_000:.0f} minutes for "
              f"160,000; peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB, "
              f"{4 * store.pixels.numel() / 1e9:.1f} GB of it images")


if __name__ == "__main__":
    main()
