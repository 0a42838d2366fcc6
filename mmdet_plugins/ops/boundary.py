"""Boundary IoU of instance masks (Cheng et al., "Boundary IoU", CVPR 2021, section 4).

Shapes: D detections, G ground truths, ``H W`` the image. Masks are COCO RLE of the whole image.

The boundary of a mask is what an erosion by ``d`` pixels takes away from it, the image's edge
counting as background, with ``d`` = 2 % of the image diagonal, at least one pixel (as in the
authors' ``boundary-iou-api``). The measure is the smaller of mask IoU and boundary IoU, so that a
mask must be right inside and at its edge; a mask thinner than ``2 d`` is all boundary, and its
measure is the mask IoU.
"""

from collections.abc import Sequence

import numpy as np
from hotcoco import mask as rle_ops

DILATION_RATIO = 0.02


def boundary_width(height: int, width: int, ratio: float = DILATION_RATIO) -> int:
    """Width in pixels of the boundary band in an image of this size."""
    return max(1, int(round(ratio * float(np.hypot(height, width)))))


def mask_boundary(mask: np.ndarray, width: int) -> np.ndarray:
    """Pixels of a mask that are closer than ``width`` to its outside (chessboard distance).

    Args:
        mask: ``[H, W]`` bool or uint8. Everything beyond its edge counts as outside.
        width: Width of the band in pixels, at least 1.

    Returns:
        ``[H, W]`` bool.
    """
    mask = np.asarray(mask, dtype=bool)
    # A pixel survives the erosion iff the (2 width + 1) square around it is full: counted in
    # constant time per pixel from a summed area table.
    window = 2 * width + 1
    table = np.zeros((mask.shape[0] + window, mask.shape[1] + window), dtype=np.int32)
    table[width + 1 : -width, width + 1 : -width] = mask
    table = table.cumsum(0, out=table).cumsum(1, out=table)
    count = (
        table[window:, window:]
        - table[:-window, window:]
        - table[window:, :-window]
        + table[:-window, :-window]
    )
    return mask & (count < window * window)


def rle_boundary(rle: dict, ratio: float = DILATION_RATIO) -> dict:
    """Boundary of an RLE mask, as an RLE of the same image.

    Works inside the mask's bounding box: the erosion of a mask never reaches out of it.
    """
    height, width = rle['size']
    x, y, w, h = (int(v) for v in rle_ops.to_bbox(rle))
    mask = rle_ops.decode(rle)
    crop = mask[y : y + h, x : x + w]
    if crop.size:
        crop[...] = mask_boundary(crop, boundary_width(height, width, ratio))
    return rle_ops.encode(np.asfortranarray(mask))


def boundary_iou(
    detections: Sequence[dict],
    truths: Sequence[dict],
    crowd: np.ndarray,
    min_iou: float = 0.0,
    ratio: float = DILATION_RATIO,
) -> np.ndarray:
    """min(mask IoU, boundary IoU) of every detection with every ground truth.

    A crowd region has no boundary of its own: there the measure is the mask's (intersection over
    the detection's area), as in ``boundary-iou-api``.

    Args:
        detections: D RLE masks.
        truths: G RLE masks of the same image.
        crowd: ``[G]`` bool.
        min_iou: Pairs whose mask IoU is below this keep it: no boundary is looked at for them.

    Returns:
        ``[D, G]`` float64.
    """
    crowd = np.asarray(crowd, dtype=bool)
    ious = np.zeros((len(detections), len(truths)))
    if not ious.size:
        return ious
    ious[:] = rle_ops.iou(list(detections), list(truths), crowd)
    close = (ious >= max(min_iou, np.finfo(np.float64).tiny)) & ~crowd
    rows, cols = np.flatnonzero(close.any(1)), np.flatnonzero(close.any(0))
    if rows.size:
        edges = rle_ops.iou(
            [rle_boundary(detections[i], ratio) for i in rows],
            [rle_boundary(truths[j], ratio) for j in cols],
            np.zeros(len(cols), dtype=bool),
        )
        pairs = np.ix_(rows, cols)
        ious[pairs] = np.where(close[pairs], np.minimum(ious[pairs], edges), ious[pairs])
    return ious
