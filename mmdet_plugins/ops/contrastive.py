"""InfoNCE over a queue without its logits, and correspondence between two views of an image.

Shapes: M queries, K negatives in the queue, C channels, N images, S the side of a square grid of
cells, numbered row by row. All vectors are meant to have length one, which nothing here requires.

The loss is equation 5.1 of Wang's thesis (and 5.2, whose queries are the cells of all images): of
query q with its one positive k+ and the queue's negatives,

    L = log(exp(q.k+ / t) + sum_j exp(q.k_j / t)) - q.k+ / t.

Its gradient by q is ``(sum_j p_j k_j + (p+ - 1) k+) / t``, p being the softmax of the logits: what
attention does with the queue as keys and as values. So both come from one pass over tiles of the
queue, and the M x K logits exist nowhere.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS, _COLUMNS = 2048, 2048  # queries and negatives whose logits exist at a time: 16 MB


def info_nce(
    query: Tensor, key: Tensor, queue: Tensor, temperature: float, dtype: torch.dtype | None = None
) -> Tensor:
    """The loss of every query, in O(M C) memory.

    Args:
        query: Float ``[M, C]``.
        key: Float ``[M, C]``, the positive of each query.
        queue: Float ``[K, C]``, negatives of all queries; K may be 0. No gradient reaches it.
        temperature: t above; positive.
        dtype: What is multiplied with the queue, sums being float32 whatever it is. By default
            bfloat16 on a CUDA device that computes in it, and float32 elsewhere. The positive is
            always multiplied in float32.

    Returns:
        Float32 ``[M]``.
    """
    if dtype is None:
        low = query.is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = torch.bfloat16 if low else torch.float32
    return _InfoNCE.apply(query, key, queue, temperature, dtype)


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, queue, temperature, dtype):
        with torch.autocast(query.device.type, enabled=False):
            query_, key_ = query.float(), key.float()
            positive = (query_ * key_).sum(1) / temperature
            scaled, queue = (query_ / temperature).to(dtype), queue.to(dtype)
            with_grad = ctx.needs_input_grad[0]
            parts = [
                _stream(*part, queue.split(_COLUMNS), with_grad)
                for part in zip(
                    scaled.split(_ROWS), key_.split(_ROWS), positive.split(_ROWS), strict=True
                )
            ]
            log_sum, pull = (torch.cat(part) if part[0] is not None else None
                             for part in zip(*parts, strict=True))  # fmt: skip
            loss = log_sum - positive
            ctx.temperature = temperature
            ctx.save_for_backward(
                pull.sub_(key_).div_(temperature) if with_grad else None,
                query if ctx.needs_input_grad[1] else None,
                loss,
            )
            ctx.dtypes = query.dtype, key.dtype
        return loss

    @staticmethod
    def backward(ctx, grad):
        by_query, query, loss = ctx.saved_tensors
        grad = grad[:, None]
        grad_query = grad_key = None
        if by_query is not None:
            grad_query = (grad * by_query).to(ctx.dtypes[0])
        if query is not None:
            share = torch.expm1(-loss)[:, None] / ctx.temperature  # p+ - 1
            grad_key = (grad * share * query.float()).to(ctx.dtypes[1])
        return grad_query, grad_key, None, None, None


def _stream(scaled, key, positive, tiles, with_grad):
    """Log of the sum of exponentials ``[m]``, and the softmax's mean of the keys ``[m, C]``.

    The positive is the first term of both, the tiles follow; all sums are relative to the largest
    logit so far.
    """
    top = positive.clone()
    total = torch.ones_like(top)
    mean = key.clone() if with_grad else None
    for tile in tiles:
        logits = _product(scaled, tile.T)
        new = torch.maximum(top, logits.amax(1))
        fade = torch.exp(top - new)
        top = new
        weights = logits.sub_(new[:, None]).exp_()
        total = total.mul_(fade).add_(weights.sum(1))
        if with_grad:
            mean.mul_(fade[:, None])
            if weights.dtype == tile.dtype:
                mean.addmm_(weights, tile)
            else:
                mean.add_(_product(weights.to(tile.dtype), tile))
    return total.log().add_(top), mean.div_(total[:, None]) if with_grad else None


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in float32, of factors that may be shorter."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


@torch.no_grad()
def match_cells(query_map: Tensor, key_map: Tensor) -> Tensor:
    """For each cell of one map the most similar cell, by cosine, of the other (equation 5.4).

    Args:
        query_map, key_map: Float ``[N, C, S, S]``, two views of the same N images.

    Returns:
        Int64 ``[N, S * S]``, cells of ``key_map``; the first one of a tie.
    """
    keys = F.normalize(key_map.flatten(2), dim=1)  # the length of a query decides nothing
    return torch.bmm(query_map.flatten(2).transpose(1, 2), keys).argmax(2)


def true_cells(query_frame: Tensor, key_frame: Tensor, grid: int) -> Tensor:
    """Where the centre of each cell of one view lies in the other, by the views' frames.

    Args:
        query_frame, key_frame: Float ``[N, 4]``, the image points (x, y) that the view's upper left
            and lower right corners show; a flip exchanges x or y of the two.
        grid: S.

    Returns:
        Int64 ``[N, S * S]``, cells of the second view, -1 where the point is outside of it.
    """
    centre = (torch.arange(grid, device=query_frame.device) + 0.5) / grid
    cells = []
    for axis in (1, 0):
        start, end = query_frame[:, axis, None], query_frame[:, axis + 2, None]
        image = start + centre * (end - start)
        start, end = key_frame[:, axis, None], key_frame[:, axis + 2, None]
        cell = ((image - start) / (end - start) * grid).floor().long()
        cells.append(torch.where((cell >= 0) & (cell < grid), cell, -1))
    row, column = cells[0][:, :, None], cells[1][:, None, :]
    inside = (row >= 0) & (column >= 0)
    return torch.where(inside, row * grid + column, -1).flatten(1)
