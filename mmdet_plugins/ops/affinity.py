"""Pairwise colour affinity: neighbours of like colour belong to one object or to none (BoxInst).

Tian et al., "BoxInst", CVPR 2021, section 3.2; in Wang's thesis, section 6.2.3.

Shapes: N images of ``H W`` pixels, Q predicted masks, G objects, ``h w`` mask maps.

With the probability p of a pixel i to be foreground, that of i and its neighbour j to agree is
``p_i p_j + (1 - p_i)(1 - p_j)``, and minus its logarithm, of the logits x,
``softplus(x_i) + softplus(x_j) - softplus(x_i + x_j)``. That is symmetric, so that the eight
neighbours are four shifts, and stable, so that nothing is unfolded. Which of its neighbours a pixel
resembles takes a byte, shared by all objects of an image; what is outside the image never counts,
so that borders are left out. The backward pass computes everything anew: kept are the logits.
"""

import math
from collections.abc import Iterator, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dice import wide

_CHUNK_CPU = 1 << 17  # pixels at a time: what stays in the caches
_CHUNK_DEVICE = 1 << 24
_DIRECTIONS = ((0, 1), (1, -1), (1, 0), (1, 1))  # y, x; the opposite ones come with them
# CIE XYZ of linear sRGB, its rows relative to the white point D65.
_XYZ = (
    (0.412453 / 0.95047, 0.357580 / 0.95047, 0.180423 / 0.95047),
    (0.212671, 0.715160, 0.072169),
    (0.019334 / 1.08883, 0.119193 / 1.08883, 0.950227 / 1.08883),
)


def rgb_to_lab(images: Tensor) -> Tensor:
    """CIE Lab (D65, 2 degrees) of sRGB images.

    Args:
        images: uint8 ``[..., 3, h, w]``, RGB.

    Returns:
        Float32 of that shape, on the device of the images; scikit-image's ``rgb2lab`` to 1e-3.
    """
    linear = _linear_rgb(images.device)[images.long()]
    matrix = torch.tensor(_XYZ, device=images.device)
    xyz = torch.einsum('xc,...chw->...xhw', matrix, linear)
    x, y, z = torch.where(xyz > 0.008856, xyz.pow(1 / 3), 7.787 * xyz + 16 / 116).unbind(-3)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -3)


@cache
def _linear_rgb(device: torch.device) -> Tensor:
    """Linear intensity of each of the 256 values of a channel."""
    value = torch.arange(256, dtype=torch.float64) / 255
    linear = torch.where(value > 0.04045, ((value + 0.055) / 1.055) ** 2.4, value / 12.92)
    return linear.float().to(device)


@torch.no_grad()
def color_affinity(
    images: Tensor,
    valid_hw: Sequence[tuple[int, int]],
    stride: int = 4,
    dilation: int = 2,
    threshold: float = 0.3,
) -> Tensor:
    """Which neighbours of each pixel have its colour: ``exp(-|Lab_i - Lab_j| / 2) >= threshold``.

    Args:
        images: ``[N, 3, H, W]``, RGB in 0..255, padded; they are averaged over ``stride`` pixels.
        valid_hw: Size of what counts of each image; a map's pixel counts if the middle of it does.
        stride: Pixels to one of the map.
        dilation: Distance of the neighbours, in pixels of the map.
        threshold: theta of the paper.

    Returns:
        uint8 ``[N, H // stride, W // stride]``: bit s for the neighbour in direction s of (right,
        below to the left, below, below to the right), bit 4 + s for the opposite one. The
        neighbour is valid; the pixel itself need not be, as in BoxInst.
    """
    # Averages of integers are multiples of 1 / stride^2: what normalisation has cost is made good.
    small = F.avg_pool2d(images.float(), stride) + 0.5 / stride**2
    lab = rgb_to_lab(small.clamp(0, 255).byte())
    height, width = lab.shape[-2:]
    y, x = (torch.arange(n, device=images.device) * stride + stride // 2 for n in (height, width))
    valid_h, valid_w = torch.tensor(valid_hw, device=images.device)[:, :, None].unbind(1)
    valid = ((y < valid_h)[:, :, None] & (x < valid_w)[:, None]).byte()

    limit = (2 * math.log(threshold)) ** 2
    affinity = torch.zeros(len(images), height, width, dtype=torch.uint8, device=images.device)
    for bit, (here, there) in enumerate(_shifts(height, width, dilation)):
        alike = (lab[..., *here] - lab[..., *there]).square_().sum(1) <= limit
        affinity[:, *here] |= (alike * valid[:, *there]) << bit
        affinity[:, *there] |= (alike * valid[:, *here]) << (4 + bit)
    return affinity


def pairwise_affinity_loss(
    logits: Tensor,
    affinity: Tensor,
    boxes_xyxy: Tensor,
    image_idx: Tensor,
    object_idx: Tensor,
    dilation: int = 2,
) -> tuple[Tensor, Tensor]:
    """Minus the log-probability that pixels agree with their neighbours of like colour.

    Counted are the pairs of a pixel in the box and a neighbour, inside or not. BoxInst divides the
    sum of losses by that of weights.

    Args:
        logits: ``[Q, h, w]``.
        affinity: uint8 ``[N, h, w]`` of :func:`color_affinity`.
        boxes_xyxy: Int64 ``[G, 4]``, x1 y1 x2 y2 in pixels of the map, the ends exclusive.
        image_idx: Int64 ``[G]``, the image of each object.
        object_idx: Int64 ``[Q]``, the object of each prediction.
        dilation: That of ``affinity``.

    Returns:
        The loss and the number of pairs of each prediction, ``[Q]`` both, float32 (float64 for
        float64 logits).

    Raises:
        ValueError: Sizes do not fit each other, or ``affinity`` is of another type.
    """
    if logits.ndim != 3 or affinity.dtype != torch.uint8 or logits.shape[1:] != affinity.shape[1:]:
        raise ValueError(
            f'logits [Q, h, w] need a uint8 affinity [N, h, w]; got {tuple(logits.shape)} and '
            f'{affinity.dtype} {tuple(affinity.shape)}'
        )
    if object_idx.shape != logits.shape[:1] or image_idx.shape != boxes_xyxy.shape[:1]:
        raise ValueError(
            f'{len(logits)} predictions need object_idx [{len(logits)}], and boxes [G, 4] '
            f'image_idx [G]; got {tuple(object_idx.shape)}, {tuple(boxes_xyxy.shape)} and '
            f'{tuple(image_idx.shape)}'
        )
    return _Pairwise.apply(logits, affinity, boxes_xyxy, image_idx, object_idx, dilation)


Window = tuple[slice, slice]


def _shifts(height: int, width: int, dilation: int) -> Iterator[tuple[Window, Window]]:
    """For each direction, the windows of pixels and of their neighbours in it."""
    for dy, dx in _DIRECTIONS:
        dy, dx = dy * dilation, dx * dilation
        rows = slice(0, max(height - dy, 0)), slice(min(dy, height), height)
        left, right = slice(0, max(width - abs(dx), 0)), slice(min(abs(dx), width), width)
        here, there = (left, right) if dx >= 0 else (right, left)
        yield (rows[0], here), (rows[1], there)


class _Pairwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, *args) -> tuple[Tensor, Tensor]:
        loss = logits.new_zeros(len(logits), dtype=wide(logits.dtype))
        total = torch.zeros_like(loss)
        for rows, window, bits in _parts(logits, *args):
            x = logits[rows, *window].to(loss.dtype)
            each = F.softplus(x)
            for (here, there), weight in _weights(bits, args[-1], x.dtype):
                both = F.softplus(x[:, *here] + x[:, *there])
                pair = each[:, *here] + each[:, *there]
                loss[rows] += pair.sub_(both).mul_(weight).sum((1, 2))
                total[rows] += weight.sum((1, 2))
        *tensors, ctx.dilation = args
        ctx.save_for_backward(logits, *tensors)
        ctx.mark_non_differentiable(total)
        return loss, total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        logits, *tensors = ctx.saved_tensors
        out = torch.zeros_like(logits, memory_format=torch.contiguous_format)
        for rows, window, bits in _parts(logits, *tensors, ctx.dilation):
            x = logits[rows, *window].to(grad.dtype)
            each = torch.zeros_like(bits, dtype=x.dtype)  # the weights of all pairs of a pixel
            pairs = torch.zeros_like(x)
            for (here, there), weight in _weights(bits, ctx.dilation, x.dtype):
                both = (x[:, *here] + x[:, *there]).sigmoid_().mul_(weight)
                for side in (here, there):
                    each[:, *side] += weight
                    pairs[:, *side] -= both
            slope = x.sigmoid_().mul(each).add_(pairs).mul_(grad[rows, None, None])
            out[rows, *window] = slope.to(out.dtype)
        return out, None, None, None, None, None


def _weights(
    bits: Tensor, dilation: int, dtype: torch.dtype
) -> Iterator[tuple[tuple[Window, Window], Tensor]]:
    """For each direction, the windows and how often a pair counts: 0, 1 or 2."""
    for bit, (here, there) in enumerate(_shifts(*bits.shape[1:], dilation)):
        weight = (bits[:, *here] >> bit & 1) + (bits[:, *there] >> (4 + bit) & 1)
        yield (here, there), weight.to(dtype)


def _parts(
    logits: Tensor,
    affinity: Tensor,
    boxes_xyxy: Tensor,
    image_idx: Tensor,
    object_idx: Tensor,
    dilation: int,
) -> Iterator[tuple[Tensor | slice, Window, Tensor]]:
    """Some predictions at a time, a window, and the affinity there, zero outside the box.

    On the CPU what lies around the box of one object; elsewhere whole maps, so that no size has to
    be known to the host.
    """
    _, height, width = logits.shape
    if logits.device.type == 'cpu':
        order = object_idx.argsort(stable=True)
        counts = torch.bincount(object_idx, minlength=len(boxes_xyxy)).tolist()
        objects = zip(order.split(counts), boxes_xyxy.tolist(), image_idx.tolist(), strict=True)
        for mine, (x1, y1, x2, y2), image in objects:
            if not len(mine) or x1 >= x2 or y1 >= y2:
                continue
            top, left = max(y1 - dilation, 0), max(x1 - dilation, 0)
            window = slice(top, y2 + dilation), slice(left, x2 + dilation)
            box = slice(y1 - top, y2 - top), slice(x1 - left, x2 - left)
            bits = torch.zeros_like(affinity[image : image + 1, *window])
            bits[:, *box] = affinity[image, y1:y2, x1:x2]
            for rows in mine.split(max(1, _CHUNK_CPU // bits.numel())):
                yield rows, window, bits
        return
    y, x = (torch.arange(n, device=logits.device) for n in (height, width))
    step = max(1, _CHUNK_DEVICE // max(1, height * width))
    for start in range(0, len(logits), step):
        rows = slice(start, start + step)
        x1, y1, x2, y2 = boxes_xyxy[object_idx[rows], :, None].unbind(1)
        inside = ((y >= y1) & (y < y2))[:, :, None] & ((x >= x1) & (x < x2))[:, None]
        bits = affinity[image_idx[object_idx[rows]]] * inside
        yield rows, (slice(None), slice(None)), bits
