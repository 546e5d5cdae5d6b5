"""How long probing takes: the plain way (encode every epoch, textbook heads), two epochs scaled, against classify.py.

    python tests/bench_classify.py                                  on a GPU the size of CUB, from JPEG files drawn here
    python tests/bench_classify.py --images 90                      on a CPU minutes (by default 10 images)
    python tests/bench_classify.py --data-path CUB_200_2011         a real data set in place of drawn files

Prints one table, the floors beside it, and memory peaks. Aims: at least 50 times for each probe; ours at most 1.3
(linear) and 1.6 (attentive) times one pass over train and test; on an H200 both probes on CUB's size in under 60 s.

Our recipe's grid of linear heads, counted: 100,000 images of 1,000 classes at width 768, a tenth of them held out, are
73.9 TFLOP in 30 epochs, logits and gradients of nine heads' weights: 430 s at the 0.17 TFLOP/s that two cores of an
EPYC reach in float32 (0.087 each, measured by their processor time), 2% of a ViT-B's 3,510 TFLOP for these images.
"""

import argparse
import json
import math
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

import classify
from datasets.classification import open_classification
from models import build_model
from models.features import ENCODE_BATCH, encode_tokens
from models.probe_training import RECIPES, batch_and_epochs
from utils.run import DTYPES

PARTS = {9: (180, 130), 11: (290, 130), 12: (180, 245), 14: (290, 245)}


def draw_cub(root: Path, count: int) -> None:
    """A folder in CUB's layout: JPEG files of 500 x 375 clouds, 2.6 patches an image (CUB: 2.60), 56% for training."""
    chance = np.random.default_rng(0)
    folder = root / "images" / "001.Cloud"
    folder.mkdir(parents=True)
    (root / "parts").mkdir()
    rows, names, split = [], [], []
    for image in range(1, count + 1):
        small = Image.fromarray(chance.integers(0, 255, (12, 16, 3), dtype=np.uint8))
        small.resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{image}.jpg", quality=90)
        visible = 2 if image % 5 < 2 else 3
        chosen = set(chance.permutation(list(PARTS))[:visible].tolist())
        for part, (x, y) in PARTS.items():
            x, y = x + int(chance.integers(-20, 21)), y + int(chance.integers(-20, 21))
            rows.append(f"{image} {part} {x}.0 {y}.0 {int(part in chosen)}\n")
        names.append(f"{image} 001.Cloud/{image}.jpg\n")
        split.append(f"{image} {int(image * 0.56 % 1 < 0.56)}\n")
    (root / "images.txt").write_text("".join(names))
    (root / "train_test_split.txt").write_text("".join(split))
    (root / "parts" / "parts.txt").write_text("9 left wing\n11 right eye\n12 right leg\n14 tail\n")
    (root / "parts" / "part_locs.txt").write_text("".join(rows))


class TextbookAttentive(nn.Module):
    """The attentive head as it is usually written: keys and values of every token."""

    def __init__(self, width: int, num_heads: int, num_classes: int):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.q, self.v, self.proj = (nn.Linear(width, width) for _ in range(3))
        self.k = nn.Linear(width, width, bias=False)
        self.batch_norm = nn.BatchNorm1d(width, affine=False)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, tokens):
        query = self.q(self.norms[0](self.query)).expand(len(tokens), -1, -1)
        q, k, v = (x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
                   for x in (query, self.k(self.norms[1](tokens)), self.v(self.norms[2](tokens))))
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(1)
        return self.fc(self.batch_norm(self.proj(x)))


def plain_way(encoder, train, test, precision, workers, batch_size, device, now, epochs=2):
    """Seconds of an epoch's encoding, linear head and attentive head, the images encoded anew in every epoch."""
    width, classes = encoder.embed_dim, len(train.classes)
    heads = {"linear": nn.Linear(width, classes), "attentive": TextbookAttentive(width, encoder.num_heads, classes)}
    heads = {name: head.to(device) for name, head in heads.items()}
    optimizers = {name: torch.optim.SGD(head.parameters(), lr=0.01, momentum=0.9) for name, head in heads.items()}
    seconds = dict.fromkeys(("encoding", *heads), 0.0)

    def clock():
        if device.type == "cuda":
            torch.cuda.synchronize()
        return now()

    def apply(dataset, tokens, ids, learn):
        for name, head in heads.items():
            start = clock()
            x = tokens.clone().float()
            with torch.set_grad_enabled(learn):
                logits = head(x[:, 0] if name == "linear" else x)
                if learn:
                    F.cross_entropy(logits, dataset.labels[ids].to(device)).backward()
                    optimizers[name].step()
                    optimizers[name].zero_grad()
            seconds[name] += clock() - start

    for _ in range(epochs):
        for dataset, learn in ((train, True), (test, False)):
            for head in heads.values():
                head.train(learn)
            start, waiting, heads_before = clock(), [], seconds["linear"] + seconds["attentive"]
            order = torch.randperm(len(dataset)).tolist() if learn else range(len(dataset))
            for patches, ids in dataset.batches(order, min(batch_size, ENCODE_BATCH[device.type]), workers,
                                              pin_memory=device.type == "cuda"):
                waiting.append((encode_tokens(encoder, patches.to(device, non_blocking=True), precision)[1], ids))
                if sum(len(ids) for _, ids in waiting) >= batch_size or not learn:
                    apply(dataset, torch.cat([tokens for tokens, _ in waiting]),
                          torch.cat([ids for _, ids in waiting]), learn)
                    waiting = []
            if waiting:
                apply(dataset, torch.cat([tokens for tokens, _ in waiting]),
                      torch.cat([ids for _, ids in waiting]), learn)
            spent = seconds["linear"] + seconds["attentive"] - heads_before
            seconds["encoding"] += clock() - start - spent
    return {name: value / epochs for name, value in seconds.items()}


def ours(words, output, now):
    """Seconds of classify.py end to end, and what it says of their parts."""
    sys.argv = ["classify.py", *map(str, words), "--output-dir", str(output)]
    start = now()
    classify.main()
    total = now() - start
    result = json.loads((output / "results.jsonl").read_text().splitlines()[-1])
    return {"total": total, "features": result["seconds_features"], "training": result["seconds_training"]}


def matrix_rate(device, dtype, now):
    """FLOP/s of a large matrix product, by the clock now."""
    side = 8192 if device.type == "cuda" else 2048
    a = torch.randn(side, side, device=device, dtype=dtype)
    best = math.inf
    for _ in range(5):
        start = now()
        (a @ a)[0, 0].item()
        best = min(best, now() - start)
    return 2 * side**3 / best


def grid_operations(num_images: int, num_classes: int, width: int) -> float:
    """Of the linear grid's training by our recipe: logits and gradients of the weights, a product each."""
    recipe, num_train = RECIPES["ours"]["linear"], num_images - num_images // 10
    size, epochs = batch_and_epochs(recipe, num_train)
    return 4.0 * epochs * (num_train // size) * size * num_classes * width * len(recipe.rates)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--data-path", type=Path, help="a folder CUB_200_2011; without it files are drawn")
    parser.add_argument("--images", type=int, default=11_730 if cuda else 10, help="to draw (default: %(default)s)")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--epochs", type=int, default=90)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--workers", type=int, default=16 if cuda else 1)
    parser.add_argument("--processor-time", action="store_true",
                        help="totals in seconds of this process's processor time, for a CPU that others use too")
    args = parser.parse_args()
    now, args.workers = (time.process_time, 0) if args.processor_time else (time.monotonic, args.workers)
    device = torch.device("cuda" if cuda else "cpu")
    precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
    with tempfile.TemporaryDirectory() as folder:
        root = args.data_path
        if root is None:
            root = Path(folder) / "CUB_200_2011"
            draw_cub(root, args.images)
        train, test = open_classification("cub", root)
        batch_size = args.batch_size or min(1024, train.num_patches)
        words = ["--model", "ibot", "--weights", "random", "--dataset", "cub", "--data-path", root, "--precision",
                 precision, "--workers", args.workers, "--epochs", args.epochs, "--batch-size", batch_size]
        encoder = build_model("ibot", "random", projector=False).to(device)
        encode_tokens(encoder, torch.zeros(2, 3, 224, 224, dtype=torch.uint8, device=device), precision)
        epoch = plain_way(encoder, train, test, precision, args.workers, batch_size, device, now)
        rows = {}
        for name, probes in (("linear", ["linear"]), ("attentive", ["attentive"]), ("both", ["linear", "attentive"])):
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            rows[name] = ours([*words, "--probe", *probes], Path(folder) / name, now)
            rows[name]["plain"] = args.epochs * (epoch["encoding"] + sum(epoch[probe] for probe in probes))
            rows[name]["memory"] = torch.cuda.max_memory_allocated() / 1e9 if cuda else 0

    patches = train.num_patches + test.num_patches
    machine = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"\n{machine}, ViT-B/16, {precision}, {train.num_patches} + {test.num_patches} patches, {args.epochs} "
          f"epochs, batch {batch_size}{', processor time' if args.processor_time else ''}")
    print(f"one pass over train and test, the encoder alone as the plain way runs it: {epoch['encoding']:.1f} s "
          f"({patches / epoch['encoding']:.1f} patches/s)")
    print("| probe | plain way, s | ours, s | times faster | of one pass | features, s (wall) | training, s (wall) | "
          "GPU peak, GB |\n"
          "| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, row in rows.items():
        print(f"| {name} | {row['plain']:.0f} | {row['total']:.1f} | {row['plain'] / row['total']:.1f} | "
              f"{row['total'] / epoch['encoding']:.2f} | {row['features']:.1f} | {row['training']:.1f} | "
              f"{row['memory']:.2f} |")
    rate = matrix_rate(device, DTYPES[precision], now)
    size = train.num_patches * 197 * 768 * (4 if precision == "fp32" else 2)
    print(f"floor of the encoder: {patches} x 35.1 GFLOP at the measured {rate / 1e12:.2f} TFLOP/s = "
          f"{patches * 35.1e9 / rate:.1f} s; tokens read per training epoch: {size / 1e9:.2f} GB; "
          f"host memory peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")
    rate, count = matrix_rate(device, torch.float32, now), grid_operations(100_000, 1000, 768)
    print(f"floor of our linear grid, 100,000 images, 1,000 classes, width 768: {count / 1e12:.1f} TFLOP at the "
          f"measured {rate / 1e12:.2f} TFLOP/s in float32 = {count / rate:.1f} s")


if __name__ == "__main__":
    main()
