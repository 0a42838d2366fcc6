"""A 3x3 convolution that several feature maps share, by a fast algorithm on CPUs.

Heads run one convolution on every level of a pyramid. A library takes the levels one by one and,
on CPUs, multiplies each pixel with each weight. Here all levels go through Winograd's minimal
filtering F(2x2, 3x3) together (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks",
CVPR 2016, section 4.1): 2.25 times fewer multiplications, in 16 matrix products, each of the tiles
of all levels. It is the smallest algorithm of its kind and rounds much as a direct convolution
does; larger tiles would be faster and lose a digit.

Shapes: N images, C input and O output channels, ``h w`` a map, T tiles of 2 x 2 output pixels. A
tile reads 4 x 4 input pixels.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_TILE_FLOATS = 1 << 22  # of a transformed chunk of tiles: about what the caches hold
_MIN_CHANNELS = 256  # below, transforming takes as much time as it saves


def _both_axes(rows: list[list[float]]) -> Tensor:
    """The transform of a flattened square whose rows and columns are transformed alike."""
    line = torch.tensor(rows)
    return torch.kron(line, line)


_INPUT = _both_axes([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]])
_WEIGHT = _both_axes([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
_OUTPUT = _both_axes([[1, 1, 1, 0], [0, 1, -1, -1]])


def makes_a_graph() -> bool:
    """Whether what runs is being traced, compiled or exported."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def is_faster(maps: Sequence[Tensor], weight: Tensor) -> bool:
    """Whether :func:`shared_conv3x3` takes less time than a convolution for each map.

    Never while a graph is traced, compiled or exported, where it would stand for one operator.
    """
    if makes_a_graph():
        return False
    device = weight.device.type
    return (
        device == 'cpu'
        and min(weight.shape[:2]) >= _MIN_CHANNELS
        and all(each.dtype == torch.float32 for each in (weight, *maps))
        and not torch.is_autocast_enabled(device)
    )


def shared_conv3x3(maps: Sequence[Tensor], weight: Tensor) -> list[Tensor]:
    """Convolve each map with the same 3x3 kernels: stride 1, padded by one, no bias.

    Args:
        maps: Of ``[N, C, h, w]``, float32 or float64, each of its own size.
        weight: ``[O, C, 3, 3]``.

    Returns:
        Maps ``[N, O, h, w]``, in channels-last memory.

    Raises:
        ValueError: The weight is not of 3x3 kernels for the channels of the maps.
    """
    channels = {x.shape[1] for x in maps}
    if weight.shape[2:] != (3, 3) or channels - {weight.shape[1]}:
        raise ValueError(
            f'a weight {tuple(weight.shape)} is not of 3x3 kernels for maps of '
            f'{sorted(channels)} channels'
        )
    return list(_SharedConv.apply(weight, *maps))


class _SharedConv(torch.autograd.Function):
    """Forward and backward walk over some tiles at a time and keep nothing but their inputs."""

    @staticmethod
    def forward(ctx, weight: Tensor, *maps: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(weight, *maps)
        kernels = _kernels(weight).transpose(1, 2)
        grids = _tile_grids(maps)
        padded = [_pad(x, 1) for x in maps]
        outs = [
            x.new_empty(n, rows, 2, columns, 2, len(weight))
            for x, (n, rows, columns) in zip(maps, grids, strict=True)
        ]
        for chunk in _chunks(grids, max(weight.shape[:2])):
            tiles = torch.bmm(_input_tiles(padded, chunk), kernels)
            parts = _transform(_OUTPUT, tiles).unflatten(0, (2, 2))
            for (i, rows), part in _split(parts, chunk, grids):
                outs[i][:, rows].copy_(part.permute(2, 3, 0, 4, 1, 5))
        return tuple(
            _crop(out.flatten(3, 4).flatten(1, 2), x, 0) for out, x in zip(outs, maps, strict=True)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, *maps = ctx.saved_tensors
        to_weight, to_maps = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:])
        kernels = _kernels(weight)
        grids = _tile_grids(maps)
        padded = [_pad(x, 1) for x in maps] if to_weight else []
        grads = [_pad(grad, 0) for grad in grads]
        grad_kernels = torch.zeros_like(kernels)
        outs = [
            x.new_zeros(n, rows + 1, 2, columns + 1, 2, weight.shape[1])
            for x, (n, rows, columns) in zip(maps, grids, strict=True)
        ]
        for chunk in _chunks(grids, max(weight.shape[:2])):
            blocks = [
                grads[i].unflatten(2, (-1, 2)).unflatten(1, (-1, 2))[:, rows].transpose(2, 3)
                for i, rows in chunk
            ]
            grad_tiles = _transform(_OUTPUT.t(), _gather(blocks))
            if to_weight:
                grad_kernels.baddbmm_(grad_tiles.transpose(1, 2), _input_tiles(padded, chunk))
            if not to_maps:
                continue
            parts = _transform(_INPUT.t(), torch.bmm(grad_tiles, kernels)).unflatten(0, (4, 4))
            for (i, rows), part in _split(parts, chunk, grids):
                # Tiles overlap by two pixels: each adds to four blocks of 2 x 2.
                columns = grids[i][2]
                for down in (0, 1):
                    for right in (0, 1):
                        block = part[2 * down :, 2 * right :][:2, :2].permute(2, 3, 0, 4, 1, 5)
                        below = slice(rows.start + down, rows.stop + down)
                        outs[i][:, below, :, right : right + columns] += block
        grad_weight = None
        if to_weight:
            grad_weight = grad_kernels.flatten(1).t() @ _WEIGHT.to(weight)
            grad_weight = grad_weight.view_as(weight)
        return grad_weight, *(
            _crop(out.flatten(3, 4).flatten(1, 2), x, 1) if needed else None
            for out, x, needed in zip(outs, maps, ctx.needs_input_grad[1:], strict=True)
        )


def _transform(matrix: Tensor, tiles: Tensor) -> Tensor:
    """``matrix`` [a, b] applied to ``tiles`` [b, T, C] -> [a, T, C]."""
    return (matrix.to(tiles) @ tiles.flatten(1)).unflatten(1, tiles.shape[1:])


def _kernels(weight: Tensor) -> Tensor:
    """[O, C, 3, 3] -> [16, O, C]."""
    return (_WEIGHT.to(weight) @ weight.reshape(-1, 9).t()).unflatten(1, weight.shape[:2])


def _tile_grids(maps: Sequence[Tensor]) -> list[tuple[int, int, int]]:
    """Images, rows and columns of each map's tiles."""
    return [(x.shape[0], (x.shape[2] + 1) // 2, (x.shape[3] + 1) // 2) for x in maps]


def _pad(x: Tensor, border: int) -> Tensor:
    """[N, C, h, w] -> [N, H, W, C], whole tiles with a border of zeros."""
    height, width = x.shape[2:]
    sides = (0, 0, border, border + width % 2, border, border + height % 2)
    return F.pad(x.permute(0, 2, 3, 1), sides).contiguous()


def _crop(x: Tensor, like: Tensor, border: int) -> Tensor:
    """[N, H, W, C] without its border -> [N, C, h, w]."""
    height, width = like.shape[2:]
    return x[:, border : border + height, border : border + width].permute(0, 3, 1, 2)


def _chunks(grids: list[tuple[int, int, int]], channels: int) -> Iterator[list[tuple[int, slice]]]:
    """Maps by number and rows of their tiles, so many together as fill a chunk."""
    limit = max(1, _TILE_FLOATS // (16 * channels))
    chunk, room = [], limit
    for i, (images, rows, columns) in enumerate(grids):
        first = 0
        while first < rows and images and columns:
            last = min(first + room // (images * columns), rows)
            if last == first and not chunk:
                last = first + 1
            if last > first:
                chunk.append((i, slice(first, last)))
                room -= (last - first) * images * columns
                first = last
            else:
                yield chunk
                chunk, room = [], limit
    if chunk:
        yield chunk


def _input_tiles(padded: list[Tensor], chunk: list[tuple[int, slice]]) -> Tensor:
    """The transformed tiles of a chunk, [16, T, C]."""
    tiles = [
        padded[i][:, 2 * rows.start : 2 * rows.stop + 2].unfold(1, 4, 2).unfold(2, 4, 2)
        for i, rows in chunk
    ]
    return _transform(_INPUT, _gather([part.movedim(3, 5) for part in tiles]))


def _gather(tiles: list[Tensor]) -> Tensor:
    """Tiles [N, rows, columns, a, a, C] of each piece of a chunk -> [a * a, T, C]."""
    side, channels = tiles[0].shape[4:]
    counts = [part.shape[:3].numel() for part in tiles]
    gathered = tiles[0].new_empty(side, side, sum(counts), channels)
    for part, out in zip(tiles, gathered.split(counts, 2), strict=True):
        out.unflatten(2, part.shape[:3]).copy_(part.permute(3, 4, 0, 1, 2, 5))
    return gathered.flatten(0, 1)


def _split(
    parts: Tensor, chunk: list[tuple[int, slice]], grids: list[tuple[int, int, int]]
) -> Iterator[tuple[tuple[int, slice], Tensor]]:
    """[a, a, T, C] -> [a, a, N, rows, columns, C] for each piece of a chunk."""
    shapes = [(grids[i][0], rows.stop - rows.start, grids[i][2]) for i, rows in chunk]
    counts = [n * rows * columns for n, rows, columns in shapes]
    for piece, shape, part in zip(chunk, shapes, parts.split(counts, 2), strict=True):
        yield piece, part.unflatten(2, shape)
