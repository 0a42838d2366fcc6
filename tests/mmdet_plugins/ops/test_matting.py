"""Errors of mattes against values by hand and slow loops; pictures of known composition."""

import math

import numpy as np
import pytest
import torch

from mmdet_plugins.ops import matting
from mmdet_plugins.ops.dice import mask_dice_loss
from mmdet_plugins.ops.matting import (
    absolute_error,
    bokeh,
    composite,
    connectivity_error,
    estimate_foreground,
    gradient_error,
    matte_dice_loss,
    paste_matte,
    squared_error,
)


def random_mattes(hw=(11, 17), seed=0):
    """Two similar mattes with regions of 0 and of 1."""
    rng = np.random.default_rng(seed)
    truth = np.clip(np.cumsum(rng.normal(0.02, 0.3, hw), 1), 0, 1)
    return np.clip(truth + rng.normal(0, 0.1, hw), 0, 1), truth


# --- losses -----------------------------------------------------------------------------------


def test_dice_of_mattes_by_hand_and_of_masks_as_elsewhere():
    probs = torch.tensor([[[0.5, 1.0]]], dtype=torch.float64)
    mattes = torch.tensor([[[0.5, 0.5]]], dtype=torch.float64)
    assert matte_dice_loss(probs, mattes, 0.0).item() == pytest.approx(1 - 2 * 0.75 / 1.75)
    assert matte_dice_loss(mattes, mattes, 0.0).item() == pytest.approx(0)
    logits, masks = torch.randn(5, 7, 9), torch.rand(2, 7, 9) > 0.6
    index = torch.tensor([0, 1, 1, 0, 1])
    ours = matte_dice_loss(logits.sigmoid(), masks[index].float())
    torch.testing.assert_close(ours, mask_dice_loss(logits, masks, index))
    assert matte_dice_loss(probs[:0], mattes[:0]).shape == (0,)


# --- errors -----------------------------------------------------------------------------------


def test_differences_by_hand():
    matte, truth = np.array([[0.0, 0.5, 1.0]]), np.array([[0.25, 0.5, 0.5]])
    assert absolute_error(matte, truth) == pytest.approx(0.75)
    assert squared_error(matte, truth) == pytest.approx((0.0625 + 0.25) / 3)


@pytest.mark.parametrize(
    'error', [absolute_error, squared_error, gradient_error, connectivity_error]
)
def test_errors_are_zero_between_equals_and_symmetric(error):
    matte, truth = random_mattes()
    assert error(truth, truth) == 0
    assert error(matte, truth) == pytest.approx(error(truth, matte)) != 0
    single = error(matte.astype(np.float32), truth.astype(np.float32))
    assert single == pytest.approx(error(matte, truth), rel=1e-4)
    assert error(np.zeros((1, 1)), np.zeros((1, 1))) == 0


def test_gradient_of_a_ramp_by_hand():
    """A ramp has one slope all over, away from the border; a constant has none."""
    ramp = np.tile(0.01 * np.arange(41), (31, 1))
    sigma = 1.4
    half = math.ceil(sigma * math.sqrt(-2 * math.log(math.sqrt(2 * math.pi) * sigma * 0.01)))
    assert half == 4
    g = [math.exp(-x * x / (2 * sigma**2)) for x in range(-half, half + 1)]
    d = [x * v for x, v in zip(range(-half, half + 1), g, strict=True)]
    norm = math.sqrt(sum(v * v for v in g) * sum(v * v for v in d))
    slope = 0.01 * sum(g) * sum(x * v for x, v in zip(range(-half, half + 1), d, strict=True))
    inside = (slice(None), slice(half, -half))
    for alpha, turned in ((ramp, False), (ramp.T, True)):
        error = gradient_error(alpha, np.zeros_like(alpha))
        border = gradient_error(alpha[:1] if not turned else alpha[:, :1], np.zeros((1, 1)))
        columns = ramp[inside].shape[1]
        assert 31 * columns * (slope / norm) ** 2 < error < 31 * 41 * (slope / norm) ** 2
        assert error == pytest.approx(31 * border, rel=1e-9)


def test_gradient_against_loops():
    matte, truth = random_mattes((9, 12), seed=3)
    half, sigma = 4, 1.4
    offsets = range(-half, half + 1)
    weights = {
        (y, x): x * math.exp(-(x * x + y * y) / (2 * sigma**2)) for y in offsets for x in offsets
    }
    norm = math.sqrt(sum(w * w for w in weights.values()))

    def magnitude(alpha, row, column):
        dx = dy = 0.0
        for (y, x), weight in weights.items():
            line, place = np.clip(row + y, 0, 8), np.clip(column + x, 0, 11)
            dx += weight * alpha[line, place]
            line, place = np.clip(row + x, 0, 8), np.clip(column + y, 0, 11)
            dy += weight * alpha[line, place]
        return math.hypot(dx, dy) / norm

    expected = sum(
        (magnitude(matte, row, column) - magnitude(truth, row, column)) ** 2
        for row in range(9)
        for column in range(12)
    )
    assert gradient_error(matte, truth) == pytest.approx(expected, rel=1e-9)


def test_connectivity_by_hand():
    truth = np.array([[1.0, 1.0, 1.0, 0.0, 0.0, 0.0]])
    # The island of 0.8 hangs together with the object at no level but 0: it loses 0.8.
    # The 0.1 beside the object is below theta.
    matte = np.array([[1.0, 1.0, 1.0, 0.1, 0.0, 0.8]])
    assert connectivity_error(matte, truth) == pytest.approx(0.8)
    # A hole: one pixel of 0.45 inside. It stays with the object up to 0.4, as in both mattes; the
    # truth is then 0.6 above that level, and the matte 0.05.
    matte = np.array([[1.0, 0.45, 1.0, 0.0, 0.0, 0.0]])
    # From level 0.5 on the right pixel is cut off, which both mattes have at 1: no difference.
    assert connectivity_error(matte, truth) == pytest.approx(0.6)
    # A corner does not connect: the last pixel stands alone, and both mattes lose all of it.
    truth, matte = np.array([[1.0, 1, 0], [0, 0, 1]]), np.array([[1, 1, 0], [0, 0, 0.9]])
    assert connectivity_error(matte, truth) == pytest.approx(0.1)


def test_connectivity_against_flooding():
    matte, truth = random_mattes((10, 14), seed=5)

    def largest(mask):
        best, seen = set(), set()
        for start in zip(*np.nonzero(mask), strict=True):
            region, queue = set(), [start]
            while queue:
                row, column = queue.pop()
                inside = 0 <= row < 10 and 0 <= column < 14
                if inside and mask[row, column] and (row, column) not in seen:
                    seen.add((row, column))
                    region.add((row, column))
                    queue += [
                        (row + 1, column),
                        (row - 1, column),
                        (row, column + 1),
                        (row, column - 1),
                    ]
            best = region if len(region) > len(best) else best
        return best

    regions = [largest((matte >= k / 10) & (truth >= k / 10)) for k in range(1, 11)]
    expected = 0.0
    for row in range(10):
        for column in range(14):
            outside = [k for k, region in enumerate(regions) if (row, column) not in region]
            level = outside[0] / 10 if outside else 1.0
            degrees = []
            for alpha in (matte, truth):
                d = alpha[row, column] - level
                degrees.append(1 - d if d >= 0.15 else 1)
            expected += abs(degrees[0] - degrees[1])
    assert connectivity_error(matte, truth) == pytest.approx(expected, rel=1e-9)


# --- pictures ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('place', 'inside', 'cut'),
    [
        ((1, 2), np.s_[1:3, 2:5], np.s_[:, :]),
        ((-1, 4), np.s_[0:1, 4:6], np.s_[1:, :2]),
        ((3, -2), np.s_[3:4, 0:1], np.s_[:1, 2:]),
        ((9, 0), np.s_[:0, :3], np.s_[:0, :]),
        ((0, -7), np.s_[:2, :0], np.s_[:, :0]),
    ],
)
def test_pasted_by_hand(place, inside, cut):
    image, below = np.full((4, 6, 3), 100, np.uint8), np.full((4, 6), 200, np.uint8)
    front = np.arange(18, dtype=np.uint8).reshape(2, 3, 3) * 10
    matte = np.array([[0, 51, 255], [102, 255, 0]], np.uint8)
    pasted, mattes = paste_matte(image, [below], front, matte, place)
    expected = np.zeros((4, 6), np.uint8)
    expected[inside] = matte[cut]
    assert np.array_equal(mattes[1], expected)
    left = {0: 200, 51: 160, 102: 120, 255: 0}
    assert np.array_equal(mattes[0], np.vectorize(left.get)(expected))
    blend = expected[..., None] / 255
    colours = np.zeros((4, 6, 3))
    colours[inside] = front[cut]
    assert np.abs(blend * colours + (1 - blend) * 100 - pasted).max() <= 0.5 + 1e-4
    assert (image == 100).all() and (below == 200).all(), 'the input is left alone'


def test_composite_by_hand():
    front, behind = np.full((1, 3, 3), 200, np.uint8), np.full((1, 3, 3), 100, np.uint8)
    picture = composite(front, np.array([[0, 0.5, 1]]), behind)
    assert picture.dtype == np.uint8 and picture[0, :, 0].tolist() == [100, 150, 200]


def soft_disc(hw=(60, 80), softness=6.0):
    y, x = np.mgrid[: hw[0], : hw[1]]
    return np.clip((18 - np.hypot(x - 40, y - 28)) / softness + 0.5, 0, 1)


def test_foreground_of_plain_colours_is_found():
    matte = soft_disc()
    front, behind = (np.full((60, 80, 3), c, np.uint8) for c in ((220, 40, 60), (20, 160, 90)))
    image = composite(front, matte, behind)
    found = estimate_foreground(image, matte)
    shown = matte > 0.05
    seam = np.abs(image[shown].astype(int) - front[shown]).max()
    assert np.abs(found[shown].astype(int) - front[shown]).max() < 0.1 * seam
    assert np.array_equal(found[matte == 1], image[matte == 1])


def test_bokeh_blurs_the_background_alone():
    matte = soft_disc()
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (60, 80, 1)).repeat(3, 2).astype(np.uint8)
    front = np.full((60, 80, 3), (0, 0, 255), np.uint8)
    image = composite(front, matte, noise)
    blurred = bokeh(image, matte, 5)
    assert np.abs(blurred[matte == 1].astype(int) - (0, 0, 255)).max() <= 1
    outside = matte == 0
    assert blurred[outside].std() < 0.3 * image[outside].std()
    # No red of the object bleeds into its surroundings: they stay grey.
    assert np.ptp(blurred[outside].astype(int), axis=-1).max() < 0.02 * 255


def test_the_levels_are_those_of_the_benchmark():
    assert (matting.GRADIENT_SIGMA, matting.CONNECTIVITY_THRESHOLD) == (1.4, 0.15)
