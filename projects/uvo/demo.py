"""The whole job on a small data set: train both stages, run them, score them, write a report.

    python projects/uvo/demo.py [--data FOLDER]

FOLDER holds ``images/``, ``instances_train.json`` and ``instances_val.json``; without it a
synthetic set is made. Training goes through ``mim train``, detector and segmenter side by side, as
neither needs the other. Scores stand beside two baselines: both models with untrained weights, and
one box around each whole image given to the trained segmenter. The same command goes on where it
was stopped.
"""

import argparse
import json
import shutil
from pathlib import Path

import two_stage
from mmengine.config import Config
from mmengine.device import get_device

from mmdet_plugins.common.files import atomic_write
from mmdet_plugins.common.report import write_report
from mmdet_plugins.common.stages import (
    Stage,
    config_digest,
    digest,
    keep_settings,
    prepare_data,
    train,
)
from mmdet_plugins.ops.open_world import evaluate_json

REPO = Path(__file__).resolve().parents[2]
TINY = REPO / 'configs/uvo/tiny'
COLUMNS = {
    f'{kind} {metric}': f'{key}_{metric}'
    for kind, key in dict(box='bbox', mask='segm').items()
    for metric in ('AP', 'AP50', 'AR@1', 'AR@10', 'AR@100')
} | {'novel mask AR@100': 'novel_segm_AR@100'}


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
        f'{split} data': digest(data / f'instances_{split}.json') for split in ('train', 'val')
    }
    for s in stages:
        settings[f'{s.name} config'] = config_digest(s.config)
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
