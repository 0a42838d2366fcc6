"""Shuffling BN: keys are normalised beside other images than their queries."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class Exchange:
    """A random exchange of the samples of a batch between ranks, and the way back.

    Every rank sends an equal share of its ``num`` samples to each rank, itself included, and so has
    ``num`` again (MoCo's section 3.3, with shares where MoCo permutes all samples of all ranks).
    A sample travels once, where gathering takes it to every rank.

    Args:
        num: Samples of this rank; the same on all of them.
        device: Where they are.
    """

    def __init__(self, num: int, device: torch.device) -> None:
        self._order = torch.randperm(num, device=device)
        rank, world = dist.get_rank(), dist.get_world_size()
        share, rest = divmod(num, world)
        # A Latin square: what does not divide goes to the ranks that follow, to each equally often.
        self._sent = [share + ((other - rank) % world < rest) for other in range(world)]
        self._received = [share + ((rank - other) % world < rest) for other in range(world)]

    def send(self, samples: Tensor) -> Tensor:
        """Samples ``[num, ...]`` of this rank -> as many of all ranks."""
        return _all_to_all(samples[self._order], self._sent, self._received)

    def back(self, results: Sequence[Tensor]) -> list[Tensor]:
        """Results ``[num, ...]`` of what ``send`` returned -> those of this rank's own samples."""
        packed = torch.cat([result.reshape(len(result), -1).float() for result in results], dim=1)
        home = torch.empty_like(packed)
        home[self._order] = _all_to_all(packed, self._received, self._sent)
        widths = [result[0].numel() for result in results]
        return [
            part.reshape(result.shape).to(result.dtype)
            for part, result in zip(home.split(widths, dim=1), results, strict=True)
        ]


def _all_to_all(rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
    out = torch.empty_like(rows)
    dist.all_to_all_single(out, rows.contiguous(), list(received), list(sent))
    return out
