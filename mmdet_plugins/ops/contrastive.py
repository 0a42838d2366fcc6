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

_LOGITS = 1 << 22  # that exist at a time: 16 MB, half of what the caches of a server hold
_LOGITS_DEVICE = 1 << 23  # fewer and larger launches


def info_nce(
    query: Tensor, key: Tensor, queue: Tensor, temperature: float, dtype: torch.dtype | None = None
) -> Tensor:
    """The loss of every query, in O(M C) memory.

    Args:
        query: Float ``[M, C]``.
        key: Float ``[M, C]``, the positive of each query.
        queue: Float ``[K, C]``, negatives of all queries. No gradient reaches it.
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
        of_query, of_key = ctx.needs_input_grad[:2]
        with torch.autocast(query.device.type, enabled=False):
            scaled, keys = query.float() / temperature, key.float()
            positive = (scaled * keys).sum(1)
            log_sum, mean = _attend(scaled.to(dtype), queue.to(dtype), positive, keys, of_query)
        loss = log_sum - positive
        ctx.temperature, ctx.dtypes = temperature, (query.dtype, key.dtype)
        ctx.save_for_backward(
            mean.sub_(keys).div_(temperature) if of_query else None, query if of_key else None, loss
        )
        return loss

    @staticmethod
    def backward(ctx, grad):
        by_query, query, loss = ctx.saved_tensors
        grad_query = grad_key = None
        if by_query is not None:
            grad_query = (grad[:, None] * by_query).to(ctx.dtypes[0])
        if query is not None:
            share = torch.expm1(-loss) / ctx.temperature  # p+ - 1
            grad_key = ((grad * share)[:, None] * query.float()).to(ctx.dtypes[1])
        return grad_query, grad_key, None, None, None


def _attend(
    scaled: Tensor, queue: Tensor, log_sum: Tensor, first: Tensor, with_mean: bool
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp ``[M]`` of the logits, and the mean ``[M, C]`` of the keys by their softmax.

    Both start with one key a query, of logit ``log_sum`` and value ``first``.
    """
    mean = first.clone()
    budget = _LOGITS_DEVICE if scaled.is_cuda else _LOGITS
    for tile in queue.split(max(64, budget // len(scaled))):
        logits = _product(scaled, tile.T)
        log_weights = logits.log_softmax(1)
        of_tile = logits[:, 0] - log_weights[:, 0]
        del logits
        before, log_sum = log_sum, torch.logaddexp(log_sum, of_tile)
        if with_mean:
            weights = log_weights.exp_().to(tile.dtype)
            mean.mul_(torch.exp(before - log_sum)[:, None])
            mean.addcmul_(_product(weights, tile), torch.exp(of_tile - log_sum)[:, None])
    return log_sum, mean


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in float32, of factors that may be shorter."""
    if a.is_cuda and a.dtype != torch.float32 and 'dtype' in torch.ops.aten.mm.overloads():
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


def mutual_matches(query_map: Tensor, key_map: Tensor) -> tuple[Tensor, Tensor]:
    """Cells that are each other's most similar ones (section 5.3.4 of the thesis).

    Args:
        query_map, key_map: As for :func:`match_cells`.

    Returns:
        Int64 ``[N, S * S]``, cells of ``key_map``, -1 where that cell's own match is another one;
        float ``[N, S * S]``, the cosines of the matches, those that are not mutual included.
    """
    there, back = match_cells(query_map, key_map), match_cells(key_map, query_map)
    queries, keys = (F.normalize(part.flatten(2), dim=1) for part in (query_map, key_map))
    matched = keys.gather(2, there[:, None].expand_as(queries))
    cells = torch.arange(there.shape[1], device=there.device)
    mutual = torch.where(back.gather(1, there) == cells, there, -1)
    return mutual, (queries * matched).sum(1)


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
