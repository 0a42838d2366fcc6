"""Losses of predicted masks, from logits and one target per object, lean in memory.

Shapes: Q predicted masks, G objects, ``h w`` pixels. Each prediction has the target of one object,
and many may share it. A prediction is one map of logits or, as in Decoupled SOLO, two whose
sigmoids are multiplied.

Forward and backward walk over a few masks at a time: what is kept between them are the logits, the
bool targets and some numbers for each mask. Sums run in float32 whatever the logits are (float64 if
they are), and gradients are closed forms; there is none of second order.
"""

from collections.abc import Iterator, Sequence
from functools import partial, reduce

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_CHUNK_CPU = 1 << 18  # pixels at a time: what stays in the caches
_CHUNK_DEVICE = 1 << 25


def mask_dice_loss(
    logits: Tensor | tuple[Tensor, Tensor], targets: Tensor, target_idx: Tensor, eps: float = 1e-3
) -> Tensor:
    """Dice loss in its squared form, ``1 - 2 sum(p t) / (sum(p^2) + sum(t^2) + 2 eps)``.

    Equation 3.4 of Wang's thesis on SOLO; with ``eps``, mmdet's ``DiceLoss(naive_dice=False)``.

    Args:
        logits: ``[Q, h, w]``, or two of them, of whose sigmoids ``p`` is the product.
        targets: Bool or 0/1 uint8 ``[G, h, w]``.
        target_idx: Int64 ``[Q]``, the target of each prediction.
        eps: Added to both sums of the denominator.

    Returns:
        ``[Q]``, float32 (float64 for float64 logits).

    Raises:
        ValueError: Sizes do not fit each other.
    """
    factors = logits if isinstance(logits, tuple) else (logits,)
    _check(factors, targets, target_idx)
    return _Dice.apply(targets.bool(), target_idx, eps, *factors)


def mask_bce_loss(
    logits: Tensor, targets: Tensor, target_idx: Tensor, positive_weight: float = 2.0
) -> Tensor:
    """Binary cross entropy, the mean over each mask.

    Table 3.4 of Wang's thesis on SOLO, where it is weighted by 10 beside the category loss.

    Args:
        logits: ``[Q, h, w]``.
        targets: Bool or 0/1 uint8 ``[G, h, w]``.
        target_idx: Int64 ``[Q]``, the target of each prediction.
        positive_weight: Weight of the pixels of the object.

    Returns:
        ``[Q]``, float32 (float64 for float64 logits).

    Raises:
        ValueError: Sizes do not fit each other.
    """
    _check((logits,), targets, target_idx)
    return _Focal.apply(targets.bool(), target_idx, positive_weight, 1.0, 0.0, logits)


def mask_focal_loss(
    logits: Tensor, targets: Tensor, target_idx: Tensor, alpha: float = 0.25, gamma: float = 2.0
) -> Tensor:
    """Focal loss, the mean over each mask.

    Table 3.4 of Wang's thesis on SOLO, where it is weighted by 20 beside the category loss. The
    table does not say how pixels are averaged.

    Args:
        logits: ``[Q, h, w]``.
        targets: Bool or 0/1 uint8 ``[G, h, w]``.
        target_idx: Int64 ``[Q]``, the target of each prediction.
        alpha: Weight of the pixels of the object; ``1 - alpha`` is that of the others.
        gamma: Power of the probability of the wrong class.

    Returns:
        ``[Q]``, float32 (float64 for float64 logits).

    Raises:
        ValueError: Sizes do not fit each other.
    """
    _check((logits,), targets, target_idx)
    return _Focal.apply(targets.bool(), target_idx, alpha, 1 - alpha, gamma, logits)


def _check(factors: tuple[Tensor, ...], targets: Tensor, target_idx: Tensor) -> None:
    shape = factors[0].shape
    if len(shape) != 3 or any(factor.shape != shape for factor in factors):
        raise ValueError(f'logits must be [Q, h, w], got {[tuple(f.shape) for f in factors]}')
    if targets.shape[1:] != shape[1:] or target_idx.shape != shape[:1]:
        raise ValueError(
            f'logits {tuple(shape)} need targets [G, {shape[1]}, {shape[2]}] and target_idx '
            f'[{shape[0]}]; got {tuple(targets.shape)} and {tuple(target_idx.shape)}'
        )


def _empty(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _chunks(logits: Tensor) -> Iterator[slice]:
    """A few masks at a time."""
    num, height, width = logits.shape
    budget = _CHUNK_DEVICE if logits.is_cuda else _CHUNK_CPU
    step = max(1, budget // max(1, height * width))
    return (slice(start, start + step) for start in range(0, num, step))


def _rows(factors: Sequence[Tensor], rows: slice) -> list[Tensor]:
    """Some masks of each factor, ``[q, h * w]``."""
    return [factor[rows].flatten(1).to(_wide(factor.dtype)) for factor in factors]


_product = partial(reduce, torch.mul)


class _Dice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, targets: Tensor, target_idx: Tensor, eps: float, *factors: Tensor) -> Tensor:
        overlap = factors[0].new_empty(len(target_idx), dtype=_wide(factors[0].dtype))
        total = torch.empty_like(overlap)
        flat = targets.view(torch.uint8).flatten(1)
        for rows in _chunks(factors[0]):
            p = _product([x.sigmoid() for x in _rows(factors, rows)])
            total[rows] = torch.linalg.vector_norm(p, dim=1).square()
            overlap[rows] = (p * flat.index_select(0, target_idx[rows]).to(p.dtype)).sum(1)
        total += flat.sum(1)[target_idx] + 2 * eps
        ctx.save_for_backward(targets, target_idx, overlap, total, *factors)
        return 1 - 2 * overlap / total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        targets, target_idx, overlap, total, *factors = ctx.saved_tensors
        flat = targets.view(torch.uint8).flatten(1)
        # The derivative by p is inside * t + everywhere * p.
        inside = (-2 * grad / total)[:, None]
        everywhere = (4 * grad * overlap / total.square())[:, None]
        grads = [_empty(factor) for factor in factors]
        for rows in _chunks(factors[0]):
            parts = [x.sigmoid() for x in _rows(factors, rows)]
            slope = _product(parts) * everywhere[rows]
            slope.addcmul_(flat.index_select(0, target_idx[rows]).to(slope.dtype), inside[rows])
            for i, (out, part) in enumerate(zip(grads, parts, strict=True)):
                by_part = _product([slope, *parts[:i], *parts[i + 1 :]])
                out.flatten(1)[rows] = torch.ops.aten.sigmoid_backward(by_part, part)
        return None, None, None, *grads


class _Focal(torch.autograd.Function):
    """``weight * q^gamma * -log(1 - q)``, ``q`` being the probability of the wrong class."""

    @staticmethod
    def forward(ctx, targets, target_idx, positive, negative, gamma, logits) -> Tensor:
        losses = logits.new_empty(len(target_idx), dtype=_wide(logits.dtype))
        ctx.parameters = positive, negative, gamma
        for rows in _chunks(logits):
            target = targets.index_select(0, target_idx[rows])
            wrong, _, weight = _Focal.terms(logits, target, rows, *ctx.parameters)
            losses[rows] = (weight * F.softplus(wrong)).mean((1, 2))
        ctx.save_for_backward(targets, target_idx, logits)
        return losses

    @staticmethod
    def terms(logits, target, rows, positive, negative, gamma):
        """Logit of q; q; the loss's weight with q to its power."""
        wrong = logits[rows].to(_wide(logits.dtype))
        wrong = torch.where(target, -wrong, wrong)
        q = wrong.sigmoid()
        weight = torch.full_like(q, negative).masked_fill_(target, positive)
        return wrong, q, weight * q**gamma if gamma else weight

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        targets, target_idx, logits = ctx.saved_tensors
        gamma = ctx.parameters[-1]
        scale = (grad / logits[0].numel())[:, None, None] if len(logits) else grad
        out = _empty(logits)
        for rows in _chunks(logits):
            target = targets.index_select(0, target_idx[rows])
            wrong, q, weight = _Focal.terms(logits, target, rows, *ctx.parameters)
            slope = weight * (q + gamma * (1 - q) * F.softplus(wrong)) * scale[rows]
            out[rows] = torch.where(target, -slope, slope)
        return None, None, None, None, None, out
