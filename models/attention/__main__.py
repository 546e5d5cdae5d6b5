"""How local attention is: distance, receptive field and similarity across images, for every encoder and MAE's decoder.

    python -m models.attention --model mae --weights mae_pretrain_vit_base_full.pth --data-path FOLDER --output-dir OUT
    torchrun --nproc-per-node 8 -m models.attention --model ibot --data-path FOLDER --output-dir OUT
    python -m models.attention --model mae --weights random --dataset synthetic     nothing downloaded, a control
    python -m models.attention --table --output-dir OUT      no run: table and plots from OUT/results.jsonl

One results line (task "attention") for the encoder on whole images and one for MAE's decoder at each mask ratio, and
plots of all models in the folder. Images are central crops at the size of the checkpoint's own grid. A line holds:

* distance_patches, distance_pixels [layers][heads]: the attention-weighted mean Euclidean distance from the centre of a
  query patch to those of the key patches, itself included at 0, over images and queries. Prefix tokens are left out as
  queries and keys; a query's weights on the patches are divided by their sum. For the decoder also over mask tokens
  (..._masked) and visible patches (..._visible) apart; ..._uniform: what equal weights on all patches would give.
* map_similarity [layers]: the mean cosine similarity of the N x N maps (rows divided as above) of two different images,
  over all pairs of images and all heads. The decoder's sequence is whole and in order at every ratio; above ratio 0
  every image has another mask, and what that changes counts too.
* receptive_field: the gradient magnitude of a token with respect to the input patches, by (row, column) offset from the
  token's patch in the middle. The token is the encoder's final one on whole images, or the decoder's prediction of a
  masked patch, through decoder and encoder, from the visible patches. Magnitude: the L2 norm, over a patch's normalised
  pixels, of the gradient of the token's product with a seeded standard normal direction (MAE mostly predicts patches
  normalised to mean 0, whose plain sum says little). Mean over the receptive_field_count queries and images that have
  a patch at that offset; null where none has.
* receptive_field_tokens: the same for the decoder alone, with respect to the encoder's output for visible patches.
* *_radius50, *_radius90 (of both fields, _patches and _pixels): the smallest distance between patches within which
  offsets hold that share of the field's sum; an offset without a value counts as the others at its distance do.

Cost: the pass that gives the attention gives the receptive fields too, with one backward pass for each of --queries.
Measured for ViT-B/16 on a CPU core, in forward passes of the encoder: the encoder 1.4 with --queries 0, 2.7 with 1;
with MAE's decoder at five mask ratios 5.5 and 9.9. Receptive fields keep activations, about 0.12 GB an image.
Masks and directions depend on --seed and an image's place in the list, so figures do not depend on batch size or number
of processes, beyond rounding. The queries of receptive fields are the same patches at every mask ratio.
"""

import argparse
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from datasets.patches import PatchDataset
from datasets.retrieval import open_images
from utils import UserError
from utils.distributed import is_main, shard, world_size
from utils.drawing import require_matplotlib
from utils.ending import exit_with_one_line_errors
from utils.formats import render
from utils.results import append_result, read_results, run_title, start_line
from utils.run import (
    OneLineParser,
    Progress,
    add_common_arguments,
    autocast,
    non_negative_int,
    number,
    positive_int,
    setup,
)
from utils.storage import require_room

from .. import METHODS, Encoder, load_encoder
from ..features import require_batch_room
from .maps import Sums, add_centred, patch_gradients, patch_norms
from .plots import summary_table, write_plots

# What the table and the plots take from a results line.
NEEDED = ("weights", "part", "mask_ratio", "num_images", "patch_size", "distance_pixels", "distance_pixels_uniform",
          "map_similarity", "receptive_field")


def image_noise(ids: Sequence[int], seed: int, sizes: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
    """Standard normal values for every image, by its number and the seed alone: for each size a tensor [B, *size]."""
    # The generator takes 32 bits of a seed.
    images = [torch.Generator().manual_seed((seed * 1_000_003 + int(number)) % 2**32) for number in ids]
    return [torch.stack([torch.randn(size, generator=image) for image in images]) for size in sizes]


def add_encoder(encoder: Encoder, images: torch.Tensor, queries: torch.Tensor, directions: torch.Tensor,
                sums: Sums) -> torch.Tensor:
    """Adds a pass over whole images [B, 3, H, W]; queries [B, Q], directions [B, Q, D]. Returns the final tokens."""
    seen = torch.ones(len(images), len(sums.distances), device=images.device)
    with torch.set_grad_enabled(queries.shape[1] > 0):
        with sums.watch(1 - seen):
            tokens = encoder(images)
        for query, direction in zip(queries.T, directions.unbind(1), strict=True):
            pixels, = patch_gradients(tokens[:, 1:], query, direction, [images])
            add_centred(sums.fields["receptive_field"], patch_norms(pixels, encoder.patch_size), seen, query, sums.grid)
    return tokens.detach()


def add_decoder(encoder: Encoder, images: torch.Tensor, latent: torch.Tensor | None, noise: torch.Tensor, ratio: float,
                queries: torch.Tensor, directions: torch.Tensor, sums: Sums) -> None:
    """Adds a pass of MAE's decoder. images [B, 3, H, W], noise [B, N]; queries [B, Q] are masked at every ratio but 0,
    directions [B, Q, p * p * 3]. latent: the encoder's tokens of whole images, for ratio 0."""
    if ratio == 0:
        # Nothing is masked, so there is no prediction of a masked patch to take a gradient of.
        with torch.no_grad(), sums.watch(torch.zeros_like(noise)):
            encoder.decode(latent, torch.arange(noise.shape[1], device=noise.device).expand(len(noise), -1))
        return
    with torch.set_grad_enabled(queries.shape[1] > 0):
        latent, mask, ids_restore = encoder.encode_visible(images, noise, ratio)
        with sums.watch(mask):
            prediction = encoder.decode(latent, ids_restore)
        for query, direction in zip(queries.T, directions.unbind(1), strict=True):
            pixels, tokens = patch_gradients(prediction, query, direction, [images, latent])
            pixels, tokens = patch_norms(pixels, encoder.patch_size), tokens[:, 1:].float().norm(dim=2)
            tokens = F.pad(tokens, (0, noise.shape[1] - tokens.shape[1])).gather(1, ids_restore)
            add_centred(sums.fields["receptive_field"], pixels, 1 - mask, query, sums.grid)
            add_centred(sums.fields["receptive_field_tokens"], tokens, 1 - mask, query, sums.grid)


def sum_attention(encoder: Encoder, dataset: PatchDataset, grid: tuple[int, int], ratios: Sequence[float],
                  num_queries: int, batch_size: int, workers: int, precision: str, seed: int, device: torch.device,
                  ) -> dict[float | None, Sums]:
    """This process's share of the images, added up: {None: the encoder's Sums, mask ratio: the decoder's, ...}."""
    count, patch_size = grid[0] * grid[1], encoder.patch_size
    sums = {None: Sums(encoder.vit.blocks, grid, encoder.vit.num_prefix_tokens, device)}
    for ratio in ratios:
        sums[ratio] = Sums(encoder.decoder.decoder_blocks, grid, 1, device, decoder=True)
    share, progress = shard(len(dataset)), Progress(len(dataset), "attention", "images")
    sizes = [(count,), (num_queries, encoder.embed_dim), (num_queries, patch_size**2 * 3)]
    for images, ids in dataset.batches(share, max(1, batch_size // world_size()), workers,
                                     pin_memory=device.type == "cuda"):
        noise, token_directions, pixel_directions = (x.to(device) for x in image_noise(ids.tolist(), seed, sizes))
        # The patches of the highest noise are the first to be masked: at every ratio the same queries, drawn evenly.
        queries = noise.argsort(dim=1)[:, count - num_queries:]
        images = encoder.preprocess(images.to(device, non_blocking=True)).requires_grad_(num_queries > 0)
        with autocast(device, precision):
            latent = add_encoder(encoder, images, queries, token_directions, sums[None])
            for ratio in ratios:
                add_decoder(encoder, images, latent, noise, ratio, queries, pixel_directions, sums[ratio])
        progress.update(len(ids) * world_size())
    return sums


def choose_ratios(mask_ratios: Sequence[float], num_patches: int, num_queries: int) -> list[float]:
    """The decoder's mask ratios, sorted, each once. Raises UserError for one that leaves no patch visible and for more
    queries than the smallest masks."""
    visible = {ratio: int(num_patches * (1 - ratio)) if 0 <= ratio < 1 else 0 for ratio in sorted(mask_ratios)}
    if 0 in visible.values():
        raise UserError(f"--mask-ratios {' '.join(map(str, mask_ratios))}: of {num_patches} patches each must leave "
                        "one visible, from 0 up to below 1")
    most = num_patches - max([number for ratio, number in visible.items() if ratio > 0], default=0)
    if num_queries > most:
        raise UserError(f"--queries {num_queries}: only {most} of {num_patches} patches are masked at the lowest ratio")
    return list(visible)


def parse_arguments() -> argparse.Namespace:
    parser = OneLineParser(__doc__, prog="python -m models.attention")
    add_common_arguments(parser, METHODS, ("imagenet", "synthetic"), batch_size=32)
    parser.set_defaults(model="mae", dataset="imagenet")
    group = parser.add_argument_group("attention (--dataset imagenet: any folder of images)")
    group.add_argument("--num-images", type=positive_int, default=256, metavar="N",
                       help="drawn by the seed (default: %(default)s)")
    group.add_argument("--mask-ratios", type=number(float, 0, 1), nargs="+", default=(0.0, 0.25, 0.5, 0.75, 0.9),
                       metavar="R", help="of MAE's decoder (default: 0 0.25 0.5 0.75 0.9)")
    group.add_argument("--queries", type=non_negative_int, default=1, metavar="N",
                       help="per image, for the receptive fields; 0: none of them (default: %(default)s)")
    group.add_argument("--encoder-only", action="store_true", help="leave MAE's decoder out; the base file is enough")
    group.add_argument("--skip-bad-images", action="store_true",
                       help="leave out undecodable images instead of stopping")
    args = parser.parse_args()
    if args.model != "mae" or args.encoder_only:
        parser.check_used(args, f"--model {args.model}" if args.model != "mae" else "--encoder-only", "mask_ratios")
    if args.compile:
        raise UserError("--compile: attention is read inside the blocks, which then cannot be compiled; leave it out")
    return args


def main() -> None:
    """Sums attention over images, for the encoder and for MAE's decoder, and writes results lines and plots."""
    args, started = parse_arguments(), time.monotonic()
    if args.table:
        results, notes = read_results(args.output_dir, NEEDED, "attention")
        print(render([summary_table(results)], notes, args.format))
        write_plots(results, args.output_dir)
        return
    require_matplotlib()
    device, log = setup(args)

    wants_decoder = args.model == "mae" and not args.encoder_only
    encoder = load_encoder(args, device, log, projector=False, decoder=wants_decoder)
    if not hasattr(encoder, "vit"):
        raise UserError(f"{args.model}: the attention of your own network is not known here; use a model of timm's")
    grid = tuple(encoder.vit.patch_embed.grid_size)
    if grid[0] != grid[1]:
        raise UserError(f"{args.model} has a grid of {grid[0]} x {grid[1]} patches; only square ones are measured")
    count, size = grid[0] * grid[1], grid[0] * encoder.patch_size
    ratios = choose_ratios(args.mask_ratios, count, args.queries) if wants_decoder else []
    parts = [encoder.vit.blocks] + [encoder.decoder.decoder_blocks for _ in ratios]
    need = sum(len(blocks) * blocks[0].attn.num_heads for blocks in parts) * count**2 * 8
    log(f"sums of attention maps need {need / 1e9:.2f} GB")
    require_room(need, device, "sums of attention maps", lambda share: "fewer --mask-ratios, or a smaller --model")

    dataset = open_images(args.dataset, args.data_path, args.num_images, args.seed, size, args.skip_bad_images)
    require_batch_room(encoder, size, min(args.batch_size, len(dataset)))
    sums = sum_attention(encoder, dataset, grid, ratios, args.queries, args.batch_size, args.workers, args.precision,
                         args.seed, device)

    lines = []
    for ratio, part in sums.items():
        figures = part.figures(encoder.patch_size)
        num_images = round(float(part.queries[:, 0].sum()) / count)
        if not num_images:
            raise UserError("no image could be read, so there is nothing to measure")
        lines.append(start_line("attention", args, encoder) | {
            "part": "encoder" if ratio is None else "decoder", "mask_ratio": ratio or 0.0, "num_images": num_images,
            "image_size": size, "patch_size": encoder.patch_size, "seconds": time.monotonic() - started, **figures})
    log.open(args.output_dir)
    log(f"{run_title(lines[0])}, {lines[0]['num_images']} images, {args.precision}")
    log(render([summary_table(lines)], [], "text"))
    append_result(args.output_dir, *lines)
    if is_main():
        names = write_plots(read_results(args.output_dir, NEEDED, "attention")[0], args.output_dir)
        log(f"{', '.join(names)} in {args.output_dir}")


if __name__ == "__main__":
    exit_with_one_line_errors(main)
