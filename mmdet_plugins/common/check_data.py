"""Find what is wrong with a COCO-style data set before a training run does.

Errors are what a run dies of, or what silently loses or falsifies objects; warnings are what it
survives, but the user may want to know. The kinds of both, with their mends, are in ``KINDS``.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hotcoco import mask as rle_ops
from PIL import Image, UnidentifiedImageError

from ..ops.coco_json import SINGULAR, JsonFile, bad_entries, is_finite, read_json
from ..ops.rle import segmentation_to_rle
from .uvo import coco_or_uvo

# kind: (whether it is an error, how to mend it)
KINDS = {
    'file': (True, 'give a COCO annotation file that is complete'),
    'empty': (True, 'check that this is the right file'),
    'field': (True, 'add the field, or remove the entry'),
    'duplicate-id': (True, 'give every entry an id of its own'),
    'unknown-image': (True, 'add the image, or remove the annotation'),
    'unknown-category': (True, 'add the category, or correct the id'),
    'box-not-finite': (True, 'recompute the box from the mask, or remove the annotation'),
    'box-inverted': (True, 'write boxes as x, y, width, height with positive sizes'),
    'box-empty': (True, 'remove the annotation: training drops it'),
    'box-outside': (True, 'correct the box, or remove the annotation: training drops it'),
    'area-not-positive': (True, 'recompute the area: training drops the object'),
    'polygon': (True, 'write polygons as flat lists of three points x, y or more'),
    'rle': (True, 'encode the mask again'),
    'mask-empty': (True, 'remove the annotation, or encode the mask again'),
    'image-missing': (True, 'supply the file, or correct the folder'),
    'image-corrupt': (True, 'fetch or export the file again'),
    'image-truncated': (True, 'fetch the file again: training sees grey where it ends'),
    'image-size': (True, 'correct width and height, or supply the image that was annotated'),
    'image-rotated': (True, 'turn the pixels as annotated and drop the EXIF tag'),
    'id-zero': (False, 'start ids at 1: pycocotools counts an object with id 0 as missed'),
    'duplicate-name': (False, 'rename or merge the categories'),
    'duplicate-file': (False, 'list every image once'),
    'box-beyond-image': (False, 'clip the box: training does'),
    'box-off-mask': (False, 'check that boxes are x, y, width, height, not two corners'),
    'area-mismatch': (False, 'recompute the area: it decides small, medium and large'),
    'mask-missing': (False, 'leave it if only boxes are used'),
    'image-exif': (False, 'nothing, if it was annotated as shown: training reads it so'),
    'image-tiny': (False, 'leave it out (filter_cfg=dict(min_size=32)): it vanishes at stride 32'),
    'image-huge': (False, 'shrink it, or cut it: decoding it slows every epoch'),
    'image-grey': (False, 'nothing, if it may be read as three equal channels'),
    'image-cmyk': (False, 'convert it to RGB: decoders differ in what they make of it'),
    'image-alpha': (False, 'flatten it onto a background: transparency is dropped'),
    'image-mode': (False, 'convert it to 8-bit RGB'),
}
TINY_SIDE_PX = 16
HUGE_PIXELS = 16_000_000
_EXIF_ORIENTATION = 274


@dataclass(frozen=True)
class Problem:
    """One finding: its kind, the file or entry it is in, and what is the matter there."""

    kind: str
    where: str
    what: str

    @property
    def is_error(self) -> bool:
        return KINDS[self.kind][0]

    @property
    def mend(self) -> str:
        return KINDS[self.kind][1]

    def __str__(self) -> str:
        level = 'error' if self.is_error else 'warning'
        return f'{level}: {self.where}: {self.what} [{self.kind}] -> {self.mend}'


def check_data(
    ann_file: JsonFile,
    image_root: str | os.PathLike | None = None,
    workers: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Problem]:
    """Check an annotation file (COCO, or UVO of either layout) and the images it lists.

    Args:
        ann_file: The annotation file.
        image_root: Folder its file names are relative to; ``None`` leaves images alone.
        workers: Threads that decode images.
        progress: Called with the number of images done and their total.
    """
    try:
        data = coco_or_uvo(read_json(ann_file), os.fspath(ann_file))
    except (OSError, ValueError) as error:
        return [Problem('file', os.fspath(ann_file), str(error).removeprefix(f'{ann_file}: '))]
    problems = list(check_annotations(data))
    if image_root is not None:
        images = [
            image
            for image in data['images']
            if isinstance(image, dict) and isinstance(image.get('file_name'), str)
        ]
        with ThreadPoolExecutor(workers) as pool:
            found = pool.map(lambda image: list(check_image(image, image_root)), images)
            for done, new in enumerate(found, start=1):
                problems += new
                progress(done, len(images))
    return problems


def check_annotations(data: Mapping) -> Iterator[Problem]:
    """Problems of a parsed COCO annotation file (see :func:`.coco_json.check_coco`)."""
    for key in ('images', 'annotations', 'categories'):
        if not data[key]:
            yield Problem('empty', key, f'the list of {key} is empty')
    bad = defaultdict(set)
    # Sizes, boxes and areas have checks of their own below.
    for key, i, where, what in bad_entries(data, ('height', 'width', 'bbox', 'area')):
        yield Problem('field', where, what)
        bad[key].add(i)
    usable = {
        key: [entry for i, entry in enumerate(data[key]) if i not in bad[key]] for key in SINGULAR
    }
    for key, entries in usable.items():
        yield from _repeated(entries, 'id', 'duplicate-id', key)
    yield from _repeated(usable['images'], 'file_name', 'duplicate-file', 'images')
    yield from _repeated(usable['categories'], 'name', 'duplicate-name', 'categories')
    images = {}
    for image in usable['images']:
        size = (image.get('height'), image.get('width'))
        if all(isinstance(v, int) and v > 0 for v in size):
            images[image['id']] = image
        else:
            yield Problem('field', f'image {image["id"]}', f'has height and width {size}')
    categories = {category['id'] for category in usable['categories']}
    listed_images = {image['id'] for image in usable['images']}
    with_masks = any(annotation.get('segmentation') for annotation in usable['annotations'])
    for annotation in usable['annotations']:
        where = f'annotation {annotation["id"]} (image {annotation["image_id"]})'
        if annotation['id'] == 0:
            yield Problem('id-zero', where, 'has id 0')
        if annotation['image_id'] not in listed_images:
            yield Problem('unknown-image', where, 'belongs to an image that is not listed')
        if annotation['category_id'] not in categories:
            yield Problem(
                'unknown-category',
                where,
                f'has category_id {annotation["category_id"]}, which is not listed',
            )
        image = images.get(annotation['image_id'])
        if image is not None:
            for kind, what in _check_object(annotation, image, with_masks):
                yield Problem(kind, where, what)


def _repeated(entries: list[dict], field: str, kind: str, key: str) -> Iterator[Problem]:
    for value, count in Counter(str(entry[field]) for entry in entries).items():
        if count > 1:
            yield Problem(kind, f'{SINGULAR[key]} {value}', f'{count} {key} have this {field}')


def _check_object(annotation: dict, image: dict, with_masks: bool) -> Iterator[tuple[str, str]]:
    """Kind and description of what is wrong with the box, area and mask of one annotation."""
    missing = [field for field in ('bbox', 'area') if field not in annotation]
    if missing:
        yield 'field', f'lacks {", ".join(missing)}'
        return
    size = height, width = image['height'], image['width']
    box, area = annotation['bbox'], annotation['area']
    good_box = False
    if not is_finite(box, 4):
        yield 'box-not-finite', f'has the box {box}'
    else:
        x, y, w, h = box
        inside = (min(x + w, width) - max(x, 0), min(y + h, height) - max(y, 0))
        if w < 0 or h < 0:
            yield 'box-inverted', f'has the box {box}, of negative size'
        elif w < 1 or h < 1:
            yield 'box-empty', f'has the box {box}, thinner than a pixel'
        elif min(inside) <= 0:
            yield 'box-outside', f'has the box {box} outside its {width}x{height} image'
        else:
            good_box = True
            if min(x, y) < -1 or x + w > width + 1 or y + h > height + 1:
                yield 'box-beyond-image', f'has the box {box} in a {width}x{height} image'
    good_area = is_finite([area], 1) and area > 0
    if not good_area:
        yield 'area-not-positive', f'has the area {area}'
    segmentation = annotation.get('segmentation')
    if not segmentation:
        if isinstance(segmentation, list):
            yield 'polygon', 'has an empty list of polygons'
        elif with_masks:
            yield 'mask-missing', 'has no mask, others have'
        if good_box and good_area and area > 1.05 * w * h + 1:
            yield 'area-mismatch', f'has the area {area}, more than its box ({w * h:g})'
        return
    kind = 'rle' if isinstance(segmentation, dict) else 'polygon'
    try:
        rle = segmentation_to_rle(segmentation, size)
        if kind == 'rle' and (total := _num_pixels(rle['counts'])) != height * width:
            raise ValueError(f'an RLE of {total} pixels for {height}x{width}')
        mask_area = int(rle_ops.area(rle))
        mask_box = rle_ops.to_bbox(rle)
    except (ValueError, TypeError, KeyError) as error:
        yield kind, f'has {error}'
        return
    if not mask_area:
        yield 'mask-empty', 'has a mask without a pixel in the image'
        return
    # The area of a polygon and of its pixels differ by up to half its outline.
    if good_area and abs(area - mask_area) > 0.1 * mask_area + mask_box[2] + mask_box[3]:
        yield 'area-mismatch', f'has the area {area}, its mask {mask_area}'
    if good_box:
        iou = rle_ops.bbox_iou(np.array([box], float), mask_box[None], np.zeros(1, bool))[0, 0]
        slack = min(w, h, *mask_box[2:]) > 4  # a pixel more or less is no mistake
        if iou < 0.5 and slack:
            yield (
                'box-off-mask',
                (
                    f'has the box {box}, but its mask spans '
                    f'{[round(v, 1) for v in mask_box.tolist()]}'
                ),
            )


def _num_pixels(counts: str) -> int:
    """Sum of the runs of compressed COCO counts (5 bits a character, a run relative to the one
    before its predecessor)."""
    runs: list[int] = []
    value = shift = 0
    for character in counts:
        code = ord(character) - 48
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            if code & 16:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return sum(runs)


def check_image(image: Mapping, image_root: str | os.PathLike) -> Iterator[Problem]:
    """Problems of one image file, decoded in full.

    Args:
        image: Its entry in ``images``.
        image_root: Folder its ``file_name`` is relative to.
    """
    path = Path(image_root, image['file_name'])
    where = str(path)
    try:
        with Image.open(path) as file:
            size, mode = file.size, file.mode
            turned = file.getexif().get(_EXIF_ORIENTATION, 1)
            huge = size[0] * size[1] > HUGE_PIXELS
            file.load()
    except FileNotFoundError:
        yield Problem('image-missing', where, f'image {image.get("id")} has no file')
        return
    except UnidentifiedImageError:
        yield Problem('image-corrupt', where, f'is not an image ({path.stat().st_size} bytes)')
        return
    except Image.DecompressionBombError as error:
        yield Problem('image-huge', where, str(error))
        return
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        truncated = 'truncated' in str(error) or isinstance(error, EOFError)
        yield Problem('image-truncated' if truncated else 'image-corrupt', where, str(error))
        return
    expected = (image.get('width'), image.get('height'))
    shown = size[::-1] if turned in (5, 6, 7, 8) else size
    if turned not in (0, 1):
        yield Problem(
            'image-exif' if shown == expected else 'image-rotated',
            where,
            f'has the EXIF orientation {turned}: {_by(size)} as stored, '
            f'{_by(shown)} as shown, {_by(expected)} in the JSON',
        )
    elif size != expected:
        yield Problem('image-size', where, f'is {_by(size)}, but {_by(expected)} in the JSON')
    if huge:
        yield Problem('image-huge', where, f'has {size[0] * size[1] / 1e6:.0f} megapixels')
    if min(size) < TINY_SIDE_PX:
        yield Problem('image-tiny', where, f'is {_by(size)}')
    if mode != 'RGB':
        kind = {
            'L': 'image-grey',
            '1': 'image-grey',
            'CMYK': 'image-cmyk',
            'RGBA': 'image-alpha',
            'LA': 'image-alpha',
            'PA': 'image-alpha',
        }.get(mode, 'image-mode')
        yield Problem(kind, where, f'has the colour mode {mode}')


def _by(size_wh: tuple) -> str:
    return f'{size_wh[0]}x{size_wh[1]}'


def summarise(problems: Iterable[Problem]) -> str:
    """A table of how many problems there are of each kind, errors first."""
    counts = Counter(problem.kind for problem in problems)
    if not counts:
        return 'No problem found.'
    order = sorted(counts, key=lambda kind: (not KINDS[kind][0], -counts[kind]))
    return '\n'.join(
        f'{counts[kind]:>8} {"error" if KINDS[kind][0] else "warning":<8}{kind}' for kind in order
    )
