"""How well SOLO's grids fit a data set, and grids, scale ranges and an input size that fit better.

Shapes: I images, G objects of all of them, L levels, S cells a side of a level's grid, P cells of
all levels. A cell can predict one object; of several that want it, the later one gets it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from .coco_json import by_image
from .grid_targets import assign_cells
from .rle import decode_rle, segmentation_to_rle

HEAD_STRIDES = (8, 8, 16, 32, 32)
PAD_DIVISOR = 32
MIN_SIDE_PX = 16
"""Below this an object has fewer than 4 x 4 pixels of the mask, which is predicted at stride 4."""
_SHORT_SIDES = (256, 320, 384, 448, 512, 640, 800, 1024, 1280)
_GRID_SIZES = (*range(12, 68, 4),)


@dataclass(frozen=True)
class GridSetting:
    """What the advice is about; the default is the thesis's, section 3.3.

    Attributes:
        input_size: Longer and shorter side, px, that images are resized to fit in.
        num_grids: S of each level.
        scale_ranges: Of the square root of an object's box area, px, one a level.
    """

    input_size: tuple[int, int] = (1333, 800)
    num_grids: tuple[int, ...] = (40, 36, 24, 16, 12)
    scale_ranges: tuple[tuple[int, int], ...] = (
        (1, 96),
        (48, 192),
        (96, 384),
        (192, 768),
        (384, 2048),
    )


@dataclass(frozen=True)
class GridObjects:
    """Objects of a data set, in pixels of the images as they are stored.

    Attributes:
        image_hw: ``[I, 2]``.
        image_idx: ``[G]``, the image of each object.
        boxes_xyxy: ``[G, 4]`` float64.
        centres_xy: ``[G, 2]`` float64, centres of mass; of the box where there is no mask.
        num_skipped: Annotations without a usable box or mask.
    """

    image_hw: np.ndarray
    image_idx: np.ndarray
    boxes_xyxy: np.ndarray
    centres_xy: np.ndarray
    num_skipped: int

    def __len__(self) -> int:
        return len(self.image_idx)

    def scale(self, input_size: tuple[int, int]) -> np.ndarray:
        """``[I]``, by how much each image is enlarged to fit."""
        long, short = self.image_hw.max(1), self.image_hw.min(1)
        return np.minimum(max(input_size) / long, min(input_size) / short)

    def sides(self, input_size: tuple[int, int]) -> np.ndarray:
        """``[G]``, square roots of box areas in pixels of the input."""
        size_wh = self.boxes_xyxy[:, 2:] - self.boxes_xyxy[:, :2]
        return np.sqrt(size_wh.prod(1)) * self.scale(input_size)[self.image_idx]


@dataclass(frozen=True)
class Fit:
    """How objects fare, on one level or over all of them.

    Attributes:
        wanted: ``[G]`` bool, the object claims a cell.
        contested: ``[G]`` bool, on each level where it claims some, another object claims one too.
        lost: ``[G]`` bool, it claims cells, and others get all of them.
    """

    wanted: np.ndarray
    contested: np.ndarray
    lost: np.ndarray

    def shares(self) -> tuple[float, float, float]:
        """Share of all objects that claim cells; of these, shares contested and lost."""
        count = max(self.wanted.sum(), 1)
        return self.wanted.mean(), self.contested.sum() / count, self.lost.sum() / count


def read_objects(data: Mapping, max_images: int | None = None, seed: int = 0) -> GridObjects:
    """Objects of a COCO annotation file (see :func:`.coco_json.load_coco`), crowds left out.

    Args:
        data: The parsed and checked file.
        max_images: Measure a random sample of this many images.
        seed: Of the sample.

    Raises:
        ValueError: No object is left.
    """
    images = data['images']
    if max_images is not None and len(images) > max_images:
        chosen = np.random.default_rng(seed).choice(len(images), max_images, replace=False)
        images = [images[i] for i in sorted(chosen)]
    annotations_of = by_image(a for a in data['annotations'] if not a.get('iscrowd'))
    sizes, image_idx, boxes, centres = [], [], [], []
    skipped = 0
    for index, image in enumerate(images):
        size = image['height'], image['width']
        sizes.append(size)
        found, masks = [], []
        for annotation in annotations_of[image['id']]:
            x, y, width, height = annotation['bbox']
            try:
                mask = annotation.get('segmentation')
                mask = segmentation_to_rle(mask, size) if mask else None
            except ValueError:
                skipped += 1
                continue
            if not (width >= 1 and height >= 1):  # data sets drop it too
                skipped += 1
                continue
            found.append((x, y, x + width, y + height))
            masks.append(mask)
        image_idx += [index] * len(found)
        boxes += found
        centres += _centres(masks, found)
    if not boxes:
        raise ValueError(f'no object to measure among {len(data["annotations"])} annotations.')
    return GridObjects(
        np.array(sizes, np.float64),
        np.array(image_idx),
        np.array(boxes, np.float64),
        np.array(centres, np.float64),
        skipped,
    )


def _centres(rles: list[dict | None], boxes_xyxy: list[tuple]) -> list[tuple[float, float]]:
    centres = []
    for rle, (x1, y1, x2, y2) in zip(rles, boxes_xyxy, strict=True):
        # the crop is all of the mask, unless the box is wrong
        left, top = max(math.floor(x1), 0), max(math.floor(y1), 0)
        window = slice(top, math.ceil(y2)), slice(left, math.ceil(x2))
        crop = None if rle is None else decode_rle([rle])[0][window]
        if crop is None or not crop.any():
            centres.append(((x1 + x2) / 2, (y1 + y2) / 2))
            continue
        columns, rows = crop.sum(0), crop.sum(1)
        area = columns.sum()
        centres.append(
            (
                left + (columns @ np.arange(len(columns))) / area,
                top + (rows @ np.arange(len(rows))) / area,
            )
        )
    return centres


def fit(objects: GridObjects, setting: GridSetting) -> tuple[list[Fit], Fit]:
    """How the objects fare on each level, and over all levels.

    As in training on images of the size that testing has, one a batch, padded to multiples of 32.
    """
    scale = objects.scale(setting.input_size)
    canvas = np.ceil(np.round(objects.image_hw * scale[:, None]) / PAD_DIVISOR) * PAD_DIVISOR
    per_object = scale[objects.image_idx, None]
    cells = assign_cells(
        torch.from_numpy(objects.centres_xy * per_object).float(),
        torch.from_numpy(objects.boxes_xyxy * per_object).float(),
        torch.from_numpy(canvas[objects.image_idx]).float(),
        grid_sizes=setting.num_grids,
        scale_ranges=setting.scale_ranges,
    ).numpy()  # [G, L, 9]
    num_cells = sum(size**2 for size in setting.num_grids)
    owner_idx, level, _ = claims = (cells >= 0).nonzero()
    place = cells[claims] + objects.image_idx[owner_idx] * num_cells
    _, place = np.unique(place, return_inverse=True)
    owner = np.zeros(place.max(initial=-1) + 1, np.int64)
    owner[place] = owner_idx  # objects come in order: the later one stays

    def on_levels(flags: np.ndarray) -> np.ndarray:
        hits = np.zeros(cells.shape[:2], bool)
        hits[owner_idx[flags], level[flags]] = True
        return hits

    wanted = on_levels(np.ones(len(place), bool))
    contested = on_levels(np.bincount(place)[place] > 1)
    held = on_levels(owner[place] == owner_idx)
    levels = [
        Fit(wanted[:, i], contested[:, i], wanted[:, i] & ~held[:, i])
        for i in range(wanted.shape[1])
    ]
    claimed = wanted.any(1)
    overall = Fit(claimed, claimed & (contested | ~wanted).all(1), claimed & ~held.any(1))
    return levels, overall


def propose(objects: GridObjects, max_share: float = 0.01) -> GridSetting:
    """A setting that fits the objects.

    The input is the smallest at which 19 of 20 objects measure ``MIN_SIDE_PX`` and few are lost,
    without enlarging the median image more than twice. Scale ranges keep the thesis's pattern,
    where each object falls into two neighbouring levels; but their bounds are quantiles, so that
    the levels share the objects evenly, at least a factor of the square root of two apart, and
    such that an object spans two cells or more of its level's features. A grid is the smallest
    on which few of its objects are lost.

    Args:
        objects: Of the training set.
        max_share: Of the objects, that may be lost at a level and in all.
    """
    largest = max(2 * np.median(objects.image_hw.min(1)), _SHORT_SIDES[0])
    aspect = np.quantile(objects.image_hw.max(1) / objects.image_hw.min(1), 0.95)
    input_sizes = [
        (max(short, round(short * aspect / PAD_DIVISOR) * PAD_DIVISOR), short)
        for short in _SHORT_SIDES
        if short <= largest
    ]
    for input_size in input_sizes:
        sides = objects.sides(input_size)
        if np.quantile(sides, 0.05) < MIN_SIDE_PX and input_size != input_sizes[-1]:
            continue
        setting = GridSetting(input_size, scale_ranges=_scale_ranges(sides))
        setting = _with_grids(objects, setting, max_share)
        if fit(objects, setting)[1].shares()[2] <= max_share:
            break
    return setting


def _scale_ranges(sides: np.ndarray) -> tuple[tuple[int, int], ...]:
    num_levels = len(HEAD_STRIDES)
    bounds = []
    for i in range(num_levels):
        deepest = HEAD_STRIDES[min(i + 1, num_levels - 1)]  # of the levels that start here
        low = max(np.quantile(sides, (i + 1) / (num_levels + 1)), 2 * deepest)
        bounds.append(max(low, bounds[-1] * math.sqrt(2)) if bounds else low)
    bounds = [round(bound) for bound in bounds]
    top = max(2048, math.ceil(sides.max()))
    lows = [1, *bounds[: num_levels - 1]]
    highs = [*bounds[1:num_levels], top]
    return tuple(zip(lows, highs, strict=True))


def _with_grids(objects: GridObjects, setting: GridSetting, max_share: float) -> GridSetting:
    """The smallest grids at which no level loses more than ``max_share`` of its objects."""
    chosen: list[int | None] = [None] * len(setting.scale_ranges)
    for size in _GRID_SIZES:
        trial = replace(setting, num_grids=(size,) * len(chosen))
        for i, level in enumerate(fit(objects, trial)[0]):
            if chosen[i] is None and level.shares()[2] <= max_share:
                chosen[i] = size
        if None not in chosen:
            break
    return replace(setting, num_grids=tuple(size or _GRID_SIZES[-1] for size in chosen))
