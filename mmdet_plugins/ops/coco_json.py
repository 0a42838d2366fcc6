"""COCO-style annotation and result files: read, checked, and turned into arrays.

Shapes: G annotations or D results of one image, ``H W`` its size.
"""

import json
import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hotcoco import mask as rle_ops

from .rle import segmentation_to_rle

JsonFile = str | os.PathLike


@dataclass(frozen=True)
class Objects:
    """Annotated objects of one image.

    Attributes:
        boxes_xywh: ``[G, 4]`` float64, pixels.
        areas: ``[G]`` float64, pixels squared; decides small, medium and large.
        crowd: ``[G]`` bool, regions in which detections are ignored.
        rles: G COCO RLE masks; not needed for boxes.
        base: ``[G]`` bool, objects of the classes seen in training; not needed without a split.
    """

    boxes_xywh: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    rles: Sequence[dict] | None = None
    base: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.boxes_xywh)


@dataclass(frozen=True)
class Detections:
    """Detections of one image, in any order.

    Attributes:
        boxes_xywh: ``[D, 4]``, pixels.
        scores: ``[D]``.
        rles: D COCO RLE masks; not needed for boxes.
    """

    boxes_xywh: np.ndarray
    scores: np.ndarray
    rles: Sequence[dict] | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, index: np.ndarray) -> 'Detections':
        rles = None if self.rles is None else [self.rles[i] for i in index]
        return Detections(self.boxes_xywh[index], self.scores[index], rles)


def read_json(path: JsonFile) -> Any:
    """Parse a JSON file; a missing, truncated or other file is named in the error.

    Raises:
        FileNotFoundError, ValueError: With one sentence that says what is wrong with which file.
    """
    path = Path(path)
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f'{path}: there is no such file.') from None
    except IsADirectoryError:
        raise ValueError(f'{path}: this is a folder; give the JSON file itself.') from None
    except UnicodeDecodeError:
        raise ValueError(f'{path}: this is not a JSON file (not even text).') from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f'{path}: not valid JSON at line {error.lineno}, column {error.colno} '
            f'({error.msg}). If it was cut short, fetch or write it again.'
        ) from None


def load_coco(source: JsonFile | Mapping) -> dict:
    """Read a COCO annotation file, or take a parsed one.

    Raises:
        FileNotFoundError, ValueError: The file is missing, is not JSON, or is not COCO.
    """
    if isinstance(source, Mapping):
        return check_coco(source)
    return check_coco(read_json(source), os.fspath(source))


def check_coco(data: Any, name: str = 'The annotations') -> dict:
    """Check the outline of a parsed COCO annotation file, which errors call ``name``.

    Returns:
        It as a dict: ``images``, ``annotations`` and ``categories`` are lists.
    """
    if isinstance(data, list):
        raise ValueError(
            f'{name}: this is a list, which is how COCO results look; '
            'annotations are an object with images, annotations and categories.'
        )
    if not isinstance(data, Mapping):
        raise ValueError(
            f'{name}: not a COCO annotation file: an object with images, annotations '
            f'and categories is needed, this is a {type(data).__name__}.'
        )
    if 'videos' in data and 'images' not in data:
        raise ValueError(
            f'{name}: this lists videos, not images. '
            'Use UVODataset, or convert it with tools/convert/uvo_to_coco.py.'
        )
    for key in ('images', 'annotations', 'categories'):
        if not isinstance(data.get(key), list):
            found = ', '.join(sorted(map(str, data))[:6]) or 'nothing'
            raise ValueError(
                f'{name}: not a COCO annotation file: it has no list "{key}" (it has {found}).'
            )
    return dict(data)


def load_results(source: JsonFile | list) -> list[dict]:
    """Read a COCO result file (or take a parsed one) and check its outline.

    Raises:
        FileNotFoundError, ValueError: The file is missing, is not JSON, or is not a result list.
    """
    name = 'The results' if isinstance(source, list) else os.fspath(source)
    data = source if isinstance(source, list) else read_json(source)
    if not isinstance(data, list):
        raise ValueError(
            f'{name}: COCO results are a list of objects with image_id, category_id, '
            f'score and bbox or segmentation; this is a {type(data).__name__}.'
        )
    for i, result in enumerate(data):
        if (
            not isinstance(result, dict)
            or not {'image_id', 'score'} <= result.keys()
            or not result.keys() & {'bbox', 'segmentation'}
        ):
            raise ValueError(
                f'{name}: entry {i} is not a COCO result: it needs image_id, score, '
                'and bbox or segmentation.'
            )
    return data


def to_objects(
    annotations: Iterable[Mapping],
    image: Mapping,
    with_masks: bool = False,
    base_ids: Collection[int] | None = None,
) -> Objects:
    """Annotations of one image as arrays.

    Args:
        annotations: COCO annotations of that image.
        image: Its entry in ``images``; the size is needed with masks only.
        with_masks: Whether the masks are needed too.
        base_ids: Category ids of the base classes, if the split is wanted.

    Raises:
        ValueError: A mask is missing or broken; the annotation is named.
    """
    annotations = list(annotations)
    rles = None
    if with_masks:
        rles = []
        for ann in annotations:
            try:
                rle = segmentation_to_rle(
                    ann.get('segmentation'), (image['height'], image['width'])
                )
            except (KeyError, ValueError) as error:
                raise ValueError(
                    f'Annotation {ann.get("id")} of image {image["id"]} has no usable mask '
                    f'({error}); tools/check_data.py lists all of them.'
                ) from None
            rles.append(rle)
    return Objects(
        boxes_xywh=np.array([ann['bbox'] for ann in annotations], np.float64).reshape(-1, 4),
        areas=np.array([ann['area'] for ann in annotations], np.float64),
        crowd=np.array([bool(ann.get('iscrowd', 0)) for ann in annotations], bool),
        rles=rles,
        base=None
        if base_ids is None
        else np.array([ann['category_id'] in base_ids for ann in annotations], bool),
    )


def to_detections(results: Iterable[Mapping], with_masks: bool = False) -> Detections:
    """COCO results of one image as arrays; a result without a box gets its mask's."""
    results = list(results)
    boxes = [r['bbox'] if 'bbox' in r else rle_ops.to_bbox(r['segmentation']) for r in results]
    rles = None
    if with_masks:
        missing = [r['image_id'] for r in results if 'segmentation' not in r]
        if missing:
            raise ValueError(
                f'A result of image {missing[0]} has no segmentation, so its mask '
                "cannot be evaluated; evaluate 'bbox' only."
            )
        rles = [r['segmentation'] for r in results]
    return Detections(
        np.array(boxes, np.float64).reshape(-1, 4),
        np.array([r['score'] for r in results], np.float64),
        rles,
    )


def by_image(entries: Iterable[Mapping]) -> dict[int, list]:
    """Annotations or results by image id, within an image by category as in pycocotools."""
    groups = defaultdict(list)
    for entry in sorted(entries, key=lambda entry: entry.get('category_id', 0)):
        groups[entry['image_id']].append(entry)
    return groups


def base_category_ids(categories: Iterable[Mapping], names: Collection[str]) -> set[int]:
    """Ids of the categories with these names.

    Raises:
        ValueError: A name is not among the categories; both sides are listed.
    """
    ids = {category['name']: category['id'] for category in categories}
    missing = [name for name in names if name not in ids]
    if missing:
        raise ValueError(
            f'{listed(missing)} not among the categories of the annotations, '
            f'which are {listed(ids)}.'
        )
    return {ids[name] for name in names}


def listed(names: Iterable, limit: int = 20) -> str:
    """The first names of many, as they look in a message."""
    names = list(names)
    more = f' and {len(names) - limit} more' if len(names) > limit else ''
    return ', '.join(map(repr, names[:limit])) + more
