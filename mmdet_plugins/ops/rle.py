"""COCO run-length encodings of whole masks and of crops that never become whole masks.

Shapes: N masks, ``H W`` the frame, ``h w`` a crop. An encoding is the JSON-ready dict
``{'size': [H, W], 'counts': str}``, byte for byte what pycocotools writes. Runs go down columns,
so everything here works on transposed masks: ``hotcoco`` encodes those five to ten times faster
than the row-major ones, and a crop's runs become the frame's by arithmetic on their ends alone.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from hotcoco import mask as _coco
from torch import Tensor

RLE = dict
Array = np.ndarray | Tensor


def encode_masks(masks: Array) -> list[RLE]:
    """Encode ``[N, H, W]`` masks (bool or 0/1 integers; a tensor may live on any device)."""
    if masks.ndim != 3:
        raise ValueError(f'masks must be [N, H, W], got the shape {tuple(masks.shape)}')
    if len(masks) == 0:
        return []
    # Transposed by torch: it does so on the mask's device, and faster than NumPy on the CPU.
    columns = torch.as_tensor(masks).ne(0).transpose(1, 2).contiguous()
    rles = _coco.encode(columns.cpu().numpy().view(np.uint8).transpose(2, 1, 0))
    return [_json_ready(rle) for rle in rles]


def encode_crops(
    crops: Sequence[Array], offsets_xy: Sequence, image_hw: tuple[int, int]
) -> list[RLE]:
    """Encode N crops as masks of the frame they were cut from, which is never built.

    Args:
        crops: N masks ``[h, w]`` of any sizes, bool or 0/1 integers.
        offsets_xy: ``[N, 2]`` left and top pixel of each crop in the frame.
        image_hw: Size of the frame.
    """
    shapes_hw = [tuple(crop.shape) for crop in crops]
    on_device = len(crops) > 0 and isinstance(crops[0], Tensor)
    buffer, views = column_buffer(shapes_hw, crops[0].device if on_device else 'cpu')
    for view, crop in zip(views, crops, strict=True):
        view.copy_(torch.as_tensor(crop).ne(0).T)
    return encode_columns(buffer, shapes_hw, offsets_xy, image_hw)


def column_buffer(
    shapes_hw: Sequence[tuple[int, int]], device='cpu'
) -> tuple[Tensor, list[Tensor]]:
    """Allocate what :func:`encode_columns` reads: crops of many sizes in one flat tensor.

    Returns:
        The zeroed uint8 buffer and N views ``[w, h]`` of it, to be filled with transposed masks.
        A zero precedes the first column and follows every column, so that no run leaves its column.
    """
    sizes = [w * (h + 1) for h, w in shapes_hw]
    buffer = torch.zeros(1 + sum(sizes), dtype=torch.uint8, device=device)
    parts = buffer[1:].split(sizes) if sizes else ()
    views = [part.view(w, h + 1)[:, :h] for part, (h, w) in zip(parts, shapes_hw, strict=True)]
    return buffer, views


def encode_columns(
    buffer: Tensor,
    shapes_hw: Sequence[tuple[int, int]],
    offsets_xy: Sequence,
    image_hw: tuple[int, int],
) -> list[RLE]:
    """Encode a filled :func:`column_buffer`; only the ends of the runs leave its device.

    Raises:
        ValueError: If a crop reaches out of the frame.
    """
    height, width = image_hw
    shapes = np.asarray(shapes_hw, dtype=np.int64).reshape(-1, 2)
    offsets = np.asarray(offsets_xy, dtype=np.int64).reshape(-1, 2)
    outside = (offsets < 0).any(1) | (offsets + shapes[:, ::-1] > (width, height)).any(1)
    if outside.any():
        index = int(outside.argmax())
        raise ValueError(
            f'crop {index} of {shapes[index].tolist()} pixels (h, w) at {offsets[index].tolist()} '
            f'(x, y) reaches out of the {height} x {width} frame'
        )
    changes = buffer[1:] != buffer[:-1]
    # NumPy finds them four times faster than torch does on the CPU.
    on_cpu = changes.device.type == 'cpu'
    edges = np.flatnonzero(changes) if on_cpu else changes.nonzero()[:, 0].cpu().numpy()
    rows = shapes[:, 0] + 1
    first = np.concatenate(([0], np.cumsum(rows * shapes[:, 1])))[:-1]
    crop = np.searchsorted(first, edges, side='right') - 1
    column, row = np.divmod(edges - first[crop], rows[crop])
    ends = (offsets[crop, 0] + column) * height + offsets[crop, 1] + row

    # Edges alternate start, end. Where a crop is as high as the frame a run may continue into the
    # next column: its end and the next start fall together, and both go.
    joined = (ends[1:-1:2] == ends[2::2]) & (crop[1:-1:2] == crop[2::2])
    keep = np.ones(len(ends), dtype=bool)
    keep[1:-1:2] = keep[2::2] = ~joined
    crop, ends = crop[keep], ends[keep]

    # All lengths at once: each crop's differences between ends, then what is left of its frame.
    per_crop = np.bincount(crop, minlength=len(shapes))
    stops = np.cumsum(per_crop + 1)
    starts = stops - per_crop - 1
    counts = np.empty(len(ends) + len(shapes), dtype=np.int64)
    counts[np.arange(len(ends)) + crop] = ends
    counts[stops - 1] = height * width
    counts[1:] -= counts[:-1].copy()
    counts[starts[1:]] += height * width
    stops -= counts[stops - 1] == 0
    counts = counts.tolist()  # hotcoco reads a list twice as fast as an array
    size = [int(height), int(width)]
    return [
        {'size': [*size], 'counts': _coco.rle_to_string({'size': size, 'counts': counts[a:b]})}
        for a, b in zip(starts.tolist(), stops.tolist(), strict=True)
    ]


def decode_rle(rles: Sequence[RLE], image_hw: tuple[int, int] | None = None) -> np.ndarray:
    """Decode N encodings of one frame to bool ``[N, H, W]``; ``image_hw`` serves an empty list."""
    if len(rles) == 0:
        return np.zeros((0, *(image_hw or (0, 0))), dtype=bool)
    masks = _coco.decode(list(rles)).transpose(2, 1, 0).view(bool)
    return np.ascontiguousarray(masks.transpose(0, 2, 1))


def rle_to_xyxy(rles: Sequence[RLE]) -> np.ndarray:
    """Tight boxes, float64 ``[N, 4]`` (right and bottom exclusive); zeros for an empty mask."""
    if len(rles) == 0:
        return np.zeros((0, 4))
    boxes = np.asarray(_coco.to_bbox(list(rles)))
    boxes[:, 2:] += boxes[:, :2]
    return boxes


def area(rles: Sequence[RLE]) -> np.ndarray:
    """Number of pixels of each of N masks, int64 ``[N]``."""
    return np.asarray(_coco.area(list(rles)) if len(rles) else [], dtype=np.int64)


def segmentation_to_rle(segmentation, image_hw: tuple[int, int]) -> RLE:
    """Turn the ``segmentation`` of a COCO annotation into one encoding.

    Args:
        segmentation: A list of polygons ``[x1, y1, x2, y2, ...]``, or a dict with compressed
            (str or bytes) or uncompressed (list) counts.
        image_hw: Size of the image; must agree with the size in the dict.

    Raises:
        ValueError: If it is none of these, or broken; says in which way.
    """
    height, width = (int(v) for v in image_hw)
    if isinstance(segmentation, dict):
        size = segmentation.get('size')
        if not isinstance(size, list | tuple) or list(size) != [height, width]:
            raise ValueError(f'an RLE of the size {size} on an image of {[height, width]}')
        try:
            return _json_ready(_coco.fr_py_objects(segmentation, height, width))
        except TypeError as error:
            raise ValueError(str(error)) from None
    if not isinstance(segmentation, list | tuple) or not segmentation:
        raise ValueError('a segmentation that is neither polygons nor an RLE')
    for polygon in segmentation:
        if not isinstance(polygon, list | tuple) or len(polygon) < 6 or len(polygon) % 2:
            raise ValueError('a polygon that is not a flat list x1, y1, x2, y2, x3, y3, ...')
        if not all(isinstance(v, int | float) and math.isfinite(v) for v in polygon):
            raise ValueError('a polygon with a coordinate that is no finite number')
    return _json_ready(_coco.merge(_coco.fr_py_objects(list(segmentation), height, width)))


def _json_ready(rle: RLE) -> RLE:
    counts = rle['counts']
    return {
        'size': [int(v) for v in rle['size']],
        'counts': counts.decode('ascii') if isinstance(counts, bytes) else counts,
    }
