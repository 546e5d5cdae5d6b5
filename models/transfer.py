"""Keypoint transfer with a frozen encoder: does the token at a keypoint find the same keypoint in another image?

Training-free. The source token is sampled bilinearly at the keypoint, the prediction is the centre of the most similar
cell of the target. Right is what lies within alpha * max(w, h) of the target's box (PCK, Yang and Ramanan 2013; on
SPair-71k, Min et al. 2019). Images are squashed to a square, as in DIFT (arXiv:2306.03881); distances are measured in
the original pixels.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from utils import UserError
from utils.distributed import gather_rows, shard, world_size
from utils.run import Progress, autocast, log_waiting
from utils.storage import has_room

from .encoder import Encoder
from .features import DTYPES, require_batch_room

ALPHAS = (0.05, 0.1, 0.15, 0.2)
# Of the windowed soft-argmax: GeoAware-SC's values (arXiv:2311.17034).
TEMPERATURE, WINDOW = 0.02, 15


def transfer_keypoints(source: torch.Tensor, target: torch.Tensor, points: torch.Tensor,
                       match: str = "cell") -> torch.Tensor:
    """Where the keypoints of one image are in another, by cosine similarity of tokens in float64.

    source [D, h, w] and target [D, H, W]: tokens that cover the whole image. points [n, 2]: (x, y) in the source, from
    0 to 1; beyond the outermost centres of cells tokens are constant. match: "cell", the centre of the most similar
    cell, or "soft-argmax", the mean of the centres around it, weighted by softmax(similarity / temperature).
    Returns [n, 2], from 0 to 1 in the target. Raises ValueError for another match.
    """
    first = torch.zeros(len(points), dtype=torch.int64, device=points.device)
    queries = sample_tokens(source.permute(1, 2, 0)[None, None], first, points)
    return locate(queries, target.permute(1, 2, 0)[None], match)[0].to(points.dtype)


def sample_tokens(tokens: torch.Tensor, images: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Tokens [L, n, h, w, D] as unit vectors at points [m, 2] (x, y, 0 to 1) of images [m] -> [L, m, D], float64."""
    corners = []
    for size, place in zip(tokens.shape[2:4], (points[:, 1], points[:, 0]), strict=True):
        place = (place.double() * size - 0.5).clamp(0, size - 1)
        low = place.long()
        corners.append(((low, 1 - (place - low)), ((low + 1).clamp(max=size - 1), place - low)))
    return F.normalize(sum(F.normalize(tokens[:, images, row, column].double(), dim=-1) * (share_y * share_x)[:, None]
                           for row, share_y in corners[0] for column, share_x in corners[1]), dim=-1)


def locate(queries: torch.Tensor, target: torch.Tensor, match: str) -> torch.Tensor:
    """Unit vectors float64 [L, m, D] in the tokens [L, h, w, D] of an image -> [L, m, 2], (x, y) from 0 to 1, float64;
    NaN where a token is NaN. match: as in transfer_keypoints."""
    if match not in ("cell", "soft-argmax"):
        raise ValueError(f"match {match!r} is neither 'cell' nor 'soft-argmax'")
    (height, width), window = target.shape[1:3], 1 if match == "cell" else WINDOW
    # In float64: the last digit of a float32 product depends on how many rows it is made with, and softmax multiplies
    # its error by 50.
    similarity = queries @ F.normalize(target.double(), dim=-1).flatten(1, 2).mT
    best = similarity.argmax(-1)[..., None, None]
    offsets = torch.arange(window, device=best.device) - window // 2
    row, column = best // width + offsets[:, None], best % width + offsets
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    cells = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
    logits = similarity.gather(-1, cells.flatten(-2)) / TEMPERATURE
    weights = logits.masked_fill(~inside.flatten(-2), -torch.inf).softmax(-1).view(cells.shape)
    return torch.stack([(weights * ((place.double() + 0.5) / size)).sum((-2, -1))
                        for place, size in ((column, width), (row, height))], dim=-1)


def match_points(tokens: torch.Tensor, source: torch.Tensor, target: torch.Tensor, points: torch.Tensor,
                 match: str) -> torch.Tensor:
    """transfer_keypoints for many pairs and layers: one product for each target image, whose tokens are read once.

    tokens [L, n, h, w, D]: of n images. source, target [m], on the CPU: rows of tokens, by point; points [m, 2]: from 0
    to 1 in the source. Returns [L, m, 2], float64, on the tokens' device.
    """
    device, order = tokens.device, target.argsort(stable=True)
    images, counts = target[order].unique_consecutive(return_counts=True)
    source, points = source[order].to(device), points[order].to(device)
    found = torch.empty(len(tokens), len(points), 2, dtype=torch.float64, device=device)
    parts = (rows.split(counts.tolist(), dim) for rows, dim in ((source, 0), (points, 0), (found, 1)))
    for image, source_part, points_part, found_part in zip(images.tolist(), *parts, strict=True):
        found_part.copy_(locate(sample_tokens(tokens, source_part, points_part), tokens[:, image], match))
    return found[:, order.argsort().to(device)]


def encode(encoder: Encoder, pairs, numbers: Sequence[int], layers: Sequence[int], norm: bool, batch_size: int,
           workers: int, precision: str, log: Callable[[str], None]) -> Iterator[torch.Tensor]:
    """The L2-normalised patch tokens of each image of these numbers after the 0-based blocks layers, [L, h, w, D], on
    the encoder's device, in the type of the precision."""
    device, progress = encoder.mean.device, Progress(len(numbers) * world_size(), "encoding", "images")
    batches = pairs.images.batches(numbers, batch_size, workers, pin_memory=device.type == "cuda")
    for images, _ in log_waiting(batches, "encoding and matching", log):
        with autocast(device, precision):
            maps = encoder.get_intermediate_layers(encoder.preprocess(images.to(device, non_blocking=True)), n=layers,
                                                   norm=norm)
        progress.update(len(images) * world_size())
        yield from torch.stack([F.normalize(tokens.float(), dim=1).permute(0, 2, 3, 1).to(DTYPES[precision])
                                for tokens in maps], dim=1)


def within(predicted: torch.Tensor, points: torch.Tensor, side: torch.Tensor) -> torch.Tensor:
    """Whether predicted [..., n, 2] is right for points [n, 2] by boxes of side [n]: bool [..., n, A], A = ALPHAS. All
    in pixels, float64; a distance exactly at the threshold is right, as in DIFT."""
    distance = torch.hypot(*(predicted - points).unbind(-1))
    return distance[..., None] <= side[:, None] * torch.tensor(ALPHAS, dtype=torch.float64, device=side.device)


def chance(points: torch.Tensor, sizes: torch.Tensor, side: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
    """The share of the cells of grid (h, w) whose centre would be right, [n, A]: what a random cell expects. points
    [n, 2] in images of sizes [n, 2], side [n], as in within."""
    rows, columns = ((torch.arange(size, dtype=torch.float64, device=points.device) + 0.5) / size for size in grid)
    centres = torch.cartesian_prod(columns, rows)[:, None]
    return torch.cat([within(centres * size, point, s).double().mean(0) for point, size, s in
                      zip(points.split(256), sizes.split(256), side.split(256), strict=True)])


def pck(right: torch.Tensor, pair: torch.Tensor, groups: Mapping[str, Sequence[str]]) -> dict:
    """PCK in percent, by alpha, from right [n, A], 1 where a point is right, and pair [n], the pair it belongs to.

    groups: of every pair its "category", and its level of other attributes. pck_image is the mean over pairs of the
    pair's PCK, pck_point the mean over points, pck_category the mean over categories of their pck_image; by_NAME has
    the first two for every level of each of groups.
    """
    right, counts = right.double(), pair.bincount().double()
    per_pair = right.new_zeros(len(counts), right.shape[1]).index_add_(0, pair, right)

    def named(values):
        return {str(alpha): 100 * value for alpha, value in zip(ALPHAS, values.tolist(), strict=True)}

    def figures(chosen):
        return {"num_pairs": len(chosen), "num_points": int(counts[chosen].sum()),
                "pck_image": named((per_pair[chosen] / counts[chosen, None]).mean(0)),
                "pck_point": named(per_pair[chosen].sum(0) / counts[chosen].sum())}

    result = figures(torch.arange(len(counts)))
    for name, levels in groups.items():
        known, level_of = np.unique(levels, return_inverse=True)
        result[f"by_{name}"] = {level: figures(torch.from_numpy(np.flatnonzero(level_of == number)))
                                for number, level in enumerate(known.tolist())}
    categories = [list(row["pck_image"].values()) for row in result["by_category"].values()]
    result["pck_category"] = named(torch.tensor(categories, dtype=torch.float64).mean(0) / 100)
    return result


@torch.inference_mode()
def transfer_run(encoder: Encoder, pairs, layers: Sequence[int], norm: bool, match: str, batch_size: int, workers: int,
                 precision: str, log: Callable[[str], None]) -> tuple[dict, torch.Tensor]:
    """Transfers the keypoints of all pairs (a datasets.pairs.PairDataset) and measures PCK, all processes together.

    Each process encodes the images of its contiguous share of the pairs, each image once, and holds the tokens of one
    category; where those of all layers do not fit on the encoder's device, it makes several passes. layers: 0-based
    blocks. norm: apply the encoder's final norm. batch_size: over all processes, in images of 224 x 224.

    Returns the metrics of a results line (pck's of the last layer; by_layer of several; chance, of a random cell;
    same_place, of the source's own coordinates) and the last layer's predictions, float64 [n, 2] in pixels. Raises
    UserError.
    """
    device, size, patch = encoder.mean.device, pairs.image_size, encoder.patch_size
    layers, grid = sorted(set(layers)), (size // patch, size // patch)
    source, target, side = pairs.source[pairs.pair], pairs.target[pairs.pair], pairs.box_side[pairs.pair]
    units, sizes = pairs.source_points / pairs.sizes[source], pairs.sizes[target]
    # Points are in the order of the pairs, and these are sorted by category.
    share = shard(len(pairs.pairs))
    mine = slice(*torch.searchsorted(pairs.pair, torch.tensor([share.start, share.stop])).tolist())
    counts = pairs.category[pairs.pair[mine]].unique_consecutive(return_counts=True)[1].tolist()
    points = list(zip(*(rows[mine].split(counts) for rows in (source, target, units)), strict=True))
    groups = [torch.cat(ends).unique() for *ends, _ in points]

    # Of the process with the most images of a category, so that all decide alike.
    most = int(gather_rows(torch.tensor([max(map(len, groups), default=0)])).max())
    need = most * grid[0] * grid[1] * encoder.embed_dim * DTYPES[precision].itemsize
    free = has_room(need, device)[1] / 2
    if need > free:
        raise UserError(f"the tokens of a category need {need / 1e9:.1f} GB at --image-size {size}, half of the memory "
                        f"that is free on {device} is {free / 1e9:.1f} GB; use a smaller one")
    per_pass = min(len(layers), int(free / need))
    passes = [slice(first, first + per_pass) for first in range(0, len(layers), per_pass)]
    log(f"{len(pairs.pairs)} pairs of {len(pairs.images)} images, {len(pairs.pair)} points ({pairs.num_outside} out of "
        f"their image); {need * per_pass / 1e9:.2f} GB of tokens on {device}, {len(passes)} pass(es)")

    per_batch = max(1, batch_size * 224**2 // (size**2 * world_size()))
    require_batch_room(encoder, size, min(per_batch * world_size(), len(pairs.images)))
    found = torch.empty(mine.stop - mine.start, len(layers), 2, dtype=torch.float64, device=device)
    numbers = [number for group in groups for number in group.tolist()]
    for columns in passes:
        # One loader serves all categories.
        images = encode(encoder, pairs, numbers, layers[columns], norm, per_batch, workers, precision, log)
        for (*ends, at), group, part in zip(points, groups, found.split(counts), strict=True):
            tokens = torch.empty(len(layers[columns]), len(group), *grid, encoder.embed_dim, dtype=DTYPES[precision],
                                 device=device)
            for place, image in enumerate(islice(images, len(group))):
                tokens[:, place] = image
            rows = (torch.searchsorted(group, end) for end in ends)
            part[:, columns] = match_points(tokens, *rows, at, match).transpose(0, 1)
    by_chance = chance(*(rows[mine].to(device) for rows in (pairs.target_points, sizes, side)), grid)
    predicted, by_chance = gather_rows(found).cpu() * sizes[:, None], gather_rows(by_chance).cpu()
    if not predicted.isfinite().all():
        raise UserError(f"tokens are not finite at {precision}; use --precision fp32, or check the weights")

    levels = {"category": [pair.category for pair in pairs.pairs]} | {
        name: [pair.attributes.get(name, "unknown") for pair in pairs.pairs] for name in pairs.pairs[0].attributes}
    by_layer = {str(layer): pck(within(predicted[:, column], pairs.target_points, side), pairs.pair, levels)
                for column, layer in enumerate(layers)}
    same_place = within(units * sizes, pairs.target_points, side)
    expected, same = ({key: value for key, value in pck(right, pairs.pair, levels).items() if key.startswith("pck")}
                      for right in (by_chance, same_place))
    metrics = {**by_layer[str(layers[-1])], "num_outside": pairs.num_outside, "chance": expected, "same_place": same,
               "protocol": f"images squashed to {size} x {size}, {grid[0]} x {grid[1]} cells, patch tokens "
                           f"{'with' if norm else 'without'} final norm, bilinear source token, cosine similarity, "
                           f"{'centre of the best cell' if match == 'cell' else 'windowed soft-argmax'}; "
                           "distance <= alpha * max(w, h) of the target's box, in original pixels"}
    for layer, figures in by_layer.items():
        log(f"block {layer:>2}  PCK@0.1 per image {figures['pck_image']['0.1']:6.2f}  per point "
            f"{figures['pck_point']['0.1']:6.2f}  category mean {figures['pck_category']['0.1']:6.2f}")
    log(f"compare PCK@0.1 per image of a random cell, {expected['pck_image']['0.1']:.2f}, and of the same place as "
        f"in the source, {same['pck_image']['0.1']:.2f}")
    log(f"protocol: {metrics['protocol']}")
    return metrics | ({"by_layer": by_layer} if len(layers) > 1 else {}), predicted[:, -1]


def draw_transfer(source: Image.Image, target: Image.Image, source_points: torch.Tensor, predicted: torch.Tensor,
                  points: torch.Tensor, right: torch.Tensor, side: int = 320) -> Image.Image:
    """Two images in squares side by side, a line from every keypoint to its prediction: green where right [n], red
    where wrong, with a white disc at the true place. Points [n, 2] in pixels of their own image."""
    canvas = Image.new("RGB", (2 * side, side), "white")
    places = []
    for left, image, marks in ((0, source, [source_points]), (side, target, [predicted, points])):
        scale = (side - 8) / max(image.size)
        canvas.paste(image.resize([max(1, round(scale * length)) for length in image.size]), (left + 4, 4))
        places += [(scale * mark + torch.tensor([left + 4, 4])).tolist() for mark in marks]
    draw = ImageDraw.Draw(canvas)
    for start, end, true, good in zip(*places, right.tolist(), strict=True):
        if not good:
            draw.line((*end, *true), fill="white")
            draw.ellipse([true[0] - 4, true[1] - 4, true[0] + 4, true[1] + 4], fill="white", outline="black")
        draw.line((*start, *end), fill="lime" if good else "red", width=2)
        draw.ellipse([start[0] - 3, start[1] - 3, start[0] + 3, start[1] + 3], fill="yellow", outline="black")
    return canvas


def draw_pairs(pairs, predicted: torch.Tensor, count: int, columns: int = 2) -> Image.Image:
    """A sheet of count pairs, evenly spaced in the list of all, each by draw_transfer; right is what is right at alpha
    0.1. predicted [n, 2]: as transfer_run returns it."""
    numbers = torch.linspace(0, len(pairs.pairs) - 1, min(count, len(pairs.pairs))).round().long().tolist()
    right = within(predicted, pairs.target_points, pairs.box_side[pairs.pair])[:, ALPHAS.index(0.1)]
    sheet = Image.new("RGB", (columns * 640, -(-len(numbers) // columns) * 320), "white")
    for place, number in enumerate(numbers):
        pair, at = pairs.pairs[number], pairs.pair == number
        picture = draw_transfer(pairs.images.load(pair.source), pairs.images.load(pair.target), pairs.source_points[at],
                                predicted[at], pairs.target_points[at], right[at])
        sheet.paste(picture, (place % columns * 640, place // columns * 320))
    return sheet
