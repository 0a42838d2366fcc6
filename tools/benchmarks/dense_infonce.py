"""Dense InfoNCE, forward and backward: 1,568 queries x 65,536 negatives of 128 channels.

The queries are the 7 x 7 cells of 32 images (section 5.3 of the thesis), the negatives a full
queue; all tensors live on the device under test, in float32. On a GPU ours multiplies with the
queue in bfloat16. The peer is what mmpretrain's ``DenseCL.loss`` and ``ContrastiveHead`` do, and
the released code: logits of positives and negatives, concatenated, divided, and cross entropy. A
second case is the global term of MoCo-v2, 32 queries.
"""

import functools

import torch
import torch.nn.functional as F
from _case import Case, Floor, Sides

from mmdet_plugins.ops.contrastive import info_nce

CHANNELS, QUEUE = 128, 65536
TEMPERATURE = 0.2


def _build(queries: int, device: str) -> Sides:
    rng = torch.Generator().manual_seed(0)
    query, key, queue = (
        F.normalize(torch.randn(num, CHANNELS, generator=rng), dim=1).to(device)
        for num in (queries, queries, QUEUE)
    )
    query.requires_grad_()

    def backward(loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        query.grad = None
        loss.backward()
        return loss.detach(), query.grad

    def ours() -> tuple[torch.Tensor, torch.Tensor]:
        return backward(info_nce(query, key, queue, TEMPERATURE).mean())

    def peer() -> tuple[torch.Tensor, torch.Tensor]:
        positive = torch.einsum('nc,nc->n', query, key)[:, None]
        negative = torch.einsum('nc,ck->nk', query, queue.T.clone())
        logits = torch.cat((positive, negative), dim=1) / TEMPERATURE
        labels = torch.zeros(len(logits), dtype=torch.long, device=device)
        return backward(F.cross_entropy(logits, labels))

    def parity(mine: tuple, theirs: tuple) -> str:
        tolerance = 1e-5 if device == 'cpu' else 1e-3
        largest = theirs[1].abs().max().item()
        torch.testing.assert_close(mine[0], theirs[0], rtol=tolerance, atol=0)
        torch.testing.assert_close(mine[1], theirs[1], rtol=0, atol=10 * tolerance * largest)
        torch.testing.assert_close(mine[1].norm(), theirs[1].norm(), rtol=tolerance, atol=0)
        return f'loss and gradient equal to {tolerance:g}'

    return Sides(ours, peer, parity)


DENSE = {'cpu': Floor(ratio=2, memory=1 / 20), 'cuda': Floor(ratio=4, memory=1 / 20, syncs=0)}
CASES = [
    Case('dense, 32 images of 7 x 7 cells', functools.partial(_build, 32 * 49), DENSE),
    Case('global, 32 images', functools.partial(_build, 32), {'cuda': Floor(syncs=0)}),
]
