"""What the converters share: a COCO instance file being filled, and words about how far it is."""

import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mmdet_plugins.common.files import atomic_write  # noqa: E402
from mmdet_plugins.ops.rle import RLE, area, encode_masks, rle_to_xyxy  # noqa: E402


class CocoFile:
    """Images and instances in the making; what could not be used is kept count of."""

    def __init__(self, categories: Iterable[str]) -> None:
        self.category_ids = {name: i for i, name in enumerate(categories, start=1)}
        self.images: list[dict] = []
        self.annotations: list[dict] = []
        self.problems: list[str] = []

    def add_image(self, file_name: str, size_hw: Sequence[int]) -> int:
        image_id = len(self.images) + 1
        height, width = map(int, size_hw)
        self.images.append(dict(id=image_id, file_name=file_name, height=height, width=width))
        return image_id

    def add_instance(self, image_id: int, category: str, rle: RLE) -> None:
        self.add_box(
            image_id,
            category,
            rle_to_xyxy([rle])[0].tolist(),
            area=int(area([rle])[0]),
            segmentation=rle,
        )

    def add_box(
        self,
        image_id: int,
        category: str,
        box_xyxy: Sequence[float],
        **fields: Any,
    ) -> None:
        """An object whose area is its box's; ``fields`` are added, or take the place of others."""
        x1, y1, x2, y2 = box_xyxy
        category_id = self.category_ids.setdefault(category, len(self.category_ids) + 1)
        self.annotations.append(
            dict(
                id=len(self.annotations) + 1,
                image_id=image_id,
                category_id=category_id,
                bbox=[x1, y1, x2 - x1, y2 - y1],
                area=(x2 - x1) * (y2 - y1),
                iscrowd=0,
            )
            | fields
        )

    def write(self, path: str) -> int:
        """Write the file and a summary; return the exit status: 1 if there is nothing to write."""
        for problem in self.problems[:10]:
            print(problem, file=sys.stderr)
        if len(self.problems) > 10:
            print(f'... and {len(self.problems) - 10} more', file=sys.stderr)
        if not self.annotations:
            print(f'no instance could be converted; {path} is not written', file=sys.stderr)
            return 1
        categories = [dict(id=i, name=name) for name, i in self.category_ids.items()]
        content = dict(images=self.images, annotations=self.annotations, categories=categories)
        with atomic_write(path) as file:
            json.dump(content, file)
        left_out = f', {len(self.problems)} left out' if self.problems else ''
        print(f'{path}: {len(self.images)} images, {len(self.annotations)} instances{left_out}')
        return 0


def encode(mask: np.ndarray) -> RLE:
    """One bool ``[H, W]`` mask."""
    return encode_masks(mask[None])[0]


def read_index_image(path: Path) -> np.ndarray:
    """Pixel values of a palette or grey image, ``[H, W]``; OpenCV would give the palette's colours.

    Raises:
        ValueError: If the file is missing or no such image; names it.
    """
    try:
        with Image.open(path) as image:
            values = np.array(image)
    except FileNotFoundError:
        raise ValueError(f'{path} is missing') from None
    except (OSError, SyntaxError) as error:
        raise ValueError(f'{path} cannot be decoded: {error}') from None
    if values.ndim != 2:
        raise ValueError(f'{path} is a colour image of the shape {values.shape}, not an index map')
    return values


def image_size_hw(path: Path) -> tuple[int, int]:
    """Size from the file's header; the pixels are not decoded."""
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except FileNotFoundError:
        raise ValueError(f'{path} is missing') from None
    except OSError as error:
        raise ValueError(f'{path} cannot be decoded: {error}') from None


def progress(items: Iterable, total: int, what: str, every_s: float = 2.0) -> Iterator:
    """Pass items on, saying on stderr how far they are, now and then."""
    last = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        if time.monotonic() - last >= every_s:
            last = time.monotonic()
            print(f'{done} of {total} {what}', file=sys.stderr)


def in_threads(pool, function, items: Iterable, ahead: int = 256) -> Iterator:
    """``pool.map`` that takes items only as results are taken: millions of them fit in no queue."""
    items = iter(items)
    waiting = [pool.submit(function, item) for item in islice(items, ahead)]
    while waiting:
        yield waiting.pop(0).result()
        waiting += [pool.submit(function, item) for item in islice(items, 1)]
