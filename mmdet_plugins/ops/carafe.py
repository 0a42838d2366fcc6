"""CARAFE, content-aware reassembly of features, on any device, in little memory.

Shapes: N images, C channels in G groups, ``h x w`` low-resolution cells, upsampled ``s`` times by
kernels of ``k x k`` taps.

Every output pixel is a weighted sum of the ``k x k`` low-resolution neighbourhood of the cell that
it lies in, with weights of its own (Wang et al., "CARAFE: Content-Aware ReAssembly of FEatures",
ICCV 2019, section 3.1). As matrices: each cell multiplies its ``[s*s, k*k]`` weights with a
``[k*k, C]`` patch. Stored as *strips* -- ``[column, tap row, channel]`` for one row of cells -- the
patches of neighbouring cells overlap in memory, so that one batched matrix product over a strided
view does a row of cells without unfolding it. The backward pass keeps the two inputs only.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Elements of a strip: on the CPU it should stay in the second-level cache, on other devices the
# number of launches counts.
_STRIP = 1 << 18
_STRIP_DEVICE = 1 << 25


def carafe(
    features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale_factor: int
) -> Tensor:
    """Reassemble features with one kernel per output pixel, as ``mmcv.ops.carafe`` does.

    Args:
        features: ``[N, C, h, w]``.
        masks: ``[N, G*k*k, s*h, s*w]`` kernels, used as they are (normalise them before); channels
            are group-major, then tap row, then tap column.
        kernel_size: ``k``, odd.
        group_size: ``G``, a divisor of C; group g holds channels ``g*C/G .. (g+1)*C/G - 1``.
        scale_factor: ``s >= 1``.

    Returns:
        ``[N, C, s*h, s*w]`` in the type and memory format of ``features``. Cells outside the map
        count as zero. Sums are formed in float32 (float64 for float64 input), whatever the input
        type and autocast say. Differentiable once, in both inputs.

    Raises:
        ValueError: Sizes do not fit each other.
    """
    n, c, h, w = features.shape
    if kernel_size < 1 or kernel_size % 2 == 0 or scale_factor < 1:
        raise ValueError(
            f'CARAFE needs an odd kernel size and a scale factor of 1 or more, got '
            f'kernel_size={kernel_size}, scale_factor={scale_factor}'
        )
    if group_size < 1 or c % group_size:
        raise ValueError(f'{c} channels do not split into {group_size} groups')
    expected = (n, group_size * kernel_size**2, h * scale_factor, w * scale_factor)
    if masks.shape != expected:
        raise ValueError(
            f'CARAFE masks are {tuple(masks.shape)}; features {tuple(features.shape)} '
            f'with kernel_size={kernel_size}, group_size={group_size}, '
            f'scale_factor={scale_factor} need {expected}'
        )
    return _Carafe.apply(features, masks, kernel_size, group_size, scale_factor)


class _Strips:
    """The buffers and views of one problem, taken a few rows of cells at a time.

    A row of cells is ``pitch`` columns wide, a multiple of ``tile`` that holds the padded width;
    what lies beyond the map is computed and dropped. Taps are column-major here.
    """

    def __init__(self, features: Tensor, k: int, groups: int, s: int) -> None:
        self.n, channels, self.h, self.w = features.shape
        self.k, self.groups, self.s, self.c = k, groups, s, channels // groups
        self.tile = max(8, k - 1)
        self.pitch = -(-(self.w + k - 1) // self.tile) * self.tile
        budget = _STRIP if features.device.type == 'cpu' else _STRIP_DEVICE
        self.rows = min(max(1, budget // max(1, self.pitch * k * self.c)), self.h)
        self.windows = self.rows * self.pitch
        dtype = torch.promote_types(features.dtype, torch.float32)
        self.zeros = partial(features.new_zeros, dtype=dtype)
        self.strip = self.zeros(self.windows + k - 1, k, self.c)

    def planes(self) -> Iterator[tuple[int, slice, slice]]:
        """Image index, its channels and its mask channels, for each image and group."""
        taps = self.k**2
        for i in range(self.n):
            for g in range(self.groups):
                yield i, slice(g * self.c, (g + 1) * self.c), slice(g * taps, (g + 1) * taps)

    def chunks(self) -> Iterator[slice]:
        for start in range(0, self.h, self.rows):
            yield slice(start, min(start + self.rows, self.h))

    def pad(self, feature: Tensor | None = None) -> Tensor:
        """``[c, h, w]``, or zeros, within zeros: channels-last ``[h+k-1, pitch, c]``."""
        padded = self.zeros(self.h + self.k - 1, self.pitch, self.c)
        if feature is not None:
            self.inner(padded).copy_(feature)
        return padded

    def inner(self, padded: Tensor) -> Tensor:
        """The ``[c, h, w]`` that a padded map surrounds, as a view."""
        r = self.k // 2
        return padded[r : r + self.h, r : r + self.w].permute(2, 0, 1)

    def patches(self, padded: Tensor, rows: slice) -> Tensor:
        """``[windows, k*k, c]``: the neighbourhoods of a chunk, as overlapping views of a strip."""
        for y in range(self.k):
            source = padded[rows.start + y : rows.stop + y]
            self.strip[: source.shape[0] * self.pitch, y] = source.flatten(0, 1)
        return self.strip.as_strided(
            (self.windows, self.k**2, self.c), (self.k * self.c, self.c, 1)
        )

    def cells(self, image: Tensor) -> Tensor:
        """View ``[..., s*h, s*w]`` as ``[..., h, s, w, s]``."""
        return image.unflatten(-1, (self.w, self.s)).unflatten(-3, (self.h, self.s))

    def taps(self, mask: Tensor) -> Tensor:
        """View ``[k*k, s*h, s*w]`` as ``[k, k, h, s, w, s]``, tap column first."""
        return self.cells(mask.unflatten(0, (self.k, self.k)).transpose(0, 1))

    def chunk(self, buffer: Tensor, rows: slice) -> Tensor:
        """View ``[windows, s*s, m]`` as the ``[m, R, s, w, s]`` that lie on the map."""
        view = buffer.view(self.rows, self.pitch, self.s, self.s, -1)
        return view[: rows.stop - rows.start, : self.w].permute(4, 0, 2, 1, 3)


class _Carafe(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features: Tensor, masks: Tensor, k: int, groups: int, s: int) -> Tensor:
        ctx.save_for_backward(features, masks)
        ctx.sizes = (k, groups, s)
        channels_last = (
            features.is_contiguous(memory_format=torch.channels_last)
            and not features.is_contiguous()
        )
        n, c, h, w = features.shape
        out = torch.empty(
            (n, c, h * s, w * s),
            dtype=features.dtype,
            device=features.device,
            memory_format=torch.channels_last if channels_last else torch.contiguous_format,
        )
        strips = _Strips(features, k, groups, s)
        weights = strips.zeros(strips.windows, s * s, k * k)
        sums = strips.zeros(strips.windows, s * s, strips.c)
        for i, channels, taps in strips.planes():
            padded = strips.pad(features[i, channels])
            mask, target = strips.taps(masks[i, taps]), strips.cells(out[i, channels])
            for rows in strips.chunks():
                strips.chunk(weights, rows).unflatten(0, (k, k)).copy_(mask[:, :, rows])
                torch.bmm(weights, strips.patches(padded, rows), out=sums)
                target[:, rows] = strips.chunk(sums, rows)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        features, masks = ctx.saved_tensors
        k, groups, s = ctx.sizes
        for_features, for_masks = ctx.needs_input_grad[:2]
        grad_features = torch.empty_like(features) if for_features else None
        grad_masks = torch.empty_like(masks) if for_masks else None
        strips = _Strips(features, k, groups, s)
        flow = strips.zeros(strips.windows, s * s, strips.c)
        if for_masks:
            sums = strips.zeros(strips.windows, s * s, k * k)
        if for_features:
            scatter = _Scatter(strips)
        for i, channels, taps in strips.planes():
            source = strips.cells(grad[i, channels])
            if for_masks:
                padded = strips.pad(features[i, channels])
                target = strips.taps(grad_masks[i, taps])
            if for_features:
                mask, total = strips.taps(masks[i, taps]), strips.pad()
            for rows in strips.chunks():
                strips.chunk(flow, rows).copy_(source[:, rows])
                if for_masks:
                    patches = strips.patches(padded, rows)
                    torch.bmm(flow, patches.transpose(1, 2), out=sums)
                    target[:, :, rows] = strips.chunk(sums, rows).unflatten(0, (k, k))
                if for_features:
                    scatter(flow, mask, total, rows)
            if for_features:
                grad_features[i, channels] = strips.inner(total)
        return grad_features, grad_masks, None, None, None


class _Scatter:
    """The transpose of the reassembly, by tiles of cells so that few of the sums overlap.

    The weights of a tile form a band ``[tile * s*s, (tile + k-1) * k]``, in which cell t starts at
    column t of the window.
    """

    def __init__(self, strips: _Strips) -> None:
        self.strips = strips
        k, s, tile = strips.k, strips.s, strips.tile
        self.tiles, width = strips.windows // tile, (tile + k - 1) * k
        self.weights = strips.zeros(strips.windows, s * s, k * k)
        self.band = strips.zeros(self.tiles, tile * s * s, width)
        self.diagonal = self.band.as_strided(
            (self.tiles, tile, s * s, k * k), (tile * s * s * width, s * s * width + k, width, 1)
        )
        self.sums = strips.zeros(self.tiles, tile + k - 1, k * strips.c)
        self.strip = strips.zeros(self.tiles, tile, k * strips.c)

    def __call__(self, flow: Tensor, mask: Tensor, total: Tensor, rows: slice) -> None:
        """Add the share of some rows of cells to ``total [h+k-1, pitch, c]``."""
        strips, k = self.strips, self.strips.k
        strips.chunk(self.weights, rows).unflatten(0, (k, k)).copy_(mask[:, :, rows])
        self.diagonal.copy_(self.weights.view(self.diagonal.shape))
        torch.bmm(
            self.band.transpose(1, 2),
            flow.view(self.tiles, -1, strips.c),
            out=self.sums.view(self.tiles, -1, strips.c),
        )
        self.strip.copy_(self.sums[:, : strips.tile])
        self.strip[1:, : k - 1] += self.sums[:-1, strips.tile :]
        strip = self.strip.view(strips.rows, strips.pitch, k, strips.c)[: rows.stop - rows.start]
        for y in range(k):
            total[rows.start + y : rows.stop + y] += strip[:, :, y]
