"""Deformable convolution v1 and v2 in torch operators, for devices where mmcv's kernel is slow.

Shapes: N images, C input and O output channels, ``H W`` input, ``h w`` output, K = k*k taps.

mmcv's CPU kernel scatters gradients one scalar at a time: a training step of one 3x3 layer, 64
channels at 40x56, costs ten times this one. Here a tap is a row of C contiguous numbers: a sample
is a weighted bag of four rows (bilinear interpolation), and the convolution is one matrix product
over the gathered rows.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def deform_conv2d(
    features: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
) -> Tensor:
    """Convolve at displaced locations (Dai et al., "Deformable Convolutional Networks", ICCV 2017,
    section 2.1; modulated by ``mask``: Zhu et al., CVPR 2019, section 3.2).

    Values of ``mmcv.ops.deform_conv2d`` and ``modulated_deform_conv2d`` with one group and one
    deformable group.

    Args:
        features: ``[N, C, H, W]``; zero outside.
        offset: ``[N, 2*K, h, w]`` in pixels of the input: (dy, dx) of each tap in turn.
        weight: ``[O, C, k, k]``.
        bias: ``[O]``.
        mask: ``[N, K, h, w]`` factor of each tap; None: 1.
        stride, padding, dilation: As for ``torch.nn.functional.conv2d``, the same on both axes.

    Returns:
        ``[N, O, h, w]`` in the type of ``features``; computed in float32 at least. Differentiable
        in all tensors; NaN where a tap's offset is not finite.

    Raises:
        ValueError: The sizes do not fit each other.
    """
    n, c, height, width = features.shape
    o, c_weight, k, k_other = weight.shape
    h, w = ((size + 2 * padding - dilation * (k - 1) - 1) // stride + 1 for size in (height, width))
    if (
        c != c_weight
        or k != k_other
        or offset.shape != (n, 2 * k * k, h, w)
        or (mask is not None and mask.shape != (n, k * k, h, w))
    ):
        raise ValueError(
            f'features {list(features.shape)} and weight {list(weight.shape)} want an offset of '
            f'{[n, 2 * k * k, h, w]} and a mask of {[n, k * k, h, w]}, not {list(offset.shape)} '
            f'and {mask if mask is None else list(mask.shape)}'
        )
    dtype = torch.promote_types(features.dtype, torch.float32)
    taps = torch.arange(k, device=features.device, dtype=dtype) * dilation - padding
    rows = torch.arange(h, device=features.device, dtype=dtype) * stride
    columns = torch.arange(w, device=features.device, dtype=dtype) * stride
    shift = offset.to(dtype).view(n, k * k, 2, h, w).permute(0, 3, 4, 1, 2)  # [N, h, w, K, 2]
    y_idx, y_weight = _corners(
        shift[..., 0] + rows[:, None, None] + taps.repeat_interleave(k), height
    )
    x_idx, x_weight = _corners(shift[..., 1] + columns[:, None] + taps.repeat(k), width)
    if mask is not None:
        y_weight = y_weight * mask.to(dtype).permute(0, 2, 3, 1)[..., None]

    first = torch.arange(n, device=features.device).view(n, 1, 1, 1, 1, 1) * (height * width)
    idx = y_idx[..., :, None] * width + x_idx[..., None, :] + first
    sampled = _bags(
        idx.view(-1, 4),
        features.to(dtype).permute(0, 2, 3, 1).reshape(n * height * width, c),
        (y_weight[..., :, None] * x_weight[..., None, :]).view(-1, 4),
    )
    kernel = weight.to(dtype).permute(2, 3, 1, 0).reshape(k * k * c, o)
    out = sampled.view(n * h * w, k * k * c) @ kernel
    if bias is not None:
        out = out + bias.to(dtype)
    return out.view(n, h, w, o).permute(0, 3, 1, 2).contiguous().to(features.dtype)


def _bags(idx: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums ``[B, C]`` of ``rows`` ``[R, C]``; ``idx`` and ``weights`` are ``[B, 4]``."""
    if torch.onnx.is_in_onnx_export():  # ONNX has no such operator
        pairs = zip(idx.unbind(1), weights.split(1, dim=1), strict=True)
        return sum(rows.index_select(0, i) * weight for i, weight in pairs)
    return F.embedding_bag(idx, rows, per_sample_weights=weights, mode='sum')


def _corners(position: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The two grid lines around each position and their weights, 0 for a line outside: [..., 2]."""
    low = position.detach().floor()
    lines = torch.stack([low, low + 1], -1)
    share = position - low
    inside = (lines >= 0) & (lines < size)
    weights = torch.stack([1 - share, share], -1) * inside
    return lines.nan_to_num(0).clamp(0, size - 1).long(), weights
