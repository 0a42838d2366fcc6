"""COCO-style annotation and result files: read, checked, and turned into arrays.

Shapes: G annotations or D results of one image, ``H W`` its size.
"""

import json
import math
import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
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


def load_coco(source: JsonFile | Mapping, unchecked: Collection[str] = ()) -> dict:
    """Read a COCO annotation file, or take a parsed one, and check it.

    Args:
        source: The file, or what it holds.
        unchecked: As for :func:`bad_entries`.

    Raises:
        FileNotFoundError, ValueError: The file is missing, is not JSON, or is not COCO.
    """
    if isinstance(source, Mapping):
        return check_entries(check_coco(source), unchecked=unchecked)
    name = os.fspath(source)
    return check_entries(check_coco(read_json(source), name), name, unchecked)


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


def is_finite(values: Any, length: int) -> bool:
    """Whether this is a list of so many finite numbers."""
    return (
        isinstance(values, list | tuple)
        and len(values) == length
        and all(isinstance(v, Real) and math.isfinite(v) for v in values)
    )


SINGULAR = {'images': 'image', 'annotations': 'annotation', 'categories': 'category'}
_INTEGER = 'an integer', lambda value: isinstance(value, Integral)
_TEXT = 'text', lambda value: isinstance(value, str)
_SIDE = 'a positive integer', lambda value: isinstance(value, Integral) and value > 0
_FIELDS = {
    'images': {'id': _INTEGER, 'file_name': _TEXT, 'height': _SIDE, 'width': _SIDE},
    'categories': {'id': _INTEGER, 'name': _TEXT},
    'annotations': {
        'id': _INTEGER,
        'image_id': _INTEGER,
        'category_id': _INTEGER,
        'bbox': ('four finite numbers', lambda value: is_finite(value, 4)),
        'area': ('a finite number', lambda value: is_finite([value], 1)),
    },
}


def entry_name(kind: str, index: int, entry: Any) -> str:
    """What messages call an entry: by its id, or by its place (from 0) if it has none."""
    name = entry.get('id') if isinstance(entry, Mapping) else None
    return f'{kind} {f"number {index}" if name is None else name}'


def bad_entries(
    data: Mapping, unchecked: Collection[str] = ()
) -> Iterator[tuple[str, int, str, str]]:
    """Entries that lack a field or have one of another type.

    Args:
        data: Of :func:`check_coco`.
        unchecked: Fields that need not be there and may hold anything.

    Yields:
        Name of the list, index in it, what to call the entry, what is wrong with it.
    """
    for key, fields in _FIELDS.items():
        fields = {field: rule for field, rule in fields.items() if field not in unchecked}
        for i, entry in enumerate(data[key]):
            if not isinstance(entry, Mapping):
                what = f'is a {type(entry).__name__}, not an object'
            elif missing := [field for field in fields if field not in entry]:
                what = f'lacks {", ".join(missing)}'
            else:
                wrong = (
                    f'has the {field} {entry[field]!r}, which should be {wanted}'
                    for field, (wanted, fits) in fields.items()
                    if not fits(entry[field])
                )
                what = next(wrong, None)
            if what:
                yield key, i, entry_name(SINGULAR[key], i, entry), what


def check_entries(
    data: dict, name: str = 'The annotations', unchecked: Collection[str] = ()
) -> dict:
    """Check the entries of an annotation file (see :func:`check_coco`), and return it.

    Args:
        data, unchecked: As for :func:`bad_entries`.
        name: What errors call the file.

    Raises:
        ValueError: An entry lacks a field or has one of another type, or an annotation is on an
            image that is not listed; says which.
    """
    for _, _, where, what in bad_entries(data, unchecked):
        raise ValueError(f'{name}: {where} {what}. tools/check_data.py lists all such entries.')
    images = {image['id'] for image in data['images']}
    lost = [ann['id'] for ann in data['annotations'] if ann['image_id'] not in images]
    if lost:
        raise ValueError(
            f'{name}: {len(lost)} annotations are on images that it does not list, those with the '
            f'ids {listed(lost, 5)}: add the images, or remove the annotations.'
        )
    return data


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


def base_category_ids(categories: Collection[Mapping], names: Collection[str]) -> set[int]:
    """Ids of the categories with these names.

    Raises:
        ValueError: A name is not among the categories; both sides are listed.
    """
    known = dict.fromkeys(category['name'] for category in categories)
    missing = [name for name in names if name not in known]
    if missing:
        raise ValueError(
            f'{listed(missing)} not among the categories of the annotations, '
            f'which are {listed(known)}.'
        )
    return {category['id'] for category in categories if category['name'] in names}


def listed(names: Iterable, limit: int = 20) -> str:
    """The first names of many, as they look in a message."""
    names = list(names)
    more = f' and {len(names) - limit} more' if len(names) > limit else ''
    return ', '.join(map(repr, names[:limit])) + more
