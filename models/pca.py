"""Principal components of patch tokens as colours, and a sheet of them: a row of images, below it a row per model.

As DINOv2's figures (arXiv:2304.07193, section 7.3): a first analysis separates foreground from background, three
components of a second one on the foreground are red, green and blue. Both are joint over a model's images: colours
compare within a row, not between rows.
"""

import textwrap
from collections.abc import Mapping
from pathlib import Path

import torch

from utils import UserError
from utils.distributed import is_main
from utils.drawing import image_rows
from utils.run import autocast
from utils.storage import load, save

from .encoder import Encoder


def principal_components(features: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, D] -> float64 (scores [N, count] of the centred rows, ratios [count] of the variance that each component
    explains), on the CPU; computed on the features' device by the eigenvectors of the covariance. A component's sign
    makes the skewness of its scores positive, as in CAPI (arXiv:2502.08769). Raises UserError for features that are not
    finite, or all the same."""
    centred = features.double() - features.double().mean(0)
    if not centred.isfinite().all() or not centred.any():
        raise UserError("patch tokens are not finite, or all the same; use --precision fp32, or check the weights")
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
    values, vectors = values.flip(0).cpu(), vectors.flip(1)[:, :count]
    scores = (centred @ vectors).cpu()
    return scores * torch.where(scores.pow(3).sum(0) < 0, -1.0, 1.0), values[:count] / values.sum()


def foreground_mask(scores: torch.Tensor) -> torch.Tensor:
    """Scores of the first component [n, h, w] -> bool [n, h, w], True on the foreground: of the two sides that Otsu's
    threshold (1979) over all images makes, the one with the smaller share of its patches on an image's border."""
    ordered = scores.flatten().sort().values
    # (sum of the lower side)^2 / (size of the lower side * size of the higher) is the variance between, up to a factor.
    size = torch.arange(1, len(ordered), device=scores.device)
    between = (ordered - ordered.mean()).cumsum(0)[:-1].square() / (size * (len(ordered) - size))
    high = scores >= ordered[between.argmax() + 1]
    border = torch.ones_like(high)
    border[:, 1:-1, 1:-1] = False
    return high if border[high].double().mean() <= border[~high].double().mean() else ~high


def token_colours(tokens: torch.Tensor, foreground: str = "first") -> tuple[torch.Tensor, torch.Tensor, list[float]]:
    """Patch tokens [n, h, w, D] -> (colours uint8 [n, h, w, 3], foreground bool [n, h, w], ratios), on the CPU.

    tokens: after the encoder's final norm; without it a few tokens of very large norm are the first component.
    foreground: "first" = foreground_mask of the first component, "none" = all patches; the rest is black. Components
    are scaled from their 1st to their 99th percentile, as the minimum and maximum of DINOv2 follow single tokens.
    ratios: of the foreground's variance, as principal_components gives them. Raises UserError as it does.
    """
    mask = torch.ones(tokens.shape[:3], dtype=torch.bool)
    if foreground == "first":
        mask = foreground_mask(principal_components(tokens.flatten(0, 2), 1)[0].view(mask.shape))
    scores, ratios = principal_components(tokens[mask.to(tokens.device)], 3)
    low, high = scores.quantile(torch.tensor([0.01, 0.99], dtype=scores.dtype), dim=0)
    colours = torch.zeros(*mask.shape, 3, dtype=torch.uint8)
    colours[mask] = (((scores - low) / (high - low)).clamp(0, 1) * 255).round().byte()
    return colours, mask, ratios.tolist()


def draw_sheet(path: Path, images: torch.Tensor, rows: Mapping[str, torch.Tensor]) -> None:
    """Draws images uint8 [n, 3, H, W] in a row, below it a row for each model, its name on the left: by name the
    colours uint8 [n, h, w, 3], enlarged to H x W (nearest patch)."""
    lines = [[("", image) for image in line] for line in (images.permute(0, 2, 3, 1), *rows.values())]
    with image_rows(path, lines, images.shape[2:], gap=4) as axes:
        for one, name in zip(axes[1:, 0], rows, strict=True):
            one.images[0].set_interpolation("nearest")
            one.text(-8, images.shape[2] / 2, textwrap.fill(name, 40), ha="right", va="center")


@torch.inference_mode()
def pca_run(encoder: Encoder, dataset, name: str, foreground: str, precision: str, folder: Path) -> tuple[Path, dict]:
    """Draws the colours of a data set of whole images as a row of folder/pca.png, below those of earlier runs with the
    same images, whose colours folder/pca.pt holds. Returns the picture's path and what a results line says. Raises
    UserError."""
    images, _ = next(dataset.batches(range(len(dataset)), dataset.num_patches, 0))
    with autocast(encoder.mean.device, precision):
        batch = encoder.preprocess(images.to(encoder.mean.device))
        tokens = torch.cat([encoder(part)[:, 1:] for part in batch.split(16)]).unflatten(1, encoder.grid(batch))
    colours, mask, ratios = token_colours(tokens.float(), foreground)
    rows, path = {name: colours}, folder / "pca.png"
    if is_main():
        kept = path.with_suffix(".pt")
        if kept.exists():
            earlier = load(kept, "a sheet's colours", ("images", "foreground", "rows"))
            if earlier["foreground"] == foreground and torch.equal(earlier["images"], images):
                rows = earlier["rows"] | rows
        save(kept, {"images": images, "foreground": foreground, "rows": rows})
        draw_sheet(path, images, rows)
    return path, {"num_images": len(images), "foreground": foreground, "explained_variance": ratios,
                  "foreground_share": mask.double().mean().item(), "rows": list(rows)}
