#!/usr/bin/env python
"""Pascal VOC's instance masks, or boxes, as a COCO instance file.

    python tools/convert/voc_to_coco.py data/VOCdevkit/VOC2012 --split trainval
    python tools/convert/voc_to_coco.py data/VOCdevkit/VOC2012 --split val --out voc_val.json
    python tools/convert/voc_to_coco.py data/VOCdevkit/VOC2007 --boxes

Reads ImageSets/Segmentation/SPLIT.txt, SegmentationObject and SegmentationClass. The void border
around objects (255) belongs to none of them. Boxes come from ImageSets/Main/SPLIT.txt and
Annotations; difficult objects become crowds, which count neither when found nor when missed.
mmdet's own reader takes the last row and column off every box.
"""

import argparse
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _common import CocoFile, encode, progress, read_index_image  # noqa: E402

CLASSES = (
    'aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike '
    'person pottedplant sheep sofa train tvmonitor'
).split()
VOID = 255
EDGES = ('xmin', 'ymin', 'xmax', 'ymax')


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


def convert_boxes(root: Path, split: str) -> CocoFile:
    names = (root / 'ImageSets' / 'Main' / f'{split}.txt').read_text().split()
    coco = CocoFile(CLASSES)
    for name in progress(names, len(names), 'images'):
        path = root / 'Annotations' / f'{name}.xml'
        try:
            tree = ET.parse(path)
            size_hw = [int(tree.findtext(f'size/{side}')) for side in ('height', 'width')]
            objects = [
                (
                    found.findtext('name'),
                    [float(found.findtext(f'bndbox/{key}')) for key in EDGES],
                    int(found.findtext('difficult', '0')),
                )
                for found in tree.iterfind('object')
            ]
        except (OSError, ET.ParseError, TypeError, ValueError) as error:
            coco.problems.append(f'{path} is missing or damaged: {error}')
            continue
        image_id = coco.add_image(f'{name}.jpg', size_hw)
        for category, (x1, y1, x2, y2), difficult in objects:
            box_xyxy = (x1 - 1, y1 - 1, x2, y2)  # they count from one, and the last is inside
            coco.add_box(image_id, category, box_xyxy, iscrowd=difficult)
    return coco


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('root', type=Path, help='folder with ImageSets, JPEGImages, ...')
    parser.add_argument('--split', default='trainval')
    parser.add_argument('--boxes', action='store_true', help='boxes of all images, without masks')
    parser.add_argument('--out', help='default: ROOT/annotations/{instances|boxes}_SPLIT.json')
    args = parser.parse_args(argv)
    kind, content = ('Main', 'boxes') if args.boxes else ('Segmentation', 'instances')
    listing = args.root / 'ImageSets' / kind / f'{args.split}.txt'
    if not listing.is_file():
        parser.error(f'{listing} is missing: is {args.root} a VOC folder, {args.split} a split?')
    out = args.out or args.root / 'annotations' / f'{content}_{args.split}.json'
    return (convert_boxes if args.boxes else convert)(args.root, args.split).write(str(out))


if __name__ == '__main__':
    sys.exit(main())
