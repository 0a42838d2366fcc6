"""Write one self-contained HTML page on the masks that a stage found.

    python projects/freesolo/health.py STORE --images photographs/
    python projects/freesolo/health.py "iteration 1=labels-1/store" "coarse=labels-0/store" \\
        --images photographs/

A stage is a store of pseudo-labels, a COCO file, or COCO results with --annotations. The images of
the first are shown, the others stand beside it.
"""

import argparse
import sys
from pathlib import Path

from mmdet_plugins.freesolo.health import write_health


def named(text: str) -> tuple[str, str]:
    name, _, file = text.rpartition('=')
    return name or Path(file).name, file


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('stages', nargs='+', type=named, metavar='[NAME=]STORE')
    parser.add_argument('--images', required=True, help='folder that file names are relative to')
    parser.add_argument('--out', default='health.html', help='the page (default: %(default)s)')
    parser.add_argument('--annotations', help='COCO file that lists the images of results')
    parser.add_argument('--num-images', type=int, default=4, help='of a kind (default: 4)')
    args = parser.parse_args(arguments)
    try:
        page = write_health(
            dict(args.stages),
            args.images,
            args.out,
            args.annotations,
            num_images=args.num_images,
        )
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(page)
    return 0


if __name__ == '__main__':
    sys.exit(main())
