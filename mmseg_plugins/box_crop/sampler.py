"""Endless sampling from several data sets by weight."""

import itertools
from collections.abc import Iterator, Sequence

import torch
from mmengine.dataset import ConcatDataset
from mmengine.dist import get_dist_info, sync_random_seed
from mmseg.registry import DATA_SAMPLERS
from torch.utils.data import Sampler


@DATA_SAMPLERS.register_module()
class BoxCropMixSampler(Sampler):
    """Draw the data set of each sample by weight, and its instances without replacement.

    mmengine's ``InfiniteSampler`` sees a concatenation as one data set, in which the largest
    drowns the others. The order depends on the seed alone; rank r of R takes every R-th index.

    Args:
        dataset: A ``ConcatDataset``, or any single data set.
        weights: One positive weight for each part, in any scale; by default the parts' sizes, which
            is what shuffling the concatenation amounts to.
        seed: Drawn anew, the same on all ranks, if not given.
    """

    def __init__(self, dataset, weights: Sequence[float] | None = None, seed: int | None = None):
        parts = dataset.datasets if isinstance(dataset, ConcatDataset) else [dataset]
        self.sizes = [len(part) for part in parts]
        weights = self.sizes if weights is None else list(weights)
        if len(weights) != len(parts) or min(weights) <= 0:
            raise ValueError(
                f'{len(parts)} data sets need as many positive weights, got {list(weights)}'
            )
        self.weights = torch.tensor(weights, dtype=torch.float64)
        self.seed = sync_random_seed() if seed is None else seed
        self.rank, self.world_size = get_dist_info()

    def __iter__(self) -> Iterator[int]:
        return itertools.islice(self._indices(), self.rank, None, self.world_size)

    def __len__(self) -> int:
        return sum(self.sizes)

    def _indices(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        offsets = itertools.accumulate(self.sizes[:-1], initial=0)
        streams = [
            self._stream(offset, size, part)
            for part, (offset, size) in enumerate(zip(offsets, self.sizes, strict=True))
        ]
        while True:
            parts = torch.multinomial(self.weights, 4096, replacement=True, generator=generator)
            for part in parts.tolist():
                yield next(streams[part])

    def _stream(self, offset: int, size: int, part: int) -> Iterator[int]:
        # One generator for each part: its order does not depend on the other parts.
        generator = torch.Generator().manual_seed((self.seed + 1) * 1000 + part)
        while True:
            for index in torch.randperm(size, generator=generator).numpy():
                yield offset + int(index)
