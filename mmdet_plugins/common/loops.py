"""A training loop that resumes without decoding what it has already trained on."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from mmengine.registry import LOOPS
from mmengine.runner import IterBasedTrainLoop
from mmengine.runner.base_loop import BaseLoop
from torch.utils.data import DataLoader, IterableDataset


@LOOPS.register_module()
class ResumableIterBasedTrainLoop(IterBasedTrainLoop):
    """mmengine's iteration-based loop; a resume advances the sampler instead of the data loader.

    The stock loop (mmengine 0.10.7) fetches, hence decodes and augments, one batch for each past
    iteration. Here a past iteration costs its indices alone, with any sampler, batch sampler and
    number of workers: some seconds for ten million samples, more where a batch sampler looks each
    of them up (mmdet's ``AspectRatioBatchSampler``). The samples that follow are those of the
    uninterrupted run, unless ``randomness.diff_rank_seed`` hides the sampler's seed; their random
    augmentation is drawn anew. A data set without indices (``IterableDataset``) is read through, as
    the stock loop does.

    Other differences: workers start with the first batch, not with the loop; the epochs of a finite
    sampler follow each other without a pause; the OneDL fork's ``fast_forward_on_resume``, by which
    a resumed run repeats its first samples, is not offered.

    Args:
        runner: The runner.
        dataloader: The training loader or its config.
        max_iters: Iterations of the whole training.
        val_begin: The iteration that validation begins with.
        val_interval: Iterations from one validation to the next.
        dynamic_intervals: Pairs (iteration, ``val_interval`` from there on).
    """

    def __init__(
        self,
        runner,
        dataloader: DataLoader | dict,
        max_iters: int,
        val_begin: int = 1,
        val_interval: int = 1000,
        dynamic_intervals: list[tuple[int, int]] | None = None,
    ) -> None:
        BaseLoop.__init__(self, runner, dataloader)
        dataloader = self.dataloader
        # The stock constructor iterates over the loader, which starts the workers and moves the
        # sampler before the runner has resumed. It is given an empty one.
        empty = _EmptyLoader(dataset=dataloader.dataset)
        super().__init__(runner, empty, max_iters, val_begin, val_interval, dynamic_intervals)
        self.dataloader = dataloader
        self.dataloader_iterator = _BatchStream(self)


class _EmptyLoader(SimpleNamespace):
    def __iter__(self) -> Iterator:
        return iter(())


class _BatchStream:
    """The batches of a loop's loader without end; None for an iteration that lies behind the loop.

    The stock loop resumes by discarding one batch per past iteration, so no more is needed.
    """

    def __init__(self, loop: IterBasedTrainLoop) -> None:
        self._loop = loop
        self._loader = loop.dataloader
        self._first_seed = getattr(loop.runner, 'seed', None)
        self._position = 0
        self._epoch = 0
        self._indices: Iterator | None = None
        self._batches: Iterator | None = None

    def __iter__(self) -> _BatchStream:
        return self

    def __next__(self) -> Any:
        if not self._position:
            self._follow_seed()
        past = self._position < self._loop.iter
        self._position += 1
        if past and not isinstance(self._loader.dataset, IterableDataset):
            return self._pass_over()
        if self._batches is None:
            if self._indices is not None:
                _continue_from(self._indices, self._loader)
            self._batches = iter(self._loader)
        try:
            return next(self._batches)
        except StopIteration:
            self._begin_epoch()
            self._batches = iter(self._loader)
            return next(self._batches)

    def skip_iter(self, num_iters: int) -> None:
        """Pass over ``num_iters`` batches, as the OneDL fork's loop asks for instead."""
        for _ in range(num_iters):
            next(self)

    def _pass_over(self) -> None:
        sampler = getattr(self._loader, _sampler_key(self._loader))
        if self._indices is None:
            self._indices = iter(sampler)
        try:
            next(self._indices)
        except StopIteration:
            self._begin_epoch()
            self._indices = iter(sampler)
            next(self._indices)

    def _begin_epoch(self) -> None:
        self._epoch += 1
        sampler = _innermost_sampler(self._loader)
        if hasattr(sampler, 'set_epoch'):
            sampler.set_epoch(self._epoch)

    def _follow_seed(self) -> None:
        """Give the sampler the seed that the runner has resumed; it was built with another one."""
        sampler = _innermost_sampler(self._loader)
        if self._first_seed is not None and getattr(sampler, 'seed', None) == self._first_seed:
            sampler.seed = self._loop.runner.seed


def _innermost_sampler(loader: DataLoader) -> Any:
    """What the order of samples comes from, below any batch sampler."""
    return getattr(loader.batch_sampler, 'sampler', loader.sampler)


def _sampler_key(loader: DataLoader) -> str:
    """The attribute that a loader takes its indices from."""
    return 'sampler' if loader.batch_sampler is None else 'batch_sampler'


def _continue_from(indices: Iterator, loader: DataLoader) -> None:
    """Let the next epoch of ``loader`` go on with ``indices``, which are under way."""
    key = _sampler_key(loader)
    # A loader refuses to have its sampler set; to build another one would copy all its options.
    loader.__dict__[key] = _Continued(getattr(loader, key), indices)


class _Continued:
    """A sampler whose first iteration has begun elsewhere."""

    def __init__(self, sampler: Any, begun: Iterator) -> None:
        self._sampler = sampler
        self._begun: Iterator | None = begun

    def __iter__(self) -> Iterator:
        # A generator, so that nothing happens before the first index: a loader with workers asks
        # for two iterators and uses the second.
        begun, self._begun = self._begun, None
        yield from self._sampler if begun is None else begun

    def __len__(self) -> int:
        return len(self._sampler)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)
