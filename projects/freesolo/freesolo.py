"""Photographs in, an instance segmenter out, nothing labelled: every stage of FreeSOLO in a row.

    python projects/freesolo/freesolo.py [--data FOLDER [--tiles SIZE]]

DenseCL learns features from the images, Free Mask finds coarse masks in them, SOLOv2 is trained on
these (iteration 0 of Table 6.7(c)), and again on its own predictions (iteration 1, ...). FOLDER
holds photographs; if they lie in ``images/`` beside ``instances_train.json`` and
``instances_val.json``, the images of the first are learnt from, labels unseen, and every iteration
is scored on the second. Without it the made-up scenes of ``make demo`` are used. Where objects are
small and many, ``--tiles`` cuts such a FOLDER into tiles, which the networks see enlarged. All
stages are stock runner calls; the same command goes on where it was stopped, inside a stage too.
"""

import argparse
import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.device import get_device

from mmdet_plugins.common.files import atomic_write
from mmdet_plugins.common.pseudo_store import LABELS
from mmdet_plugins.common.report import write_report
from mmdet_plugins.common.stages import (
    Stage,
    environment,
    evaluate,
    keep_settings,
    mim,
    prepare_data,
    resize,
    train,
    write_config,
)
from mmdet_plugins.common.tiles import cut_tiles
from mmdet_plugins.freesolo.clusters import write_clusters
from mmdet_plugins.freesolo.health import write_health
from mmdet_plugins.ops.open_world import evaluate_json

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
SCENES = dict(size_hw=(128, 160), large=True)
CLUSTERS = 12
METRICS = ('segm_AP', 'segm_AP50', 'segm_AR@10', 'segm_AR@100', 'bbox_AR@100')


class Recipe:
    """The stages of one output folder.

    Args:
        args: Of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.device, self.iters, self.seed = args.device, args.iters, args.seed
        self.out = args.out or Path('work_dirs') / (
            f'freesolo-{args.data.name}' if args.data else 'freesolo'
        )
        if args.fresh and self.out.exists():
            shutil.rmtree(self.out)
        self.data = (args.data or self.out / 'data').resolve()
        self.labelled = args.data is None or (self.data / 'instances_train.json').exists()
        if self.labelled:
            prepare_data(self.data, synthetic=args.data is None, **SCENES)
        if args.tiles:
            if not self.labelled:
                raise SystemExit(f'--tiles needs {self.data}/instances_train.json')
            tiles = self.out.resolve() / 'data'
            keep_settings(tiles, dict(data=str(self.data), tiles=args.tiles))
            cut_tiles(self.data, tiles, args.tiles)
            self.data = tiles
        self.out = self.out.resolve()
        self.scale = (2 * args.tiles,) * 2 if args.tiles else (256, 192) if args.data else None
        self.free_mask = f'freesolo/tiny/free-mask_tiny_{"nuclei" if args.tiles else "demo"}'
        self.stores: dict[str, Path] = {}
        self.objects = 0  # in the newest of them
        self.train_source, self.val_source = (
            dict(ann_file=f'instances_{split}.json', img='images/')
            if self.labelled
            else {'img': ''}
            for split in ('train', 'val')
        )

    def config(self, name: str, base: str, changes: Mapping[str, Any]) -> tuple[Path, Config]:
        """Write a shipped config with changes."""
        cfg = Config.fromfile(CONFIGS / f'{base}.py')
        cfg.merge_from_dict({'randomness.seed': self.seed, **changes})
        if self.iters and 'train_cfg' in cfg:
            cfg.train_cfg.max_iters = self.iters
        if base.startswith('freesolo/tiny/freesolo'):
            if self.scale:
                resize(cfg, self.scale)
            if not self.labelled:
                cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
        return write_config(name, cfg, self.out), cfg

    def trained(self, name: str, base: str, changes: Mapping[str, Any]) -> Stage:
        """Train through ``mim train``, unless that is done."""
        path, cfg = self.config(name, base, changes)
        stage = Stage(name, 'mmdet', path, cfg.train_cfg.max_iters, self.out / name)
        train([stage], self.data, self.device)
        return stage

    def labels(self, name: str, base: str, checkpoint: Path, source: dict) -> Path:
        """Fill a store of pseudo-labels through ``mim test``, unless it is full."""
        folder = self.out / name / 'store'
        labels = folder / LABELS
        config, _ = self.config(
            name,
            base,
            {
                'test_dataloader.dataset.data_root': f'{self.data}/',
                'test_dataloader.dataset.sources': [source],
                'custom_hooks.0.folder': str(folder),
            },
        )
        if not labels.exists():
            print(f'{name}: labelling', flush=True)
            command = mim('test', 'mmdet', config, '--checkpoint', checkpoint)
            with open(self.out / name / 'console.log', 'a') as log:
                done = subprocess.run(
                    [*command, '--work-dir', str(self.out / name / 'log')],
                    env=environment(self.device, 1),
                    stdout=log,
                    stderr=log,
                )
            if done.returncode:
                raise SystemExit(
                    ''.join(open(log.name).readlines()[-5:])
                    + f'{name} stopped early (end of {log.name} above); the same command goes on'
                )
        content = json.loads(labels.read_text())
        if not content['annotations']:
            raise SystemExit(
                f'{name}: nothing was found certain enough in {len(content["images"])} images: '
                'start again with longer trainings, --fresh --iters N'
            )
        objects = len(content['annotations'])
        if source == self.train_source:
            self.stores[name], self.objects = folder, objects
        print(f'{name}: {objects} masks in {len(content["images"])} images', flush=True)
        return labels

    def run(self, iterations: int) -> None:
        """All stages, the scores of each iteration, and the report."""
        pretrained = self.pretrain()
        labels = self.labels('labels-0', self.free_mask, pretrained, self.train_source)
        results, metrics = {}, {}
        if self.labelled:
            coarse = self.labels('coarse-val', self.free_mask, pretrained, self.val_source)
            results['coarse masks'] = json.loads(coarse.read_text())['annotations']
            metrics['coarse masks'] = evaluate_json(self.truth, results['coarse masks'])
        for i in range(iterations):
            stage = self.trained(
                f'iteration-{i}',
                'freesolo/tiny/freesolo_tiny_demo',
                {
                    'train_dataloader.dataset.dataset.ann_file': str(labels),
                    'train_dataloader.dataset.dataset.data_prefix.img': f'{self.data}/',
                    'model.backbone.init_cfg': dict(
                        _delete_=True,
                        type='Pretrained',
                        checkpoint=str(pretrained),
                        prefix='backbone.',
                    ),
                },
            )
            if self.labelled:
                prefix = stage.work_dir / 'val'
                scores = evaluate(
                    stage, self.data, self.device, {'test_evaluator.outfile_prefix': prefix}
                )
                name = f'iteration {i}'
                metrics[name] = {
                    key.removeprefix('open_world/'): value for key, value in scores.items()
                }
                results[name] = Path(f'{prefix}.segm.json')
                print(f'{name}: {self.line(metrics[name])}', flush=True)
            if i + 1 < iterations:
                labels = self.labels(
                    f'labels-{i + 1}',
                    'freesolo/tiny/freesolo-pseudo-labels_tiny_demo',
                    stage.checkpoint,
                    self.train_source,
                )
        print(f'\nthe segmenter: {stage.config} {stage.checkpoint}')
        if self.labelled:
            self.save(metrics)
        self.pages()
        if self.labelled:
            self.report(results, metrics)

    def save(self, metrics: dict) -> None:
        with atomic_write(self.out / 'metrics.json') as file:
            json.dump(metrics, file, indent=1)

    def pages(self) -> None:
        """What was found in the images learnt from, and its objects in clusters."""
        stages = dict(reversed(self.stores.items()))
        print(write_health(stages, self.data, self.out / 'health.html'))
        page, newest = self.out / 'clusters.html', next(iter(stages.values()))
        try:
            write_clusters(newest, self.data, page, min(CLUSTERS, self.objects))
            print(page)
        except ValueError as error:
            print(f'no page of clusters: {error}')

    def pretrain(self) -> Path:
        """Features by DenseCL."""
        changes = {}
        if not self.labelled:
            cfg = Config.fromfile(CONFIGS / 'densecl/tiny/densecl-c3_tiny_demo.py')
            changes['train_dataloader.dataset'] = dict(
                _delete_=True,
                type='ImageFolderDataset',
                data_root=f'{self.data}/',
                pipeline=cfg.train_pipeline,
            )
        stage = self.trained('pretrain', 'densecl/tiny/densecl-c3_tiny_demo', changes)
        return stage.checkpoint

    @property
    def truth(self) -> Path:
        return self.data / 'instances_val.json'

    @staticmethod
    def line(scores: Mapping[str, float]) -> str:
        return ', '.join(f'{key} {scores[key]:.3f}' for key in METRICS)

    def report(self, results: dict, metrics: dict) -> None:
        newest_first = dict(reversed(results.items()))
        page = write_report(
            self.truth,
            self.data / 'images',
            newest_first,
            self.out / 'report.html',
            metrics,
            title='Segmented without labels',
        )
        for name, scores in metrics.items():
            print(f'{name:>14}: {self.line(scores)}')
        print(page)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--data', type=Path, help='a folder of photographs')
    parser.add_argument('--out', type=Path, help='default: work_dirs/freesolo[-NAME OF THE DATA]')
    parser.add_argument('--tiles', type=int, metavar='SIZE', help='cut --data into tiles, px')
    parser.add_argument('--iters', type=int, help="of every training; default: the configs'")
    parser.add_argument('--iterations', type=int, default=2, help='trainings of the segmenter')
    parser.add_argument('--seed', type=int, default=0, help='of every training')
    parser.add_argument('--device', choices=['cpu', 'cuda'], default=get_device())
    parser.add_argument('--fresh', action='store_true', help='forget what was done before')
    args = parser.parse_args()
    Recipe(args).run(args.iterations)


if __name__ == '__main__':
    main()
