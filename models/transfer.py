"""Keypoint transfer with a frozen encoder: does the token at a keypoint find the same keypoint in another image?

Training-free. The source token is sampled bilinearly at the keypoint, the prediction is the centre of the most similar
cell of the target. Right is what lies within alpha * max(w, h) of the target's box (PCK, Yang and Ramanan 2013; on
SPair-71k, Min et al. 2019). Images are squashed to a square, as in DIFT (arXiv:2306.03881); distances are measured in
the original pixels.
"""

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from utils import UserError
from utils.distributed import gather_rows, shard, world_size
from utils.drawing import image_rows
from utils.run import DTYPES, Progress, autocast
from utils.storage import free_on_all

from .encoder import Encoder

ALPHAS = (0.05, 0.1, 0.15, 0.2)


def transfer_keypoints(source: torch.Tensor, target: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Where the keypoints of one image are in another: at the centres of the cells that are most similar, by cosine.

    source [D, h, w] and target [D, H, W], arrays or tensors: features that cover the whole image. points [n, 2]:
    (x, y) in the source, from 0 to 1; beyond the outermost centres of cells features are constant. Returns [n, 2], from
    0 to 1 in the target.
    """
    source, target, points = map(torch.as_tensor, (source, target, points))
    return locate(sample(source[None], points), target[None])[0].to(points.dtype)


def sample(maps: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Features [L, D, h, w] of an image at points [n, 2], as unit vectors, float32 [L, n, D]."""
    maps = F.normalize(maps.float(), dim=1)
    places = (2 * points - 1).to(maps).expand(len(maps), 1, -1, 2)
    found = F.grid_sample(maps, places, padding_mode="border", align_corners=False)
    return F.normalize(found[:, :, 0], dim=1).mT


def locate(queries: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Unit vectors [L, n, D] in the features [L, D, h, w] of an image -> [L, n, 2], (x, y) from 0 to 1, float64, NaN
    where a similarity is. The product is in float32 on a CPU, on CUDA in the features' type."""
    height, width = target.shape[2:]
    dtype = target.dtype if target.is_cuda else torch.float32
    similarity = queries.to(dtype) @ F.normalize(target.float(), dim=1).flatten(2).to(dtype)
    highest, best = similarity.max(-1)
    cells = torch.stack([best % width, best // width], dim=-1).double()
    centres = (cells + 0.5) / cells.new_tensor([width, height])
    return centres.masked_fill(highest.isnan()[..., None], torch.nan)


def match_points(tokens: torch.Tensor, source: torch.Tensor, target: torch.Tensor,
                 points: torch.Tensor) -> torch.Tensor:
    """transfer_keypoints for many pairs and layers, each image once as a source and once as a target.

    tokens [L, n, D, h, w]: of n images. source, target [m]: their numbers, by point; points [m, 2]: from 0 to 1 in the
    source. Returns [L, m, 2], float64, on the tokens' device.
    """
    queries = torch.empty(len(tokens), len(points), tokens.shape[2], device=tokens.device)
    for image in source.unique().tolist():
        here = (source == image).nonzero()[:, 0]
        queries[:, here] = sample(tokens[:, image], points[here])
    found = torch.empty(len(tokens), len(points), 2, dtype=torch.float64, device=tokens.device)
    for image in target.unique().tolist():
        here = (target == image).nonzero()[:, 0]
        found[:, here] = locate(queries[:, here], tokens[:, image])
    return found


def within(predicted: torch.Tensor, points: torch.Tensor, side: torch.Tensor,
           alphas: Sequence[float] = ALPHAS) -> torch.Tensor:
    """Whether predicted [..., n, 2] is right for points [n, 2] by boxes of side [n]: bool [..., n, A]. All in pixels,
    float64; a distance exactly at the threshold is right, as in DIFT."""
    distance = torch.hypot(*(predicted - points).unbind(-1))
    return distance[..., None] <= side[:, None] * torch.tensor(alphas, dtype=torch.float64, device=side.device)


def chance(points: torch.Tensor, sizes: torch.Tensor, side: torch.Tensor, cells: int) -> torch.Tensor:
    """The share of the cells x cells cells whose centre would be right, [n, A]: what a random cell expects. points
    [n, 2] in images of sizes [n, 2], side [n], as in within."""
    middles = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
    centres = torch.cartesian_prod(middles, middles)[:, None]
    return torch.cat([within(centres * size, point, s).double().mean(0) for point, size, s in
                      zip(points.split(256), sizes.split(256), side.split(256), strict=True)])


def pck(right: torch.Tensor, pair: torch.Tensor, categories: Sequence[str] = ()) -> dict:
    """PCK in percent, by alpha, from right [n, A], 1 where a point is right, and pair [n], the pair it belongs to;
    tensors or arrays.

    categories: of every pair, or none. pck_image is the mean over pairs of the pair's PCK, pck_point the mean over
    points, pck_category the mean over categories of their pck_image; by_category has the first two of each.
    """
    right, pair = torch.as_tensor(right).double(), torch.as_tensor(pair)
    counts = pair.bincount().double()
    per_pair = right.new_zeros(len(counts), right.shape[1]).index_add_(0, pair, right)

    def named(values):
        return {str(alpha): 100 * value for alpha, value in zip(ALPHAS, values.tolist(), strict=True)}

    def figures(chosen):
        return {"num_pairs": int(chosen.sum()), "num_points": int(counts[chosen].sum()),
                "pck_image": named((per_pair[chosen] / counts[chosen, None]).mean(0)),
                "pck_point": named(per_pair[chosen].sum(0) / counts[chosen].sum())}

    if not categories:
        return figures(counts > 0)
    names, numbers = np.unique(categories, return_inverse=True)
    by_category = {str(name): figures(torch.from_numpy(numbers == number)) for number, name in enumerate(names)}
    means = torch.tensor([[*found["pck_image"].values()] for found in by_category.values()], dtype=torch.float64)
    return figures(counts > 0) | {"by_category": by_category, "pck_category": named(means.mean(0) / 100)}


def pck_of_features(source_maps: Sequence, target_maps: Sequence, source_points: Sequence, target_points: Sequence,
                    box_sides: Sequence[float], target_sizes: Sequence | None = None,
                    alpha: float = 0.1) -> torch.Tensor:
    """PCK of one's own features, in percent, of every pair of images [P], float64; its mean is PCK per image.

    By pair: source_maps and target_maps [D, h, w], arrays or tensors; source_points and target_points [n, 2], (x, y)
    from 0 to 1 of the image's width and height; box_sides: max(w, h) of the target's box, in the unit of target_sizes,
    the target's (width, height), without which images are squares of side 1.
    """
    percent = []
    for pair, (source, target) in enumerate(zip(source_maps, target_maps, strict=True)):
        size = torch.as_tensor(target_sizes[pair] if target_sizes is not None else (1, 1)).double()
        start, end = (torch.as_tensor(points[pair]).double() for points in (source_points, target_points))
        found = transfer_keypoints(source, target, start).cpu()
        side = torch.as_tensor(box_sides[pair]).double().expand(len(end))
        percent.append(100 * within(found * size, end.cpu() * size, side, (alpha,)).double().mean())
    return torch.stack(percent)


def encode(encoder: Encoder, pairs, numbers: Sequence[int], layers: Sequence[int], norm: bool, batch_size: int,
           workers: int, precision: str) -> torch.Tensor:
    """The patch tokens after the 0-based blocks layers of the images with these numbers, [L, n, D, h, w], on the
    encoder's device, in the type of the precision. batch_size: of this process."""
    device, side, done = encoder.mean.device, pairs.image_size // encoder.patch_size, 0
    tokens = torch.empty(len(layers), len(numbers), encoder.embed_dim, side, side, dtype=DTYPES[precision],
                         device=device)
    progress = Progress(len(numbers) * world_size(), "encoding", "images")
    batches = pairs.images.batches(numbers, batch_size, workers, pin_memory=device.type == "cuda")
    for pixels, _ in batches:
        with autocast(device, precision):
            maps = encoder.get_intermediate_layers(encoder.preprocess(pixels.to(device, non_blocking=True)), n=layers,
                                                   norm=norm)
        for layer, found in zip(tokens, maps, strict=True):
            layer[done:done + len(pixels)] = found
        done += len(pixels)
        progress.update(len(pixels) * world_size())
    return tokens


def measure(pairs, predicted: torch.Tensor, layers: Sequence[int], cells: int) -> dict:
    """The metrics of predictions [L, n, 2] in pixels: pck's of the last layer; by_layer of several; chance, of a random
    one of cells x cells cells; and same_place, of the source's own coordinates."""
    source, target, side = pairs.source[pairs.pair], pairs.target[pairs.pair], pairs.box_side[pairs.pair]
    categories = [pair.category for pair in pairs.pairs]
    by_layer = {str(layer): pck(right, pairs.pair, categories) for layer, right in
                zip(layers, within(predicted, pairs.target_points, side), strict=True)}
    metrics = dict(by_layer[str(layers[-1])])
    same_place = pairs.source_points / pairs.sizes[source] * pairs.sizes[target]
    for name, right in (("chance", chance(pairs.target_points, pairs.sizes[target], side, cells)),
                        ("same_place", within(same_place, pairs.target_points, side))):
        found = pck(right, pairs.pair, categories)
        metrics[name] = {key: value for key, value in found.items() if key.startswith("pck")}
    return metrics | ({"by_layer": by_layer} if len(layers) > 1 else {})


@torch.inference_mode()
def transfer_run(encoder: Encoder, pairs, layers: Sequence[int], norm: bool, batch_size: int, workers: int,
                 precision: str, log: Callable[[str], None]) -> tuple[dict, torch.Tensor]:
    """Transfers the keypoints of all pairs (a datasets.pairs.PairDataset) and measures PCK, all processes together.

    Each process encodes the images of its contiguous share of the pairs, each once; in several passes where the tokens
    of all layers take more than half of what is free on the encoder's device. layers: 0-based blocks. norm: apply the
    encoder's final norm. batch_size: over all processes, in images of 224 x 224. Returns the metrics of a results line
    (see measure) and the last layer's predictions, float64 [n, 2] in pixels. Raises UserError for tokens that are not
    finite.
    """
    device, size, layers = encoder.mean.device, pairs.image_size, sorted(set(layers))
    cells, batch_size = size // encoder.patch_size, max(1, batch_size * 224**2 // (size**2 * world_size()))
    source, target = pairs.source[pairs.pair], pairs.target[pairs.pair]
    points, share = pairs.source_points / pairs.sizes[source], shard(len(pairs.pairs))
    mine = (pairs.pair >= share.start) & (pairs.pair < share.stop)
    images, ends = torch.stack([source[mine], target[mine]]).unique(return_inverse=True)

    need = max(1, len(images) * cells**2 * encoder.embed_dim * DTYPES[precision].itemsize)
    per_pass = max(1, min(len(layers), free_on_all(device) // 2 // need))
    log(f"{len(pairs.pairs)} pairs of {len(pairs.images)} images, {len(pairs.pair)} points ({pairs.num_outside} out of "
        f"their image); {need * per_pass / 1e9:.2f} GB of tokens, {-(-len(layers) // per_pass)} pass(es)")
    found = []
    for first in range(0, len(layers), per_pass):
        tokens = encode(encoder, pairs, images.tolist(), layers[first:first + per_pass], norm, batch_size, workers,
                        precision)
        found.append(match_points(tokens, *ends, points[mine]))
        del tokens
    predicted = gather_rows(torch.cat(found).transpose(0, 1)).transpose(0, 1).cpu()
    if not predicted.isfinite().all():
        raise UserError(f"tokens are not finite at {precision}; use --precision fp32, or check the weights")

    predicted = predicted * pairs.sizes[target]
    metrics = measure(pairs, predicted, layers, cells)
    metrics["num_outside"] = pairs.num_outside
    metrics["protocol"] = (f"images squashed to {size} x {size}, {cells} x {cells} cells, patch tokens "
                           f"{'with' if norm else 'without'} final norm, bilinear source token, cosine similarity, "
                           "centre of the best cell; distance <= alpha * max(w, h) of the target's box, in original "
                           "pixels")
    for layer, found in metrics.get("by_layer", {str(layers[-1]): metrics}).items():
        log(f"block {layer}: PCK@0.1 {found['pck_image']['0.1']:.2f} per image, {found['pck_point']['0.1']:.2f} per "
            f"point, {found['pck_category']['0.1']:.2f} the category mean")
    chance_level, same_place = (metrics[name]["pck_image"]["0.1"] for name in ("chance", "same_place"))
    log(f"per image a random cell has {chance_level:.2f}, the same place as in the source {same_place:.2f}")
    log(f"protocol: {metrics['protocol']}")
    return metrics, predicted[-1]


def draw_pairs(path: Path, pairs, predicted: torch.Tensor, count: int, title: str = "keypoint transfer",
               side: int = 480) -> None:
    """Draws count pairs, evenly spaced in the list of all, under a title and a legend; images are squares, as the
    encoder gets them, enlarged to side. predicted [n, 2]: as transfer_run returns it."""
    right = within(predicted, pairs.target_points, pairs.box_side[pairs.pair])[:, ALPHAS.index(0.1)]
    chosen = torch.linspace(0, len(pairs.pairs) - 1, min(count, len(pairs.pairs))).round().long().tolist()
    ends, gap = torch.stack([pairs.source[chosen], pairs.target[chosen]], 1).tolist(), 8
    rows = [[("", pairs.images[image][0][0].permute(1, 2, 0)) for image in both] for both in ends]
    with image_rows(path, rows, (side, side), gap) as axes:
        for number, (source, target), (_, one) in zip(chosen, ends, axes, strict=True):
            at = pairs.pair == number
            # In pixels of the target, the source on its left.
            starts = pairs.source_points[at] / pairs.sizes[source] * side - torch.tensor([side + gap, 0])
            found, truth = (points[at] / pairs.sizes[target] * side for points in (predicted, pairs.target_points))
            lines = torch.stack([starts, found, torch.full_like(found, torch.nan)], dim=1)
            one.plot(*truth[~right[at]].T, "o", color="white", label="true place")
            for label, colour, kind in (("right", "lime", right[at]), ("wrong", "red", ~right[at])):
                one.plot(*lines[kind].flatten(0, 1).T, color=colour, label=label)
            one.plot(*starts.T, "o", color="yellow", label="keypoint")
            for line in one.lines:
                line.set(clip_on=False, markeredgecolor="black")
        heading = f"{textwrap.fill(title, 60)}\nright: within 0.1 of the longer side of the target's box"
        axes[0, 0].legend(handles=one.lines, title=heading, loc="lower left", bbox_to_anchor=(0, 1), ncols=4,
                          alignment="left")
