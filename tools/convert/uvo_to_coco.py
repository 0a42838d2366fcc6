#!/usr/bin/env python
"""UVO's video annotations (UVO-Dense) as a COCO instance file, one image a frame.

    python tools/convert/uvo_to_coco.py UVO_video_train_dense.json \\
        --out data/uvo/annotations/UVO_dense_train_frames.json --images data/uvo/images/dense_train

With --images, frames whose files are missing are left out, and named. UVO-Sparse is COCO already.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _common import CocoFile  # noqa: E402

from mmdet_plugins.common.uvo import coco_or_uvo  # noqa: E402
from mmdet_plugins.ops.coco_json import check_entries, read_json  # noqa: E402


def convert(path: str, images: Path | None) -> CocoFile:
    data = check_entries(coco_or_uvo(read_json(path), path), path)
    coco = CocoFile(())
    coco.category_ids = {category['name']: category['id'] for category in data['categories']}
    coco.images, coco.annotations = data['images'], data['annotations']
    if images is not None:
        missing = {i['id'] for i in coco.images if not (images / i['file_name']).is_file()}
        coco.problems = [
            f'{images / i["file_name"]} is missing' for i in coco.images if i['id'] in missing
        ]
        coco.images = [i for i in coco.images if i['id'] not in missing]
        coco.annotations = [a for a in coco.annotations if a['image_id'] not in missing]
    return coco


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('json', help='UVO_video_*_dense.json')
    parser.add_argument('--out', required=True)
    parser.add_argument('--images', type=Path, help='folder that file names are relative to')
    args = parser.parse_args(argv)
    try:
        coco = convert(args.json, args.images)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return coco.write(args.out)


if __name__ == '__main__':
    sys.exit(main())
