"""Parts found by similarity alone: retrieval of part patches, keypoint transfer between images, picture sheets.

    python retrieval.py --model ibot --weights random                     nothing downloaded: synthetic data, control
    python retrieval.py --model ibot --dataset cub --data-path CUB_200_2011
    torchrun --nproc-per-node 8 retrieval.py --model dino --dataset coco --data-path coco
    python retrieval.py --model mae --dataset imagenet --data-path imagenet/val --queries 10     picture sheets
    python retrieval.py --model ibot --dataset spair --data-path SPair-71k --image-size 768      keypoint transfer
    python retrieval.py --table                                           the paper's table 3 beside our results

Protocol of retrieval: paper, section 4.2 and table 3 (left); sheets: figures 2, 4, 7 and 8. Final normalised tokens, no
training, cosine similarity; "encoded" is the better of the class token and the mean of the patch tokens. Keypoint
transfer and principal components are not in the paper: models/transfer.py and models/pca.py say how they are measured.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from datasets.pairs import PAIR_DATASETS, load_pairs
from datasets.patches import PatchDataset
from datasets.retrieval import RETRIEVAL_DATASETS, open_images, open_retrieval
from datasets.sheets import write_sheets
from models import METHODS, WITH_PROJECTOR, Encoder, choose_layers, load_encoder
from models.pca import pca_run
from models.transfer import ALPHAS, draw_pairs, transfer_run
from models.transfer import transfer_keypoints as transfer_keypoints
from utils import UserError, results, run
from utils.distributed import all_reduce, gather_rows, is_main, shard, world_size
from utils.drawing import draw_curves, require_matplotlib
from utils.storage import atomic_write, free_memory, load, save
from utils.tables import paper_tables

# What made the features, as keys of a results line of their own; and what a file of features holds.
PROTOCOL = ("crop_scale", "image_size", "keypoints", "authors_defects")
FEATURE_FILE = ("features", "labels", "classes", "paths", "data", "line")


def average_precision(features: torch.Tensor, labels: torch.Tensor, *, queries: torch.Tensor | None = None,
                      exclude_query: bool = False, device: torch.device | None = None) -> torch.Tensor:
    """Average precision of rows as queries, by cosine similarity in float32 against all rows.

    features [N, D], any float type, on any device, or an array; labels [N], integers: rows of the query's class are
    positives. queries: row numbers [Q], all N rows by default. exclude_query: leave a query out of its own ranking (the
    published code counts it, as a positive). device: where to compute, by default where the features are. N x N is
    never held.

    Returns AP [Q], float64 on the CPU, in the sense of scikit-learn's average_precision_score: equal similarities share
    a threshold. NaN where a query has no positive left. Raises ValueError for features that are not finite.
    """
    features, labels = torch.as_tensor(features), torch.as_tensor(labels).cpu()
    device = torch.device(device or features.device)
    features = features.to(device, torch.float32)
    queries = torch.arange(len(features)) if queries is None else torch.as_tensor(queries).cpu()
    result = torch.full((len(queries),), float("nan"), dtype=torch.float64)
    if len(queries) == 0:
        return result
    # Rows sorted by class: the positives of a query are one slice of its similarities.
    order = labels.argsort(stable=True)
    position = order.argsort()
    norms = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    if not norms.isfinite().all():
        raise ValueError("features are not finite: a row holds NaN or infinity")
    features = (features / norms.clamp_min(1e-12))[order.to(device)]

    for label in labels[queries].unique():
        start = int((labels < label).sum())
        stop = start + int((labels == label).sum())
        for chunk in (labels[queries] == label).nonzero()[:, 0].split(rows_per_chunk(len(features), device)):
            at = position[queries[chunk]].to(device)
            similarity = features[at] @ features.T
            if exclude_query:
                # Below every cosine, so that it is the last of the positives, which the ranking then skips.
                similarity[torch.arange(len(chunk), device=device), at] = -1.5
            rank = ranked_precision_cpu if device.type == "cpu" else ranked_precision
            result[chunk] = rank(similarity, start, stop, skip=int(exclude_query)).cpu()
    return result


def rows_per_chunk(count: int, device: torch.device) -> int:
    """Queries whose similarities to `count` rows, and what ranking them takes, fit in half of the free memory."""
    # Per similarity: itself, sorted values, sorted indices and the sort's own copies; on CPU only itself.
    bytes_each = 64 if device.type == "cuda" else 8
    fit = int(free_memory(device) / 2 / (count * bytes_each))
    # Beyond these, larger chunks gain nothing: a product of 256 rows keeps CPU cores busy, one of 2^28 entries a GPU.
    enough = 2**28 // count if device.type == "cuda" else 256
    return max(1, min(fit, enough))


def ranked_precision(similarity: torch.Tensor, start: int, stop: int, skip: int) -> torch.Tensor:
    """AP [Q] of queries with similarities [Q, N] whose positives are the columns start to stop; float64.

    A positive's precision counts all that is at least as similar: AP is the mean over positives of (positives at or
    above it) / (rows at or above it), which is scikit-learn's sum over thresholds, ties included. skip: of the
    positives, leave out that many of the least similar (a query that was put there to be excluded).
    """
    everything = similarity.sort(dim=1).values
    positives = similarity[:, start:stop].sort(dim=1).values
    above = similarity.shape[1] - torch.searchsorted(everything, positives)
    positives_above = positives.shape[1] - torch.searchsorted(positives, positives)
    return (positives_above / above.double())[:, skip:].mean(dim=1)


def ranked_precision_cpu(similarity: torch.Tensor, start: int, stop: int, skip: int) -> torch.Tensor:
    """ranked_precision of similarities in (-2, 2) for the CPU, where NumPy's sort of plain integers is the fast one."""
    count, positives = similarity.shape[1], stop - start
    numbers = np.arange(positives)

    def rank(rows: np.ndarray) -> np.ndarray:
        # Whole numbers in the order of the floats (-0 made 0). Below 2 in size they take 31 bits: a lowest bit fits in
        # that is 0 for positives and 1 for others, so one sort without indices does, positives first among equals.
        keys = (rows + 0.0).view(np.int32)
        keys ^= (keys >> 31) & 0x7FFFFFFF
        keys <<= 1
        keys |= 1
        keys[:, start:stop] -= 1
        keys.sort(axis=1)
        at = np.flatnonzero((keys & 1) == 0)
        values = keys.ravel()[at].reshape(len(rows), positives)
        below = at.reshape(len(rows), positives) - count * np.arange(len(rows))[:, None]
        first = numbers
        new = values[:, 1:] != values[:, :-1]
        if not new.all():
            # Equal positives share a threshold: all take the place of the first of them.
            first = np.zeros_like(below)
            np.maximum.accumulate(numbers[1:] * new, axis=1, out=first[:, 1:])
            below = np.take_along_axis(below, first, axis=1)
        return ((positives - first) / (count - below))[:, skip:].mean(axis=1)

    # As many rows as a core's second-level cache holds.
    rows = max(1, 2**17 // count)
    if positives == skip:
        return torch.full((len(similarity),), float("nan"), dtype=torch.float64)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        chunks = np.split(similarity.numpy(), range(rows, len(similarity), rows))
        return torch.from_numpy(np.concatenate(list(pool.map(rank, chunks))))


def random_ranking_ap(count: int, positives: int, exclude_query: bool) -> float:
    """The expected AP of a query whose class has `positives` of `count` rows where the others come in random order;
    unless excluded, the query itself, a positive, comes first. NaN where no positive is left."""
    first, others, hits = int(not exclude_query), count - 1, positives - 1
    if first + hits == 0:
        return float("nan")
    ranks = torch.arange(1, others + 1, dtype=torch.float64)
    # Of the rows above a positive, each is one with this probability.
    above = first + 1 + (ranks - 1) * (hits - 1) / max(1, others - 1)
    return (first + hits / max(1, others) * float((above / (first + ranks)).sum())) / (first + hits)


def mean_average_precision(ap: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Per-query AP [Q] and classes [Q] -> (AP, mAP) in percent: the mean over queries, and over classes of the class
    means. Queries without a positive (NaN) are left out; NaN where none is left."""
    classes = [ap[labels == label].nanmean() for label in labels.unique()]
    return 100 * float(ap.nanmean()), 100 * float(torch.stack(classes).nanmean()) if classes else float("nan")


def encode_patches(encoder: Encoder, dataset: PatchDataset, features: Sequence[str], batch_size: int, workers: int,
                   precision: str) -> dict[str, torch.Tensor]:
    """Encodes this process's share of the images, each decoded once.

    features: of "cls", "avg", "projected". batch_size: patches, over all processes. Returns {feature: [n, D]}, float32
    on the encoder's device, in the order of the patches. Raises UserError for features that are not finite.
    """
    device, rows, share = encoder.mean.device, [], shard(len(dataset))
    count = int(dataset.first_id[share.stop] - dataset.first_id[share.start])
    progress = run.Progress(dataset.num_patches, "encoding", "patches")
    # A process without images encodes one to know how wide its features would be, of which it keeps no row.
    for patches, ids in dataset.batches(share or [0], max(1, batch_size // world_size()), workers,
                                        pin_memory=device.type == "cuda"):
        with torch.inference_mode(), run.autocast(device, precision):
            extracted = encoder.extract(encoder.preprocess(patches.to(device, non_blocking=True)))
        rows.append([extracted[name] for name in features])
        progress.update(len(ids) * world_size())
    found = {name: torch.cat(parts)[:count] for name, *parts in zip(features, *rows, strict=True)}
    if all_reduce(torch.tensor(sum(int((~part.isfinite()).sum()) for part in found.values()))):
        raise UserError(f"the encoder gave features that are not finite at --precision {precision}; "
                        "use --precision fp32, or other weights")
    return found


def encode_source(args: argparse.Namespace, device: torch.device, log: run.Log) -> dict:
    """Features of a data set's patches, with what a file of them holds and a results line says of them."""
    dataset = open_retrieval(args.dataset, args.data_path, args.keypoints, args.crop_scale, args.num_images, args.seed,
                             args.image_size, (args.annotations, args.images, args.category))
    for note in dataset.notes:
        log(note)
    log(f"{args.dataset}: {len(dataset)} images, {dataset.num_patches} patches")
    # The paper's table has a projected column wherever the official full file has a projector.
    official = args.weights == "official" and args.model in WITH_PROJECTOR
    projector = "projected" in args.features if args.features else official or None
    options = defect_options(args.model, args.weights) if args.authors_defects else {}
    encoder = load_encoder(args, device, log, projector=projector, **options)
    # Where the first token is the mean of the others, there is one feature, not two.
    tokens = ["avg"] if encoder.cls_from == "mean" else ["cls", "avg"]
    names = args.features or tokens + ["projected"] * encoder.has_projector
    features = encode_patches(encoder, dataset, names, args.batch_size, args.workers, args.precision)
    line = results.start_line("retrieval", args, encoder) | {name: vars(args)[name] for name in PROTOCOL}
    return {"features": features, "labels": dataset.labels, "classes": dataset.classes,
            "paths": [image.path for image in dataset.images] if args.dataset == "imagenet" else [],
            "data": dataset.identity("data set"),
            "line": line | {"num_outside": dataset.num_outside, "features_made_by": results.this_run()}}


def load_features(paths: Sequence[Path], log: Callable[[str], None]) -> list[dict]:
    """Reads files of --save-features, of the rows this process's share. Raises UserError, also for files of different
    data."""
    sources = [load(path, "a whole feature file", FEATURE_FILE, "--load-features ") for path in paths]
    for path, source in zip(paths, sources, strict=True):
        results.check_same(path, source["data"], sources[0]["data"], "--load-features", "name files of one data set")
        mine = shard(len(source["labels"]))
        source["features"] = {name: rows[mine.start:mine.stop] for name, rows in source["features"].items()}
        line = source["line"]
        log(f"features of {results.run_title(line)}: weights {line['weights']}, SHA-256 {line['sha256']}; made by run "
            f"{line['features_made_by']['run']}, {line['features_made_by']['date']}")
    return sources


def source_line(made: dict, args: argparse.Namespace) -> dict:
    """The start of a results line, of features that may come from a file. made: that of the run that made them."""
    given = results.args_to_json(args)
    kept = [name for name in made["args"]["changed"] if name != "exclude_query"]
    return made | {"world_size": world_size(), "seed": args.seed, "args": {
        **made["args"], **{name: given[name] for name in ("exclude_query", *given["changed"])},
        "changed": list(dict.fromkeys(kept + given["changed"]))}}


def defect_options(model: str, weights: str) -> dict:
    """Options of build_model that bring back a defect of the authors' code. Raises UserError where none is known."""
    defects = {"mae": {"shuffle_patches": True}, "dino": {"branch": "student"}}
    if model not in defects or model == "dino" and weights == "random":
        raise UserError("--authors-defects: they are known for mae, and for full checkpoints of dino, alone")
    return defects[model]


def retrieval_metrics(source: dict, exclude_query: bool, device: torch.device, log: Callable[[str], None]) -> dict:
    """AP and mAP of every feature of a source, all processes together; returns the metrics of a results line. Raises
    UserError where no query has a positive."""
    line, labels = source["line"], source["labels"]
    log(f"{results.run_title(line)}, {line['precision']}")
    counts = labels.bincount(minlength=len(source["classes"])).tolist()
    if exclude_query and max(counts) < 2:
        raise UserError("--exclude-query: every class has one patch, so no query has a positive left; leave it out, or "
                        "use more images")
    metrics = {"num_patches": len(labels), "patches_per_class": dict(zip(source["classes"], counts, strict=True))}
    chance = torch.tensor([random_ranking_ap(len(labels), count, exclude_query) for count in counts])
    metrics["ap_chance"] = mean_average_precision(chance[labels], labels)[0]
    share = shard(len(labels))
    for name, rows in source["features"].items():
        ap = gather_rows(average_precision(gather_rows(rows.to(device)), labels, exclude_query=exclude_query,
                                           queries=torch.arange(share.start, share.stop)))
        metrics[f"ap_{name}"], metrics[f"map_{name}"] = mean_average_precision(ap, labels)
        log(f"{name:>10}  AP {metrics[f'ap_{name}']:6.2f}  mAP {metrics[f'map_{name}']:6.2f}")
    encoded = [name for name in ("cls", "avg") if f"ap_{name}" in metrics]
    if encoded:
        metrics["best"] = max(encoded, key=lambda name: metrics[f"ap_{name}"])
        log(f"   encoded  AP {metrics['ap_' + metrics['best']]:6.2f}  ({metrics['best']} is the better one)")
    log(f"    random  AP {metrics['ap_chance']:6.2f}  (the others in random order"
        f"{'' if exclude_query else ' behind the query, which counts'})")
    return metrics


def retrieve(args: argparse.Namespace, device: torch.device, log: run.Log, write: Callable[..., None]) -> None:
    """Part retrieval, or picture sheets of a folder of images. Features of several models may come from files."""
    sources = load_features(args.load_features, log) if args.load_features else [encode_source(args, device, log)]
    if args.save_features:
        features = {name: gather_rows(rows).cpu() for name, rows in sources[0]["features"].items()}
        args.save_features.parent.mkdir(parents=True, exist_ok=True)
        save(args.save_features, sources[0] | {"features": features})
    lines = [source_line(source["line"], args) for source in sources]
    if not sources[0]["paths"]:
        write(*(line | retrieval_metrics(source, args.exclude_query, device, log)
                for line, source in zip(lines, sources, strict=True)))
        return
    for source in sources:
        source["features"] = {name: rows.to(device) for name, rows in source["features"].items()}
    files = write_sheets(sources, args.query, args.queries, args.top, args.seed, args.other_images, args.output_dir,
                         args.plot_format)
    log(f"{len(files)} sheets in {args.output_dir}")
    write(lines[0] | {"task": "retrieval-sheets", "sheets": files, "models": [line["model"] for line in lines]})


def transfer(args: argparse.Namespace, device: torch.device, log: run.Log, write: Callable[..., None]) -> None:
    """Keypoint transfer (models/transfer.py), with the list of pairs, a sheet of some and, for all layers, a plot."""
    pairs = load_pairs(args.dataset, args.data_path, args.image_size, args.split, args.num_pairs, args.seed,
                       args.num_images)
    encoder = load_encoder(args, device, log, projector=False)
    line, layers = results.start_line("transfer", args, encoder), choose_layers(args.layers, encoder.depth)
    title, prefix = results.run_title(line), f"{args.output_dir}/{results.run_slug(args.name)}_{args.dataset}"
    log(title)
    metrics, predicted = transfer_run(encoder, pairs, layers, args.norm, args.batch_size, args.workers,
                                      args.precision, log)
    write(line | metrics)
    if not is_main():
        return
    listed = json.dumps([pair._asdict() for pair in pairs.pairs])
    atomic_write(Path(f"{prefix}_pairs.json"), lambda path: path.write_text(listed))
    if args.pictures:
        draw_pairs(Path(f"{prefix}_pairs.{args.plot_format}"), pairs, predicted, args.pictures, title)
    if args.layers == ["all"] and encoder.depth > 1:
        curves = {f"PCK@{alpha}": [found["pck_image"][str(alpha)] for found in metrics["by_layer"].values()]
                  for alpha in ALPHAS}
        draw_curves(Path(f"{prefix}_layers.{args.plot_format}"), title, curves, first=0, xlabel="block",
                    ylabel="PCK per image, percent")


def principal_components(args: argparse.Namespace, device: torch.device, log: run.Log,
                         write: Callable[..., None]) -> None:
    """Principal components as colours (models/pca.py), on a sheet."""
    images = open_images(args.dataset, args.data_path, args.num_images or 6, args.seed, args.image_size)
    for note in images.notes:
        log(note)
    encoder = load_encoder(args, device, log, projector=False)
    path, found = pca_run(encoder, images, args.name, args.pca, args.precision, args.output_dir)
    log(f"principal components of {found['num_images']} images in {path}")
    write(results.start_line("pca", args, encoder) | found)


def parse_arguments() -> argparse.Namespace:
    """The command line. Raises UserError for values that cannot be."""
    parser = run.OneLineParser(__doc__)
    run.add_common_arguments(parser, METHODS, RETRIEVAL_DATASETS + PAIR_DATASETS, batch_size=64)
    group = parser.add_argument_group("retrieval")
    group.add_argument("--features", nargs="+", choices=("cls", "avg", "projected"),
                       help="(default: cls and avg, and projected where the checkpoint has a projector)")
    group.add_argument("--exclude-query", action="store_true", help="leave the query out of its own ranking")
    group.add_argument("--save-features", type=Path, metavar="FILE", help="for --load-features")
    group.add_argument("--load-features", type=Path, nargs="+", metavar="FILE",
                       help="of one or several models, in place of encoding")
    group.add_argument("--num-images", type=run.positive_int, metavar="N",
                       help="a sample drawn by the seed (default: all; of synthetic, pictures drawn: 30)")
    group.add_argument("--authors-defects", action="store_true", help="MAE: shuffled tokens; DINO: the student")
    run.add_patch_arguments(parser, "one FILE")
    group = parser.add_argument_group(f"keypoint transfer (--dataset {', '.join(PAIR_DATASETS)})")
    group.add_argument("--split", choices=("trn", "val", "test"), default="test", help="of spair (default: test)")
    group.add_argument("--num-pairs", type=run.positive_int, metavar="N",
                       help="drawn by the seed (default: all of spair; 10,000 of the others)")
    group.add_argument("--layers", nargs="+", default=["last"], metavar="BLOCK",
                       help="blocks, counted from 0; last, last4 or all (default: last)")
    group.add_argument("--norm", action=argparse.BooleanOptionalAction, default=True,
                       help="the encoder's final norm on the tokens (default: yes)")
    group.add_argument("--pictures", type=run.non_negative_int, default=0, metavar="N", help="draw N pairs on a sheet")
    group.add_argument("--plot-format", choices=("png", "pdf"), default="png", help="of sheets and plots")
    add_sheet_arguments(parser)
    args = parser.parse_args()
    # Options by the modes that read them.
    pairs = ("split", "num_pairs", "layers", "norm", "pictures")
    sheets = ("queries", "query", "top", "other_images")
    ranking = ("exclude_query", "crop_scale", "keypoints")
    features = ("features", "save_features", "load_features", "authors_defects")
    if args.load_features:
        read = ("load_features", "exclude_query", "output_dir", "workers", "seed", "device", "plot_format", *sheets)
        parser.check_used(args, "--load-features", *(name for name in args.changed if name not in read))
    elif args.dataset in PAIR_DATASETS:
        drawn = () if args.dataset == "synthetic-pairs" else ("num_images",)
        parser.check_used(args, f"--dataset {args.dataset}", "pca", *features, *ranking, *sheets, *drawn)
    elif args.dataset != "imagenet":
        parser.check_used(args, f"--dataset {args.dataset}", "pca", *sheets, *pairs, "plot_format")
    elif args.pca:
        parser.check_used(args, "--pca", *features, *ranking, *sheets, *pairs, "plot_format")
    else:
        parser.check_used(args, "picture sheets (--dataset imagenet)", *ranking, *pairs)
    if args.pictures or args.dataset == "imagenet" or "all" in args.layers:
        require_matplotlib()
    return args


def add_sheet_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("picture sheets (--dataset imagenet: any folder of images)")
    group.add_argument("--pca", choices=("first", "none"), nargs="?", const="first",
                       help="principal components of patch tokens as colours; the foreground by the first component, "
                            "or none. Each run adds a row to --output-dir's pca.png; other images begin anew")
    group.add_argument("--queries", type=run.positive_int, default=10, metavar="N",
                       help="query patches, drawn by the seed (default: %(default)s)")
    group.add_argument("--query", nargs="+", default=[], metavar="PATH:POSITION", help="these instead")
    group.add_argument("--top", type=run.positive_int, default=24,
                       help="patches shown (paper 24, code 84; default: %(default)s)")
    group.add_argument("--other-images", action="store_true",
                       help="leave out the query's own image (default: patches that overlap the query are marked)")


def main() -> None:
    """Ranks every patch of a data set against all others, transfers keypoints between images, or draws sheets."""
    args, started = parse_arguments(), time.monotonic()
    if args.table:
        print(paper_tables(("retrieval", "transfer"), args.output_dir, args.format))
        return
    device, log = run.setup(args)

    def write(*lines):
        results.append_result(args.output_dir, *(line | {"seconds": time.monotonic() - started} for line in lines))

    stage = transfer if args.dataset in PAIR_DATASETS else principal_components if args.pca else retrieve
    stage(args, device, log, write)


if __name__ == "__main__":
    run.run_main(main)
