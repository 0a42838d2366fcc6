"""Images of many small objects, cut into tiles that show a few of them large."""

import json
from pathlib import Path

import cv2
import numpy as np

from ..ops.coco_json import by_image, load_coco
from ..ops.images import read_image
from ..ops.rle import area, decode_rle, encode_masks, rle_to_xyxy, segmentation_to_rle
from .files import atomic_write


def corners(length: int, size: int) -> list[int]:
    """Where the fewest tiles begin that cover a side evenly."""
    count = -(-length // size)
    return np.linspace(0, max(length - size, 0), count).round().astype(int).tolist()


def cut_tiles(data: Path, out: Path, size: int, limit: int = 4) -> None:
    """Make a data set of the tiles of another, both splits, laid out alike.

    Objects that a border cuts are labelled as far as they are seen.

    Args:
        data: ``images/``, ``instances_train.json``, ``instances_val.json``.
        out: Made if need be; what is finished is left alone.
        size: Of a tile, px; a side of an image that is shorter is kept whole.
        limit: Tiles of an image at most, drawn at random by a fixed seed.
    """
    (out / 'images').mkdir(parents=True, exist_ok=True)
    for split in ('train', 'val'):
        target = out / f'instances_{split}.json'
        if target.exists():
            continue
        source = load_coco(data / target.name)
        annotations_of = by_image(source['annotations'])
        rng = np.random.default_rng(0)
        images, annotations = [], []
        for entry in source['images']:
            hw = height, width = entry['height'], entry['width']
            image = read_image(data / 'images' / entry['file_name'], hw)
            objects = annotations_of[entry['id']]
            masks = decode_rle([segmentation_to_rle(x['segmentation'], hw) for x in objects], hw)
            tiles = [(y, x) for y in corners(height, size) for x in corners(width, size)]
            for index in sorted(rng.permutation(len(tiles))[:limit].tolist()):
                y, x = tiles[index]
                window = np.s_[y : y + size, x : x + size]
                name = f'{split}_{entry["id"]}_{y}_{x}.png'
                (out / 'images' / name).write_bytes(cv2.imencode('.png', image[window])[1])
                tile_hw = image[window].shape[:2]
                images.append(
                    dict(id=len(images) + 1, file_name=name, height=tile_hw[0], width=tile_hw[1])
                )
                parts = encode_masks(masks[:, *window])
                for whole, rle, pixels in zip(objects, parts, area(parts).tolist(), strict=True):
                    if pixels:
                        x1, y1, x2, y2 = rle_to_xyxy([rle])[0].tolist()
                        annotation = dict(
                            id=len(annotations) + 1,
                            image_id=len(images),
                            bbox=[x1, y1, x2 - x1, y2 - y1],
                            area=pixels,
                            segmentation=rle,
                        )
                        annotations.append(whole | annotation)
        content = source | dict(images=images, annotations=annotations)
        with atomic_write(target) as file:
            json.dump(content, file)
