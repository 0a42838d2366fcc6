#!/usr/bin/env python
"""Open Images' instance masks as a COCO instance file.

    python tools/convert/openimages_to_coco.py train-annotations-object-segmentation.csv \\
        train_masks/ train/ --out data/openimages/annotations/instances_train.json \\
        --classes class-descriptions-boxable.csv

The CSV lists a mask a line (MaskPath, ImageID, LabelName, ...). Masks are looked for in the folder
itself and in the ones the archives make of it (by the first character of the name). They come in
other sizes than their images, and are resized (nearest neighbour). Images are IMAGES/ImageID.jpg.
"""

import argparse
import csv
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import cv2

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _common import (  # noqa: E402
    CocoFile,
    encode,
    image_size_hw,
    in_threads,
    progress,
    read_index_image,
)

COLUMNS = {'MaskPath', 'ImageID', 'LabelName'}


def read_rows(path: Path) -> list[dict]:
    with open(path, newline='', encoding='utf-8') as file:
        reader = csv.DictReader(file)
        missing = COLUMNS - set(reader.fieldnames or ())
        if missing:
            raise ValueError(f'{path} has no column {", ".join(sorted(missing))}')
        return [{key: row[key] for key in COLUMNS} for row in reader]


def find_mask(folder: Path, name: str) -> Path:
    for parent in ('', name[:1], name[:1].upper(), f'train-masks-{name[:1]}'):
        if (folder / parent / name).is_file():
            return folder / parent / name
    return folder / name


def convert(
    rows: list[dict], masks: Path, images: Path, names: dict[str, str], workers: int
) -> CocoFile:
    coco, image_ids = CocoFile(()), {}
    size_of = lru_cache(maxsize=4096)(image_size_hw)  # rows of one image follow each other

    def read(row: dict):
        try:
            size_hw = size_of(images / f'{row["ImageID"]}.jpg')
            mask = read_index_image(find_mask(masks, row['MaskPath']))
        except ValueError as error:
            return row, None, str(error)
        mask = cv2.resize(
            (mask > 0).astype('uint8'), size_hw[::-1], interpolation=cv2.INTER_NEAREST
        )
        if not mask.any():
            return row, None, f'{row["MaskPath"]} is empty'
        return row, encode(mask), None

    with ThreadPoolExecutor(workers) as pool:
        for row, rle, problem in progress(in_threads(pool, read, rows), len(rows), 'masks'):
            if problem:
                coco.problems.append(problem)
                continue
            name = row['ImageID']
            if name not in image_ids:
                image_ids[name] = coco.add_image(f'{name}.jpg', rle['size'])
            label = row['LabelName']
            coco.add_instance(image_ids[name], names.get(label, label), rle)
    return coco


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('csv', type=Path, help='...-annotations-object-segmentation.csv')
    parser.add_argument('masks', type=Path, help='folder of mask PNGs')
    parser.add_argument('images', type=Path, help='folder of JPEGs')
    parser.add_argument('--out', required=True)
    parser.add_argument('--classes', type=Path, help='CSV of label and name, without a header')
    parser.add_argument('--workers', type=int, default=os.cpu_count() or 1)
    args = parser.parse_args(argv)
    for folder in (args.masks, args.images):
        if not folder.is_dir():
            parser.error(f'{folder} is not a folder')
    names = {}
    try:
        rows = read_rows(args.csv)
        if args.classes:
            with open(args.classes, newline='', encoding='utf-8') as file:
                names = {row[0]: row[1] for row in csv.reader(file)}
    except (OSError, ValueError, IndexError) as error:
        parser.error(str(error))
    return convert(rows, args.masks, args.images, names, args.workers).write(args.out)


if __name__ == '__main__':
    sys.exit(main())
