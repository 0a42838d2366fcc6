"""Targets of the SOLO family: which grid cells an object claims, and its mask at output strides.

Shapes: N images, G objects of all of them in order, L levels, ``S`` the grid size of a level,
P the sum of S x S over levels, ``H W`` masks, ``h w`` mask targets. Boxes are ``x1 y1 x2 y2``, in
pixels of the input.

An object belongs to each level whose scale range holds the square root of its box area. There it
claims the cells that its centre region touches: a box around the centre of mass, ``centre_ratio``
times as wide and high as the object's (section 3.2 of Wang's thesis on SOLO), and at most one cell
away from the centre's own. The targets are those of mmdet's ``SOLOHead``, ``DecoupledSOLOHead`` and
``SOLOV2Head``, bit for bit. But each mask is reduced where it lies, in two passes; its target is
formed once and not once for each cell; and no value is read back to the host.
"""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK_CPU = 1 << 20  # mask bytes reduced at a time: what stays in a core's cache
_CHUNK_DEVICE = 1 << 28


class Positives(NamedTuple):
    """Some cells, each with the object that it has to predict; all int64 ``[Q]``.

    Attributes:
        image_idx: In ``0 .. N-1``.
        cell_idx: In ``0 .. P-1``: levels one after the other, cells row by row.
        object_idx: In ``0 .. G-1``.
    """

    image_idx: Tensor
    cell_idx: Tensor
    object_idx: Tensor


class GridTargets(NamedTuple):
    """The targets of a batch.

    Attributes:
        labels: Int64 ``[N, P]``, the class of each cell; the number of classes for background.
        owner: Int64 ``[N, P]``, of the objects that claim a cell the last one; -1 for background.
        cells: Int64 ``[G, L, 9]``, the cells (in ``0 .. P-1``) that an object claims, in row-major
            order, and -1 in slots that are not used.
        masks: For each level, bool ``[G, h, w]``; levels of one stride and size share a tensor.
        num_objects: Of each image; they sum to G.
        grid_sizes: S of each level.
    """

    labels: Tensor
    owner: Tensor
    cells: Tensor
    masks: tuple[Tensor, ...]
    num_objects: tuple[int, ...]
    grid_sizes: tuple[int, ...]

    @property
    def num_positives(self) -> Tensor:
        """How many cells of the batch have an owner, a tensor without dimensions."""
        return (self.owner >= 0).sum()

    def by_image(self) -> tuple[Positives, list[int]]:
        """Every claim of an object on a cell, as SOLOv2 trains them: a contested cell comes twice.

        Ordered by image, object, level and cell; of one image and level, this is mmdet's order.
        Waits for the device once.

        Returns:
            The claims and how many of them each image has.
        """
        claims = self.cells >= 0
        counts = claims.sum((1, 2)).cpu().split(self.num_objects)
        counts = [int(count.sum()) for count in counts]
        slot = claims.flatten().nonzero_static(size=sum(counts))[:, 0]
        object_idx = slot // math.prod(claims.shape[1:])
        image_idx = image_of_objects(self.num_objects, slot.device)[object_idx]
        return Positives(image_idx, self.cells.flatten()[slot], object_idx), counts

    def by_level(self) -> tuple[Positives, list[int]]:
        """Every cell that has an owner, as SOLO and Decoupled SOLO train them.

        Ordered by level, image and cell, as mmdet does. Waits for the device once.

        Returns:
            The cells and how many of them each level has.
        """
        sizes = [size**2 for size in self.grid_sizes]
        num_images, num_cells = self.owner.shape
        place = torch.arange(self.owner.numel(), device=self.owner.device).view_as(self.owner)
        place = torch.cat([level.flatten() for level in place.split(sizes, dim=1)])
        owned = self.owner.flatten()[place] >= 0
        levels = owned.split([num_images * size for size in sizes])
        counts = torch.stack([level.sum() for level in levels]).tolist()
        place = place[owned.nonzero_static(size=sum(counts))[:, 0]]
        owner = self.owner.flatten()[place]
        return Positives(place // num_cells, place % num_cells, owner), counts


def grid_targets(
    masks: Sequence[Tensor | np.ndarray],
    boxes_xyxy: Sequence[Tensor],
    labels: Sequence[Tensor],
    *,
    grid_sizes: Sequence[int],
    scale_ranges: Sequence[tuple[float, float]],
    mask_strides: Sequence[int],
    mask_hw: Sequence[tuple[int, int]],
    num_classes: int,
    centre_ratio: float = 0.2,
) -> GridTargets:
    """Targets of all objects, levels and images of a batch.

    The grids divide a canvas of ``mask_strides[0] * mask_hw[0]`` pixels, the padded input. Masks
    may be smaller; what is missing on the right and at the bottom counts as zero. Where two objects
    of an image claim one cell of a level, the later one is its owner.

    Args:
        masks: N arrays ``[G_i, H_i, W_i]``, bool or 0/1 uint8. Their reduction runs where they are.
        boxes_xyxy: N tensors ``[G_i, 4]``, on the device where the targets are wanted.
        labels: N tensors ``[G_i]`` in ``0 .. num_classes - 1``.
        grid_sizes: S of each level.
        scale_ranges: Lower and upper bound, inclusive, of the square root of a box area.
        mask_strides: Pixels of the input to one of the mask target, for each level: 1 or even.
            mmdet's SOLO halves the strides of its features, its SOLOv2 has 4 at all levels.
        mask_hw: Size of the mask targets at each level.
        num_classes: Label of cells without an object.
        centre_ratio: Sides of the centre region, in sides of the box (epsilon, ``pos_scale``).

    Returns:
        The targets, on the device of the boxes. An object without a pixel claims nothing.

    Raises:
        ValueError: Sizes do not fit each other, masks are of another type, or a stride is odd.
    """
    grid_sizes = tuple(grid_sizes)
    outputs = list(zip(mask_strides, map(tuple, mask_hw), strict=True))
    _check(masks, boxes_xyxy, labels, grid_sizes, scale_ranges, outputs)
    device = boxes_xyxy[0].device
    with torch.no_grad():
        distinct = list(dict.fromkeys(outputs))
        reduced = zip(*[_reduce(torch.as_tensor(m), distinct) for m in masks], strict=True)
        moments, *small = (torch.cat(part).to(device, non_blocking=True) for part in reduced)
        image_hw = tuple(mask_strides[0] * extent for extent in mask_hw[0])
        num_objects = tuple(len(boxes) for boxes in boxes_xyxy)
        cells = assign_cells(
            _centre_of_mass(moments),
            torch.cat(list(boxes_xyxy)),
            image_hw,
            grid_sizes=grid_sizes,
            scale_ranges=scale_ranges,
            centre_ratio=centre_ratio,
        )
        owner = _last_claim(cells, num_objects, sum(size**2 for size in grid_sizes))
        return GridTargets(
            labels=F.pad(torch.cat(list(labels)), (0, 1), value=num_classes)[owner],
            owner=owner,
            cells=cells,
            masks=tuple(small[distinct.index(output)] for output in outputs),
            num_objects=num_objects,
            grid_sizes=grid_sizes,
        )


def assign_cells(
    centres_xy: Tensor,
    boxes_xyxy: Tensor,
    image_hw: tuple[int, int] | Tensor,
    *,
    grid_sizes: Sequence[int],
    scale_ranges: Sequence[tuple[float, float]],
    centre_ratio: float = 0.2,
) -> Tensor:
    """The cells that each object claims at each level.

    Args:
        centres_xy: Float ``[G, 2]``, centres of mass in pixels; NaN for objects to be left out.
        boxes_xyxy: Float ``[G, 4]``.
        image_hw: Size of the canvas that the grids divide, or ``[G, 2]``, one for each object.
        grid_sizes: S of each level.
        scale_ranges: Lower and upper bound, inclusive, of the square root of a box area.
        centre_ratio: Sides of the centre region, in sides of the box.

    Returns:
        Int64 ``[G, L, 9]``: places in the P cells of all levels, row by row, -1 where a slot is
        not used. Slot ``3 * (dy + 1) + dx + 1`` is for the cell ``dx, dy`` off the centre's.
    """
    grids = _grids(tuple(grid_sizes), tuple(map(tuple, scale_ranges)), centres_xy.device)
    low, high = boxes_xyxy.split(2, dim=1)
    reach = 0.5 * (high - low) * centre_ratio
    ends_xy = torch.stack([centres_xy - reach, centres_xy, centres_xy + reach])  # [3, G, 2]
    height, width = image_hw.unbind(1) if isinstance(image_hw, Tensor) else image_hw
    fraction = torch.stack([ends_xy[..., 1] / height, ends_xy[..., 0] / width], dim=-1)
    first, centre, last = _trunc_div(fraction[:, :, None], grids.step[:, None])  # [G, L, 2]

    around = torch.arange(-1, 2, device=centres_xy.device)
    line = centre[..., None] + around  # [G, L, 2, 3]
    last = torch.minimum(last, grids.size[:, None] - 1)
    claimed = (line >= first.clamp(min=0)[..., None]) & (line <= last[..., None])
    side = (high - low).prod(1).sqrt()[:, None]
    in_range = (side >= grids.low) & (side <= grids.high)  # [G, L]
    claimed = claimed[:, :, 0, :, None] & claimed[:, :, 1, None] & in_range[..., None, None]
    cell = line[:, :, 0, :, None] * grids.size[:, None, None] + line[:, :, 1, None]
    cell = cell + grids.start[:, None, None]
    return cell.where(claimed, -1).long().flatten(2)


class _Grids(NamedTuple):
    """Float32 ``[L]`` each: S, 1 / S, the first cell, the ends of the scale range."""

    size: Tensor
    step: Tensor
    start: Tensor
    low: Tensor
    high: Tensor


@lru_cache(maxsize=32)
def _grids(sizes: tuple, ranges: tuple, device: torch.device) -> _Grids:
    starts = [sum(s**2 for s in sizes[:level]) for level in range(len(sizes))]
    steps = [1 / s for s in sizes]
    rows = torch.tensor([sizes, steps, starts, *zip(*ranges, strict=True)], dtype=torch.float32)
    with torch.inference_mode(False), torch.no_grad():
        return _Grids(*rows.to(device, non_blocking=True))


def _trunc_div(values: Tensor, divisor: Tensor) -> Tensor:
    """The quotient towards zero, rounded as if the divisors were numbers, as they are in mmdet.

    torch divides by a number on CUDA by multiplication with its reciprocal.
    """
    return (values * divisor.reciprocal() if values.is_cuda else values / divisor).trunc()


def _centre_of_mass(moments: Tensor) -> Tensor:
    """``[G, 3]`` area and sums of x and y to ``[G, 2]``, NaN where the area is zero."""
    moments = moments.float()
    return moments[:, 1:] / moments[:, :1]


def image_of_objects(num_objects: Sequence[int], device: torch.device) -> Tensor:
    """The image of each object, ``[G]``."""
    return torch.repeat_interleave(torch.tensor(num_objects)).to(device, non_blocking=True)


def _last_claim(cells: Tensor, num_objects: Sequence[int], num_cells: int) -> Tensor:
    """The last object that claims each cell, or -1: ``[N, P]``."""
    size = len(num_objects) * num_cells
    offset = image_of_objects(num_objects, cells.device)[:, None, None] * num_cells
    place = (cells + offset).where(cells >= 0, size).flatten()
    index = torch.arange(len(cells), device=cells.device)[:, None, None].expand_as(cells).flatten()
    owner = index.new_full((size + 1,), -1).scatter_reduce_(0, place, index, 'amax')
    return owner[:size].view(-1, num_cells)


def _reduce(masks: Tensor, outputs: Sequence[tuple[int, tuple[int, int]]]) -> list[Tensor]:
    """Area and sums of x and y, int64 ``[G, 3]``, and for each output the mask at its stride."""
    align = math.lcm(8, *(stride for stride, _ in outputs))
    parts = [
        [_moments(words), *(_shrink(words, *output) for output in outputs)]
        for words in _words(masks, align)
    ]
    return [torch.cat(part) for part in zip(*parts, strict=True)]


def _words(masks: Tensor, align: int) -> Iterator[Tensor]:
    """Masks, some at a time and padded to multiples of ``align``, as words of eight pixels."""
    _, height, width = masks.shape
    padding = (0, -width % align, 0, -height % align)
    budget = _CHUNK_CPU if masks.device.type == 'cpu' else _CHUNK_DEVICE
    for part in masks.view(torch.uint8).split(max(1, budget // max(1, height * width))):
        if any(padding):
            part = F.pad(part, padding)
        elif part.stride() != (height * width, width, 1) or part.storage_offset() % 8:
            part = part.clone(memory_format=torch.contiguous_format)
        yield part.view(torch.int64)


def _moments(words: Tensor) -> Tensor:
    _, height, num_words = words.shape
    # Sums of up to 255 words, whose bytes then do not carry into each other.
    rows = words.unflatten(2, (-1, _block(num_words))).sum(3).view(torch.uint8).sum(2)
    columns = words.unflatten(1, (-1, _block(height))).sum(2).view(torch.uint8).sum(1)
    x = torch.arange(columns.shape[1], device=words.device)
    y = torch.arange(height, device=words.device)
    return torch.stack([rows.sum(1), (columns * x).sum(1), (rows * y).sum(1)], dim=1)


def _block(size: int) -> int:
    return max(d for d in range(1, min(size, 255) + 1) if size % d == 0)


def _shrink(words: Tensor, stride: int, out_hw: tuple[int, int]) -> Tensor:
    """Bilinear sampling at an even stride, as OpenCV does it: the four pixels around each centre,
    set where at least two of them are.
    """
    if stride == 1:
        small = words.view(torch.uint8) != 0
    else:
        middle = stride // 2
        pair = (words[:, middle - 1 :: stride] + words[:, middle::stride]).view(torch.uint8)
        small = pair[:, :, middle - 1 :: stride] + pair[:, :, middle::stride] >= 2
    height, width = out_hw
    return F.pad(small, (0, width - small.shape[2], 0, height - small.shape[1]))


def _check(
    masks: Sequence,
    boxes: Sequence[Tensor],
    labels: Sequence[Tensor],
    grid_sizes: tuple[int, ...],
    scale_ranges: Sequence,
    outputs: Sequence[tuple[int, tuple[int, int]]],
) -> None:
    if not len(masks) == len(boxes) == len(labels) > 0:
        raise ValueError(
            'masks, boxes_xyxy and labels must have one entry for each image; got '
            f'{len(masks)}, {len(boxes)} and {len(labels)}'
        )
    for mask, box, label in zip(masks, boxes, labels, strict=True):
        if mask.ndim != 3 or box.shape != (len(mask), 4) or label.shape != (len(mask),):
            raise ValueError(
                'an image needs masks [G, H, W], boxes [G, 4] and labels [G]; got '
                f'{tuple(mask.shape)}, {tuple(box.shape)} and {tuple(label.shape)}'
            )
        if str(mask.dtype).rpartition('.')[2] not in ('bool', 'uint8'):
            raise ValueError(f'masks must be bool or uint8, got {mask.dtype}')
    if not len(grid_sizes) == len(scale_ranges) == len(outputs):
        raise ValueError(
            'grid_sizes, scale_ranges, mask_strides and mask_hw must have one entry for each level'
        )
    if odd := [stride for stride, _ in outputs if stride != 1 and stride % 2]:
        raise ValueError(f'a mask stride must be 1 or even, got {odd[0]}')
