"""How long the neighbours of dense nearest-neighbour segmentation take, beside the plain way, and what it all costs.

    python tests/bench_knn.py                                     on a GPU: 32,768 queries, 262,144 patches in memory
    python tests/bench_knn.py --device cpu                        1,024 queries, 32,768 patches

The plain way holds all similarities of the queries and takes torch.topk of them. Vectors are noise around common
directions, so that neighbours are close as those of real patches are. Not a test: pytest does not collect it.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from models.knn_segmentation import NEIGHBOURS, nearest

# The whole task: ADE20K's 2,000 test images at their usual size, 512 x 683, two windows of 1,024 patches in each;
# ViT-B/16, memory as in the publication.
QUERIES, MEMORY, WIDTH = 2000 * 2 * 1024, 1_024_000, 768
# Of an H200, per second: products in float32 without TF32 and in bf16, bytes.
RATES, BANDWIDTH = {"float32": 60e12, "bfloat16": 790e12}, 4.8e12

WAYS = {"plain": lambda queries, memory: (queries @ memory.T).topk(NEIGHBOURS, dim=1),
        "ours": lambda queries, memory: nearest(queries, memory, NEIGHBOURS)}


def directions(count, device, dtype, seed):
    generator = torch.Generator(device).manual_seed(seed)
    centres = torch.randn(200, WIDTH, generator=torch.Generator(device).manual_seed(99), device=device)
    chosen = centres[torch.randint(0, 200, (count,), generator=generator, device=device)]
    return F.normalize(chosen + torch.randn(count, WIDTH, generator=generator, device=device), dim=1).to(dtype)


def seconds_of(function, device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--queries", type=int, help="(default: 32768, on a CPU 1024)")
    parser.add_argument("--memory-size", type=int, help="(default: 262144, on a CPU 32768)")
    args = parser.parse_args()
    device = torch.device(args.device)
    count, size = args.queries, args.memory_size
    count, size = (count or 32_768, size or 262_144) if device.type == "cuda" else (count or 1024, size or 32_768)
    for dtype in (torch.float32, torch.bfloat16)[:1 + (device.type == "cuda")]:
        queries, memory = (directions(number, device, dtype, seed) for seed, number in enumerate((count, size)))
        # In turns, as a machine may slow down or be shared; the first time is for nothing.
        times = {way: [] for way in WAYS}
        for _ in range(6):
            for way, function in WAYS.items():
                times[way].append(seconds_of(partial(function, queries, memory), device))
        times = {way: found[1:] for way, found in times.items()}
        print(f"{count} queries, {size} patches in memory, width {WIDTH}, {NEIGHBOURS} neighbours, {dtype}, {device}, "
              f"{torch.get_num_threads()} threads: "
              + ", ".join(f"{way} {min(found):.2f} s (median {sorted(found)[2]:.2f})" for way, found in times.items()))
        print(f"    of the whole task, at this speed: {min(times['ours']) * QUERIES * MEMORY / count / size:.0f} s")

    print(f"counted for an H200, not measured, {QUERIES} queries against {MEMORY} patches, "
          f"{2e-15 * QUERIES * MEMORY * WIDTH:.2f} PFLOP:")
    for name, rate in RATES.items():
        size = torch.finfo(getattr(torch, name)).bits // 8
        once = size * QUERIES * MEMORY / BANDWIDTH
        print(f"    {name}: products {2 * QUERIES * MEMORY * WIDTH / rate:.1f} s, similarities written {once:.1f} s, "
              f"each time that topk reads them {once:.1f} s; memory {1e-9 * size * MEMORY * WIDTH:.1f} GB")


if __name__ == "__main__":
    main()
