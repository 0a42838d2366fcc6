"""The whole job on a small data set: train both stages, run them, score them, write a report.

    python projects/uvo/demo.py [--data FOLDER]

FOLDER holds ``images/``, ``instances_train.json`` and ``instances_val.json``; without it a
synthetic set is made. Training goes through ``mim train``, detector and segmenter side by side, as
neither needs the other. Scores stand beside two baselines: both models with untrained weights, and
one box around each whole image given to the trained segmenter. The same command goes on where it
was stopped.
"""

import argparse
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import two_stage
from mmengine.config import Config
from mmengine.device import get_device

from mmdet_plugins.common.files import atomic_write
from mmdet_plugins.common.report import write_report
from mmdet_plugins.common.synthetic import make_demo_data
from mmdet_plugins.ops.open_world import evaluate_json

REPO = Path(__file__).resolve().parents[2]
TINY = REPO / 'configs/uvo/tiny'
ITERATION = re.compile(r'Iter\(train\)\s*\[\s*(\d+)/(\d+)\].*?eta: (\S+).*?\bloss: (\S+)')
COLUMNS = {
    f'{kind} {metric}': f'{key}_{metric}'
    for kind, key in dict(box='bbox', mask='segm').items()
    for metric in ('AP', 'AP50', 'AR@1', 'AR@10', 'AR@100')
} | {'novel mask AR@100': 'novel_segm_AR@100'}


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
        if found := ITERATION.findall(self.tail.read()):
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
        options[f'{split}_dataloader.dataset.data_root'] = f'{data}/'
        if 'ann_file' in cfg.get(f'{split}_evaluator', {}):
            options[f'{split}_evaluator.ann_file'] = f'{data}/instances_val.json'
    return options


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


def prepare_data(data: Path, synthetic: bool) -> None:
    wanted = [data / name for name in ('images', 'instances_train.json', 'instances_val.json')]
    # The validation file is written last.
    if synthetic and not wanted[-1].exists():
        print(f'making the synthetic data set in {data}', flush=True)
        make_demo_data(data)
    for path in wanted:
        if not path.exists():
            raise SystemExit(f'{path} is missing; --help shows the layout of a data set')


def novel_split(data: Path) -> list[str] | None:
    """Names of the training categories if the validation set has others besides."""
    train_names, val_names = (
        [category['name'] for category in json.loads(path.read_text())['categories']]
        for path in (data / 'instances_train.json', data / 'instances_val.json')
    )
    return train_names if set(val_names) - set(train_names) else None


def write_whole_image_boxes(gt_json: Path, out: Path) -> None:
    images = json.loads(gt_json.read_text())['images']
    boxes = [
        dict(image_id=i['id'], bbox=[0, 0, i['width'], i['height']], score=1.0) for i in images
    ]
    with atomic_write(out) as file:
        json.dump(boxes, file)


def table(metrics: dict[str, dict[str, float]]) -> str:
    """Markdown table of what was measured, a row per result file."""
    columns = {n: key for n, key in COLUMNS.items() if all(key in row for row in metrics.values())}
    rows = [['', *columns]]
    rows += [[n, *(f'{row[key]:.3f}' for key in columns.values())] for n, row in metrics.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ['-' * width for width in widths])
    return '\n'.join(
        '| ' + ' | '.join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + ' |'
        for row in rows
    )


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


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--data', type=Path, help='folder of a data set in the layout above')
    parser.add_argument('--out', type=Path, help='default: work_dirs/demo[-NAME OF THE DATA]')
    parser.add_argument('--detector', type=Path, default=TINY / 'cascade-rpn_tiny_demo.py')
    parser.add_argument('--segmenter', type=Path, default=TINY / 'box-crop_tiny_demo.py')
    parser.add_argument('--detector-iters', type=int, help="default: the config's")
    parser.add_argument('--segmenter-iters', type=int, help="default: the config's")
    parser.add_argument(
        '--compare', type=Path, metavar='CONFIG', help='train a second detector, equally long'
    )
    parser.add_argument('--device', choices=['cpu', 'cuda'], default=get_device())
    parser.add_argument('--fresh', action='store_true', help='forget what was done before')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    out = args.out or Path('work_dirs') / (f'demo-{args.data.name}' if args.data else 'demo')
    if args.fresh and out.exists():
        shutil.rmtree(out)
    data = args.data or out / 'data'
    prepare_data(data, synthetic=args.data is None)

    def stage(name: str, package: str, config: Path, iters: int | None) -> Stage:
        iters = iters or Config.fromfile(config).train_cfg.max_iters
        return Stage(name, package, config, iters, out / name)

    detector = stage('detector', 'mmdet', args.detector, args.detector_iters)
    segmenter = stage('segmenter', 'mmseg', args.segmenter, args.segmenter_iters)
    stages = [detector, segmenter]
    if args.compare:
        stages.append(stage('compared detector', 'mmdet', args.compare, detector.iters))
    settings = {
        f'{split} data': two_stage.digest(data / f'instances_{split}.json')
        for split in ('train', 'val')
    }
    for s in stages:
        settings[f'{s.name} config'] = two_stage.config_digest(s.config)
        settings[f'{s.name} length'] = s.iters
    keep_settings(out, settings)
    train(stages, data, args.device)

    gt_json, whole = data / 'instances_val.json', out / 'boxes-of-whole-images.json'
    write_whole_image_boxes(gt_json, whole)
    trained = ['--segmenter', *segmenter.model]
    runs = {
        'trained': ['--detector', *detector.model, *trained],
        'untrained': ['--detector', str(detector.config), '--segmenter', str(segmenter.config)],
        'whole-image boxes': ['--boxes', str(whole), *trained],
    }
    if args.compare:
        runs[args.compare.stem] = ['--detector', *stages[-1].model, *trained]
    results, metrics = {}, {}
    for name, options in runs.items():
        results[name] = out / f'{name.replace(" ", "-")}.json'
        print(f'running: {name}', flush=True)
        two_stage.main(
            [str(gt_json), str(results[name]), '--image-root', str(data / 'images')]
            + ['--devices', args.device, '--batch-size', '32', *options]
        )
        metrics[name] = evaluate_json(
            gt_json, results[name], max_dets=(1, 10, 100), base_categories=novel_split(data)
        )
    with atomic_write(out / 'metrics.json') as file:
        json.dump(metrics, file, indent=1)
    report = write_report(gt_json, data / 'images', results, out / 'report.html', metrics)
    print(f'\n{table(metrics)}\n\nmask AR@100: {metrics["trained"]["segm_AR@100"]:.3f}\n{report}')


if __name__ == '__main__':
    main()
