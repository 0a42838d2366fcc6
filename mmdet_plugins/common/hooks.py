"""Checkpoints that are either whole or not there."""

import contextlib
import copy
import os
import os.path as osp
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS

_PARTIAL = '.partial-'
_BOOKKEEPING = ('keep_ckpt_ids', 'last_ckpt', 'best_ckpt_path', 'best_ckpt_path_dict')


def write_atomically(path: str, data: bytes) -> None:
    """Write ``data`` beside ``path``, flush it to the disk and rename it; on any error ``path`` is as it was."""
    folder, name = osp.split(osp.abspath(path))
    partial = osp.join(folder, _PARTIAL + name)
    try:
        with open(partial, 'wb') as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(partial)
        raise
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the rename itself
    finally:
        os.close(descriptor)


@register_backend('atomic_local')
class AtomicLocalBackend(LocalBackend):
    """mmengine's local storage, whose ``put`` never leaves half a file."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        os.makedirs(osp.dirname(osp.abspath(filepath)), exist_ok=True)
        write_atomically(str(filepath), obj)


class _Postponed:
    """A storage backend that keeps what is to be removed until told."""

    def __init__(self, backend) -> None:
        self._backend = backend
        self.paths: list[str] = []

    def __getattr__(self, name: str):
        return getattr(self._backend, name)

    def remove(self, path: str) -> None:
        self.paths.append(path)

    rmtree = remove


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """mmengine's ``CheckpointHook``, so that a kill or a full disk during a save costs at most that save.

    The stock hook removes the oldest checkpoint, and the former best one, before it writes the new one in place. Here
    the new file is complete on the disk under its name first, then ``last_checkpoint`` names it, then old files go:
    room for one checkpoint more than ``max_keep_ckpts`` is needed. Options and file names are the stock hook's. On a
    storage backend other than the local disk only the order is kept; writing is the backend's affair.

    A save that fails with ``OSError`` is reported and training goes on to the next one, unless there is nothing to fall
    back to: the first save of a run without an earlier checkpoint, and the last save of a run, raise.
    """

    def before_train(self, runner) -> None:
        super().before_train(runner)
        if type(self.file_backend) is LocalBackend:
            self.file_backend = AtomicLocalBackend()
            self.backend_args = dict(backend='atomic_local')
            if is_main_process():
                for partial in Path(self.out_dir).glob(f'{_PARTIAL}*'):
                    partial.unlink(missing_ok=True)

    def _save_checkpoint_with_step(self, runner, step: int, meta: dict) -> None:
        with self._all_or_nothing(runner):
            kept = list(getattr(self, 'keep_ckpt_ids', ()))
            if not kept or kept[-1] != step:
                kept.append(step)
            if self.max_keep_ckpts > 0:
                # A kill before the removal below leaves this list in the checkpoint; resuming from it shortens it.
                runner.message_hub.update_info('keep_ckpt_ids', kept)
            filename = self.filename_tmpl.format(step)
            self.last_ckpt = self.file_backend.join_path(self.out_dir, filename)
            runner.message_hub.update_info('last_ckpt', self.last_ckpt)
            runner.save_checkpoint(
                self.out_dir,
                filename,
                self.file_client_args,
                save_optimizer=self.save_optimizer,
                save_param_scheduler=self.save_param_scheduler,
                meta=meta,
                by_epoch=self.by_epoch,
                backend_args=self.backend_args,
                **self.args,
            )
            if is_main_process():
                write_atomically(
                    osp.join(runner.work_dir, 'last_checkpoint'), str(self.last_ckpt).encode()
                )
            if self.max_keep_ckpts > 0:
                for outdated in kept[: -self.max_keep_ckpts]:
                    self._remove(
                        self.file_backend.join_path(
                            self.out_dir, self.filename_tmpl.format(outdated)
                        )
                    )
                self.keep_ckpt_ids = deque(kept, self.max_keep_ckpts)
                runner.message_hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))

    def _save_best_checkpoint(self, runner, metrics: dict) -> None:
        backend = self.file_backend
        self.file_backend = _Postponed(backend)
        try:
            with self._all_or_nothing(runner):
                super()._save_best_checkpoint(runner, metrics)
                for path in self.file_backend.paths:
                    self._remove(path, backend)
        finally:
            self.file_backend = backend

    def _remove(self, path: str, backend=None) -> None:
        """Delete a checkpoint on the main process: a file, or the folder that some model-parallel strategies write."""
        backend = backend or self.file_backend
        if is_main_process() and backend.exists(path):
            backend.rmtree(path) if backend.isdir(path) else backend.remove(path)

    @contextlib.contextmanager
    def _all_or_nothing(self, runner) -> Iterator[None]:
        """Undo the bookkeeping of a save that failed, and decide whether the run survives it."""
        hub = runner.message_hub
        info = dict(hub.runtime_info)
        own = {key: copy.copy(value) for key, value in vars(self).items() if key in _BOOKKEEPING}
        try:
            yield
        except OSError as error:
            for key in set(hub.runtime_info) - set(info):
                hub.pop_info(key)
            for key in [key for key, value in info.items() if hub.runtime_info[key] is not value]:
                hub.update_info(key, info[key])
            vars(self).update(own)
            if 'last_ckpt' not in info or self._is_last(runner):
                raise
            runner.logger.error(
                f'Saving a checkpoint to {self.out_dir} failed ({error.strerror or error}); {info["last_ckpt"]} is '
                'whole and training goes on: free some space there, or restart with --resume and another '
                'default_hooks.checkpoint.out_dir.'
            )

    def _is_last(self, runner) -> bool:
        return (
            self.is_last_train_epoch(runner) if self.by_epoch else self.is_last_train_iter(runner)
        )
