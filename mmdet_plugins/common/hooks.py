"""Checkpoints that are whole or not there; channels-last weights; the model behind its wrapper."""

import contextlib
import copy
import os.path as osp
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import torch
from mmengine.dist import is_main_process
from mmengine.fileio import BaseStorageBackend, LocalBackend, register_backend
from mmengine.hooks import CheckpointHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapperDict
from mmengine.registry import HOOKS
from torch import Tensor, nn

from mmdet_plugins.common.files import atomic_write
from mmdet_plugins.common.memory_format import channels_first_module

_BOOKKEEPING = ('keep_ckpt_ids', 'last_ckpt', 'best_ckpt_path', 'best_ckpt_path_dict')


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, whether or not a wrapper shares it between ranks."""
    return model.module if is_model_wrapper(model) else model


@register_backend('atomic_local')
class AtomicLocalBackend(LocalBackend):
    """mmengine's local storage, whose ``put`` never leaves half a file."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        with atomic_write(filepath, 'wb') as file:
            file.write(obj)


class _Postponed:
    """A storage backend that lists what is to be removed instead of removing it."""

    def __init__(self, backend: BaseStorageBackend) -> None:
        self._backend = backend
        self.paths: list[str] = []

    def __getattr__(self, name: str):
        return getattr(self._backend, name)

    def remove(self, path: str) -> None:
        self.paths.append(path)

    rmtree = remove


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """mmengine's ``CheckpointHook``; a kill or a full disk during a save costs that save at most.

    The stock hook removes the oldest checkpoint, or the former best one, and then writes the new
    one in place. Here the new file is first complete on the disk, then ``last_checkpoint`` names
    it, then the old file goes; this takes room for ``max_keep_ckpts + 1`` checkpoints. Options and
    file names are the stock hook's. With another storage backend than the local disk, only the
    order is kept: how it writes is the backend's affair.

    A save that fails with ``OSError`` is logged and training goes on to the next one, except where
    going on may lose the run: at its last save, and as long as it has no checkpoint at all.
    """

    def before_train(self, runner) -> None:
        super().before_train(runner)
        if type(self.file_backend) is not LocalBackend:
            return
        self.file_backend = AtomicLocalBackend()
        self.backend_args = dict(backend='atomic_local')
        if is_main_process():
            suffix = Path(self.filename_tmpl).suffix
            for partial in Path(self.out_dir).glob(f'.*{suffix}.*.tmp'):  # of a run that was killed
                partial.unlink()

    def _save_checkpoint_with_step(self, runner, step: int, meta: dict) -> None:
        end = runner.max_epochs if self.by_epoch else runner.max_iters
        with self._undone_on_failure(runner, is_last=step >= end):
            filename = self.filename_tmpl.format(step)
            self.last_ckpt = self.file_backend.join_path(self.out_dir, filename)
            runner.message_hub.update_info('last_ckpt', self.last_ckpt)
            if self.max_keep_ckpts > 0:
                kept = [other for other in self.keep_ckpt_ids if other != step] + [step]
                # One too many until the save is done. If the run is killed before it removes the
                # oldest, the checkpoint remembers it, and a resumed run does so at its start.
                runner.message_hub.update_info('keep_ckpt_ids', kept)
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
                with atomic_write(osp.join(runner.work_dir, 'last_checkpoint')) as file:
                    file.write(str(self.last_ckpt))
            if self.max_keep_ckpts > 0:
                for outdated in kept[: -self.max_keep_ckpts]:
                    filename = self.filename_tmpl.format(outdated)
                    self._remove(runner, self.file_backend.join_path(self.out_dir, filename))
                self.keep_ckpt_ids = deque(kept, self.max_keep_ckpts)
                runner.message_hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))

    def _save_best_checkpoint(self, runner, metrics: dict) -> None:
        with self._undone_on_failure(runner):
            backend = self.file_backend
            self.file_backend = postponed = _Postponed(backend)
            try:
                super()._save_best_checkpoint(runner, metrics)
            finally:
                self.file_backend = backend
            best = {getattr(self, 'best_ckpt_path', None)}
            best.update(getattr(self, 'best_ckpt_path_dict', {}).values())
            for path in set(postponed.paths) - best:
                self._remove(runner, path)

    def _remove(self, runner, path: str) -> None:
        """Delete a checkpoint: a file, or the folder that some model-parallel strategies write."""
        if not is_main_process():
            return
        try:
            if self.file_backend.isdir(path):
                self.file_backend.rmtree(path)
            elif self.file_backend.exists(path):
                self.file_backend.remove(path)
        except OSError as error:
            runner.logger.warning(f'{path} is outdated but cannot be removed ({error}).')

    @contextlib.contextmanager
    def _undone_on_failure(self, runner, is_last: bool = False) -> Iterator[None]:
        """Take back the bookkeeping of a save that failed, and decide whether the run goes on."""
        hub = runner.message_hub
        info = dict(hub.runtime_info)
        own = {key: copy.copy(value) for key, value in vars(self).items() if key in _BOOKKEEPING}
        try:
            yield
        except OSError as error:
            for key in set(hub.runtime_info) - set(info):
                hub.pop_info(key)
            for key in [key for key in info if hub.runtime_info.get(key) is not info[key]]:
                hub.update_info(key, info[key])
            vars(self).update(own)
            message = (
                f'a checkpoint could not be saved in {self.out_dir} ({error.strerror or error}): '
                'free some space there, or resume with another default_hooks.checkpoint.out_dir'
            )
            if is_last or 'last_ckpt' not in info:
                raise OSError(error.errno, message) from error
            runner.logger.error(f'{message}; training goes on, {info["last_ckpt"]} is whole.')


@HOOKS.register_module()
class ChannelsLastHook(Hook):
    """Runs a model in channels-last order of memory: same mathematics, other order of summation.

    Worth it on a CPU for narrow networks (the toys: 1.2 to 1.3 times faster), not for wide ones (a
    step of SOLOv2 R50: the same), and on a GPU for convolutions in half precision.

    Weights of convolutions are reordered before the first iteration of training, validation or
    test, after checkpoints were loaded; features then follow them. Shapes, checkpoints and their
    keys stay as they are. What an optimiser keeps of a weight is reordered with it, since fused
    optimisers walk through both in the order of memory.

    Raises:
        ValueError: The model has an operator that cannot read such features.
    """

    priority = 'VERY_HIGH'

    def before_train(self, runner) -> None:
        self._reorder(runner)
        optim = runner.optim_wrapper
        for wrapper in optim.values() if isinstance(optim, OptimWrapperDict) else [optim]:
            for weight, state in wrapper.optimizer.state.items():
                for key, value in state.items():
                    if isinstance(value, Tensor) and value.ndim == weight.ndim == 4:
                        state[key] = torch.empty_like(weight, dtype=value.dtype).copy_(value)

    def before_val(self, runner) -> None:
        self._reorder(runner)

    def before_test(self, runner) -> None:
        self._reorder(runner)

    @staticmethod
    def _reorder(runner) -> None:
        model = unwrapped(runner.model)
        module = channels_first_module(model)
        if module:
            raise ValueError(
                f'model.{module} reads features channels-first whatever their order in memory, and '
                'may give wrong values: take ChannelsLastHook out of the config'
            )
        for layer in model.modules():  # mmcv's kernels read weights, too, as channels-first
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                layer.to(memory_format=torch.channels_last)
