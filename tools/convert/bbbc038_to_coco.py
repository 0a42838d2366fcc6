#!/usr/bin/env python
"""BBBC038, the nuclei of the 2018 Data Science Bowl, as a data set that `make demo DATA=...` takes.

    python tools/convert/bbbc038_to_coco.py stage1_train data/nuclei
    make demo DATA=data/nuclei

Reads ROOT/ID/images/ID.png and the binary ROOT/ID/masks/*.png, one a nucleus, as
https://bbbc.broadinstitute.org/BBBC038 hands them out. Writes images/ and
instances_{train,val}.json; every fourth ID, in their order, is for validation.
"""

import argparse
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _common import CocoFile, encode, image_size_hw, progress, read_index_image  # noqa: E402


def convert(folders: list[Path], images: Path) -> CocoFile:
    coco = CocoFile(['nucleus'])
    for folder in progress(folders, len(folders), 'images'):
        image = folder / 'images' / f'{folder.name}.png'
        try:
            size_hw = image_size_hw(image)
            masks = [read_index_image(path) > 0 for path in sorted(folder.glob('masks/*.png'))]
            if any(mask.shape != size_hw for mask in masks):
                raise ValueError(f'{folder}: a mask is not of the size of the image, {size_hw}')
        except ValueError as error:
            coco.problems.append(str(error))
            continue
        shutil.copyfile(image, images / image.name)
        image_id = coco.add_image(image.name, size_hw)
        for mask in masks:
            if mask.any():
                coco.add_instance(image_id, 'nucleus', encode(mask))
    return coco


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('root', type=Path, help='the unpacked stage1_train')
    parser.add_argument('out', type=Path)
    args = parser.parse_args(argv)
    folders = sorted(path.parent for path in args.root.glob('*/images'))
    if not folders:
        parser.error(f'{args.root} has no folders ID/images')
    images = args.out / 'images'
    images.mkdir(parents=True, exist_ok=True)
    validation = folders[3::4]
    training = [folder for folder in folders if folder not in validation]
    return max(
        convert(part, images).write(str(args.out / f'instances_{split}.json'))
        for split, part in (('train', training), ('val', validation))
    )


if __name__ == '__main__':
    sys.exit(main())
