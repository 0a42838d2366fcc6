"""Correspondence learnt by DenseCL and by MoCo-v2, trained equally, on images neither has seen.

    python projects/densecl/compare.py                       # made-up scenes
    python projects/densecl/compare.py --data data/nuclei    # a set of one's own

Both start from the same random weights, see the same images and learn as long; two trainings run at
a time. On pairs of views of the validation images, the same for all, a cell of the one is matched
with the cell of the other whose features are most similar, and the known crops say whether it shows
the same point. Points that are in another place there also count alone, as a network that knows the
place by its padding finds the others without a look; the plot is of these. The untrained network is
measured alike. Intervals of 95 % are bootstrapped over seeds and images. The runner's log tells the
time of an iteration, with that of its data. The table goes to ``results/``, from where
``tools/build_tables.py`` takes it to the README, and a plot beside this file. The command goes on
where it was stopped.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import MMLogger

from mmdet_plugins.common.files import atomic_write
from mmdet_plugins.common.interval_plot import Interval, interval_plot
from mmdet_plugins.common.stages import (
    Stage,
    commit,
    evaluate,
    iteration_seconds,
    make_stage,
    prepare_data,
    spread,
    train,
    write_rows,
)

REPO = Path(__file__).resolve().parents[2]
METHODS = {'DenseCL': 'densecl-c3_tiny_demo', 'MoCo-v2': 'moco-v2-c3_tiny_demo'}
UNTRAINED = 'untrained'
DRAWS = 10000
POINTS = {'moved': ('right_moved', 'moved'), 'all': ('right', 'shown')}  # right, counted
COLOURS = {'DenseCL': '#1b7f5c', 'MoCo-v2': '#b3541e', UNTRAINED: '#777777'}


def bootstrap(right: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Accuracies [DRAWS] of sets of seeds and images, drawn with replacement.

    Every method is drawn alike, so that the differences of two of them are paired.

    Args:
        right, counted: Cells [seeds, images].
    """
    rng = np.random.default_rng(0)
    seeds, images = (
        rng.multinomial(count, np.full(count, 1 / count), DRAWS) for count in right.shape
    )
    return (seeds @ right * images).sum(1) / (seeds @ counted * images).sum(1)


def save_untrained(stage: Stage, seed: int) -> None:
    """The checkpoint of a model that has learnt nothing."""
    if stage.checkpoint.exists():
        return
    register_all_modules(init_default_scope=True)
    MMLogger.get_current_instance().setLevel('WARNING')
    torch.manual_seed(seed)
    model = MODELS.build(Config.fromfile(stage.config).model)
    model.init_weights()
    stage.work_dir.mkdir(parents=True, exist_ok=True)
    with atomic_write(stage.checkpoint, 'wb') as file:
        torch.save({'state_dict': model.state_dict()}, file)


def interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def rows_of(counts: dict[str, tuple[np.ndarray, np.ndarray]], cells: int) -> list[dict]:
    """A row a method: accuracy, interval, times chance, and how far above MoCo-v2 it lies."""
    drawn = {method: bootstrap(*pair) for method, pair in counts.items()}
    rows = []
    for method, (right, counted) in counts.items():
        low, high = interval(drawn[method])
        accuracy = right.sum() / counted.sum()
        row = {
            'features': method,
            'accuracy': float(accuracy),
            '95 %': f'{low:.3f}–{high:.3f}',
            '× chance': f'{accuracy * cells:.1f}',
            'of each seed': ', '.join(f'{share:.3f}' for share in right.sum(1) / counted.sum(1)),
        }
        if method != 'MoCo-v2':
            low, high = interval(drawn[method] - drawn['MoCo-v2'])
            row['above MoCo-v2, 95 %'] = f'{low:+.3f} to {high:+.3f}'
        rows.append(row)
    return rows


def plot(rows: list[dict], chance: float) -> str:
    """SVG of accuracies with their intervals, chance dotted."""
    intervals = [
        Interval(
            row['features'],
            row['accuracy'],
            *map(float, row['95 %'].split('–')),
            COLOURS[row['features']],
        )
        for row in rows
    ]
    return interval_plot(intervals, (f'chance {chance:.3f}', chance))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--data', type=Path, help='images/, instances_train.json, instances_val.json'
    )
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--iters', type=int, help="default: the config's")
    parser.add_argument('--out', type=Path, help='default: work_dirs/densecl[-NAME OF THE DATA]')
    parser.add_argument('--device', choices=['cpu', 'cuda'], default=get_device())
    parser.add_argument('--json', type=Path, help='default: results/densecl_learning[-NAME].json')
    parser.add_argument('--plot', type=Path, help='default: beside this file')
    args = parser.parse_args()
    suffix = f'-{args.data.name}' if args.data else ''
    out = args.out or Path(f'work_dirs/densecl{suffix}')
    data = args.data or out / 'data'
    prepare_data(data, synthetic=args.data is None)

    counts, times = {}, {}
    for seed in range(args.seeds):
        pair = []
        for method, config in METHODS.items():
            cfg = Config.fromfile(REPO / f'configs/densecl/tiny/{config}.py')
            cfg.merge_from_dict({'randomness.seed': seed})
            pair.append(make_stage(f'{method.lower()}-{seed}', cfg, out, args.iters))
        train(pair, data, args.device)
        for method, stage in zip(METHODS, pair, strict=True):
            times.setdefault(method, []).append(iteration_seconds(stage))
        untrained = pair[0]._replace(name=f'{UNTRAINED}-{seed}', iters=0)
        untrained = untrained._replace(work_dir=out / untrained.name)
        save_untrained(untrained, seed)
        for method, stage in zip([*METHODS, UNTRAINED], [*pair, untrained], strict=True):
            cells_json = stage.work_dir / 'cells.json'
            options = {'test_evaluator.out_file': cells_json}
            scores = evaluate(stage, data, args.device, options)
            for key, values in json.loads(cells_json.read_text()).items():
                counts.setdefault(method, {}).setdefault(key, []).append(values)
            print(f'{stage.name}: accuracy {scores["densecl/accuracy"]:.3f}', flush=True)
    counts = {
        method: {key: np.array(values) for key, values in found.items()}
        for method, found in counts.items()
    }
    cells = int(counts[UNTRAINED]['cells'][0, 0])
    table = []
    for points, keys in POINTS.items():
        pairs = {method: tuple(found[key] for key in keys) for method, found in counts.items()}
        rows = rows_of(pairs, cells)
        if points == 'moved':
            target = args.plot or Path(__file__).with_name(f'learning{suffix}.svg')
            with atomic_write(target) as file:
                file.write(plot(rows, 1 / cells))
        table += [{'points': points, **row} for row in rows]
    for row in table:
        method = row['features']
        found = counts[method]
        row['matched in place'] = float(found['stayed'].sum() / (found['pairs'].sum() * cells))
        row['iterations'] = pair[0].iters if method in times else 0
        if method in times:
            row['s an iteration'] = spread(times[method], 3)
        if method == 'DenseCL':
            ratios = np.divide(times[method], times['MoCo-v2'])
            row["of MoCo-v2's"] = spread(ratios.tolist(), 3)
        row['commit'] = commit(*out.glob('densecl-*'))
    target = args.json or REPO / f'results/densecl_learning{suffix}.json'
    write_rows(table, target)


if __name__ == '__main__':
    main()
