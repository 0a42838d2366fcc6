"""A training run of a second, and the disasters that may befall it while it saves.

As a script, ``tiny_run.py FOLDER DISASTER ...`` lets each disaster happen to a run of its own in
``FOLDER/DISASTER`` and prints how the process ended.
"""

import os
import resource
import signal
import sys
from pathlib import Path

import torch
from mmengine.dataset import BaseDataset
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, HOOKS, METRICS, MODELS
from mmengine.runner import Runner

import mmdet_plugins.common.runtime  # noqa: F401
from mmdet_plugins.common import hooks, loops  # noqa: F401

LENGTH = 10


@DATASETS.register_module()
class TinyDataset(BaseDataset):
    """Ten numbers; each one fetched is a line in ``fetched``. Two in three are landscapes."""

    def __init__(self, fetched: str | None = None, **kwargs) -> None:
        self.fetched = fetched
        super().__init__(**kwargs)

    def load_data_list(self) -> list[dict]:
        return [dict(index=i, width=2 + i % 3, height=3) for i in range(LENGTH)]

    def prepare_data(self, idx: int) -> dict:
        if self.fetched:
            with open(self.fetched, 'a') as file:
                file.write(f'{idx}\n')
        return dict(inputs=torch.tensor([idx / LENGTH]), index=idx)


@MODELS.register_module()
class TinyModel(BaseModel):
    """A linear regression, and a buffer of 1 MB that makes its checkpoints the largest files."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(1, 1)
        self.register_buffer('ballast', torch.zeros(250_000))

    def forward(self, inputs: list[torch.Tensor], index: list[int], mode: str = 'tensor'):
        error = self.linear(torch.stack(inputs)) - 3 * torch.stack(inputs)
        return dict(loss=error.square().mean()) if mode == 'loss' else list(error)


@METRICS.register_module()
class TinyMetric(BaseMetric):
    """A score that rises with every evaluation."""

    default_prefix = 'tiny'
    evaluations = 0

    def process(self, data_batch: dict, data_samples: list) -> None:
        self.results.append(0)

    def compute_metrics(self, results: list) -> dict:
        self.evaluations += 1
        return dict(acc=self.evaluations)


@HOOKS.register_module()
class TinyStop(Hook):
    """Stops a run dead before an iteration; the run's own parameters do not know of it."""

    priority = 'HIGHEST'

    def __init__(self, at: int) -> None:
        self.at = at

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if runner.iter == self.at:
            raise InterruptedError


def build(
    work_dir: str | Path,
    *,
    by_epoch: bool = False,
    sampler: str = 'InfiniteSampler',
    fetched: str | None = None,
    stop_at: int | None = None,
    checkpoint: dict | None = None,
    validate: bool = False,
    seed: int | None = 0,
    **kwargs,
) -> Runner:
    """Build a run of 8 iterations (2 epochs of 4) that saves after every second one (every one)."""
    torch.manual_seed(0)
    loader = dict(batch_size=3, num_workers=0, dataset=dict(type='TinyDataset', fetched=fetched))
    if by_epoch:
        train_cfg = dict(by_epoch=True, max_epochs=2)
    else:
        train_cfg = dict(type='ResumableIterBasedTrainLoop', max_iters=8, val_interval=2)
    val = dict(
        val_dataloader=dict(
            batch_size=2, sampler=dict(type='DefaultSampler'), dataset=dict(type='TinyDataset')
        ),
        val_evaluator=dict(type='TinyMetric'),
        val_cfg=dict(),
    )
    options = dict(type='AtomicCheckpointHook', by_epoch=by_epoch, interval=1 if by_epoch else 2)
    build.count += 1  # mmengine keeps one message hub for all runs of a name
    return Runner(
        TinyModel(),
        str(work_dir),
        train_dataloader=dict(loader, sampler=dict(type=sampler, shuffle=True)),
        train_cfg=train_cfg,
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.1)),
        param_scheduler=[
            dict(type='LinearLR', start_factor=0.1, end=3, by_epoch=False),
            dict(type='MultiStepLR', milestones=[5, 7], by_epoch=False),
        ],
        default_hooks=dict(checkpoint=dict(options, **(checkpoint or {}))),
        custom_hooks=[] if stop_at is None else [dict(type='TinyStop', at=stop_at)],
        randomness=dict(seed=seed),
        experiment_name=f'tiny_{os.getpid()}_{build.count}',
        log_level='WARNING',
        **(val if validate else {}),
        **kwargs,
    )


build.count = 0


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_half_written(name: str) -> None:
    put = hooks.AtomicLocalBackend.put

    def put_half(self, obj: bytes, filepath: str) -> None:
        if Path(filepath).name != name:
            return put(self, obj, filepath)
        with hooks.atomic_write(filepath, 'wb') as file:
            file.write(obj[: len(obj) // 2])
            file.flush()
            _die()

    hooks.AtomicLocalBackend.put = put_half


def _kill_before_naming() -> None:
    write = hooks.atomic_write

    def write_or_die(path, mode='w'):
        folder, name = os.path.split(path)
        if name == 'last_checkpoint' and os.path.exists(os.path.join(folder, 'iter_4.pth')):
            _die()
        return write(path, mode)

    hooks.atomic_write = write_or_die


def _kill_before_removing() -> None:
    hooks.AtomicCheckpointHook._remove = lambda *_: _die()


@HOOKS.register_module()
class TinyFullDisk(Hook):
    """Lets no file grow beyond half a checkpoint from one iteration to another."""

    priority = 'HIGHEST'

    def __init__(self, begin: int, end: int) -> None:
        self.begin, self.end = begin, end

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        full = self.begin <= runner.iter < self.end
        limit = 500_000 if full else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def _full_disk(begin: int, end: int) -> dict:
    return dict(custom_hooks=[dict(type='TinyFullDisk', begin=begin, end=end)])


DISASTERS = {
    'killed_half_written': lambda: _kill_half_written('iter_4.pth'),
    'killed_before_naming': _kill_before_naming,
    'killed_before_removing': _kill_before_removing,
    'killed_best_half_written': lambda: _kill_half_written('best_tiny_acc_iter_4.pth'),
    'full_for_a_while': lambda: _full_disk(2, 6),
    'full_at_the_end': lambda: _full_disk(4, 9),
    'full_from_the_start': lambda: _full_disk(0, 9),
}


def suffer(folder: Path, disaster: str) -> None:
    """Train under a disaster; its last words go to ``error.txt``."""
    extra = DISASTERS[disaster]() or {}
    best = dict(save_best='tiny/acc', rule='greater') if 'best' in disaster else {}
    runner = build(folder, checkpoint=dict(max_keep_ckpts=1, **best), validate=bool(best))
    for hook in extra.get('custom_hooks', ()):
        runner.register_hook(hook)
    try:
        runner.train()
    except OSError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        (folder / 'error.txt').write_text(str(error))
        os._exit(1)
    os._exit(0)


if __name__ == '__main__':
    children = {}
    for name in sys.argv[2:]:
        if (child := os.fork()) == 0:
            MMLogger._instance_dict.clear()
            suffer(Path(sys.argv[1]) / name, name)
        children[name] = child
    for name, child in children.items():
        print(name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
