#!/usr/bin/env python
"""The part of a COCO file that a list of images names, such as COCO 20k out of train2014.

    python tools/convert/coco_subset.py instances_train2014.json coco_20k_filenames.txt out.json

The list has a path or a file name a line; folders in front of the name do not matter.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mmdet_plugins.common.files import atomic_write  # noqa: E402
from mmdet_plugins.ops.coco_json import listed, load_coco  # noqa: E402


def subset(data: dict, names: list[str]) -> dict:
    """Images of those names with their annotations, and everything else that the file has.

    Raises:
        ValueError: A name is not in the file, or stands for several images.
    """
    wanted = {Path(name).name for name in names}
    images = [image for image in data['images'] if Path(image['file_name']).name in wanted]
    found = Counter(Path(image['file_name']).name for image in images)
    if missing := sorted(wanted - found.keys()):
        raise ValueError(f'{len(missing)} of them are not in it, {listed(missing, 3)}')
    if shared := [name for name, count in found.items() if count > 1]:
        raise ValueError(f'it has several images called {listed(shared, 3)}')
    ids = {image['id'] for image in images}
    annotations = [found for found in data['annotations'] if found['image_id'] in ids]
    return data | dict(images=images, annotations=annotations)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('annotations', help='COCO annotation file')
    parser.add_argument('names', type=Path, help='text file, an image a line')
    parser.add_argument('out')
    args = parser.parse_args(argv)
    try:
        part = subset(load_coco(args.annotations), args.names.read_text().split())
    except (OSError, ValueError) as error:
        print(f'{args.annotations}, {args.names}: {error}', file=sys.stderr)
        return 1
    with atomic_write(args.out) as file:
        json.dump(part, file)
    print(f'{args.out}: {len(part["images"])} images, {len(part["annotations"])} annotations')
    return 0


if __name__ == '__main__':
    sys.exit(main())
