"""Deterministic photo-like scenes in COCO format: a data set of any size with no download.

Each image is a textured, unevenly lit background with shaded, textured objects that cast shadows,
hide each other, leave the frame and go down to a few pixels. The kinds in ``KNOWN`` appear
everywhere; those in ``NOVEL`` only in the validation split and in hues of their own, so that recall
on objects never seen in training can be measured. Masks are modal (the visible part).

The same arguments give the same bytes on one build of NumPy and OpenCV, and image ``i`` of a split
does not depend on how many images are made.

Legend: H W image, s side of the square patch an object is drawn in; ``u v`` [s, s] are the object's
own coordinates, its extent being about [-1, 1].
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from hotcoco import mask as coco_mask

from mmdet_plugins.common.files import atomic_write

Array = np.ndarray
Shape = Callable[[Array, Array, np.random.Generator], Array]


def _polar(u: Array, v: Array) -> tuple[Array, Array]:
    return np.hypot(u, v), np.arctan2(v, u)


def _disc(u: Array, v: Array, rng: np.random.Generator) -> Array:
    return u**2 + v**2 < 1


def _box(u: Array, v: Array, rng: np.random.Generator) -> Array:
    corner = rng.uniform(0.05, 0.3)
    du, dv = (np.maximum(np.abs(x) - 0.85 + corner, 0) for x in (u, v))
    return du**2 + dv**2 < corner**2


def _star(u: Array, v: Array, rng: np.random.Generator) -> Array:
    radius, angle = _polar(u, v)
    points, depth = int(rng.integers(4, 8)), rng.uniform(0.35, 0.55)
    return radius < 1 - depth * np.abs((points * angle / np.pi) % 2 - 1)


def _blob(u: Array, v: Array, rng: np.random.Generator) -> Array:
    radius, angle = _polar(u, v)
    limit = np.full_like(radius, 0.78)
    for order in range(2, 5):
        limit += rng.uniform(0.03, 0.2) / order * np.cos(order * angle + rng.uniform(0, 2 * np.pi))
    return radius < limit


def _capsule(u: Array, v: Array, rng: np.random.Generator) -> Array:
    width = rng.uniform(0.3, 0.45)
    return np.maximum(np.abs(u) - 1 + width, 0) ** 2 + v**2 < width**2


def _ring(u: Array, v: Array, rng: np.random.Generator) -> Array:
    return np.abs(np.hypot(u, v) - 0.75) < rng.uniform(0.15, 0.25)


def _cross(u: Array, v: Array, rng: np.random.Generator) -> Array:
    width = rng.uniform(0.25, 0.38)
    return (np.minimum(abs(u), abs(v)) < width) & (np.maximum(abs(u), abs(v)) < 0.95)


def _crescent(u: Array, v: Array, rng: np.random.Generator) -> Array:
    return (u**2 + v**2 < 1) & ((u - rng.uniform(0.4, 0.6)) ** 2 + v**2 > 0.6)


def _heart(u: Array, v: Array, rng: np.random.Generator) -> Array:
    x, y = 1.2 * u, 0.2 - 1.15 * v
    return (x**2 + y**2 - 0.8) ** 3 < x**2 * y**3


KNOWN: dict[str, Shape] = dict(disc=_disc, box=_box, star=_star, blob=_blob, capsule=_capsule)
NOVEL: dict[str, Shape] = dict(ring=_ring, cross=_cross, crescent=_crescent, heart=_heart)
CATEGORIES = [
    dict(id=i, name=name, supercategory='known' if name in KNOWN else 'novel')
    for i, name in enumerate((*KNOWN, *NOVEL), 1)
]
_CATEGORY_ID = {category['name']: category['id'] for category in CATEGORIES}
# OpenCV hues (0-180). Novel kinds keep to the violet and pink that no known kind has.
KNOWN_HUES, NOVEL_HUES = (0, 125), (130, 170)
PATTERNS = ('plain', 'grain', 'tiles')
_SUPERSAMPLE = 4
_MIN_AREA_PX = 12
_MIN_VISIBLE = 0.3


class Instance(NamedTuple):
    """One annotated region: its kind, visible mask [H, W] bool, and whether it is a group."""

    kind: str
    mask: Array
    crowd: bool


def _noise(rng: np.random.Generator, hw: tuple[int, int], cells: int, octaves: int = 4) -> Array:
    """Smooth noise [H, W] float32 in about [-1, 1], ``cells`` bumps across at the first octave."""
    h, w = hw
    total = np.zeros(hw, np.float32)
    for octave in range(octaves):
        side = cells * 2**octave + 2
        grid = rng.uniform(-1, 1, (side, side)).astype(np.float32)
        total += cv2.resize(grid, (w, h), interpolation=cv2.INTER_CUBIC) / 2**octave
    return total / 1.9


def _colour(rng: np.random.Generator, hues: tuple[int, int], sat: tuple, val: tuple) -> Array:
    hsv = np.uint8([[[rng.integers(*hues), rng.integers(*sat), rng.integers(*val)]]])
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)[0, 0].astype(np.float32)


def background(rng: np.random.Generator, hw: tuple[int, int], pattern: str | None = None) -> Array:
    """Ground of a scene, [H, W, 3] float32 BGR 0-255: two muted colours mixed by a pattern.

    Args:
        rng: source of every choice.
        hw: height and width, px.
        pattern: one of ``PATTERNS``, or any.
    """
    h, w = hw
    y, x = np.mgrid[:h, :w].astype(np.float32)
    angle, pitch = rng.uniform(0, np.pi), rng.uniform(10, 40)
    along = (x * np.cos(angle) + y * np.sin(angle)) / pitch
    across = (y * np.cos(angle) - x * np.sin(angle)) / pitch
    noise = _noise(rng, hw, int(rng.integers(2, 6)))
    pattern = pattern or rng.choice(PATTERNS, p=[0.5, 0.3, 0.2])
    if pattern == 'grain':
        mix = 0.5 + 0.3 * np.sin(2 * np.pi * along + 2.5 * noise) + 0.2 * noise
    elif pattern == 'tiles':
        mix = 0.3 + 0.4 * ((np.floor(along) + np.floor(across)) % 2) + 0.2 * noise
    else:
        mix = 0.5 + 0.5 * noise
    first = _colour(rng, (0, 180), (10, 110), (50, 220))
    second = np.clip(first * rng.uniform(0.6, 1.5) + rng.uniform(-15, 15, 3), 10, 245)
    mix = np.clip(mix, 0, 1)[..., None]
    return first * mix + second.astype(np.float32) * (1 - mix)


def texture(rng: np.random.Generator, u: Array, v: Array, hues: tuple[int, int]) -> Array:
    """Paint of an object, [s, s, 3] float32 BGR: one colour or a pattern of two, lit as a bulge."""
    first = _colour(rng, hues, (90, 256), (90, 256))
    paint = np.broadcast_to(first, (*u.shape, 3))
    pattern, pitch = rng.choice(['plain', 'stripes', 'checks', 'dots']), rng.uniform(2, 5)
    if pattern != 'plain':
        waves = np.sin(pitch * u + rng.uniform(0, 6)), np.sin(pitch * v + rng.uniform(0, 6))
        mix = dict(stripes=waves[0], checks=waves[0] * waves[1], dots=waves[0] + waves[1] - 1)
        second = _colour(rng, hues, (40, 256), (60, 256))
        paint = np.where((mix[str(pattern)] > 0)[..., None], second, paint)
    light = rng.uniform(0, 2 * np.pi)
    slope = u * np.cos(light) + v * np.sin(light)
    shade = 1 + rng.uniform(0.1, 0.35) * slope - rng.uniform(0, 0.25) * (u**2 + v**2)
    gloss = rng.uniform(0, 120) * np.exp(
        -12 * ((u - 0.4 * np.cos(light)) ** 2 + (v - 0.4 * np.sin(light)) ** 2)
    )
    return paint * shade[..., None] + gloss[..., None] + rng.normal(0, 4, (*u.shape, 1))


class Canvas:
    """An image under construction and the visible mask of what was drawn on it so far."""

    def __init__(self, rng: np.random.Generator, hw: tuple[int, int]) -> None:
        self.rng, self.hw = rng, hw
        self.image = background(rng, hw)
        self.instances: list[Instance] = []
        self.shadow = rng.uniform(-0.35, 0.35, 2), rng.uniform(0.15, 0.5)
        self._full_area: list[int] = []

    def draw(self, kind: str, centre_xy: Array, radius: float, aspect: float = 1) -> Array | None:
        """Draw an object over the others.

        Returns:
            Its mask [H, W] bool; None, and nothing drawn, where it is too small or hides too much.
        """
        rng, (h, w) = self.rng, self.hw
        shape = (KNOWN | NOVEL)[kind]
        side = 2 * int(np.ceil(radius)) + 3
        x0, y0 = (int(np.floor(c)) - side // 2 for c in centre_xy)
        fine = (np.arange(side * _SUPERSAMPLE) + 0.5) / _SUPERSAMPLE
        x, y = np.meshgrid(fine + x0 - centre_xy[0], fine + y0 - centre_xy[1])
        angle = rng.uniform(0, 2 * np.pi)
        u = (x * np.cos(angle) + y * np.sin(angle)) / radius
        v = (y * np.cos(angle) - x * np.sin(angle)) / (radius * aspect)
        inside = shape(u, v, rng).astype(np.float32)
        alpha = cv2.resize(inside, (side, side), interpolation=cv2.INTER_AREA)
        u, v = (cv2.resize(c, (side, side), interpolation=cv2.INTER_AREA) for c in (u, v))

        top, left = max(0, -y0), max(0, -x0)
        bottom, right = min(side, h - y0), min(side, w - x0)
        if bottom <= top or right <= left:
            return None
        patch = slice(top, bottom), slice(left, right)
        frame = slice(y0 + top, y0 + bottom), slice(x0 + left, x0 + right)
        mask = np.zeros(self.hw, bool)
        mask[frame] = alpha[patch] >= 0.5
        if mask.sum() < _MIN_AREA_PX or self._hides_too_much(mask):
            return None

        offset, strength = self.shadow
        cast = np.float32([[1, 0, x0 + offset[0] * radius], [0, 1, y0 + offset[1] * radius]])
        shadow = cv2.GaussianBlur(cv2.warpAffine(alpha, cast, (w, h)), (0, 0), 0.5 + radius / 8)
        self.image *= 1 - strength * shadow[..., None]
        paint = texture(rng, u, v, KNOWN_HUES if kind in KNOWN else NOVEL_HUES)[patch]
        cover = alpha[patch][..., None]
        self.image[frame] = self.image[frame] * (1 - cover) + np.clip(paint, 0, 255) * cover
        for instance in self.instances:
            instance.mask[mask] = False
        return mask

    def add(self, kind: str, mask: Array, crowd: bool = False) -> None:
        self.instances.append(Instance(kind, mask, crowd))
        self._full_area.append(int(mask.sum()))

    def _hides_too_much(self, mask: Array) -> bool:
        for instance, full in zip(self.instances, self._full_area, strict=True):
            left = int((instance.mask & ~mask).sum())
            if left < max(_MIN_AREA_PX, _MIN_VISIBLE * full):
                return True
        return False

    def develop(self) -> Array:
        """The finished photograph [H, W, 3] uint8 BGR: uneven light, lens blur, sensor noise."""
        rng = self.rng
        light = 1 + rng.uniform(0, 0.3) * _noise(rng, self.hw, 1, octaves=1)[..., None]
        image = cv2.GaussianBlur(self.image * light, (0, 0), rng.uniform(0.3, 0.8))
        image += rng.normal(0, rng.uniform(1, 5), image.shape)
        return np.clip(image, 0, 255).round().astype(np.uint8)


def make_scene(
    rng: np.random.Generator,
    hw: tuple[int, int],
    kinds: list[str],
    objects: int,
    crowd: bool,
    large: bool = False,
) -> tuple[Array, list[Instance]]:
    """Draw one scene.

    Args:
        rng: source of every choice.
        hw: height and width, px.
        kinds: names from ``KNOWN`` and ``NOVEL`` to choose from.
        objects: how many placements are tried; a few are dropped for hiding others too much.
        crowd: add a heap of small objects, annotated as one crowd region.
        large: only objects whose radius is 0.22 to 0.4 of the shorter side.

    Returns:
        The image [H, W, 3] uint8 BGR and its instances, masks disjoint and none empty.
    """
    canvas = Canvas(rng, hw)
    h, w = hw
    if crowd:
        heap, kind = np.zeros(hw, bool), str(rng.choice(kinds))
        middle = rng.uniform(0.2, 0.8, 2) * (w, h)
        for _ in range(30):
            mask = canvas.draw(kind, middle + rng.normal(0, min(hw) / 12, 2), rng.uniform(3, 6))
            heap |= False if mask is None else mask
        canvas.add(kind, heap, crowd=True)
    if large:
        spans = np.array([(0.22, 0.4)]) * min(hw)
    else:  # half the objects are of middling size; tiny and large ones take a quarter each
        spans = np.array([(3.0, 6.0), (7.0, 18.0), (7.0, 18.0), (18.0, 0.3 * min(hw))])
    for span in sorted(rng.choice(spans, objects), key=lambda span: -span[0]):
        kind, radius = str(rng.choice(kinds)), np.exp(rng.uniform(*np.log(span)))
        centre = rng.uniform(-0.02, 1.02, 2) * (w, h)
        mask = canvas.draw(kind, centre, radius, aspect=rng.uniform(0.6, 1))
        if mask is not None:
            canvas.add(kind, mask)
    return canvas.develop(), canvas.instances


def _polygons(mask: Array) -> list[list[float]] | None:
    """Outline of a mask along pixel edges, one polygon a part; None if a polygon cannot say it."""
    fine = mask.repeat(4, 0).repeat(4, 1).astype(np.uint8)
    contours, hierarchy = cv2.findContours(fine, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    if (hierarchy[0, :, 3] >= 0).any():
        return None
    outlines = [(cv2.approxPolyDP(c, 2, True)[:, 0] + 0.5) / 4 for c in contours]
    return [outline.round(2).ravel().tolist() for outline in outlines if len(outline) > 2] or None


def _uncompressed_rle(mask: Array) -> dict:
    flat = np.concatenate([[False], mask.ravel(order='F'), [False]])
    edges = np.flatnonzero(np.diff(flat))
    counts = np.diff(np.concatenate([[0], edges, [mask.size]]))
    return dict(size=list(mask.shape), counts=counts[: len(counts) - (counts[-1] == 0)].tolist())


def annotate(instance: Instance, as_polygon: bool) -> dict:
    """COCO annotation without ids: polygons or RLE, uncompressed RLE for a crowd as COCO has it.

    ``area`` and ``bbox`` are those of the mask that the stored segmentation decodes to.
    """
    mask = instance.mask
    polygons = _polygons(mask) if as_polygon and not instance.crowd else None
    if polygons:
        rle = coco_mask.merge(coco_mask.frPyObjects(polygons, *mask.shape))
        segmentation: object = polygons
    else:
        rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
        counts = rle['counts']
        counts = counts.decode() if isinstance(counts, bytes) else counts
        segmentation = dict(size=list(mask.shape), counts=counts)
    if instance.crowd:
        segmentation = _uncompressed_rle(mask)
    return dict(
        category_id=_CATEGORY_ID[instance.kind],
        bbox=[float(x) for x in np.asarray(coco_mask.toBbox(rle)).ravel()],
        area=float(np.asarray(coco_mask.area(rle)).item()),
        iscrowd=int(instance.crowd),
        segmentation=segmentation,
    )


def make_demo_data(
    out_dir: str | Path,
    num_train: int = 320,
    num_val: int = 80,
    size_hw: tuple[int, int] = (160, 224),
    seed: int = 0,
    large: bool = False,
) -> None:
    """Write ``images/*.jpg``, ``instances_train.json`` and ``instances_val.json`` to a folder.

    Every sixteenth image is empty, every eighth has a crowd. The training file lists the known
    kinds only; in the validation file nearly half of the objects are novel.

    Args:
        out_dir: made if need be; files of the same name are replaced.
        num_train: images of the training split.
        num_val: images of the validation split.
        size_hw: typical size, px. Each image takes it, a wider, a narrower or an upright variant.
        seed: every image is a function of (seed, split, index).
        large: one to three large objects an image instead of four to twelve of any size, and no
            crowds: what a feature map of stride 32 still shows.

    Raises:
        ValueError: a side below 64 px leaves no room for the objects.
    """
    if min(size_hw) < 64:
        raise ValueError(f'size_hw={tuple(size_hw)}: sides below 64 px leave no room for objects')
    out_dir = Path(out_dir)
    (out_dir / 'images').mkdir(parents=True, exist_ok=True)
    h, w = size_hw
    sizes = [(h, w), (h - h // 10, w), (h, w - w // 7), (w - w // 8, h)]
    for split_index, (split, count) in enumerate(dict(train=num_train, val=num_val).items()):
        kinds = [*KNOWN, *(NOVEL if split == 'val' else {})]
        images, annotations = [], []
        for index in range(count):
            rng = np.random.default_rng([seed, split_index, index])
            hw = sizes[rng.integers(len(sizes))]
            objects = 0 if index % 16 == 15 else int(rng.integers(*((1, 4) if large else (4, 13))))
            crowd = index % 8 == 3 and not large
            image, instances = make_scene(rng, hw, kinds, objects, crowd, large)
            image_id, name = index + 1, f'{split}_{index:05d}.jpg'
            _, encoded = cv2.imencode('.jpg', image, [cv2.IMWRITE_JPEG_QUALITY, 92])
            (out_dir / 'images' / name).write_bytes(encoded.tobytes())
            images.append(dict(id=image_id, file_name=name, height=hw[0], width=hw[1]))
            for instance in instances:
                record = annotate(instance, as_polygon=bool(rng.integers(2)))
                annotations.append(dict(id=len(annotations) + 1, image_id=image_id, **record))
        content = dict(
            info=dict(description=f'synthetic scenes, seed {seed}'),
            images=images,
            annotations=annotations,
            categories=[category for category in CATEGORIES if category['name'] in kinds],
        )
        with atomic_write(out_dir / f'instances_{split}.json') as file:
            json.dump(content, file)
