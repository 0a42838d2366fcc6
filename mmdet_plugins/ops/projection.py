"""Masks compared by their projections onto the axes, by maximum and by average.

Equations 6.4 and 6.5 of Wang's thesis, section 6.2.3; the maximum is BoxInst's (Tian et al., CVPR
2021, equation 2).

Shapes: Q predicted masks, G objects, ``h w`` pixels. Kept for the gradient are the logits and where
the maxima lie; there is no gradient of second order.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dice import mask_chunks, wide


class ProjectionLosses(NamedTuple):
    """``[Q]`` each, in 0..2: the sum over both axes."""

    maximum: Tensor
    average: Tensor


def projection_losses(
    logits: Tensor, targets: Tensor, target_idx: Tensor, eps: float = 1e-5
) -> ProjectionLosses:
    """Dice losses of the projections of masks and of their targets.

    Args:
        logits: ``[Q, h, w]``.
        targets: Bool ``[G, h, w]``.
        target_idx: Int64 ``[Q]``, the target of each prediction.
        eps: Added to the denominator, as in the released code.

    Returns:
        Equations 6.4 and 6.5, float32 (float64 for float64 logits).

    Raises:
        ValueError: Sizes do not fit each other, or targets are of another type.
    """
    if logits.ndim != 3 or targets.dtype != torch.bool or targets.shape[1:] != logits.shape[1:]:
        raise ValueError(
            f'logits [Q, h, w] need bool targets [G, h, w]; got {tuple(logits.shape)} and '
            f'{targets.dtype} {tuple(targets.shape)}'
        )
    if target_idx.shape != logits.shape[:1]:
        raise ValueError(
            f'{len(logits)} predictions need as many targets, got {tuple(target_idx.shape)}'
        )
    *maxima, columns, rows = _Project.apply(logits)
    losses = [
        _dice(line, targets.any(axis)[target_idx].to(line.dtype), eps)
        for axis, line in zip((1, 2), maxima, strict=True)
    ]
    averages = [
        _dice(line, (targets.sum(axis).to(line.dtype) / targets.shape[axis])[target_idx], eps)
        for axis, line in zip((1, 2), (columns, rows), strict=True)
    ]
    return ProjectionLosses(sum(losses), sum(averages))


def _dice(a: Tensor, b: Tensor, eps: float) -> Tensor:
    """``1 - 2 sum(a b) / (sum(a^2) + sum(b^2) + eps)`` of ``[Q, n]``."""
    return 1 - 2 * (a * b).sum(1) / (a.square().sum(1) + b.square().sum(1) + eps)


class _Project(torch.autograd.Function):
    """Logits to probabilities: maxima of columns and rows, averages of columns and rows."""

    @staticmethod
    def forward(ctx, logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        num, height, width = logits.shape
        new = dict(dtype=wide(logits.dtype), device=logits.device)
        averages = torch.empty(num, width, **new), torch.empty(num, height, **new)
        (columns, column_idx), (rows, row_idx) = logits.max(1), logits.max(2)
        for part in mask_chunks(logits):
            probs = logits[part].to(new['dtype']).sigmoid()
            for axis, average in enumerate(averages, 1):
                average[part] = probs.mean(axis)
        maxima = [line.to(new['dtype']).sigmoid() for line in (columns, rows)]
        ctx.save_for_backward(logits, column_idx, row_idx, *maxima)
        return *maxima, *averages

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> Tensor:
        logits, column_idx, row_idx, columns, rows = ctx.saved_tensors
        _, height, width = logits.shape
        by_column, by_row = grads[2] / height, grads[3] / width
        out = torch.empty_like(logits, memory_format=torch.contiguous_format)
        for part in mask_chunks(logits):
            probs = logits[part].to(columns.dtype).sigmoid()
            slope = probs.mul_(1 - probs).mul_(by_column[part, None] + by_row[part, :, None])
            for axis, grad, line, index in (
                (1, grads[0], columns, column_idx),
                (2, grads[1], rows, row_idx),
            ):
                source = (grad[part] * line[part] * (1 - line[part])).unsqueeze(axis)
                slope.scatter_add_(axis, index[part].unsqueeze(axis), source)
            out[part] = slope.to(out.dtype)
        return out
