"""Trainings and tests through ``mim``, strung together: side by side, watched, and resumable.

What a recipe in ``projects/`` is made of: each stage is a stock command in processes of its own,
and is skipped once its last checkpoint is there.
"""

import fcntl
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from mmengine.config import Config

from .files import atomic_write
from .synthetic import make_demo_data

REPO = Path(__file__).resolve().parents[2]
_COMMIT = 'commit.txt'
_ITERATION = re.compile(r'Iter\(train\)\s*\[\s*(\d+)/(\d+)\].*?eta: (\S+).*?\bloss: (\S+)')


class Stage(NamedTuple):
    """A training through the stock runner: of which package, how long, and where it is kept."""

    name: str
    package: str
    config: Path
    iters: int
    work_dir: Path

    @property
    def checkpoint(self) -> Path:
        return self.work_dir / f'iter_{self.iters}.pth'

    @property
    def model(self) -> list[str]:
        return [str(self.config), str(self.checkpoint)]


class Training:
    """A stage under way in processes of its own, its output going to ``console.log``.

    The log is locked by whoever writes it, so that a call which finds the training of an earlier,
    killed call still alive follows that one instead of starting another.
    """

    def __init__(self, stage: Stage, data: Path, env: dict[str, str]) -> None:
        self.stage = stage
        stage.work_dir.mkdir(parents=True, exist_ok=True)
        self.log = open(stage.work_dir / 'console.log', 'a+')
        self.log.seek(0, os.SEEK_END)
        self.process = None
        if self._lock():
            if not (stage.work_dir / 'last_checkpoint').exists():  # otherwise it is resumed
                with atomic_write(stage.work_dir / _COMMIT) as file:
                    file.write(_checked_out())
            command = mim('train', stage.package, stage.config, '--work-dir', stage.work_dir)
            options = data_options(Config.fromfile(stage.config), data)
            command += ['--resume', '--cfg-options', f'train_cfg.max_iters={stage.iters}']
            command += [f'{key}={value}' for key, value in options.items()]
            print(' '.join(command), flush=True)
            self.process = subprocess.Popen(
                command, stdout=self.log, stderr=subprocess.STDOUT, env=env
            )
        else:
            print(f'{stage.name}: its training still runs, started by an earlier call', flush=True)
        self.tail = open(self.log.name)
        self.tail.seek(0, os.SEEK_END)

    def _lock(self) -> bool:
        try:
            fcntl.flock(self.log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def running(self) -> bool:
        return not self._lock() if self.process is None else self.process.poll() is None

    def show(self) -> None:
        """Print the newest progress."""
        if found := _ITERATION.findall(self.tail.read()):
            done, total, left, loss = found[-1]
            print(
                f'{self.stage.name}: iteration {done}/{total}, loss {loss}, {left} to go',
                flush=True,
            )

    def check(self) -> None:
        if not self.stage.checkpoint.exists():
            self.log.seek(0)
            raise SystemExit(
                ''.join(self.log.readlines()[-15:])
                + f'the training of the {self.stage.name} stopped early (end of {self.log.name} '
                'above); the same command goes on from its last checkpoint'
            )


def mim(*arguments: str | Path) -> list[str]:
    """Command line of the ``mim`` that belongs to this Python."""
    return [str(Path(sys.executable).with_name('mim')), *map(str, arguments)]


def environment(device: str, jobs: int) -> dict[str, str]:
    """Environment of one of ``jobs`` processes that share the cores."""
    env = os.environ | dict(
        PYTHONPATH=os.pathsep.join([str(REPO), os.environ.get('PYTHONPATH', '')]),
        PYTHONWARNINGS='ignore',
        OMP_NUM_THREADS=str(max(1, len(os.sched_getaffinity(0)) // jobs)),
    )
    return env | (dict(CUDA_VISIBLE_DEVICES='') if device == 'cpu' else {})


def data_options(cfg: Config, data: Path) -> dict[str, str]:
    """What to change in a tiny config so that it reads its data from ``data``."""
    options = {}
    for split in ('train', 'val', 'test'):
        loader, evaluator = (
            cfg.get(f'{split}_{part}') or {} for part in ('dataloader', 'evaluator')
        )
        if 'data_root' in loader.get('dataset', {}):
            options[f'{split}_dataloader.dataset.data_root'] = f'{data}/'
        if 'ann_file' in evaluator:
            options[f'{split}_evaluator.ann_file'] = f'{data}/instances_val.json'
    return options


def resize(cfg: Config, scale: tuple[int, int]) -> None:
    """Let a toy network see images of any size at one that it can afford."""
    step = dict(type='Resize', scale=scale, keep_ratio=True)
    for part in ('train', 'val', 'test'):
        dataset = cfg[f'{part}_dataloader'].dataset
        dataset = dataset.get('dataset', dataset)  # a wrapped set loads by itself
        steps = [old for old in dataset.pipeline if old['type'] != 'Resize']
        place = 1 + max(i for i, old in enumerate(steps) if 'Load' in old['type'])
        dataset.pipeline = [*steps[:place], step, *steps[place:]]


def train(stages: list[Stage], data: Path, device: str) -> None:
    """Run the trainings that are not finished side by side, each on its share of the cores."""
    stages = [stage for stage in stages if not stage.checkpoint.exists()]
    if not stages:
        return
    env = environment(device, len(stages))
    trainings = [Training(stage, data, env) for stage in stages]
    while trainings:
        time.sleep(5)
        for training in list(trainings):
            ended = not training.running()
            training.show()
            if ended:
                training.check()
                trainings.remove(training)


def evaluate(
    stage: Stage, data: Path, device: str, options: Mapping[str, object] | None = None
) -> dict[str, float]:
    """Metrics of a trained stage's last checkpoint, through ``mim test``, once."""
    out = stage.work_dir / 'test'
    if not (found := sorted(out.glob('*/*.json'))):
        options = data_options(Config.fromfile(stage.config), data) | dict(options or {})
        command = mim('test', stage.package, stage.config, '--checkpoint', stage.checkpoint)
        command += ['--work-dir', str(out), '--cfg-options']
        command += [f'{key}={value}' for key, value in options.items()]
        with open(stage.work_dir / 'test.log', 'w') as log:
            subprocess.run(command, env=environment(device, 1), check=True, stdout=log, stderr=log)
        found = sorted(out.glob('*/*.json'))
    return json.loads(found[-1].read_text())


def iteration_seconds(stage: Stage) -> float:
    """Mean time of an iteration, waiting for its data included, of those that the runner logged."""
    logs = stage.work_dir.glob('*/vis_data/scalars.json')
    entries = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    return mean(entry['time'] for entry in entries if 'loss' in entry)


def prepare_data(data: Path, synthetic: bool, **scenes: Any) -> None:
    """See that a data set is there; make it, of ``scenes`` as ``make_demo_data`` takes them."""
    wanted = [data / name for name in ('images', 'instances_train.json', 'instances_val.json')]
    # The validation file is written last.
    if synthetic and not wanted[-1].exists():
        print(f'making the synthetic data set in {data}', flush=True)
        make_demo_data(data, **scenes)
    for path in wanted:
        if not path.exists():
            raise SystemExit(f'{path} is missing; --help shows the layout of a data set')


def keep_settings(out: Path, settings: dict) -> None:
    """Note what a folder is made with; refuse to go on in it with anything else."""
    path = out / 'settings.json'
    if path.exists():
        kept = json.loads(path.read_text())
        changed = [key for key in settings if kept.get(key) != settings[key]]
        if changed:
            raise SystemExit(
                f'{out} was made with another {", another ".join(changed)}: '
                'give another --out, or remove it to start over'
            )
    else:
        with atomic_write(path) as file:
            json.dump(settings, file, indent=1)


def write_config(name: str, cfg: Config, out: Path, **settings: Any) -> Path:
    """Write the config of ``out / name`` beside that folder, which is kept to it.

    Raises:
        SystemExit: The folder was made with another config, or other settings.
    """
    keep_settings(out / name, {'config': config_digest(cfg), **settings})
    path = out / f'{name}.py'
    with atomic_write(path) as file:
        file.write(cfg.pretty_text)
    return path


def make_stage(name: str, cfg: Config, out: Path, iters: int | None = None) -> Stage:
    """A training of mmdet kept in ``out / name``, its config written beside that folder.

    Args:
        name: Of the stage.
        cfg: What is trained.
        out: Folder of the recipe.
        iters: Length; the config's by default.

    Raises:
        SystemExit: The folder was made with another config or length.
    """
    iters = iters or cfg.train_cfg.max_iters
    return Stage(name, 'mmdet', write_config(name, cfg, out, length=iters), iters, out / name)


def write_rows(rows: list[dict], target: Path) -> None:
    """Keep the rows of a table of ``results/``."""
    with atomic_write(target) as file:
        json.dump(rows, file, indent=1, ensure_ascii=False)
        file.write('\n')
    print(f'{target}; tools/build_tables.py takes it to the README')


def spread(values: list[float], digits: int) -> str:
    """Mean of the values of some seeds, and their standard deviation if there are several."""
    deviation = f' ± {stdev(values):.{digits}f}' if len(values) > 1 else ''
    return f'{mean(values):.{digits}f}{deviation}'


def commit(*work_dirs: Path) -> str:
    """Short hash of what was checked out when the trainings of ``work_dirs`` began.

    Hashes that differ are all given; the answer is empty where nothing is known.
    """
    notes = (work_dir / _COMMIT for work_dir in work_dirs)
    known = {note.read_text().strip() for note in notes if note.exists()}
    return ', '.join(sorted(known - {''}))


def _checked_out() -> str:
    command = ['git', 'rev-parse', '--short', 'HEAD']
    return subprocess.run(command, cwd=REPO, capture_output=True, text=True).stdout.strip()


def config_digest(config: str | Path | Config) -> str:
    """SHA-256 of what a config says once its bases are merged in."""
    config = config if isinstance(config, Config) else Config.fromfile(config)
    content = config.to_dict()
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def digest(path: str | Path | None) -> str | None:
    """SHA-256 of a file; None of None."""
    if path is None:
        return None
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()
