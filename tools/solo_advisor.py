#!/usr/bin/env python
"""Say how well SOLO's grids fit a data set, and propose grids, scale ranges and an input size.

    python tools/solo_advisor.py data/coco/annotations/instances_train2017.json
    python tools/solo_advisor.py instances_train.json --max-lost 0.5 --max-images 10000

For every level: the share of all objects that it has cells for, and of these, how many want a cell
that another object wants too (contested), and how many get none of their cells (lost: training
never sees them there). The last row is about all levels: contested or lost on each where the object
is wanted. It is what training meets at the full input size; flips and smaller sizes vary it.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mmdet_plugins.ops.coco_json import load_coco  # noqa: E402
from mmdet_plugins.ops.grid_advice import (  # noqa: E402
    MIN_SIDE_PX,
    GridObjects,
    GridSetting,
    fit,
    propose,
    read_objects,
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('annotations', help='COCO annotation file of the training set')
    parser.add_argument(
        '--max-lost',
        type=float,
        default=1.0,
        metavar='PERCENT',
        help='of the objects, that the proposal may lose (default: 1)',
    )
    parser.add_argument(
        '--max-images',
        type=int,
        default=2000,
        metavar='N',
        help='measure a random sample of N images (default: 2000)',
    )
    args = parser.parse_args(argv)
    if not 0 <= args.max_lost < 100:
        parser.error('--max-lost is a percentage, from 0 to below 100')
    if args.max_images < 1:
        parser.error('--max-images must be at least 1')
    try:
        args.objects = read_objects(load_coco(args.annotations), args.max_images)
    except (OSError, ValueError) as error:
        message = str(error).removeprefix(f'{args.annotations}: ')
        parser.error(f'{args.annotations}: {message}')
    return args


def table(objects: GridObjects, setting: GridSetting) -> str:
    """What :func:`fit` finds, as text."""
    levels, overall = fit(objects, setting)
    rows = [('level', 'grid', 'scale range', 'objects', 'contested', 'lost')]
    for i, (level, size, bounds) in enumerate(
        zip(levels, setting.num_grids, setting.scale_ranges, strict=True), start=2
    ):
        shares = [f'{100 * share:.2f} %' for share in level.shares()]
        rows.append((f'P{i}', str(size), '{} - {}'.format(*bounds), *shares))
    cells = sum(size**2 for size in setting.num_grids)
    shares = [f'{100 * share:.2f} %' for share in overall.shares()]
    rows.append(('all', f'{cells} cells', '', *shares))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    small = (objects.sides(setting.input_size) < MIN_SIDE_PX).mean()
    long, short = setting.input_size
    return '\n'.join(
        [
            f'input {long}x{short}; {100 * small:.2f} % of the objects are below {MIN_SIDE_PX} px',
            *(
                '  '.join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
                for row in rows
            ),
        ]
    )


def cfg_options(setting: GridSetting) -> str:
    """The setting for the launchers' command line, with a pipeline like that of COCO's fragment."""

    def literal(value) -> str:
        return str(value).replace(' ', '')

    long, short = setting.input_size
    scales = [(long, round(short * part)) for part in (0.8, 0.84, 0.88, 0.92, 0.96, 1)]
    options = {
        'model.mask_head.num_grids': list(setting.num_grids),
        'model.mask_head.scale_ranges': list(setting.scale_ranges),
        'train_dataloader.dataset.pipeline.2.scales': scales,
        'val_dataloader.dataset.pipeline.1.scale': setting.input_size,
        'test_dataloader.dataset.pipeline.1.scale': setting.input_size,
    }
    lines = [f'  {name}="{literal(value)}"' for name, value in options.items()]
    return ' \\\n'.join(['--cfg-options', *lines])


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    objects = args.objects
    print(f'{len(objects)} objects on {len(objects.image_hw)} images')
    if objects.num_skipped:
        print(
            f'{objects.num_skipped} annotations without a usable box or mask were left out; '
            'tools/check_data.py lists them'
        )
    proposal = propose(objects, args.max_lost / 100)
    print(f'\nDefault: {table(objects, GridSetting())}')
    print(f'\nProposal: {table(objects, proposal)}')
    print(f'\nFor the leaves that train at several scales:\n\n{cfg_options(proposal)}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
