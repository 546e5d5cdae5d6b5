"""How local attention is: distance, receptive field and similarity across images, for every encoder and MAE's decoder.

    python -m models.attention --model mae --weights mae_pretrain_vit_base_full.pth --data-path FOLDER --output-dir OUT
    torchrun --nproc-per-node 8 -m models.attention --model ibot --data-path FOLDER --output-dir OUT
    python -m models.attention --table --output-dir OUT      no run: table and plots from OUT/results.jsonl

A results line for the encoder on whole images and one for MAE's decoder at each mask ratio, and one picture. Images are
central crops at the size of the checkpoint's own grid. A line holds, by layer and head or by (row, column) offset:

* distance_patches, distance_pixels: the attention-weighted mean Euclidean distance from the centre of a query patch to
  those of the key patches, itself included at 0. Prefix tokens are left out; a query's weights on the patches are
  divided by their sum. For the decoder also over mask tokens (..._masked) and visible patches (..._visible) apart;
  ..._uniform: what equal weights on all patches would give.
* map_similarity: the mean cosine similarity of the N x N maps (rows divided as above) of two different images, over all
  pairs of images and all heads. At every ratio above 0 each image has another mask, and what that changes counts too.
* receptive_field: the gradient magnitude of a token with respect to the input patches, by their offset from the token's
  patch: of the encoder's final token on whole images, of the decoder's prediction of a masked patch, through decoder
  and encoder, with respect to the visible patches. Magnitude: the L2 norm, over a patch's normalised pixels, of the
  gradient of the token's product with a seeded standard normal direction (MAE mostly predicts patches normalised to
  mean 0, whose plain sum says little). Mean over the receptive_field_count queries and images that have a patch there.
* receptive_field_tokens: the same for the decoder alone, with respect to the encoder's output for visible patches.
* *_radius50, *_radius90, of both fields: the smallest distance between patches within which offsets hold that share of
  the field's sum; an offset without a value counts as the others at its distance do.

Masks and directions depend on --seed and an image's place in the list. Queries are the same patches at every ratio. On
a trained ViT-Ti bf16 in place of fp32 moved distances by at most 0.13 percent and similarities by at most 0.0015.
"""

import argparse
import math
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from datasets.patches import PatchDataset
from datasets.retrieval import open_images
from utils import UserError
from utils.distributed import all_reduce, is_main, shard, world_size
from utils.drawing import COLOURS, PAGE, plot, require_matplotlib
from utils.formats import render
from utils.results import append_result, caveats, read_results, start_line
from utils.run import OneLineParser, Progress, add_common_arguments, autocast, number, positive_int, run_main, setup

from . import METHODS, Encoder, load_encoder


@contextmanager
def read_attention(blocks: Sequence[nn.Module], use: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    """In the body every block of timm's that runs hands its number and its weights to use: the softmax [B, heads, T, T]
    that the network itself computes, whatever biases, norms or rotations are in its scores. Raises UserError where a
    head has not one softmax."""
    with ExitStack() as stack:
        for layer, block in enumerate(blocks):
            attn, kind = block.attn, type(block.attn).__name__
            # DiffAttention subtracts one softmax from another.
            if not hasattr(attn, "attn_drop") or kind == "DiffAttention":
                raise UserError(f"timm's {kind} has not one softmax for each head; use a model with plain attention")
            # Fused attention never holds the weights.
            stack.callback(setattr, attn, "fused_attn", attn.fused_attn)
            attn.fused_attn = False
            hook = attn.attn_drop.register_forward_hook(lambda drop, inputs, weights, layer=layer: use(layer, weights))
            stack.callback(hook.remove)
        yield


def query_products(outputs: torch.Tensor, queries: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """outputs[b, queries[b, q]] . directions[b, q], summed over b: [Q]. As images do not mix, its gradient has each
    image's own. outputs [B, N, C], queries [B, Q], directions [B, Q, C]."""
    return (outputs.gather(1, queries[..., None].expand_as(directions)).float() * directions).sum((0, 2))


def patch_norms(images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """L2 norms of the patches of images [B, C, H, W], over all channels: [B, N], row by row."""
    squares = images.float().square().sum(1, keepdim=True)
    return F.avg_pool2d(squares, patch_size, divisor_override=1).sqrt().flatten(1)


def radius_holding(field: torch.Tensor, share: float) -> float:
    """The smallest distance, in patches, from the centre of field [2 side - 1, 2 side - 1] that holds this share of its
    sum. NaN (no value) counts as the mean of the values at its distance: otherwise the radius would grow with the
    number of images. NaN for a field without values."""
    offsets = torch.arange(len(field)) - len(field) // 2
    squares, ring = (offsets[:, None] ** 2 + offsets**2).flatten().unique(return_inverse=True)
    field = field.flatten().double()
    total = torch.bincount(ring, field.nan_to_num(0))
    found = torch.bincount(ring, field.isfinite())
    held = (total / found.clamp(min=1) * torch.bincount(ring)).cumsum(0)
    if held[-1] == 0:
        return float("nan")
    return float(squares[(held >= share * held[-1]).nonzero()[0, 0]]) ** 0.5


class Sums:
    """Sums over images for the encoder, or the decoder at one mask ratio. blocks: timm's; prefix: tokens before those
    of the side x side patches. decoder: adds figures by mask, and a second receptive field, of the decoder alone."""

    def __init__(self, blocks: Sequence[nn.Module], side: int, prefix: int, device: torch.device,
                 decoder: bool = False):
        self.side, self.prefix, self.decoder = side, prefix, decoder
        # Between the centres of patches, in patches: [N, N].
        centres = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float()
        self.distances = (centres[:, None] - centres).square().sum(2).sqrt().to(device)
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        layers, heads = len(blocks), blocks[0].attn.num_heads
        # Two groups of queries: tokens of visible patches, mask tokens.
        self.distance, self.queries = zeros(2, layers, heads), zeros(2, layers, 1)
        self.maps = zeros(layers, heads, side**2, side**2)
        # Sum and count, by offset.
        names = ("receptive_field", "receptive_field_tokens") if decoder else ("receptive_field",)
        self.fields = {name: zeros(2, 2 * side - 1, 2 * side - 1) for name in names}

    @torch.no_grad()
    def add_maps(self, mask: torch.Tensor, layer: int, weights: torch.Tensor) -> None:
        """Adds a layer's weights [B, heads, T, T]; mask [B, N]: 1 = mask token."""
        groups = torch.stack([1 - mask, mask]).double()
        rows = weights[:, :, self.prefix:, self.prefix:].float()
        rows = rows / rows.sum(3, keepdim=True)
        # No matrix product in float32: autocast would round it.
        distance = (rows * self.distances).sum(3).double()
        self.distance[:, layer] += torch.einsum("gbq,bhq->gh", groups, distance)
        self.queries[:, layer] += groups.sum((1, 2))[:, None]
        self.maps[layer] += (rows / torch.linalg.vector_norm(rows, dim=(2, 3), keepdim=True)).sum(0)

    def add_field(self, name: str, magnitude: torch.Tensor, seen: torch.Tensor, query: torch.Tensor) -> None:
        """Adds magnitude [B, N] to a field around the patches query [B]. seen [B, N]: 1 where a patch counts."""
        values = torch.stack([magnitude * seen, seen], dim=1).unflatten(2, (self.side, self.side))
        for image, patch in enumerate(query.tolist()):
            top, left = (self.side - 1 - place for place in divmod(patch, self.side))
            self.fields[name][:, top:top + self.side, left:left + self.side] += values[image]

    def figures(self, patch_size: int, num_images: int) -> dict:
        """The metrics of a results line, over all processes. Raises UserError where attention is not finite."""
        for value in (self.distance, self.queries, self.maps, *self.fields.values()):
            all_reduce(value)
        if not self.distance.isfinite().all():
            raise UserError("attention weights are not finite; use --precision fp32 or other weights")
        # The squared length of a sum of n unit vectors: n, and twice the sum of the products of all pairs.
        products = self.maps.flatten(2).square().sum(2) - num_images
        figures = {"map_similarity": plain((products / (num_images * (num_images - 1))).mean(1))}

        distances = {"distance_{}": self.distance.sum(0) / self.queries.sum(0),
                     "distance_{}_uniform": self.distances.double().mean()}
        if self.decoder:
            distances["distance_{}_visible"], distances["distance_{}_masked"] = self.distance / self.queries
        for name, (total, count) in self.fields.items():
            field = (total / count).cpu()
            figures[name] = plain(field) if count.any() else None
            for share in (50, 90):
                distances[f"{name}_radius{share}_{{}}"] = radius_holding(field, share / 100)
        count = self.fields["receptive_field"][1]
        figures["receptive_field_count"] = count.long().tolist() if count.any() else None
        for name, value in distances.items():
            figures[name.format("patches")] = plain(value)
            figures[name.format("pixels")] = plain(value * patch_size)
        return figures


def plain(values: torch.Tensor | list | float) -> list | float | None:
    """As nested lists of numbers with six significant digits; values that are not finite become None (JSON null)."""
    values = values.tolist() if isinstance(values, torch.Tensor) else values
    if isinstance(values, list):
        return [plain(value) for value in values]
    return float(f"{values:.6g}") if math.isfinite(values) else None


def image_noise(ids: Sequence[int], seed: int, sizes: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
    """Standard normal values for every image, by its number and the seed alone: for each size a tensor [B, *size]."""
    # The generator takes 32 bits of a seed.
    images = [torch.Generator().manual_seed((seed * 1_000_003 + int(number)) % 2**32) for number in ids]
    return [torch.stack([torch.randn(size, generator=image) for image in images]) for size in sizes]


def add_encoder(encoder: Encoder, images: torch.Tensor, queries: torch.Tensor, directions: torch.Tensor,
                sums: Sums) -> torch.Tensor:
    """Adds whole images [B, 3, H, W]; queries [B, Q], directions [B, Q, D]. Returns the final tokens."""
    seen = torch.ones(len(images), len(sums.distances), device=images.device)
    with read_attention(encoder.vit.blocks, partial(sums.add_maps, 1 - seen)):
        tokens = encoder(images)
    products = query_products(tokens[:, 1:], queries, directions)
    for query, product in zip(queries.T, products, strict=True):
        pixels, = torch.autograd.grad(product, [images], retain_graph=True)
        sums.add_field("receptive_field", patch_norms(pixels, encoder.patch_size), seen, query)
    return tokens.detach()


def add_decoder(encoder: Encoder, images: torch.Tensor, latent: torch.Tensor | None, noise: torch.Tensor, ratio: float,
                queries: torch.Tensor, directions: torch.Tensor, sums: Sums) -> None:
    """Adds MAE's decoder for images [B, 3, H, W], whose patches of the highest noise [B, N] are masked; queries [B, Q],
    masked at every ratio but 0, directions [B, Q, p * p * 3]. latent: the tokens of whole images, for ratio 0."""
    if ratio > 0:
        latent, mask, ids_restore = encoder.encode_visible(images, noise, ratio)
    else:
        mask, ids_restore = torch.zeros_like(noise), torch.arange(noise.shape[1], device=noise.device).expand_as(noise)
        # Nothing is masked, so there is no prediction of a masked patch to take a gradient of.
        queries, directions = queries[:, :0], directions[:, :0]
    with read_attention(encoder.decoder.decoder_blocks, partial(sums.add_maps, mask)):
        prediction = encoder.decoder(latent, ids_restore)
    products = query_products(prediction, queries, directions)
    for query, product in zip(queries.T, products, strict=True):
        pixels, tokens = torch.autograd.grad(product, [images, latent], retain_graph=True)
        sums.add_field("receptive_field", patch_norms(pixels, encoder.patch_size), 1 - mask, query)
        tokens = tokens[:, 1:].float().norm(dim=2)
        # Masked patches have no token: 0; then to the order of the grid.
        tokens = F.pad(tokens, (0, noise.shape[1] - tokens.shape[1])).gather(1, ids_restore)
        sums.add_field("receptive_field_tokens", tokens, 1 - mask, query)


def sum_attention(args: argparse.Namespace, encoder: Encoder, dataset: PatchDataset, side: int,
                  ratios: Sequence[float], device: torch.device) -> dict[float | None, Sums]:
    """This process's share of the images, added up: {None: the encoder's Sums, mask ratio: the decoder's, ...}."""
    sums = {ratio: Sums(encoder.decoder.decoder_blocks, side, 1, device, decoder=True) for ratio in ratios}
    sums = {None: Sums(encoder.vit.blocks, side, encoder.vit.num_prefix_tokens, device), **sums}
    progress = Progress(len(dataset), "attention", "images")
    sizes = [(side * side,), (args.queries, encoder.embed_dim), (args.queries, encoder.patch_size**2 * 3)]
    for images, ids in dataset.batches(shard(len(dataset)), max(1, args.batch_size // world_size()), args.workers,
                                       pin_memory=device.type == "cuda"):
        noise, token_directions, pixel_directions = (x.to(device) for x in image_noise(ids, args.seed, sizes))
        # The patches of the highest noise are the first to be masked: at every ratio the same queries, drawn evenly.
        queries = noise.argsort(dim=1)[:, side * side - args.queries:]
        images = encoder.preprocess(images.to(device, non_blocking=True)).requires_grad_(args.queries > 0)
        with autocast(device, args.precision):
            latent = add_encoder(encoder, images, queries, token_directions, sums[None])
            for ratio in ratios:
                add_decoder(encoder, images, latent, noise, ratio, queries, pixel_directions, sums[ratio])
        progress.update(len(ids) * world_size())
    return sums


def latest(results: Sequence[dict]) -> dict[str, dict]:
    """The last result of every name, part and mask ratio, by a title of these with the caveats."""
    chosen = {}
    for result in results:
        ratio = f", mask ratio {result['mask_ratio']:g}" if result["part"] == "decoder" else ""
        chosen[f"{result['name']}{caveats(result)}, {result['part']}{ratio}"] = result
    return chosen


def summary_table(results: Sequence[dict]) -> tuple:
    """(title, header, rows) of the latest results."""
    header = ["model", "images", "distance, first layer", "last layer", "mean", "receptive field, 50%", "90%",
              "map similarity, last layer"]
    rows = []
    for title, result in latest(results).items():
        layers = np.mean(result["distance_pixels"], axis=1)
        values = [layers[0], layers[-1], layers.mean(), result["receptive_field_radius50_pixels"],
                  result["receptive_field_radius90_pixels"], result["map_similarity"][-1]]
        rows.append([title, str(result["num_images"]), *("-" if value is None else f"{value:.4g}" for value in values)])
    return "Attention, distances and radii in pixels", header, rows


def draw_attention(path: Path, results: Sequence[dict], columns: int = 5) -> None:
    """Plots the latest results: attention distance by layer, and below it the receptive fields."""
    chosen = latest(results)
    fields = {title: np.array(result["receptive_field"], dtype=float) for title, result in chosen.items()
              if result["receptive_field"]}
    rows = math.ceil(len(fields) / columns)
    with plot(path, PAGE, 3 + 1.7 * rows) as figure:
        # Apart, since the legend takes its room from all that stands in its columns.
        above, below = figure.subfigures(2, 1, height_ratios=(3, 1.7 * rows + 0.01))
        axes = above.add_subplot(xlabel="layer (line: mean over heads; dots: heads)",
                                 ylabel="attention distance, pixels (grey: equal weights)")
        axes.xaxis.get_major_locator().set_params(integer=True)
        for index, (title, result) in enumerate(chosen.items()):
            layers, colour = np.array(result["distance_pixels"]), COLOURS[index % len(COLOURS)]
            numbers = range(1, len(layers) + 1)
            axes.axhline(result["distance_pixels_uniform"], color="#999999")
            axes.plot(numbers, layers, ".", color=colour, markersize=2)
            axes.plot(numbers, layers.mean(1), "o-", color=colour, markersize=3, label=" " + textwrap.fill(title, 40))
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
        for place, (title, field) in enumerate(fields.items(), 1):
            axes = below.add_subplot(rows, columns, place, xticks=[], yticks=[], facecolor="#cdcdcd")
            axes.set_title(textwrap.fill(title, 28), fontsize=6)
            image = axes.imshow(np.log10((field / np.nanmax(field)).clip(1e-3)), vmin=-3, vmax=0, cmap="magma_r")
        if fields:
            below.colorbar(image, ax=below.axes, location="bottom", aspect=40, shrink=0.8,
                           label="receptive fields: log10 of the share of the largest value; grey: no pair of patches")


def parse_arguments() -> argparse.Namespace:
    parser = OneLineParser(__doc__, prog="python -m models.attention")
    add_common_arguments(parser, METHODS, ("imagenet", "synthetic"), batch_size=8)
    parser.set_defaults(model="mae", dataset="imagenet")
    group = parser.add_argument_group("attention (--dataset imagenet: any folder of images)")
    group.add_argument("--num-images", type=positive_int, default=256, metavar="N",
                       help="drawn by the seed (default: %(default)s)")
    group.add_argument("--mask-ratios", type=number(float, 0, 0.99), nargs="+", default=(0.0, 0.25, 0.5, 0.75, 0.9),
                       metavar="R", help="of MAE's decoder (default: 0 0.25 0.5 0.75 0.9)")
    group.add_argument("--queries", type=number(int, 0, 1000), default=1, metavar="N",
                       help="per image, for the receptive fields; 0: none of them (default: %(default)s)")
    group.add_argument("--encoder-only", action="store_true", help="leave MAE's decoder out; the base file is enough")
    args = parser.parse_args()
    if args.model != "mae" or args.encoder_only:
        parser.check_used(args, f"--model {args.model}" if args.model != "mae" else "--encoder-only", "mask_ratios")
        args.mask_ratios = ()
    if args.compile:
        raise UserError("--compile: attention is read inside the blocks, which then cannot be compiled; leave it out")
    require_matplotlib()
    return args


def main() -> None:
    """Sums attention over images, for the encoder and for MAE's decoder, and writes results lines and plots."""
    args, started = parse_arguments(), time.monotonic()
    if args.table:
        results = read_results(args.output_dir, "attention")
        print(render([summary_table(results)], [], args.format))
        draw_attention(args.output_dir / "attention.png", results)
        return
    device, log = setup(args)

    encoder = load_encoder(args, device, log, projector=False, decoder=bool(args.mask_ratios))
    if not hasattr(encoder, "vit"):
        raise UserError(f"{args.model}: the attention of your own network is not known here; use a model of timm's")
    side = encoder.vit.patch_embed.grid_size[0]
    ratios = sorted(set(args.mask_ratios))
    most = min([side**2 - int(side**2 * (1 - ratio)) for ratio in ratios if ratio > 0], default=side**2)
    if args.queries > most:
        raise UserError(f"--queries {args.queries}: only {most} of {side**2} patches are masked at the lowest ratio")

    dataset = open_images(args.dataset, args.data_path, args.num_images, args.seed, side * encoder.patch_size)
    sums = sum_attention(args, encoder, dataset, side, ratios, device)

    start, lines = start_line("attention", args, encoder), []
    for ratio, part in sums.items():
        lines.append(start | {
            "part": "encoder" if ratio is None else "decoder", "mask_ratio": ratio or 0.0, "num_images": len(dataset),
            "image_size": side * encoder.patch_size, "patch_size": encoder.patch_size,
            **part.figures(encoder.patch_size, len(dataset)), "seconds": time.monotonic() - started})
    append_result(args.output_dir, *lines)
    log(render([summary_table(lines)], [], "text"))
    if is_main():
        draw_attention(args.output_dir / "attention.png", read_results(args.output_dir, "attention"))


if __name__ == "__main__":
    run_main(main)
