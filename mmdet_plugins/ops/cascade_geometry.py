"""Anchor grids, adaptive-convolution offsets and box deltas of Cascade RPN, a whole batch at once.

Shapes: B images, L levels of ``h_l x w_l`` cells, P = sum of ``h_l * w_l`` priors (levels in order,
row-major within a level, one square anchor per cell). Boxes are ``x1 y1 x2 y2`` in input pixels.

Stock mmdet (``StageCascadeRPNHead.anchor_offset`` and ``refine_bboxes``) runs the same arithmetic
per image and level; here every step is one call over ``[B, P]``, with the same order of floating
point operations, so that offsets agree bit for bit.

Source: Vu et al., "Cascade RPN: Delving into High-Quality Region Proposal Network with Adaptive
Convolution", NeurIPS 2019, section 3.2 (adaptive convolution); Girshick et al., "R-CNN", CVPR 2014,
appendix C (deltas).
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

SizesHW = Sequence[tuple[int, int]]


class _Grid(NamedTuple):
    """Per-prior constants of a pyramid: column, row and twice the stride, ``[P]`` each."""

    col: Tensor
    row: Tensor
    pitch: Tensor


def _key(sizes_hw: SizesHW, strides: Sequence[int]) -> tuple[tuple, tuple]:
    sizes = tuple((int(h), int(w)) for h, w in sizes_hw)
    steps = tuple(strides)
    if len(sizes) != len(steps):
        raise ValueError(
            f'{len(sizes)} level sizes but {len(steps)} strides: give one stride per level'
        )
    return sizes, steps


# Inference mode is left while a cached tensor is made: an inference tensor could not be used by a
# later training step.
@lru_cache(maxsize=32)
def _grid(sizes: tuple, strides: tuple, device: torch.device, dtype: torch.dtype) -> _Grid:
    with torch.inference_mode(False), torch.no_grad():
        cols, rows, pitches = [], [], []
        for (h, w), stride in zip(sizes, strides, strict=True):
            cols.append(torch.arange(w, device=device).to(dtype).repeat(h))
            rows.append(torch.arange(h, device=device).to(dtype).repeat_interleave(w))
            pitches.append(torch.full((h * w,), 2 * stride, device=device, dtype=dtype))
        return _Grid(torch.cat(cols), torch.cat(rows), torch.cat(pitches))


@lru_cache(maxsize=32)
def _anchors(
    sizes: tuple, strides: tuple, scale: float, device: torch.device, dtype: torch.dtype
) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        col, row, pitch = _grid(sizes, strides, device, dtype)
        half = pitch * scale / 4
        x, y = col * pitch / 2, row * pitch / 2
        return torch.stack([x - half, y - half, x + half, y + half]).t()


def grid_anchors(
    sizes_hw: SizesHW,
    strides: Sequence[int],
    scale: float,
    device: torch.device | str = 'cpu',
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """One square anchor of side ``scale * stride`` per cell, centred on ``(col, row) * stride``.

    The values are those of mmdet's ``AnchorGenerator(scales=[scale], ratios=[1.0])``.

    Args:
        sizes_hw: ``(h, w)`` of each level, in cells.
        strides: Input pixels per cell, one per level.
        scale: Anchor side in strides.
        device: Where the anchors live.
        dtype: Their floating point type.

    Returns:
        Anchors ``[P, 4]``. The tensor is cached (the 32 last pyramids) and shared between calls: do
        not write to it.
    """
    return _anchors(*_key(sizes_hw, strides), float(scale), torch.device(device), dtype)


@lru_cache(maxsize=128)
def _valid_flags(
    sizes: tuple, strides: tuple, pad_hw: tuple[int, int], device: torch.device
) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        flags = []
        for (h, w), stride in zip(sizes, strides, strict=True):
            level = torch.zeros((h, w), dtype=torch.bool, device=device)
            level[: math.ceil(pad_hw[0] / stride), : math.ceil(pad_hw[1] / stride)] = True
            flags.append(level.flatten())
        return torch.cat(flags)


def valid_flags(
    sizes_hw: SizesHW,
    strides: Sequence[int],
    pad_shapes_hw: Sequence[tuple[int, int]],
    device: torch.device | str = 'cpu',
) -> Tensor:
    """Which cells start inside each image's padded area (mmdet's ``AnchorGenerator.valid_flags``).

    Args:
        sizes_hw: ``(h, w)`` of each level, in cells.
        strides: Input pixels per cell, one per level.
        pad_shapes_hw: ``(H, W)`` of each image after its own padding, in pixels.
        device: Where the flags live.

    Returns:
        Bool flags ``[B, P]``.
    """
    key, device = _key(sizes_hw, strides), torch.device(device)
    return torch.stack(
        [_valid_flags(*key, (int(hw[0]), int(hw[1])), device) for hw in pad_shapes_hw]
    )


def adaptive_offsets(
    anchors_xyxy: Tensor, sizes_hw: SizesHW, strides: Sequence[int]
) -> list[Tensor]:
    """Offsets by which a 3x3 deformable convolution samples centre, edges and corners of anchors.

    Bitwise equal to mmdet's ``StageCascadeRPNHead.anchor_offset`` followed by the permutation in
    ``AdaptiveConv.forward`` (for strides that are powers of two on CUDA, where torch divides by a
    scalar through its reciprocal).

    Args:
        anchors_xyxy: ``[B, P, 4]``, in input pixels.
        sizes_hw: ``(h, w)`` of each level, in cells.
        strides: Input pixels per cell, one per level.

    Returns:
        One contiguous ``[B, 18, h, w]`` per level, in cells; channels are ``y0 x0 y1 x1 .. y8 x8``
        over the row-major 3x3 taps, as ``deform_conv`` takes them.

    Raises:
        ValueError: The number of anchors is not that of the levels.
    """
    sizes, steps = _key(sizes_hw, strides)
    batch, num, _ = anchors_xyxy.shape
    if num != sum(h * w for h, w in sizes):
        raise ValueError(
            f'{num} anchors an image but the levels {list(sizes)} have '
            f'{sum(h * w for h, w in sizes)} cells: one anchor per cell is needed'
        )
    grid = _grid(sizes, steps, anchors_xyxy.device, anchors_xyxy.dtype)

    def axis(low: Tensor, high: Tensor, cell: Tensor) -> Tensor:
        # Dividing by twice the stride rounds as dividing by the stride and halving does.
        edges = low.new_empty(len(low), 3, num)
        centre = torch.sub((low + high).div_(grid.pitch), cell, out=edges[:, 1])
        reach = (high - low).div_(grid.pitch).sub_(1)
        torch.sub(centre, reach, out=edges[:, 0])
        torch.add(centre, reach, out=edges[:, 2])
        return edges

    x1, y1, x2, y2 = anchors_xyxy.unbind(-1)
    x, y = axis(x1, x2, grid.col), axis(y1, y2, grid.row)
    offsets, start = [], 0
    for h, w in sizes:
        cells = slice(start, start + h * w)
        level = anchors_xyxy.new_empty(batch, 3, 3, 2, h * w)
        level[:, :, :, 0] = y[:, :, None, cells]
        level[:, :, :, 1] = x[:, None, :, cells]
        offsets.append(level.view(batch, 18, h, w))
        start = cells.stop
    return offsets


def _four(values: float | Sequence[float]) -> tuple[float, ...]:
    return tuple(values) if isinstance(values, Sequence) else (values,) * 4


def decode_deltas(
    anchors_xyxy: Tensor,
    deltas: Tensor,
    stds: float | Sequence[float],
    means: float | Sequence[float] = 0.0,
    max_shape_hw: Tensor | None = None,
    wh_ratio_clip: float = 16 / 1000,
) -> Tensor:
    """Apply ``(dx, dy, dw, dh)`` to anchors; equal to mmdet's ``DeltaXYWHBBoxCoder.decode``.

    Args:
        anchors_xyxy: ``[B, P, 4]``, or ``[P, 4]`` shared by the batch.
        deltas: ``[B, P, 4]``, normalised by ``means`` and ``stds``. Any memory layout; the
            coordinate-major one that a convolution writes is the quickest.
        stds: Standard deviations, one or four.
        means: Means, one or four.
        max_shape_hw: ``[B, 2]`` image sizes ``(H, W)`` that boxes are clipped to, on the device of
            the deltas; ``None`` leaves boxes unclipped.
        wh_ratio_clip: ``|dw|`` and ``|dh|`` are limited to ``|log(wh_ratio_clip)|``.

    Returns:
        Boxes ``[B, P, 4]`` in the wider type of the two inputs, differentiable in both. In memory
        they lie coordinate by coordinate, ``[B, 4, P]``, which is how the next steps read them.
    """
    stds, means = _four(stds), _four(means)
    limit = abs(math.log(wh_ratio_clip))
    deltas = deltas.to(torch.promote_types(deltas.dtype, anchors_xyxy.dtype))
    if anchors_xyxy.ndim == 3 and anchors_xyxy.stride(0) == 0:
        anchors_xyxy = anchors_xyxy[0]  # expanded over the batch: its sizes are needed once

    def axis(i: int) -> tuple[Tensor, Tensor]:
        low, high = anchors_xyxy[..., i], anchors_xyxy[..., i + 2]
        shift, grow = deltas[..., i] * stds[i], deltas[..., i + 2] * stds[i + 2]
        if any(means):
            shift, grow = shift + means[i], grow + means[i + 2]
        size = high - low
        centre = shift.mul_(size).add_((low + high).mul_(0.5))
        half = grow.clamp_(-limit, limit).exp_() * size.mul(0.5)
        low, high = centre - half, centre + half
        if max_shape_hw is not None:
            bound = max_shape_hw[:, 1 - i, None].to(half.dtype)
            low, high = low.clamp_(min=0).minimum(bound), high.clamp_(min=0).minimum(bound)
        return low, high

    (x1, x2), (y1, y2) = axis(0), axis(1)
    return torch.stack([x1, y1, x2, y2], dim=1).transpose(1, 2)
