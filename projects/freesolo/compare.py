"""What is learnt without labels, and what it is good for.

    python projects/freesolo/compare.py                       # made-up scenes of large objects
    python projects/freesolo/compare.py --data data/nuclei    # small objects, in enlarged tiles

For each seed, ``freesolo.py`` goes through all of its stages, and the segmenter that comes out is
trained on with a tenth of the labels, beside one that starts from random weights and sees the same
images equally long. The scores go to ``results/``, from where ``tools/build_tables.py`` takes them
to the README, and a plot beside this file. The command goes on where it was stopped.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean

from mmengine.config import Config
from mmengine.device import get_device

from mmdet_plugins.common.files import atomic_write
from mmdet_plugins.common.interval_plot import Interval, interval_plot
from mmdet_plugins.common.stages import (
    commit,
    evaluate,
    make_stage,
    resize,
    spread,
    train,
    write_rows,
)

REPO = Path(__file__).resolve().parents[2]
FINETUNE = REPO / 'configs/freesolo/tiny/freesolo-finetune_tiny_demo.py'
TILE = 64  # px, of a set of small objects
COLUMNS = {
    'mask AR@100': 'segm_AR@100',
    'mask AR@10': 'segm_AR@10',
    'mask AP': 'segm_AP',
    'mask AP50': 'segm_AP50',
    'box AR@100': 'bbox_AR@100',
}


def few_labels(out: Path, segmenter: Path, seed: int, args: argparse.Namespace) -> dict:
    """Scores after training with few labels, from the segmenter and from nothing."""
    stages = []
    for name, hooks in {
        '10 % of the labels, fine-tuned': [
            dict(type='FreeSOLOTransferHook', checkpoint=str(segmenter))
        ],
        '10 % of the labels, from scratch': [],
    }.items():
        cfg = Config.fromfile(FINETUNE)
        cfg.merge_from_dict({'randomness.seed': seed, 'custom_hooks': hooks})
        if args.data:
            resize(cfg, (2 * TILE, 2 * TILE))
        folder = 'fine-tuned' if hooks else 'from-scratch'
        stages.append(make_stage(folder, cfg, out, args.iters)._replace(name=name))
    train(stages, out / 'data', args.device)
    return {
        stage.name: {
            key.removeprefix('open_world/'): value
            for key, value in evaluate(stage, out / 'data', args.device).items()
        }
        for stage in stages
    }


def plot(scores: dict[str, list[dict]]) -> str:
    """SVG of the recall of each stage: mean, least and largest of the seeds."""
    rows = []
    for stage, values in scores.items():
        colour = '#b3541e' if 'labels' in stage else '#1b7f5c'
        recalls = [value['segm_AR@100'] for value in values]
        rows.append(Interval(stage, mean(recalls), min(recalls), max(recalls), colour))
    return interval_plot(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--data', type=Path, help='images/, instances_train.json, instances_val.json'
    )
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--iters', type=int, help="of every training; default: the configs'")
    parser.add_argument(
        '--out', type=Path, help='default: work_dirs/freesolo-seeds[-NAME OF THE DATA]'
    )
    parser.add_argument('--device', choices=['cpu', 'cuda'], default=get_device())
    parser.add_argument('--json', type=Path, help='default: results/freesolo_learning[-NAME].json')
    parser.add_argument('--plot', type=Path, help='default: beside this file')
    args = parser.parse_args()
    suffix = f'-{args.data.name}' if args.data else ''
    runs = args.out or Path(f'work_dirs/freesolo-seeds{suffix}')
    scores: dict[str, list[dict]] = {}
    for seed in range(args.seeds):
        out = (runs / f'seed-{seed}').resolve()
        command = [sys.executable, str(Path(__file__).with_name('freesolo.py')), '--out', str(out)]
        command += ['--seed', str(seed), '--device', args.device]
        command += ['--iters', str(args.iters)] if args.iters else []
        command += ['--data', str(args.data), '--tiles', str(TILE)] if args.data else []
        subprocess.run(command, check=True)
        found = json.loads((out / 'metrics.json').read_text())
        (segmenter,) = (out / 'iteration-1').glob('iter_*.pth')
        for stage, values in (found | few_labels(out, segmenter, seed, args)).items():
            scores.setdefault(stage, []).append(values)
            print(f'seed {seed}, {stage}: mask AR@100 {values["segm_AR@100"]:.3f}', flush=True)
    rows = [
        {'stage': stage}
        | {title: spread([value[key] for value in values], 3) for title, key in COLUMNS.items()}
        | {'seeds': len(values), 'commit': commit(*runs.glob('seed-*/*'))}
        for stage, values in scores.items()
    ]
    with atomic_write(args.plot or Path(__file__).with_name(f'learning{suffix}.svg')) as file:
        file.write(plot(scores))
    write_rows(rows, args.json or REPO / f'results/freesolo_learning{suffix}.json')


if __name__ == '__main__':
    main()
