"""Losses of predicted masks, from logits and one target per object, lean in memory.

Shapes: Q predicted masks, G objects, ``h w`` pixels. Each prediction has the target of one object,
and many may share it. A prediction is one map of logits or, as in Decoupled SOLO, two whose
sigmoids are multiplied.

Forward and backward walk over a few masks at a time: what is kept between them are the logits, the
targets and some numbers for each mask. Sums run in float32 whatever the logits are (float64 if
they are), and gradients are closed forms; there is none of second order.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial, reduce

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_CHUNK_CPU = 1 << 18  # pixels at a time: what stays in the caches
_CHUNK_DEVICE = 1 << 25
# Where a mask is surely absent its gradient is a product of vanishing numbers, and a convolution's
# backward pass takes three times as long on a CPU when it meets subnormal ones.
_TINY = 1e-30


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
        ValueError: Sizes do not fit each other, or targets are of another type.
    """
    factors = logits if isinstance(logits, tuple) else (logits,)
    _check(factors, targets, target_idx)
    return _Dice.apply(targets, target_idx, eps, *factors)


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
        ValueError: Sizes do not fit each other, or targets are of another type.
    """
    _check((logits,), targets, target_idx)
    return _Focal.apply(targets, target_idx, positive_weight, 1.0, 0.0, logits)


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
        ValueError: Sizes do not fit each other, or targets are of another type.
    """
    _check((logits,), targets, target_idx)
    return _Focal.apply(targets, target_idx, alpha, 1 - alpha, gamma, logits)


def dynamic_mask_logits(features: Tensor, kernels: Tensor, counts: Sequence[int]) -> Tensor:
    """Mask logits of SOLOv2: each prediction's own kernel over the mask features of its image.

    With 1 x 1 kernels, one product for each image, whose gradients are written where they belong;
    a slice or an index of the features would have a gradient of the size of the batch instead. With
    larger ones, which are padded with zeros, a convolution for each image.

    Args:
        features: ``[N, C, h, w]``.
        kernels: ``[Q, C * k * k]``, k odd, grouped by image; channels first, then rows, columns.
        counts: How many kernels each image has.

    Returns:
        ``[Q, h, w]``, in the type of the autocast, if there is one.

    Raises:
        ValueError: The kernels do not fit the features, or the counts the kernels.
    """
    num, channels = features.shape[:2]
    size = math.isqrt(kernels.shape[1] // channels)
    if size % 2 == 0 or channels * size**2 != kernels.shape[1]:
        raise ValueError(
            f'kernels {tuple(kernels.shape)} are not [Q, {channels} * k * k] with an odd k'
        )
    if len(counts) != num or sum(counts) != len(kernels):
        raise ValueError(f'counts {list(counts)} for {num} images and {len(kernels)} kernels')
    device = features.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        features, kernels = features.to(dtype), kernels.to(dtype)
    if size == 1:
        return _Dynamic.apply(features, kernels, list(counts))
    logits = [
        F.conv2d(image[None], own.view(-1, channels, size, size), padding=size // 2)[0]
        if len(own)
        else image[:0] * own.sum()  # nothing, but with gradients
        for image, own in zip(features.unbind(), kernels.split(list(counts)), strict=True)
    ]
    return torch.cat(logits)


def _check(factors: tuple[Tensor, ...], targets: Tensor, target_idx: Tensor) -> None:
    shape = factors[0].shape
    if len(shape) != 3 or any(factor.shape != shape for factor in factors):
        raise ValueError(f'logits must be [Q, h, w], got {[tuple(f.shape) for f in factors]}')
    if targets.dtype not in (torch.bool, torch.uint8):
        raise ValueError(f'targets must be bool or uint8, got {targets.dtype}')
    if targets.shape[1:] != shape[1:] or target_idx.shape != shape[:1]:
        raise ValueError(
            f'logits {tuple(shape)} need targets [G, {shape[1]}, {shape[2]}] and target_idx '
            f'[{shape[0]}]; got {tuple(targets.shape)} and {tuple(target_idx.shape)}'
        )


def _empty(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type that sums run in, float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def mask_chunks(logits: Tensor) -> Iterator[slice]:
    """Which of the masks ``[Q, h, w]`` to take at a time: a few."""
    num, height, width = logits.shape
    budget = _CHUNK_DEVICE if logits.is_cuda else _CHUNK_CPU
    step = max(1, budget // max(1, height * width))
    return (slice(start, start + step) for start in range(0, num, step))


def _rows(factors: Sequence[Tensor], rows: slice) -> list[Tensor]:
    """Some masks of each factor, ``[q, h * w]``."""
    return [factor[rows].flatten(1).to(wide(factor.dtype)) for factor in factors]


def _target_rows(targets: Tensor, target_idx: Tensor, rows: slice) -> Tensor:
    """The targets of some masks, uint8 (which torch turns into floats faster than bool)."""
    return targets.view(torch.uint8).flatten(1).index_select(0, target_idx[rows])


_product = partial(reduce, torch.mul)


class _Dice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, targets: Tensor, target_idx: Tensor, eps: float, *factors: Tensor) -> Tensor:
        overlap = factors[0].new_empty(len(target_idx), dtype=wide(factors[0].dtype))
        total = torch.empty_like(overlap)
        for rows in mask_chunks(factors[0]):
            p = _product([x.sigmoid() for x in _rows(factors, rows)])
            t = _target_rows(targets, target_idx, rows).to(p.dtype)
            total[rows] = torch.linalg.vector_norm(p, dim=1).square() + t.sum(1) + 2 * eps
            overlap[rows] = t.mul_(p).sum(1)
        ctx.save_for_backward(targets, target_idx, overlap, total, *factors)
        return 1 - 2 * overlap / total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        targets, target_idx, overlap, total, *factors = ctx.saved_tensors
        # The derivative by p is inside * t + everywhere * p.
        inside = (-2 * grad / total)[:, None]
        everywhere = (4 * grad * overlap / total.square())[:, None]
        grads = [_empty(factor) for factor in factors]
        for rows in mask_chunks(factors[0]):
            parts = [x.sigmoid() for x in _rows(factors, rows)]
            slope = _product(parts) * everywhere[rows]
            t = _target_rows(targets, target_idx, rows).to(slope.dtype)
            slope.addcmul_(t, inside[rows])
            for i, (out, part) in enumerate(zip(grads, parts, strict=True)):
                by_part = _product([slope, *parts[:i], *parts[i + 1 :]])
                by_logit = torch.ops.aten.sigmoid_backward(by_part, part)
                out.flatten(1)[rows] = F.hardshrink(by_logit, _TINY)
        return None, None, None, *grads


class _Focal(torch.autograd.Function):
    """``weight * q^gamma * -log(1 - q)``, ``q`` being the probability of the wrong class."""

    @staticmethod
    def forward(
        ctx,
        targets: Tensor,
        target_idx: Tensor,
        positive: float,
        negative: float,
        gamma: float,
        logits: Tensor,
    ) -> Tensor:
        losses = logits.new_empty(len(target_idx), dtype=wide(logits.dtype))
        ctx.parameters = positive, negative, gamma
        for rows in mask_chunks(logits):
            target = _target_rows(targets, target_idx, rows).bool()
            wrong, _, weight = _focal_terms(*_rows([logits], rows), target, *ctx.parameters)
            losses[rows] = (weight * F.softplus(wrong)).mean(1)
        ctx.save_for_backward(targets, target_idx, logits)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        targets, target_idx, logits = ctx.saved_tensors
        gamma = ctx.parameters[-1]
        scale = (grad / math.prod(logits.shape[1:]))[:, None]
        out = _empty(logits)
        for rows in mask_chunks(logits):
            target = _target_rows(targets, target_idx, rows).bool()
            wrong, q, weight = _focal_terms(*_rows([logits], rows), target, *ctx.parameters)
            slope = weight * (q + gamma * (1 - q) * F.softplus(wrong)) * scale[rows]
            out.flatten(1)[rows] = torch.where(target, -slope, slope)
        return None, None, None, None, None, out


def _focal_terms(
    logits: Tensor, target: Tensor, positive: float, negative: float, gamma: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Logit of q; q; the loss's weight with q to its power."""
    wrong = torch.where(target, -logits, logits)
    q = wrong.sigmoid()
    weight = torch.full_like(q, negative).masked_fill_(target, positive)
    return wrong, q, weight * q**gamma if gamma else weight


class _Dynamic(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features: Tensor, kernels: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(features, kernels)
        ctx.counts = counts
        logits = features.new_empty(len(kernels), *features.shape[2:])
        for image, own, out in _each_image(counts, features, kernels, logits):
            torch.mm(own, image, out=out)
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        features, kernels = ctx.saved_tensors
        grad_features, grad_kernels = _empty(features), _empty(kernels)
        for (image, own, part), (to_image, to_own, _) in zip(
            _each_image(ctx.counts, features, kernels, grad),
            _each_image(ctx.counts, grad_features, grad_kernels, grad),
            strict=True,
        ):
            torch.mm(own.t(), part, out=to_image)
            torch.mm(part, image.t(), out=to_own)
        return grad_features, grad_kernels, None


def _each_image(
    counts: list[int], features: Tensor, kernels: Tensor, logits: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Features ``[C, h * w]``, kernels ``[q, C]`` and logits ``[q, h * w]`` of each image."""
    logits = logits.flatten(1).split(counts)
    return zip(features.flatten(2), kernels.split(counts), logits, strict=True)
