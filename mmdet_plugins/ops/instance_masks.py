"""From the candidates of a SOLO-type head to the instances of an image.

Shapes: C candidates (class scores of cells, above a threshold), n instances, ``h w`` the mask map,
``H W`` the original image.

The stock heads make the maps of all candidates, rescore and sort them, keep 500, and interpolate
twice, at full size, what Matrix NMS leaves. Here candidates are taken in chunks by falling class
score until no later one can enter the result: neither rescoring nor decay raises a score. On the
CPU the two interpolations are one product with a matrix a side, on what lies around each mask.
The result is the same.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .matrix_nms import (
    PackedMasks,
    mask_intersections,
    mask_nms,
    matrix_decay,
    on_cpu,
    pack_masks,
)
from .rle import RLE, column_buffer, encode_columns

MapsOf = Callable[[Tensor], Tensor]

BYTE_BUDGET = 64 << 20
_CHUNK = 64  # maps at a time on the CPU, at most: each one more than needed costs its making
_MARGIN = 2  # an interpolated pixel draws on at most three pixels of the map a side
_BAND = 128  # rows of a product that share the range of what they draw on


class Frame(NamedTuple):
    """The sizes ``(height, width)`` that a mask goes through.

    Attributes:
        map_hw: The mask map.
        padded_hw: The network's input, to which the map is interpolated; not below ``map_hw``.
        image_hw: The part of it, at the top left, that holds the image (``img_shape``).
        original_hw: The image of the file, to which this part is interpolated (``ori_shape``).
    """

    map_hw: tuple[int, int]
    padded_hw: tuple[int, int]
    image_hw: tuple[int, int]
    original_hw: tuple[int, int]


class Selection(NamedTuple):
    """The instances of an image, by falling score.

    Attributes:
        index: int64 ``[n]``, positions among the candidates.
        scores: float32 ``[n]``, class score x maskness x decay.
        labels: ``[n]``.
    """

    index: Tensor
    scores: Tensor
    labels: Tensor


class InstanceMasks(NamedTuple):
    """Masks in the original image.

    Attributes:
        masks: bool ``[n, H, W]``, or COCO encodings.
        boxes_xyxy: float32 ``[n, 4]``, tight, right and bottom exclusive; zeros for an empty mask.
        areas: int64 ``[n]`` pixels.
    """

    masks: Tensor | list[RLE]
    boxes_xyxy: Tensor
    areas: Tensor


@torch.no_grad()
def select_instances(
    scores: Tensor,
    labels: Tensor,
    maps_of: MapsOf,
    map_hw: tuple[int, int],
    *,
    min_area: Tensor | float = 0,
    mask_thr: float = 0.5,
    logits: bool = True,
    nms_pre: int = 500,
    max_num: int = 100,
    filter_thr: float = 0.05,
    kernel: str = 'gaussian',
    sigma: float = 2.0,
    byte_budget: int = BYTE_BUDGET,
) -> Selection:
    """Rescore candidates by maskness, suppress duplicates by Matrix NMS, keep the best.

    The maskness of a candidate is the mean probability over its mask. Candidates of at most
    ``min_area`` pixels are dropped, the ``nms_pre`` best of the others decay each other within
    their class, and the ``max_num`` best of those that keep a score of ``filter_thr`` remain. Of
    equal scores the earlier candidate goes first. The mathematics are in float32 and as in the
    stock heads.

    Args:
        scores: ``[C]`` class scores in ``[0, 1]``.
        labels: int64 ``[C]``.
        maps_of: Takes int64 ``[n]`` positions among the candidates and gives their maps
            ``[n, h, w]`` of any float type, which may be overwritten.
        map_hw: ``(h, w)``.
        min_area: In pixels of the map, ``[C]`` or one for all (stock: the stride of the level).
        mask_thr: Probability above which a pixel belongs to the mask.
        logits: Whether the maps are logits (SOLOv2) or probabilities (SOLO, Decoupled SOLO).
        nms_pre: All if not positive.
        max_num: All if not positive.
        filter_thr: Nothing is dropped if not positive.
        kernel: See :func:`~mmdet_plugins.ops.matrix_nms.mask_nms`.
        sigma: See there.
        byte_budget: Bytes that the maps of a chunk, and what is made of them, may take. A chunk
            that runs out of the device's memory is halved and tried again.

    Raises:
        torch.cuda.OutOfMemoryError: Not even one map fits.
    """
    host, total = on_cpu(scores), len(scores)
    nms_pre = nms_pre if nms_pre > 0 else total
    max_num = max_num if max_num > 0 else total
    scores = scores.float()
    least = torch.as_tensor(min_area, device=scores.device).expand(total)
    ranked, order = scores.sort(descending=True, stable=True)
    bounds = ranked.tolist()
    size = byte_budget // (8 * map_hw[0] * map_hw[1])
    size = max(1, min(size, _CHUNK) if host else size)
    pool = _Pool.empty(scores, labels, map_hw)

    def extended(chunk: Tensor) -> _Pool:
        maps = maps_of(chunk)
        found = (_measure_each if host else _measure)(maps, mask_thr, logits)
        pick = (found.areas > least[chunk]).nonzero()[:, 0]
        chunk = chunk[pick]
        new = _Pool(
            chunk,
            scores[chunk] * found.maskness[pick],
            labels[chunk],
            found.areas[pick],
            found.packed.bits[pick],
            found.areas.new_empty(0),
        )
        return pool.merged(new, map_hw, nms_pre)

    start, decayed = 0, pool.scores
    while start < total and bounds[start] >= filter_thr:
        pool, size = _halved_on_oom(extended, order[start:], size)
        start += size
        decayed = pool.scores * matrix_decay(pool.iou, kernel, sigma)
        # A factor depends on the masks of higher scores alone, and what is left ends at most at
        # the next bound: whatever lies above that now is final.
        if start < total:
            above = torch.stack([(x > bounds[start]).sum() for x in (pool.scores, decayed)])
            raw, final = above.tolist()
            if raw >= nms_pre or final >= max_num:
                break

    decayed, rank = decayed.sort(descending=True, stable=True)
    num = min(max_num, int((decayed >= filter_thr).sum()))
    decayed, rank = decayed[:num], rank[:num]
    return Selection(pool.index[rank], decayed, pool.labels[rank])


@torch.no_grad()
def select_by_nms(
    scores: Tensor,
    labels: Tensor,
    maps_of: MapsOf,
    map_hw: tuple[int, int],
    *,
    min_area: Tensor,
    mask_thr: float = 0.5,
    logits: bool = True,
    maskness: bool = True,
    byte_budget: int = BYTE_BUDGET,
    **suppression: Any,
) -> Selection:
    """:func:`select_instances` by any NMS, with or without maskness: it looks at all candidates.

    Args:
        maskness: Rescore by it.
        **suppression: Options of :func:`~mmdet_plugins.ops.matrix_nms.mask_nms`.
        scores, labels, maps_of, map_hw, min_area, mask_thr, logits, byte_budget: As there.

    Raises:
        torch.cuda.OutOfMemoryError: Not even one map fits.
    """

    def measured(chunk: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = _measure(maps_of(chunk), mask_thr, logits)
        mine = (found.areas > min_area[chunk]).nonzero()[:, 0]
        chunk = chunk[mine]
        rescored = scores[chunk] * found.maskness[mine] if maskness else scores[chunk]
        return chunk, rescored, found.packed.bits[mine]

    everything = torch.arange(len(scores), device=scores.device)
    size, start, parts = max(1, byte_budget // (8 * map_hw[0] * map_hw[1])), 0, []
    while start < len(scores):
        part, size = _halved_on_oom(measured, everything[start:], size)
        parts.append(part)
        start += size
    if not parts:
        return Selection(everything, scores, labels)
    index, rescored, bits = map(torch.cat, zip(*parts, strict=True))
    found = mask_nms(PackedMasks(bits, map_hw), rescored, labels[index], **suppression)
    index = index[found.keep_inds]
    return Selection(index, found.scores, found.labels)


@torch.no_grad()
def resize_instances(
    selection: Selection,
    maps_of: MapsOf,
    frame: Frame,
    *,
    mask_thr: float = 0.5,
    logits: bool = True,
    rle: bool = False,
    byte_budget: int = BYTE_BUDGET,
) -> InstanceMasks:
    """Bring selected masks to the original image: two bilinear interpolations, then a threshold.

    Args:
        selection: From :func:`select_instances`.
        maps_of: See there.
        frame: The sizes to go through.
        mask_thr: See there.
        logits: See there.
        rle: Give COCO encodings; the masks of the image are then made some at a time.
        byte_budget: See there; the result counts extra.

    Raises:
        ValueError: The padded input is smaller than the map.
        torch.cuda.OutOfMemoryError: Not even one mask fits.
    """
    if frame.padded_hw[0] < frame.map_hw[0] or frame.padded_hw[1] < frame.map_hw[1]:
        raise ValueError(f'a map of {frame.map_hw} is not interpolated down to {frame.padded_hw}')
    index = selection.index
    num, device, host = len(index), index.device, on_cpu(index)
    area = [h * w for h, w in frame]
    size = byte_budget // (8 * area[0] if host else 5 * (area[0] + area[1] + area[3]))
    size = max(1, min(size, _CHUNK) if host else size)
    encodings: list[RLE] = []
    masks = torch.zeros(0 if rle else num, *frame.original_hw, dtype=torch.bool, device=device)
    boxes = torch.zeros(num, 4, device=device)
    areas = torch.zeros(num, dtype=torch.int64, device=device)

    def resize(chunk: Tensor) -> list[RLE]:
        span = slice(start, start + len(chunk))
        out = None if rle else masks[span]
        maps = maps_of(chunk).float()
        if host:
            crops = list(_crops(maps, maps > _threshold(mask_thr, logits), logits))
            return _resize_crops(crops, frame, mask_thr, out, boxes[span], areas[span])
        probs = maps.sigmoid_() if logits else maps
        return _resize_maps(probs, frame, mask_thr, out, boxes[span], areas[span])

    start = 0
    while start < num:
        rles, size = _halved_on_oom(resize, index[start:], size)
        encodings += rles
        start += size
    return InstanceMasks(encodings if rle else masks, boxes, areas)


def mask_boxes(masks: Tensor) -> Tensor:
    """Tight boxes, right and bottom exclusive, zeros for an empty mask.

    Args:
        masks: bool ``[..., H, W]``.

    Returns:
        float32 ``[..., 4]``.
    """
    sides = []
    for filled in (masks.any(-2), masks.any(-1)):
        filled = filled.to(torch.uint8)
        sides.append((filled.argmax(-1), filled.shape[-1] - filled.flip(-1).argmax(-1)))
    (left, right), (top, bottom) = sides
    boxes = torch.stack([left, top, right, bottom], -1).float()
    return boxes * masks.any(-1).any(-1)[..., None]


class _Measures(NamedTuple):
    """Of n maps: what rescoring and suppression need.

    Attributes:
        packed: Their masks.
        areas: float32 ``[n]``.
        maskness: float32 ``[n]``, the mean probability over the mask; anything if that is empty.
    """

    packed: PackedMasks
    areas: Tensor
    maskness: Tensor


def _measure(maps: Tensor, mask_thr: float, logits: bool) -> _Measures:
    maps = maps.float()
    masks = maps > _threshold(mask_thr, logits)
    packed = pack_masks(masks)
    areas = masks.flatten(1).sum(1).float()
    probs = maps.sigmoid_() if logits else maps
    return _Measures(packed, areas, probs.mul_(masks).flatten(1).sum(1) / areas)


def _measure_each(maps: Tensor, mask_thr: float, logits: bool) -> _Measures:
    """:func:`_measure` on the CPU, which looks at the surroundings of each mask alone."""
    maps = maps.float()
    masks = maps > _threshold(mask_thr, logits)
    areas, maskness = np.zeros((2, len(maps)), dtype=np.float32)
    for i, crop in enumerate(_crops(maps, masks, logits)):
        areas[i] = cv2.countNonZero(crop.mask)
        maskness[i] = cv2.mean(crop.probs.numpy(), crop.mask)[0]
    return _Measures(pack_masks(masks), torch.from_numpy(areas), torch.from_numpy(maskness))


def _threshold(mask_thr: float, logits: bool) -> float:
    return float(np.log(mask_thr / (1 - mask_thr))) if logits else mask_thr


class _Crop(NamedTuple):
    """All of a map that its interpolated mask depends on: ``[h', w']`` at row, column."""

    probs: Tensor
    mask: np.ndarray
    top: int
    left: int


def _crops(maps: Tensor, masks: Tensor, logits: bool) -> Iterator[_Crop]:
    height, width = maps.shape[1:]
    for values, mask in zip(maps, masks.numpy().view(np.uint8), strict=True):
        left, top, w, h = cv2.boundingRect(mask)
        rows = slice(max(top - _MARGIN, 0), min(top + h + _MARGIN, height))
        columns = slice(max(left - _MARGIN, 0), min(left + w + _MARGIN, width))
        window = values[rows, columns]
        probs = window.sigmoid() if logits else window
        yield _Crop(probs, mask[rows, columns], rows.start, columns.start)


class _Pool(NamedTuple):
    """Candidates that are measured, the best so far, by falling score.

    Attributes:
        index: int64 ``[n]``, positions among the candidates.
        scores: float32 ``[n]``, class score x maskness.
        labels: ``[n]``.
        areas: float32 ``[n]``.
        bits: Packed masks.
        iou: float32 ``[n, n]``, 0 where labels differ.
    """

    index: Tensor
    scores: Tensor
    labels: Tensor
    areas: Tensor
    bits: Tensor
    iou: Tensor

    @classmethod
    def empty(cls, scores: Tensor, labels: Tensor, map_hw: tuple[int, int]) -> '_Pool':
        none = scores[:0]
        bits = none.new_empty(0, -(-map_hw[0] * map_hw[1] // 8), dtype=torch.uint8)
        return cls(none.long(), none, labels[:0], none, bits, none.new_empty(0, 0))

    def merged(self, new: '_Pool', map_hw: tuple[int, int], limit: int) -> '_Pool':
        """The ``limit`` best of both; ``new`` comes without IoUs."""
        joined = [torch.cat(pair) for pair in zip(self[:5], new[:5], strict=True)]
        index, scores, labels, areas, bits = joined
        old = len(self.index)
        common = mask_intersections(
            PackedMasks(new.bits, map_hw), new.labels, PackedMasks(bits, map_hw), labels
        )
        rows = common / (new.areas[:, None] + areas - common)
        iou = torch.cat([torch.cat([self.iou, rows[:, :old].T], dim=1), rows])
        # Stable: of equal scores, the lowest index first.
        rank = index.argsort()
        rank = rank[scores[rank].argsort(descending=True, stable=True)][:limit]
        return _Pool(*(x[rank] for x in joined), iou[rank][:, rank])


def _halved_on_oom(call: Callable, items: Tensor, size: int) -> tuple:
    """``call`` on the first ``size`` items, on half as many where memory runs out; and ``size``."""
    while True:
        try:
            return call(items[:size]), size
        except torch.cuda.OutOfMemoryError:
            size = min(size, len(items))
            if size <= 1:
                raise
        size //= 2
        torch.cuda.empty_cache()


class _Axis(NamedTuple):
    """One side of the composed interpolation.

    Attributes:
        weights: float32 ``[out, in]``.
        first: ``[out]``, the first input that each output draws on.
        last: ``[out]``, the last one.
    """

    weights: Tensor
    first: np.ndarray
    last: np.ndarray

    def inside(self, start: int, stop: int) -> slice:
        """The outputs that draw on nothing but inputs from ``start`` to before ``stop``."""
        low, high = np.searchsorted(self.first, start), np.searchsorted(self.last, stop)
        return slice(int(low), max(int(low), int(high)))


@functools.lru_cache(maxsize=64)
def _axis(length: int, padded: int, image: int, original: int) -> _Axis:
    # What torch itself makes of unit vectors: its weights, to the last bit.
    line = torch.eye(length)[None, :, :, None]
    line = F.interpolate(line, (padded, 1), mode='bilinear', align_corners=False)[:, :, :image]
    line = F.interpolate(line, (original, 1), mode='bilinear', align_corners=False)
    weights = line[0, :, :, 0].T.contiguous()
    used = (weights != 0).numpy()
    first, last = used.argmax(1), length - 1 - used[:, ::-1].argmax(1)
    return _Axis(weights, np.maximum.accumulate(first), np.maximum.accumulate(last))


def _resize_crops(
    crops: list[_Crop],
    frame: Frame,
    mask_thr: float,
    masks: Tensor | None,
    boxes: Tensor,
    areas: Tensor,
) -> list[RLE]:
    """Fill ``masks``, or else give encodings; fill ``boxes`` and ``areas``."""
    sides = [_axis(*lengths) for lengths in zip(*frame, strict=True)]
    spans = []
    for crop in crops:
        starts = crop.top, crop.left
        spans.append(
            [
                axis.inside(start, start + length)
                for axis, start, length in zip(sides, starts, crop.probs.shape, strict=True)
            ]
        )
    if masks is None:
        shapes = [tuple(span.stop - span.start for span in pair) for pair in spans]
        buffer, views = column_buffer(shapes)
    for i, (crop, (rows, columns)) in enumerate(zip(crops, spans, strict=True)):
        across = crop.probs, (sides[0], rows, crop.top), (sides[1], columns, crop.left)
        if masks is not None:
            view = masks[i, rows, columns].numpy()
            _interpolate(*across, mask_thr, view)
            left, top, width, height = cv2.boundingRect(view.view(np.uint8))
        else:
            view = views[i].numpy().view(bool)
            _interpolate(crop.probs.T, across[2], across[1], mask_thr, view)
            top, left, height, width = cv2.boundingRect(view.view(np.uint8))
        if width:
            left, top = left + columns.start, top + rows.start
            boxes[i] = torch.tensor([left, top, left + width, top + height])
            areas[i] = cv2.countNonZero(view.view(np.uint8))
    if masks is not None:
        return []
    offsets = [(columns.start, rows.start) for rows, columns in spans]
    return encode_columns(buffer, shapes, offsets, frame.original_hw)


def _interpolate(
    probs: Tensor,
    first: tuple[_Axis, slice, int],
    second: tuple[_Axis, slice, int],
    mask_thr: float,
    out: np.ndarray,
) -> None:
    """Write a thresholded crop; a side is its axis, the outputs wanted, where the crop starts."""
    axis, outputs, start = second
    with torch.autocast('cpu', enabled=False):
        probs = probs @ axis.weights[outputs, start : start + probs.shape[1]].T
        axis, outputs, start = first
        for begin in range(outputs.start, outputs.stop, _BAND):
            end = min(begin + _BAND, outputs.stop)
            low, high = axis.first[begin], axis.last[end - 1] + 1
            band = axis.weights[begin:end, low:high] @ probs[low - start : high - start]
            np.greater(band.numpy(), mask_thr, out=out[begin - outputs.start : end - outputs.start])


def _resize_maps(
    probs: Tensor,
    frame: Frame,
    mask_thr: float,
    masks: Tensor | None,
    boxes: Tensor,
    areas: Tensor,
) -> list[RLE]:
    """:func:`_resize_crops` on a device, whole maps at a time."""
    height, width = frame.image_hw
    full = F.interpolate(probs[None], frame.padded_hw, mode='bilinear', align_corners=False)
    full = F.interpolate(
        full[:, :, :height, :width], frame.original_hw, mode='bilinear', align_corners=False
    )
    found = full[0] > mask_thr
    areas.copy_(found.sum((1, 2)))
    boxes.copy_(mask_boxes(found))
    if masks is not None:
        masks.copy_(found)
        return []
    num, (height, width) = len(found), frame.original_hw
    buffer, _ = column_buffer([frame.original_hw] * num, found.device)
    buffer[1:].view(num, width, height + 1)[:, :, :height].copy_(found.transpose(1, 2))
    return encode_columns(buffer, [frame.original_hw] * num, [(0, 0)] * num, frame.original_hw)
