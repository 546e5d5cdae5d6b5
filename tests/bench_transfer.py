"""How fast keypoint transfer is; run by hand on a quiet machine:

    python tests/bench_transfer.py                        ours against the plain way, on 200 pairs of 20 drawn images
    python tests/bench_transfer.py --model dino --size 768

The plain way, which public code goes in whole or in part: for every pair both images are encoded anew, their features
are upsampled to pixels, and every keypoint is compared with every pixel. Its images are read beforehand, ours are read
within the time. Beside it, the count of operations and bytes for all of SPair-71k's test split, and what they would
take on an H200: an estimate, nothing was measured there.
"""

import argparse
import io
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
from datasets.pairs import PairDataset, draw, load_synthetic_pairs
from models import build_model
from models.transfer import match_points, transfer_run
from utils.run import autocast

# SPair-71k, test; and assumed of an H200: operations per second in bf16, bytes per second, cores that decode.
IMAGES, POINTS = 1800, 88000
BF16_RATE, BANDWIDTH, CORES = 200e12, 4e12, 16


def timed(function, device):
    start = time.perf_counter()
    result = function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


@torch.inference_mode()
def plain_way(encoder, pairs, pixels_of, numbers, precision, device):
    predicted = []
    for number in numbers:
        maps = []
        for image in (pairs.source[number], pairs.target[number]):
            pixels = pixels_of[int(image)].to(device)
            with autocast(device, precision):
                tokens = encoder.get_intermediate_layers(encoder.preprocess(pixels), n=[encoder.depth - 1], norm=True)
            maps.append(F.interpolate(tokens[0].float(), pixels.shape[-2:], mode="bilinear")[0])
        size, at = maps[0].shape[-1], pairs.pair == number
        scale = size / pairs.sizes[pairs.source[number]]
        column, row = (pairs.source_points[at] * scale).long().clamp(0, size - 1).unbind(1)
        target = F.normalize(maps[1].flatten(1), dim=0)
        best = (F.normalize(maps[0][:, row, column], dim=0).T @ target).argmax(1).cpu()
        predicted.append(torch.stack([best % size, best // size], 1) * pairs.sizes[pairs.target[number]] / size)
    return torch.cat(predicted)


def spair_count(width, depth, patch, size):
    cells = (size // patch) ** 2
    encoding = IMAGES * (depth * (24 * (cells + 1) * width**2 + 4 * (cells + 1) ** 2 * width) + 6 * cells * patch**2
                         * width)
    matching, tokens = 2 * POINTS * cells * width, IMAGES * cells * width * 2
    noise = Image.effect_noise((500, 375), 60).convert("RGB")
    file = io.BytesIO()
    noise.save(file, "JPEG", quality=90)
    decode = min(timed(lambda: Image.open(file).convert("RGB").resize((size, size), Image.BILINEAR),
                       torch.device("cpu"))[0] for _ in range(5))
    steps = {"encoding": encoding / BF16_RATE, "matching": matching / BF16_RATE + 6 * tokens / BANDWIDTH,
             "decoding": IMAGES * decode / CORES}
    print(f"SPair-71k, test, at {size}, width {width}, {depth} blocks: encoding {encoding / 1e12:,.0f} TFLOP; of one "
          f"block, matching {matching / 1e12:.2f} TFLOP, tokens {tokens / 1e9:.1f} GB in bf16; decoding "
          f"{IMAGES * decode:.0f} s of one core of this machine")
    print("estimate for an H200, not measured: " + ", ".join(f"{name} {value:.1f} s" for name, value in steps.items())
          + f", together {sum(steps.values()):.0f} s where nothing overlaps, and starting up")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="timm/vit_tiny_patch16_224")
    parser.add_argument("--weights", default="random")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--sample", type=int, default=20, help="pairs of the plain way, scaled to 200")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision, encoder = ("bf16" if device.type == "cuda" else "fp32"), build_model(args.model, args.weights).to(device)
    every = load_synthetic_pairs(args.size, 10**9, num_images=120)
    first = sorted({pair.source for pair in every.pairs if pair.category == every.pairs[0].category})[:20]
    among = [pair for pair in every.pairs if pair.source in first and pair.target in first]
    load = every.images.load
    pairs = PairDataset(draw(among, 200, 0), args.size, lambda number: load(number).size, load)
    pixels = [item[0] for item in pairs.images]
    last = [encoder.depth - 1]

    def ours():
        return transfer_run(encoder, pairs, last, True, 64, 0, precision, lambda line: None)[1]

    plain_way(encoder, pairs, pixels, [0], precision, device)
    ours()
    own, predicted = min((timed(ours, device) for _ in range(2)), key=lambda pair: pair[0])
    sample = list(range(0, 200, 200 // args.sample))
    plain, theirs = timed(lambda: plain_way(encoder, pairs, pixels, sample, precision, device), device)
    cells = args.size // encoder.patch_size
    near = (predicted[torch.isin(pairs.pair, torch.tensor(sample))] - theirs).abs()
    near = (near <= 1.5 * (pairs.sizes.max() / cells)).all(1).double().mean()
    plain *= 200 / len(sample)
    print(f"{device}, {precision}, {args.model} at {args.size}: 200 pairs of {len(pairs.images)} images, "
          f"{len(pairs.pair)} points: ours {own:.2f} s, the plain way {plain:.1f} s ({len(sample)} pairs, scaled): "
          f"{plain / own:.0f} times ours; {100 * near:.0f}% of the predictions within 1.5 cells of each other")
    tokens = torch.randn(1, 20, encoder.embed_dim, cells, cells, device=device)
    numbers = torch.arange(len(pairs.pair)) % 20
    match, _ = timed(lambda: match_points(tokens, numbers, numbers, torch.rand(len(numbers), 2)), device)
    print(f"of ours, matching takes {match:.3f} s; the floor is encoding {len(pairs.images)} images, the plain way "
          "encodes 400")
    spair_count(768, 12, 16, 768)


if __name__ == "__main__":
    main()
