"""Training loops that resume without decoding what was already trained on."""

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
    """mmengine's iteration-based loop; resuming at iteration N advances the sampler by N batches, not the loader.

    The stock loop (mmengine 0.10.7) fetches, and so decodes and augments, one batch per past iteration before it
    continues. Here a past iteration costs its indices alone, whatever the sampler, the batch sampler and the number of
    workers. The batches that follow hold the same samples as in the uninterrupted run; random augmentations are drawn
    anew. A data set without indices (``IterableDataset``) can only be read through, as the stock loop does.

    Unlike the stock loop it starts the workers with the first batch, does not sleep between the epochs of a finite
    sampler, and does not take the fork's ``fast_forward_on_resume``, which repeats the first samples.
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
        # The stock constructor already starts the workers, before the runner knows whether it resumes.
        idle = _Idle(dataset=dataloader.dataset)
        super().__init__(runner, idle, max_iters, val_begin, val_interval, dynamic_intervals)
        self.dataloader = dataloader
        self.dataloader_iterator = _BatchStream(self)


class _Idle(SimpleNamespace):
    def __iter__(self) -> Iterator:
        return iter(())


class _BatchStream:
    """Endless batches of a loop's loader; for an iteration that the loop has behind it, None."""

    def __init__(self, loop: IterBasedTrainLoop) -> None:
        self._loop = loop
        self._loader = loop.dataloader
        self._position = 0
        self._epoch = 0
        self._indices: Iterator | None = None
        self._batches: Iterator | None = None

    def __iter__(self) -> _BatchStream:
        return self

    def __next__(self) -> Any:
        past = self._position < self._loop.iter and not isinstance(
            self._loader.dataset, IterableDataset
        )
        self._position += 1
        if past:
            self._skip()
            return None
        if self._batches is None:
            if self._indices is not None:
                _continue_from(self._loader, self._indices)
            self._batches = iter(self._loader)
        try:
            return next(self._batches)
        except StopIteration:
            self._next_epoch()
            self._batches = iter(self._loader)
            return next(self._batches)

    def skip_iter(self, num_iters: int) -> None:
        """Pass over the given number of batches; newer versions of the stock loop call it on resuming."""
        for _ in range(num_iters):
            next(self)

    def _skip(self) -> None:
        if self._indices is None:
            self._indices = iter(self._loader._index_sampler)
        try:
            next(self._indices)
        except StopIteration:
            self._next_epoch()
            self._indices = iter(self._loader._index_sampler)
            next(self._indices)

    def _next_epoch(self) -> None:
        self._epoch += 1
        batch_sampler = getattr(self._loader, 'batch_sampler', None)
        for sampler in (self._loader.sampler, getattr(batch_sampler, 'sampler', None)):
            if hasattr(sampler, 'set_epoch'):
                sampler.set_epoch(self._epoch)
                return


class _Continued:
    """A sampler whose first iteration is already under way."""

    def __init__(self, sampler: Any, head: Iterator) -> None:
        self._sampler = sampler
        self._head: Iterator | None = head

    def __iter__(self) -> Iterator:
        head, self._head = self._head, None
        return iter(self._sampler) if head is None else head

    def __len__(self) -> int:
        return len(self._sampler)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)


def _continue_from(loader: DataLoader, indices: Iterator) -> None:
    """Let the loader's next iteration go on with ``indices``.

    A loader refuses a new sampler once it is built, so the entry of its ``__dict__`` is exchanged.
    """
    key = 'sampler' if loader.batch_sampler is None else 'batch_sampler'
    loader.__dict__[key] = _Continued(loader.__dict__[key], indices)
