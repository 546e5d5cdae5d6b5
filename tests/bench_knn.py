"""How long the neighbours of dense nearest-neighbour segmentation take, beside the plain way, and what it all costs.

    python tests/bench_knn.py                                     on a GPU: 32,768 queries, 262,144 patches in memory
    python tests/bench_knn.py --device cpu                        1,024 queries, 32,768 patches

The plain way holds all similarities of the queries and takes torch.topk of them. Vectors are noise around common
directions, so that neighbours are close as those of real patches are. Not a test: pytest does not collect it.
"""

import argparse
import sys
import time
from pathlib import Path
from threading import Event, Thread

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from datasets.segmentation import PROTOCOLS
from models.knn_segmentation import NEIGHBOURS, SEARCH_BYTES, nearest
from segment import window_boxes

# The whole task: ADE20K's test images at their usual size, ViT-B/16, memory as in the publication.
IMAGES, SIZE, MEMORY, WIDTH, PATCH, CROP_TFLOP = 2000, (512, 683), 1_024_000, 768, 16, 3.47 / 16
# Of an H200, per second: float32 without TF32, bf16, bytes.
FLOAT32, BFLOAT16, BANDWIDTH = 60e12, 790e12, 4.8e12


def directions(count, width, device, seed):
    generator = torch.Generator(device).manual_seed(seed)
    centres = torch.randn(200, width, generator=torch.Generator(device).manual_seed(99), device=device)
    chosen = centres[torch.randint(0, 200, (count,), generator=generator, device=device)]
    return F.normalize(chosen + torch.randn(count, width, generator=generator, device=device), dim=1)


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def measured(function, device):
    """What function returns when it is called for the second time, its seconds, and the most bytes it took beside what
    was there: allocated on CUDA; on a CPU of the process, looked at every 2 ms."""
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if device.type == "cuda" else resident()
    done, peaks = Event(), [before]

    def watch():
        while not done.wait(0.002):
            peaks.append(resident())

    if device.type == "cpu":
        Thread(target=watch).start()
    start = time.perf_counter()
    result = function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    done.set()
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else max(peaks)
    return result, seconds, peak - before


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--queries", type=int, help="(default: 32768, on a CPU 1024)")
    parser.add_argument("--memory-size", type=int, help="(default: 262144, on a CPU 32768)")
    args = parser.parse_args()
    args.queries = args.queries or (32_768 if args.device == "cuda" else 1024)
    args.memory_size = args.memory_size or (262_144 if args.device == "cuda" else 32_768)
    device = torch.device(args.device)
    queries, memory = (directions(count, WIDTH, device, seed)
                       for seed, count in enumerate((args.queries, args.memory_size)))
    print(f"{args.queries} queries, {args.memory_size} patches in memory, width {WIDTH}, {NEIGHBOURS} neighbours, "
          f"{device}, {torch.get_num_threads()} threads")
    (_, plain), seconds, peak = measured(lambda: (queries @ memory.T).topk(NEIGHBOURS, dim=1), device)
    print(f"plain: {seconds:.2f} s, {peak / 1e9:.2f} GB")
    (_, ours), seconds, peak = measured(lambda: nearest(queries, memory, NEIGHBOURS), device)
    print(f"ours:  {seconds:.2f} s, {peak / 1e9:.2f} GB (predicted: at most {SEARCH_BYTES[device.type] / 1e9:.2f} GB)")
    same = (plain.sort(1).values == ours.sort(1).values).all(1).double().mean().item()
    print(f"the same neighbours: {100 * same:.3f} % of the queries (the plain way rounds, ours is exact)")

    protocol = PROTOCOLS["ade20k"]
    windows = len(window_boxes(*SIZE, protocol.crop_size, protocol.stride))
    patches = IMAGES * windows * (protocol.crop_size // PATCH) ** 2
    flop = 2 * patches * MEMORY * WIDTH
    rate = args.queries * args.memory_size / seconds
    print(f"\n{IMAGES} images of {SIZE[0]} x {SIZE[1]} ({windows} windows, {patches // IMAGES} queries each) against "
          f"{MEMORY} patches: {flop / 1e15:.2f} PFLOP\nat the speed measured here: {patches * MEMORY / rate:.0f} s\n"
          "floor of an H200, an estimate:")
    for what, cost in (("float32 products", flop / FLOAT32), ("(in bf16 they would take)", flop / BFLOAT16),
                       ("similarities written once and read once", 8 * patches * MEMORY / BANDWIDTH),
                       ("float64 comparison of 64 candidates", 24 * 64 * patches * WIDTH / BANDWIDTH),
                       ("encoder, bf16", IMAGES * windows * CROP_TFLOP * 1e12 / BFLOAT16)):
        print(f"    {what}: {cost:.1f} s")
    print(f"    memory: {4e-9 * MEMORY * (WIDTH + 150):.2f} GB of patches and labels, "
          f"{SEARCH_BYTES['cuda'] / 1e9:.2f} GB of a search; all similarities would be "
          f"{4e-12 * patches * MEMORY:.0f} TB")


if __name__ == "__main__":
    main()
