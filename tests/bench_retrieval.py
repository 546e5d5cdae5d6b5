"""How fast retrieval is, and what reduced precision costs; run by hand on a quiet machine:

    python tests/bench_retrieval.py ranking      ours against cosine similarity and scikit-learn, query by query
    python tests/bench_retrieval.py encoder      images per second, eager and compiled, against the matrix rate
    python tests/bench_retrieval.py timm         timm/vit_base_patch16_224 against the same network as deit, in turns
    python tests/bench_retrieval.py precision    AP at fp32, bf16, on CUDA fp16 (--model, --weights as retrieval.py)

Every figure stands beside the floor that this machine allows: operations over the rate of a plain product, and elements
over the rate of a plain sort, both measured here in the same run.
"""

import argparse
import resource
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score

sys.path.insert(0, str(Path(__file__).parent.parent))
from datasets.cub import load_cub
from datasets.synthetic import load_synthetic_patches
from models import build_model
from retrieval import average_precision, encode_patches, mean_average_precision
from utils.run import DTYPES, autocast

VIT_B_FLOP = 35.1e9  # ViT-B/16 at 224, one image, a multiplication and an addition counted as two


def seconds(function, device, repeats=3):
    """The best of several runs, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def matrix_rate(device, dtype, size):
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b, device)


def peak(device):
    if device.type == "cuda":
        return f"peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB on the device"
    return f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB of the process"


def ranking(device, sizes, sample):
    product_rate = matrix_rate(device, torch.float32, 8192 if device.type == "cuda" else 2048)
    row = torch.randn(64, 30000, device=device)
    sort = (lambda: row.sort(dim=1)) if device.type == "cuda" else (lambda: row.clone().numpy().sort(axis=1))
    sort_rate = row.numel() / seconds(sort, device)
    print(f"{device}: float32 products {product_rate / 1e12:.2f} TFLOP/s, sort {sort_rate / 1e9:.2f} G elements/s")
    for count in sizes:
        features = torch.randn(count, 768, generator=torch.Generator().manual_seed(0)).to(device)
        labels = torch.arange(count) % 4
        ours = seconds(lambda f=features, y=labels: average_precision(f, y), device, repeats=3 if count < 50000 else 1)
        floor = 2 * count**2 * 768 / product_rate, count**2 / sort_rate
        line = (f"N = {count:,} x 768, 4 classes: {ours:.3f} s; floor {floor[0]:.3f} s of products and "
                f"{floor[1]:.3f} s of sorting; {peak(device)}")
        if count <= 5000:
            queries = torch.randperm(count, generator=torch.Generator().manual_seed(1))[:sample].tolist()

            def plain(features=features, labels=labels, queries=queries):
                for query in queries:
                    similarity = F.cosine_similarity(features[query][None], features, dim=1)
                    average_precision_score((labels == labels[query]).numpy(), similarity.cpu().numpy())

            plain_time = seconds(plain, device) * count / sample
            line += f"; plain way {plain_time:.1f} s ({sample} queries, scaled): {plain_time / ours:.0f} times ours"
        print(line, flush=True)


def measured_precisions(device):
    """Those that the device multiplies in; a CPU would convert fp16, and many convert bf16."""
    if device.type == "cuda":
        return "fp32", "bf16", "fp16"
    if "bf16" in Path("/proc/cpuinfo").read_text():
        return "fp32", "bf16"
    print("this CPU has no bf16 instructions: what bf16 gains cannot be measured here")
    return ("fp32",)


def encoder(device, batch, compiled):
    model = build_model("ibot", "random", projector=False).to(device)
    images = torch.randint(0, 256, (batch, 3, 224, 224), dtype=torch.uint8).to(device)
    precisions, first = measured_precisions(device), None
    size = 8192 if device.type == "cuda" else 2048
    rates = {precision: matrix_rate(device, DTYPES[precision], size) for precision in precisions}
    print(f"{device}: ViT-B/16 at 224, batches of {batch}; products of matrices, TFLOP/s: "
          + ", ".join(f"{precision} {rate / 1e12:.2f}" for precision, rate in rates.items()))
    for way in ("eager", "compiled") if compiled else ("eager",):
        if way == "compiled":
            for block in model.vit.blocks:
                block.forward = torch.compile(block.forward, dynamic=True)
        for precision, rate in rates.items():

            def forward(precision=precision):
                with torch.inference_mode(), autocast(device, precision):
                    model(model.preprocess(images))

            per_second = batch / seconds(forward, device)
            first = first or per_second
            print(f"{precision} {way}: {per_second:,.1f} images/s, {per_second / first:.2f} times fp32 eager, "
                  f"{100 * per_second * VIT_B_FLOP / rate:.0f}% of the rate of products; {peak(device)}", flush=True)


def timm_path(device, batch, rounds=7):
    """The best of several rounds in which both take a turn, and how much the process worked: other processes come and
    go, and CPU seconds hardly see them."""
    ours, theirs = (build_model(name, "random").to(device) for name in ("deit", "timm/vit_base_patch16_224"))
    theirs.vit.load_state_dict(ours.vit.state_dict())
    images, times = torch.randn(batch, 3, 224, 224, device=device), {"deit": [], "timm": []}
    with torch.inference_mode():
        difference = float((ours(images) - theirs(images)).abs().max())
        for _ in range(rounds):
            for name, model in (("deit", ours), ("timm", theirs)):
                cpu = time.process_time()
                wall = seconds(lambda model=model: model(images), device, repeats=1)
                times[name].append((wall, time.process_time() - cpu))
    (wall, cpu), (our_wall, our_cpu) = ([min(column) for column in zip(*times[name], strict=True)]
                                        for name in ("timm", "deit"))
    print(f"{device}: timm/vit_base_patch16_224 {wall:.3f} s for {batch} images, {wall / our_wall:.3f} times deit's; "
          f"CPU seconds {cpu / our_cpu:.3f} times; largest difference of a token {difference:.1e}")


def precision(device, model, weights, num_heads, data_path, num_images):
    dataset = load_cub(data_path) if data_path else load_synthetic_patches("train", num_images)
    network = build_model(model, weights, num_heads).to(device)
    names = ["cls", "avg"] + ["projected"] * network.has_projector
    reference = None
    for name in ("fp32", "bf16", "fp16") if device.type == "cuda" else ("fp32", "bf16"):
        features = encode_patches(network, dataset, names, 64, 0, name)
        ap = {key: mean_average_precision(average_precision(rows, dataset.labels), dataset.labels)[0]
              for key, rows in features.items()}
        reference = reference or ap
        figures = ", ".join(f"{key} {ap[key]:.3f} ({ap[key] - reference[key]:+.3f})" for key in ap)
        print(f"{model} {weights} {name}: {figures} on {dataset.num_patches} patches", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("ranking", "encoder", "timm", "precision"))
    parser.add_argument("--sizes", type=int, nargs="+", help="rows (default: 4000; on CUDA 30543 and 150000 too)")
    parser.add_argument("--sample", type=int, default=50, help="queries of the plain way")
    parser.add_argument("--batch-size", type=int, help="(default: 4, on CUDA 512)")
    parser.add_argument("--compiled", action="store_true", help="torch.compile too: minutes on a CPU")
    parser.add_argument("--model", default="ibot")
    parser.add_argument("--weights", default="random")
    parser.add_argument("--num-heads", type=int)
    parser.add_argument("--data-path", help="CUB_200_2011 (default: synthetic)")
    parser.add_argument("--num-images", type=int, help="(default: 60, on a CPU 6)")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.what == "ranking":
        ranking(device, args.sizes or ([4000, 30543, 150000] if device.type == "cuda" else [4000]), args.sample)
    elif args.what == "encoder":
        encoder(device, args.batch_size or (512 if device.type == "cuda" else 4), args.compiled)
    elif args.what == "timm":
        timm_path(device, args.batch_size or (256 if device.type == "cuda" else 2))
    else:
        precision(device, args.model, args.weights, args.num_heads, args.data_path,
                  args.num_images or (60 if device.type == "cuda" else 6))


if __name__ == "__main__":
    main()
