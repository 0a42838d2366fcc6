#!/usr/bin/env python
"""Write one self-contained HTML page on one or more COCO result files.

    python tools/report.py data/instances_val.json data/images work_dirs/report.html \\
        ours=work_dirs/ours.json "untrained weights=work_dirs/untrained.json"
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mmdet_plugins.common.report import write_report, write_strip  # noqa: E402
from mmdet_plugins.ops.coco_json import read_json  # noqa: E402


def named(text: str) -> tuple[str, str]:
    name, _, file = text.rpartition('=')
    return name or Path(file).stem, file


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description='Write an HTML page on COCO result files.')
    parser.add_argument('annotations', help='COCO annotations (JSON)')
    parser.add_argument('images', help='folder that their file_name is relative to')
    parser.add_argument('out', help='the page (HTML)')
    parser.add_argument(
        'results',
        nargs='+',
        type=named,
        metavar='[NAME=]FILE',
        help='COCO results; the images of the first are shown, the others are set beside it',
    )
    parser.add_argument('--title', default='Open-world segmentation')
    parser.add_argument('--num-images', type=int, default=4, help='images a group (default: 4)')
    parser.add_argument('--seed', type=int, default=0, help='of the images drawn at random')
    parser.add_argument('--metrics', help='JSON {name: {metric: value}}; computed where not given')
    parser.add_argument(
        '--strip',
        nargs='+',
        metavar=('FILE', 'ID'),
        help='also write a picture of these image ids: input, ground truth, first results',
    )
    args = parser.parse_args(arguments)
    try:
        metrics = read_json(args.metrics) if args.metrics else None
        write_report(
            args.annotations,
            args.images,
            dict(args.results),
            args.out,
            metrics=metrics,
            title=args.title,
            num_images=args.num_images,
            seed=args.seed,
        )
        if args.strip:
            file, *ids = args.strip
            write_strip(args.annotations, args.images, args.results[0][1], file, [*map(int, ids)])
    except (FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(args.out)
    return 0


if __name__ == '__main__':
    sys.exit(main())
