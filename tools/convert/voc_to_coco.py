#!/usr/bin/env python
"""Pascal VOC's instance masks as a COCO instance file.

    python tools/convert/voc_to_coco.py data/VOCdevkit/VOC2012 --split trainval
    python tools/convert/voc_to_coco.py data/VOCdevkit/VOC2012 --split val --out voc_val.json

Reads ImageSets/Segmentation/SPLIT.txt, SegmentationObject and SegmentationClass. The void border
around objects (255) belongs to none of them.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _common import CocoFile, encode, progress, read_index_image  # noqa: E402

CLASSES = (
    'aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike '
    'person pottedplant sheep sofa train tvmonitor'
).split()
VOID = 255


def convert(root: Path, split: str) -> CocoFile:
    names = (root / 'ImageSets' / 'Segmentation' / f'{split}.txt').read_text().split()
    coco = CocoFile(CLASSES)
    for name in progress(names, len(names), 'images'):
        try:
            objects = read_index_image(root / 'SegmentationObject' / f'{name}.png')
            classes = read_index_image(root / 'SegmentationClass' / f'{name}.png')
            if objects.shape != classes.shape:
                raise ValueError(
                    f'{name}: objects of {objects.shape} pixels, classes of {classes.shape}'
                )
            if not (root / 'JPEGImages' / f'{name}.jpg').is_file():
                raise ValueError(f'{root / "JPEGImages" / name}.jpg is missing')
        except ValueError as error:
            coco.problems.append(str(error))
            continue
        image_id = coco.add_image(f'{name}.jpg', objects.shape)
        for value in np.setdiff1d(objects, (0, VOID)):
            mask = objects == value
            index = np.bincount(classes[mask]).argmax() - 1
            if not 0 <= index < len(CLASSES):
                coco.problems.append(f'{name}: object {value} is of no class ({index + 1})')
                continue
            coco.add_instance(image_id, CLASSES[index], encode(mask))
    return coco


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('root', type=Path, help='folder with ImageSets, JPEGImages, ...')
    parser.add_argument('--split', default='trainval')
    parser.add_argument('--out', help='default: ROOT/annotations/instances_SPLIT.json')
    args = parser.parse_args(argv)
    listing = args.root / 'ImageSets' / 'Segmentation' / f'{args.split}.txt'
    if not listing.is_file():
        parser.error(f'{listing} is missing: is {args.root} a VOC folder, {args.split} a split?')
    out = args.out or args.root / 'annotations' / f'instances_{args.split}.json'
    return convert(args.root, args.split).write(str(out))


if __name__ == '__main__':
    sys.exit(main())
