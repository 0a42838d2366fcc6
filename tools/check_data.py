#!/usr/bin/env python
"""Check a COCO-style data set before training: annotation file and images.

    python tools/check_data.py data/coco/annotations/instances_val2017.json data/coco/val2017
    python tools/check_data.py instances.json          # the annotation file alone
    python tools/check_data.py UVO_video_val_dense.json uvo_frames --workers 8 --json report.json

One line per problem names the file or entry, what is wrong and how to mend it; a summary by kind
follows. The exit status is 1 if there is an error, 0 if there are warnings at most.
"""

import argparse
import json
import os
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mmdet_plugins.common.check_data import check_data, summarise  # noqa: E402
from mmdet_plugins.common.files import atomic_write  # noqa: E402


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('annotations', help='COCO annotation file, or one of UVO')
    parser.add_argument('images', nargs='?', help='folder that file names are relative to')
    parser.add_argument(
        '--workers',
        type=int,
        default=os.cpu_count() or 1,
        metavar='N',
        help='threads that decode images (default: all cores)',
    )
    parser.add_argument(
        '--limit',
        type=int,
        default=20,
        metavar='N',
        help='lines printed of each kind (default: 20; 0: all)',
    )
    parser.add_argument('--json', metavar='FILE', help='write all problems to this file as well')
    args = parser.parse_args(argv)
    if args.images is not None and not os.path.isdir(args.images):
        parser.error(f'{args.images} is not a folder')
    if args.workers < 1:
        parser.error('--workers must be at least 1')
    return args


def show_progress(every_s: float = 2.0):
    """A callback that says on stderr how far the images are, now and then."""
    last = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= every_s or (done == total and total > 1000):
            last = time.monotonic()
            print(f'{done} of {total} images checked', file=sys.stderr)

    return progress


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    problems = check_data(args.annotations, args.images, args.workers, show_progress())
    printed = Counter()
    for problem in problems:
        printed[problem.kind] += 1
        if not args.limit or printed[problem.kind] <= args.limit:
            print(problem)
    for kind, count in printed.items():
        if args.limit and count > args.limit:
            print(f'... and {count - args.limit} more of {kind} (--limit 0 or --json for all)')
    print(summarise(problems))
    errors = sum(problem.is_error for problem in problems)
    if args.json:
        with atomic_write(args.json) as file:
            json.dump(
                {
                    'annotations': args.annotations,
                    'images': args.images,
                    'errors': errors,
                    'warnings': len(problems) - errors,
                    'problems': [
                        {**asdict(p), 'error': p.is_error, 'mend': p.mend} for p in problems
                    ],
                },
                file,
                indent=1,
            )
    return int(errors > 0)


if __name__ == '__main__':
    sys.exit(main())
