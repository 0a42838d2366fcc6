"""Free Mask: the coarse object masks that hide in the features of an image (section 6.2.2).

Shapes: B images, C channels, ``h w`` the feature map with P cells, the keys; Q queries of all
scales, n masks of an image, ``H W`` the image.

A query is a bilinear mean of keys, so the products of all queries with all keys are means of the
products of the keys with each other: one symmetric matrix. Its scale cancels in the normalisation
of a row. Neither Matrix NMS nor the limits raise a score, and a score depends on higher ones alone:
what does not reach ``min_score`` before the NMS never enters it. The released code multiplies every
scale, decays all masks and measures at full size; the result is the same.
"""

from collections.abc import Sequence
from itertools import compress
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .instance_masks import BYTE_BUDGET, Frame, Selection, resize_instances
from .matrix_nms import common_pixels, matrix_decay, on_cpu
from .rle import RLE, decode_rle

_FLAT = 1e-5  # products of a row that differ by less than this part are one and its rounding
_TINY = 1e-12
_BLOCK = 350  # rows of the symmetric product that are made at a time on the CPU
_BYTES = 2 << 30  # of maps and what is made of them, at a time on a device


class FreeMasks(NamedTuple):
    """The masks of one image, by falling score.

    Attributes:
        rles: n COCO encodings.
        boxes_xyxy: float32 ``[n, 4]``, tight, right and bottom exclusive.
        areas: int64 ``[n]`` pixels.
        scores: float32 ``[n]``.
        embeddings: float32 ``[n, C]``, or ``[n, embedding_dim]``.
        dropped: How many masks each rule took, by its name.
    """

    rles: list[RLE]
    boxes_xyxy: Tensor
    areas: Tensor
    scores: Tensor
    embeddings: Tensor
    dropped: dict[str, int]


@torch.no_grad()
def free_masks(
    features: Tensor,
    image_hw: tuple[int, int],
    *,
    scales: Sequence[float] = (1.0, 0.5, 0.25),
    mask_thr: float = 0.5,
    min_cells: int = 2,
    sigma: float = 2.0,
    min_score: float = 0.7,
    max_num: int = 20,
    min_centre: float | None = None,
    max_width: float | None = None,
    embedding_dim: int | None = None,
    connected: bool = False,
) -> list[FreeMasks]:
    """Masks of B images of one size, from features ``[B, C, h, w]`` that cover them.

    Args:
        features: Of any float type and device.
        image_hw: Size of the images and masks; may be smaller than the map.
        scales: Of the query grids, as ratios of the feature map (Table 6.6(b)). One that leaves
            no cell of a small map is passed over.
        mask_thr: A pixel from this on belongs to the mask.
        min_cells: Masks of fewer cells are dropped.
        sigma: Of the Gaussian decay; it multiplies, as in the released code.
        min_score: What a score must reach after the decay.
        max_num: Masks kept of an image at most, by score.
        min_centre: Drop masks whose middle row lies no deeper than this share of the height
            (released code: 0.2). The middle is the mean of the rows that the mask touches.
        max_width: Drop masks that touch at least this share of the columns (released code: 0.95).
        embedding_dim: Interpolate the embeddings along their channels to so many (released code:
            128); None leaves them as they are.
        connected: Keep of each mask the piece, of cells that share sides, in which its query lies:
            where an image is full of objects of a kind, a query is like them all. Not of the
            thesis; the pieces are found on the host.

    Returns:
        B results. Features that are constant or not finite yield no masks: where the released code
        normalises rounding errors, a map without contrast is dropped here.

    Raises:
        ValueError: ``min_score`` is not positive.
    """
    height, width = map_hw = tuple(features.shape[2:])
    scales = [scale for scale in scales if min(height, width) * scale >= 1] or [1]
    if len(features) == 0:
        return []
    if min_score <= 0:
        raise ValueError(f'min_score must be positive, got {min_score}')
    rules = dict(
        scales=scales,
        mask_thr=mask_thr,
        min_cells=min_cells,
        sigma=sigma,
        min_score=min_score,
        max_num=max_num,
        connected=connected,
    )
    size = 1 if on_cpu(features) else max(1, _BYTES // (32 * (height * width) ** 2))
    with torch.autocast(features.device.type, enabled=False):
        parts = [_coarse(part.float(), **rules) for part in features.split(size)]
    maps, scores, embeddings = (torch.cat(x) for x in list(zip(*parts, strict=True))[:3])
    if embedding_dim is not None and len(embeddings):
        embeddings = F.interpolate(embeddings[None], embedding_dim, mode='linear')[0]
    masks = resize_instances(
        Selection(torch.arange(len(scores), device=scores.device), scores, None),
        lambda index: maps[index],
        Frame(map_hw, map_hw, map_hw, image_hw),  # straight from the map to the image
        mask_thr=float(np.nextafter(np.float32(mask_thr), np.float32(0))),  # from it on, not above
        logits=False,
        rle=True,
    )
    boxes, areas = masks.boxes_xyxy.cpu(), masks.areas.cpu()
    scores, embeddings = scores.cpu(), embeddings.cpu()
    refused = {}
    if min_centre is not None or max_width is not None:
        rows, columns = _projections(maps, mask_thr, masks.masks, image_hw)
        if min_centre is not None:
            middle = (rows * np.arange(rows.shape[1])).sum(1) / rows.sum(1).clip(min=1)
            refused['centre'] = torch.from_numpy(middle <= min_centre * rows.shape[1])
        if max_width is not None:
            refused['width'] = torch.from_numpy(columns.sum(1) >= max_width * columns.shape[1])
    good = areas > 0
    results, start = [], 0
    for dropped in [x for part in parts for x in part.dropped]:
        span = slice(start, start + dropped.pop('kept'))
        start, keep = span.stop, good[span]
        for rule, bad in refused.items():
            dropped[rule] = int((bad[span] & keep).sum())
            keep = keep & ~bad[span]
        rles = list(compress(masks.masks[span], keep.tolist()))
        rest = (x[span][keep] for x in (boxes, areas, scores, embeddings))
        results.append(FreeMasks(rles, *rest, dropped))
    return results


class _Coarse(NamedTuple):
    """Masks of B images, image after image and by falling score, before they meet their pixels.

    Attributes:
        maps: float32 ``[n, h, w]``, normalised cosines in ``[0, 1]``.
        scores: float32 ``[n]``.
        embeddings: float32 ``[n, C]``.
        dropped: B dicts: how many masks each rule took, and ``kept``, how many are left.
    """

    maps: Tensor
    scores: Tensor
    embeddings: Tensor
    dropped: list[dict[str, int]]


def _coarse(
    features: Tensor,
    scales: Sequence[float],
    mask_thr: float,
    min_cells: int,
    sigma: float,
    min_score: float,
    max_num: int,
    connected: bool,
) -> _Coarse:
    map_hw = tuple(features.shape[2:])
    soft, points = _cosine_maps(features, scales)
    masks = soft >= mask_thr
    if connected:
        pieces = _own_pieces(masks, points, map_hw)
        soft[masks & ~pieces] = 0
        masks = pieces
    area = masks.sum(2)
    maskness = torch.where(area >= min_cells, (soft * masks).sum(2) / area, -1)
    ranked, order = maskness.sort(dim=1, descending=True, stable=True)
    numbers = area > 0, (area > 0) & (area < min_cells), ranked >= min_score
    formed, tiny, eligible = torch.stack([x.sum(1) for x in numbers]).tolist()

    most = max(1, *eligible)  # never none, so that no shape below is empty
    ranked, order = ranked[:, :most], order[:, :most]
    chosen = masks.gather(1, order[:, :, None].expand(-1, -1, masks.shape[2])).view(torch.int8)
    common = torch.stack([common_pixels(flat, flat) for flat in chosen])
    area = area.gather(1, order).float()
    iou = common.div_((area[:, :, None] + area[:, None]).sub_(common).clamp_(min=1))
    decayed = torch.where(ranked < min_score, -1, ranked * matrix_decay(iou, sigma=sigma))
    decayed, rank = decayed.sort(dim=1, descending=True, stable=True)
    good = (decayed >= min_score).sum(1).tolist()

    width = max(1, min(max(good), max_num))
    scores, query = decayed[:, :width], order.gather(1, rank[:, :width])
    image, place = (scores >= min_score).nonzero(as_tuple=True)
    sampled = F.grid_sample(
        features, points[query][:, None], padding_mode='border', align_corners=False
    )
    embeddings = F.normalize(sampled[image, :, 0, place], dim=1)
    maps = soft[image, query[image, place]].unflatten(1, map_hw)
    dropped = [
        dict(cells=t, score=f - t - g, number=max(0, g - max_num), kept=min(g, max_num))
        for f, t, g in zip(formed, tiny, good, strict=True)
    ]
    return _Coarse(maps, scores[image, place], embeddings, dropped)


def _cosine_maps(features: Tensor, scales: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Normalised rows ``[B, Q, P]`` and the places ``[Q, 2]`` of the queries for ``grid_sample``.

    Rows without contrast are zero; those with anything that is not finite, zero or NaN.
    """
    map_hw = tuple(features.shape[2:])
    gram = _gram(features.flatten(2))
    lengths = gram.diagonal(dim1=1, dim2=2).sqrt()
    rows, points = [], []
    for scale in scales:
        if scale == 1:
            rows.append(gram)
            hw = map_hw
        else:
            grids = F.interpolate(gram.unflatten(2, map_hw), scale_factor=scale, mode='bilinear')
            rows.append(grids.flatten(2).transpose(1, 2))
            hw = tuple(grids.shape[2:])
        y, x = (
            (torch.arange(num, device=gram.device) + 0.5) / (scale * length) * 2 - 1
            for num, length in zip(hw, map_hw, strict=True)
        )
        points.append(torch.stack(torch.meshgrid(x, y, indexing='xy'), -1).flatten(0, 1))
    soft = torch.cat(rows, 1).div_(lengths.clamp(min=_TINY)[:, None])
    low, high = soft.amin(2, keepdim=True), soft.amax(2, keepdim=True)
    contrast = high - low
    contrast[~(contrast > _FLAT * high.abs())] = torch.inf
    return soft.sub_(low).div_(contrast), torch.cat(points)


def _own_pieces(masks: Tensor, points: Tensor, map_hw: tuple[int, int]) -> Tensor:
    """Of masks ``[B, Q, P]`` what is joined to the cells at ``points``, ``[Q, 2]`` as above."""
    size_xy = points.new_tensor(map_hw[::-1])
    places = ((points + 1) / 2 * size_xy).round(decimals=3).long()  # many are on a border of cells
    cells = (places[:, 1] * map_hw[1] + places[:, 0]).cpu()
    # One tall map of all, with an empty row below each.
    tall = F.pad(masks.unflatten(2, map_hw), (0, 0, 0, 1))
    flat = tall.flatten(0, 2).cpu().numpy().view(np.uint8)
    numbers = torch.from_numpy(cv2.connectedComponents(flat, connectivity=4)[1]).view(tall.shape)
    numbers = numbers[:, :, :-1].flatten(2)
    own = numbers.gather(2, cells.expand(masks.shape[:2])[:, :, None])
    return masks & (numbers == own).to(masks.device)


def _gram(keys: Tensor) -> Tensor:
    """Products ``[B, P, P]`` of the columns of ``[B, C, P]``; on the CPU, one half is a copy."""
    columns = keys.transpose(1, 2)
    if not on_cpu(keys):
        return columns @ keys
    gram = keys.new_empty(len(keys), keys.shape[2], keys.shape[2])
    for start in range(0, keys.shape[2], _BLOCK):
        stop = start + _BLOCK
        rows = columns[:, start:stop] @ keys[:, :, start:]
        gram[:, start:stop, start:] = rows
        gram[:, stop:, start:stop] = rows[:, :, _BLOCK:].transpose(1, 2)
    return gram


def _projections(
    maps: Tensor, mask_thr: float, rles: list[RLE], image_hw: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """The rows ``[n, H]`` and the columns ``[n, W]`` that masks touch, bool."""
    if on_cpu(maps) or len(maps) == 0:
        masks = decode_rle(rles, image_hw)
        return masks.any(2), masks.any(1)
    sides = []
    for part in maps.split(max(1, BYTE_BUDGET // (8 * image_hw[0] * image_hw[1]))):
        full = F.interpolate(part[None], image_hw, mode='bilinear')[0] >= mask_thr
        sides.append((full.any(2), full.any(1)))
    rows, columns = (torch.cat(side).cpu().numpy() for side in zip(*sides, strict=True))
    return rows, columns
