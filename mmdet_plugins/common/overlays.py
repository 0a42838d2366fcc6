"""Pictures of annotated and predicted instances, drawn with NumPy and OpenCV alone.

One rule serves both sides: an instance that has a partner on the other side is filled, in the
colour of that partner; one that has none (a missed object, a prediction that matches nothing) is
a white outline. ``H W`` is the frame, ``h w`` the picture.
"""

import base64
import math
from collections.abc import Sequence

import cv2
import numpy as np
from hotcoco import mask as coco_mask

FILL_OPACITY = 0.42
GROUND = 0.68  # lightness of the photo under the masks, which then stand out on bright ones too
ALONE = (255, 255, 255)
CASING = (24, 18, 16)  # dark line under each outline: it stays visible on any ground
LONG_SIDE = 760  # of a picture, pixels
SHIFT = 4  # fractional bits of OpenCV's drawing coordinates


def colours(count: int) -> list[tuple[int, int, int]]:
    """``count`` BGR colours of like lightness; neighbours in the list are far apart in hue."""
    hues = (0.58 + 0.618034 * np.arange(count)) % 1.0
    lab = np.empty((count, 1, 3), np.float32)
    lab[..., 0] = 80 - 8 * (np.arange(count)[:, None] % 3)
    lab[..., 1] = 60 * np.cos(2 * np.pi * hues)[:, None]
    lab[..., 2] = 60 * np.sin(2 * np.pi * hues)[:, None]
    if not count:
        return []
    bgr = np.clip(cv2.cvtColor(lab, cv2.COLOR_LAB2BGR) * 255, 0, 255).astype(int)
    return [tuple(map(int, colour)) for colour in bgr[:, 0]]


def outlines(rle: dict, scale: float) -> list[np.ndarray]:
    """Contours of one mask in the picture, ``[n, 1, 2]`` int32 xy with ``SHIFT`` fractional bits.

    Traced at the frame's resolution or finer, so that no object vanishes when the picture is
    smaller and none turns into stairs when it is larger.
    """
    x, y, width, height = (int(v) for v in coco_mask.to_bbox(rle))
    if not width or not height:
        return []
    mask = coco_mask.decode(rle)[y : y + height, x : x + width]
    fine = max(1, math.ceil(scale))
    mask = cv2.copyMakeBorder(np.ascontiguousarray(mask) * 255, 1, 1, 1, 1, cv2.BORDER_CONSTANT)
    mask = cv2.resize(mask, None, fx=fine, fy=fine, interpolation=cv2.INTER_LINEAR)
    traced, _ = cv2.findContours(
        (mask > 126).astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE
    )
    corner = np.array([x - 1, y - 1])
    points = [((contour + 0.5) / fine + corner) * scale - 0.5 for contour in traced]
    return [np.round(p * (1 << SHIFT)).astype(np.int32) for p in points]


def picture_scale(image_hw: tuple[int, int], long_side: int = LONG_SIDE) -> float:
    """Factor that brings the longer side to ``long_side`` pixels, at most eightfold."""
    return min(long_side / max(image_hw), 8.0)


def resize(image: np.ndarray, scale: float) -> np.ndarray:
    """``[H, W, 3]`` to ``[h, w, 3]``."""
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    size = [max(1, round(side * scale)) for side in image.shape[1::-1]]
    return cv2.resize(image, size, interpolation=interpolation)


def draw(
    image: np.ndarray,
    rles: Sequence[dict],
    fills: Sequence[tuple[int, int, int] | None],
    long_side: int = LONG_SIDE,
) -> np.ndarray:
    """Draw N masks on an image, smaller ones over larger ones.

    Args:
        image: ``[H, W, 3]`` uint8 BGR.
        rles: N COCO RLEs of that frame.
        fills: Colour of each (BGR), or None for a white outline.
        long_side: Longer side of the picture, pixels.

    Returns:
        The picture ``[h, w, 3]``, uint8 BGR.
    """
    scale = picture_scale(image.shape[:2], long_side)
    picture = cv2.convertScaleAbs(resize(image, scale), alpha=GROUND)
    order = np.argsort(-np.asarray(coco_mask.area(list(rles)))) if len(rles) else ()
    shapes = [(outlines(rles[i], scale), fills[i]) for i in order]
    layer = picture.copy()
    for contours, colour in shapes:
        if colour is not None and contours:
            cv2.fillPoly(layer, contours, colour, cv2.LINE_AA, SHIFT)
    picture = cv2.addWeighted(layer, FILL_OPACITY, picture, 1 - FILL_OPACITY, 0)
    width = 1 + (len(rles) <= 150) + (len(rles) <= 40)
    for contours, colour in shapes:
        cv2.polylines(picture, contours, True, CASING, width + 2, cv2.LINE_AA, SHIFT)
        cv2.polylines(picture, contours, True, colour or ALONE, width, cv2.LINE_AA, SHIFT)
    return picture


def data_uri(picture: np.ndarray, quality: int = 84) -> str:
    """``[h, w, 3]`` uint8 BGR as a JPEG in a ``data:`` URI."""
    options = [cv2.IMWRITE_JPEG_QUALITY, quality]
    # Full colour resolution: thin coloured lines bleed otherwise.
    options += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    jpeg = cv2.imencode('.jpg', picture, options)[1]
    return f'data:image/jpeg;base64,{base64.b64encode(jpeg).decode("ascii")}'
