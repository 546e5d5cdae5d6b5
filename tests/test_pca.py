"""Principal components against scikit-learn, the foreground on planted clusters, colours and the sheet."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import skew
from sklearn.decomposition import PCA

from models.pca import draw_sheet, foreground_mask, principal_components, token_colours
from utils import UserError


def features(rows=400, width=24, seed=0):
    """Skewed features with distinct variances and a mean far from zero."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(rows, width, generator=generator).pow(3) * torch.linspace(3, 0.2, width)
    rotation = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    return draws @ rotation + 5


def planted(seed=0):
    """Three images of 10 x 12 patches: background, and an object of its own mean within the border. Returns tokens
    [3, 10, 12, 16] and the object's mask."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(3, 10, 12, dtype=torch.bool)
    mask[0, 2:7, 3:9] = mask[1, 4:8, 1:4] = mask[2, 1:9, 1:11] = True
    means = torch.randn(2, 16, generator=generator) * 3
    return means[mask.long()] + 0.5 * torch.randn(3, 10, 12, 16, generator=generator), mask


def test_equals_scikit_learn():
    rows = features()
    scores, ratios = principal_components(rows, 3)
    reference = PCA(3, svd_solver="full").fit(rows.double().numpy())
    expected = reference.transform(rows.double().numpy())
    signs = np.sign((scores.numpy() * expected).sum(0))
    np.testing.assert_allclose(scores.numpy() * signs, expected, atol=1e-9)
    np.testing.assert_allclose(ratios.numpy(), reference.explained_variance_ratio_, rtol=1e-10)


def test_sign_is_that_of_positive_skewness():
    rows = features()
    scores, _ = principal_components(rows, 4)
    assert (skew(scores.numpy()) > 0).all()
    torch.testing.assert_close(principal_components(rows, 4)[0], scores, rtol=0, atol=0)
    # The features in other coordinates have the same scores, whatever sign the eigenvectors come out with.
    for seed in range(4):
        rotation = torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(seed)).double())[0]
        torch.testing.assert_close(principal_components(rows.double() @ rotation, 4)[0], scores, rtol=0, atol=1e-9)
    torch.testing.assert_close(principal_components(-rows, 4)[0], scores, rtol=0, atol=1e-9)


@pytest.mark.parametrize("sign", [1, -1])
def test_foreground_is_the_planted_object(sign):
    tokens, mask = planted()
    colours, found, _ = token_colours(sign * tokens)
    assert found.equal(mask) and colours.dtype == torch.uint8
    assert (colours[~mask] == 0).all() and colours[mask].any(1).float().mean() > 0.95


def test_threshold_is_the_best_of_all_by_brute_force():
    scores = torch.rand(2, 9, 7, generator=torch.Generator().manual_seed(3)).double().pow(2)
    values = scores.flatten().numpy()

    def within(threshold):
        sides = values[values >= threshold], values[values < threshold]
        return sum(((side - side.mean()) ** 2).sum() for side in sides)

    best = min(sorted(values)[1:], key=within)
    found = foreground_mask(scores)
    assert found.equal(scores >= best) or found.equal(scores < best)


def test_large_object_that_holds_most_of_the_border_is_still_the_foreground():
    # Of the object's 78 patches 20 are on the border, of the background's 22 it is 16.
    scores = torch.ones(1, 10, 10)
    scores[0, :, :4] = 0
    scores[0, 2:8, 1:4] = 1
    assert foreground_mask(scores).equal(scores == 1) and foreground_mask(-scores).equal(scores == 1)


def test_joint_over_the_images():
    tokens, _ = planted()
    order = [2, 0, 1]
    colours, mask, _ = token_colours(tokens)
    permuted, permuted_mask, _ = token_colours(tokens[order])
    # The order of a sum may move a colour by one step.
    assert permuted_mask.equal(mask[order]) and (permuted.int() - colours[order].int()).abs().max() <= 1
    assert (token_colours(tokens[:1])[0].int() - colours[:1].int()).abs().max() > 1


def test_colours_are_scikit_learns_scores_between_percentiles():
    tokens = features().view(4, 10, 10, 24)
    colours, mask, ratios = token_colours(tokens, "none")
    assert mask.all()
    rows = tokens.flatten(0, 2).double().numpy()
    reference = PCA(3, svd_solver="full").fit(rows)
    scores = reference.transform(rows)
    scores *= np.where(skew(scores) < 0, -1, 1)
    low, high = np.percentile(scores, [1, 99], axis=0)
    expected = np.rint(255 * np.clip((scores - low) / (high - low), 0, 1)).reshape(4, 10, 10, 3)
    assert np.abs(colours.numpy() - expected).max() <= 1
    assert (colours.numpy() == expected).mean() > 0.99
    np.testing.assert_allclose(ratios, reference.explained_variance_ratio_, rtol=1e-9)


def test_tokens_that_are_not_finite_or_all_the_same():
    tokens, _ = planted()
    tokens[1, 2, 3, 4] = float("nan")
    for broken in (tokens, torch.zeros(2, 4, 4, 8), torch.randn(0, 4, 4, 8)):
        with pytest.raises(UserError, match="not finite, or all the same"):
            token_colours(broken)


def test_sheet(figures, tmp_path):
    """Nearest patches, enlarged, in the order of the images; a name beside each model's row, none beside the images."""
    images = torch.randint(0, 256, (3, 3, 32, 48), dtype=torch.uint8)
    rows = {"small $grid": torch.randint(0, 256, (3, 2, 3, 3), dtype=torch.uint8),
            "a model of a longer name": torch.randint(0, 256, (3, 4, 6, 3), dtype=torch.uint8)}
    draw_sheet(tmp_path / "a.png", images, rows)
    pictures = [*images.permute(0, 2, 3, 1), *(picture for row in rows.values() for picture in row)]
    for axes, expected in zip(figures[0].axes, pictures, strict=True):
        assert (axes.images[0].get_array() == expected.numpy()).all() and axes.images[0].get_extent() == [0, 48, 32, 0]
    words = [[text.get_text() for text in axes.texts if text.get_text()] for axes in figures[0].axes]
    assert words == [[], [], [], ["small $grid"], [], [], ["a model of a longer name"], [], []]
    sheet = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))
    for colours, size in zip(rows.values(), (16, 8), strict=True):
        for colour in colours.flatten(0, 2).numpy():
            assert (size - 1) ** 2 <= (sheet == colour).all(2).sum() <= (size + 2) ** 2
