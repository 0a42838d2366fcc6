"""Mattes: losses and errors of predicted ones, and pictures made with them.

A matte (alpha) is the share in [0, 1] that an object has in the colour of a pixel,
``image = alpha * foreground + (1 - alpha) * background``. Shapes: Q predicted mattes, G objects,
``H W`` the image; pictures are ``[H, W, 3]`` of any channel order.

Errors are those of Rhemann et al., "A Perceptually Motivated Online Benchmark for Image Matting",
CVPR 2009, over the whole image and for one object at a time.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import cv2
import numpy as np
from torch import Tensor

Array = np.ndarray

GRADIENT_SIGMA = 1.4
CONNECTIVITY_THRESHOLD = 0.15
_LEVELS = 10
"""Steps between 0 and 1 at which connectivity is looked at, as in the benchmark's code."""


def matte_dice_loss(probs: Tensor, mattes: Tensor, eps: float = 1e-3) -> Tensor:
    """``1 - 2 sum(p a) / (sum(p^2) + sum(a^2) + 2 eps)`` of each of ``[Q, H, W]``, ``[Q]``.

    :func:`~mmdet_plugins.ops.dice.mask_dice_loss` for targets between 0 and 1, where a perfect
    prediction has a loss of 0 as well.
    """
    probs, mattes = probs.flatten(1), mattes.flatten(1)
    overlap = (probs * mattes).sum(1)
    return 1 - 2 * overlap / (probs.square().sum(1) + mattes.square().sum(1) + 2 * eps)


def absolute_error(matte: Array, truth: Array) -> float:
    """Sum of absolute differences (SAD) of ``[H, W]`` in [0, 1]; tables give it in thousands."""
    return float(np.abs(matte.astype(np.float64) - truth).sum())


def squared_error(matte: Array, truth: Array) -> float:
    """Mean squared difference (MSE)."""
    return float(np.square(matte.astype(np.float64) - truth).mean())


def gradient_error(matte: Array, truth: Array) -> float:
    """Sum of squared differences of gradient magnitudes (section 3.2 there, q = 2).

    Gradients are by first derivatives of a Gaussian of sigma 1.4, scaled to a unit sum of squares
    and cut where they fall below 0.01, as in the benchmark's code; that also stretches either
    matte to [0, 1] first, which is not done here. Tables give it in thousands.
    """
    smooth, slope = _gaussian_derivative(GRADIENT_SIGMA)
    magnitudes = []
    for alpha in (matte, truth):
        alpha = alpha.astype(np.float64)
        along = [
            cv2.sepFilter2D(alpha, -1, *kernels, borderType=cv2.BORDER_REPLICATE)
            for kernels in ((slope, smooth), (smooth, slope))
        ]
        magnitudes.append(np.hypot(*along))
    return float(np.square(magnitudes[0] - magnitudes[1]).sum())


def connectivity_error(matte: Array, truth: Array) -> float:
    """Sum of absolute differences of connectivity (section 3.2 there, theta = 0.15, p = 1).

    A pixel's connectivity falls with the distance of its alpha from the highest level, in steps of
    0.1, at which it hangs together (4-connected) with the largest region that both mattes have
    there. The weight lambda of the paper is 1, as in the benchmark's code. Tables give it in
    thousands.
    """
    matte, truth = matte.astype(np.float64), truth.astype(np.float64)
    connected = np.ones(matte.shape)
    lost = np.zeros(matte.shape, bool)
    for level in range(1, _LEVELS + 1):
        both = np.minimum(matte, truth) >= level / _LEVELS
        leaves = ~_largest_region(both) & ~lost
        connected[leaves] = (level - 1) / _LEVELS
        lost |= leaves
    degrees = []
    for alpha in (matte, truth):
        distance = alpha - connected
        degrees.append(1 - distance * (distance >= CONNECTIVITY_THRESHOLD))
    return float(np.abs(degrees[0] - degrees[1]).sum())


def _gaussian_derivative(sigma: float) -> tuple[Array, Array]:
    """Two 1-D kernels whose outer product has a unit sum of squares."""
    half = math.ceil(sigma * math.sqrt(-2 * math.log(math.sqrt(2 * math.pi) * sigma * 0.01)))
    x = np.arange(-half, half + 1, dtype=np.float64)
    smooth = np.exp(-(x**2) / (2 * sigma**2))
    slope = -x * smooth
    return smooth / np.linalg.norm(smooth), slope / np.linalg.norm(slope)


def _largest_region(mask: Array) -> Array:
    """The 4-connected region ``[H, W]`` bool with most pixels; empty if there is none."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(
        mask.astype(np.uint8), connectivity=4
    )
    if count == 1:
        return np.zeros_like(mask)
    return labels == 1 + stats[1:, cv2.CC_STAT_AREA].argmax()


def composite(foreground: Array, matte: Array, background: Array) -> Array:
    """A picture, uint8, of ``foreground`` over ``background``, uint8 both, by ``matte`` [H, W]."""
    alpha = matte[..., None].astype(np.float32)
    picture = alpha * foreground + (1 - alpha) * background
    return np.clip(picture, 0, 255).round().astype(np.uint8)


def paste_matte(
    image: Array, mattes: Sequence[Array], front: Array, matte: Array, place: Sequence[int]
) -> tuple[Array, list[Array]]:
    """Lay an object over an image and over the mattes of what it shows.

    Args:
        image: ``[H, W, 3]`` uint8.
        mattes: G of them, ``[H, W]`` uint8.
        front: ``[h, w, 3]`` uint8, the object's own colours.
        matte: ``[h, w]`` uint8.
        place: Row and column in the image of the object's first pixel; may lie outside.

    Returns:
        A new image, and G + 1 mattes of what is visible, that of the object last.
    """
    whole = np.zeros(image.shape[:2], np.uint8)
    inside, cut = [], []
    for start, side, length in zip(place, matte.shape, whole.shape, strict=True):
        inside.append(slice(max(start, 0), max(min(start + side, length), 0)))
        cut.append(slice(max(-start, 0), max(min(side, length - start), 0)))
    inside, cut = tuple(inside), tuple(cut)
    whole[inside] = matte[cut]
    image = image.copy()
    image[inside] = composite(front[cut], matte[cut] / 255, image[inside])
    left = (255 - whole.astype(np.float32)) / 255
    return image, [*((below * left).round().astype(np.uint8) for below in mattes), whole]


def estimate_foreground(image: Array, matte: Array, radii: Sequence[int] = (90, 6)) -> Array:
    """The object's own colours, uint8, where the image shows them mixed with the background's.

    Blur fusion: Forte, "Approximate Fast Foreground Colour Estimation", ICIP 2021. Without it, an
    object keeps a seam of its old surroundings in a new picture.

    Args:
        image: ``[H, W, 3]`` uint8.
        matte: ``[H, W]`` in [0, 1].
        radii: Half the sides of the boxes of the blurs, px.
    """
    image = image.astype(np.float32)
    alpha = matte[..., None].astype(np.float32)
    front = behind = image
    for radius in radii:
        mean_front = _mean(front, matte, radius)
        mean_behind = _mean(behind, 1 - matte, radius)
        front = mean_front + alpha * (image - alpha * mean_front - (1 - alpha) * mean_behind)
        front, behind = front.clip(0, 255), mean_behind
    return front.round().astype(np.uint8)


def bokeh(image: Array, matte: Array, radius: int) -> Array:
    """The picture with its background out of focus, as a round aperture shows it.

    Args:
        image: ``[H, W, 3]`` uint8.
        matte: ``[H, W]``, of what stays sharp.
        radius: Of the blur, px.
    """
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1,) * 2).astype(np.float32)
    front = estimate_foreground(image, matte)
    alpha = matte[..., None].astype(np.float32)
    share = (image - alpha * front).clip(0)
    behind = _ratio(share, 1 - alpha[..., 0], partial(cv2.filter2D, ddepth=-1, kernel=disc))
    return composite(front, matte, behind)


def _mean(picture: Array, weight: Array, radius: int) -> Array:
    """Means over boxes by a weight ``[H, W]``; zero far from all that weighs anything."""
    weight = weight.astype(np.float32)
    size = (2 * radius + 1,) * 2
    return _ratio(picture * weight[..., None], weight, partial(cv2.blur, ksize=size))


def _ratio(picture: Array, weight: Array, blur: Callable[[Array], Array]) -> Array:
    return blur(picture) / np.maximum(blur(weight), 1e-6)[..., None]
