"""Synthetic scenes with panoptic annotation or mattes: sets of any size without a download.

Objects and grounds are drawn as those of the demo set (:mod:`mmdet_plugins.common.synthetic`). For
panoptic annotation the ground is divided between two of its patterns, which are the stuff classes.
For mattes, objects fade out over several pixels and have hair.

``python -m mmdet_plugins.solo.synthetic panoptic work_dirs/demo/panoptic``, or ``mattes``
"""

import json
import sys
from pathlib import Path

import cv2
import numpy as np

from ..common.files import atomic_write
from ..common.synthetic import (
    KNOWN,
    KNOWN_HUES,
    PATTERNS,
    Canvas,
    background,
    texture,
)
from ..ops.matting import paste_matte
from ..ops.panoptic import encode_id_png

PANOPTIC_CATEGORIES = [
    dict(id=i, name=name, isthing=int(name in KNOWN))
    for i, name in enumerate((*KNOWN, *PATTERNS), 1)
]
_CATEGORY_ID = {category['name']: category['id'] for category in PANOPTIC_CATEGORIES}


def panoptic_scene(
    rng: np.random.Generator, hw: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Draw one scene.

    Returns:
        The image [H, W, 3] uint8 BGR, its id map int64 [H, W] without void, and the name of the
        category of each segment, 1 and on.
    """
    canvas = Canvas(rng, hw)
    names = rng.permutation(PATTERNS)[:2].tolist()
    grounds = [background(rng, hw, name) for name in names]
    y, x = np.mgrid[: hw[0], : hw[1]]
    angle = rng.uniform(0, np.pi)
    side = (x - hw[1] / 2) * np.cos(angle) + (y - hw[0] / 2) * np.sin(angle)
    beyond = side > rng.uniform(-0.15, 0.15) * min(hw)
    canvas.image = np.where(beyond[..., None], grounds[1], grounds[0])
    ids = 1 + beyond.astype(np.int64)
    for _ in range(int(rng.integers(2, 5))):
        kind = str(rng.choice([*KNOWN]))
        centre = rng.uniform(0.15, 0.85, 2) * (hw[1], hw[0])
        radius = rng.uniform(0.12, 0.28) * min(hw)
        mask = canvas.draw(kind, centre, radius, aspect=rng.uniform(0.7, 1))
        if mask is not None:
            canvas.add(kind, mask)
            names.append(kind)
            ids[mask] = len(names)
    return canvas.develop(), ids, names


def make_panoptic_data(
    out_dir: str | Path,
    num_train: int = 320,
    num_val: int = 80,
    size_hw: tuple[int, int] = (160, 224),
    seed: int = 0,
) -> None:
    """Write ``images/*.jpg``, ``panoptic_{train,val}.json`` and ``panoptic_{train,val}/*.png``.

    Args:
        out_dir: Made if need be; files of the same name are replaced.
        num_train: Images of the training split.
        num_val: Images of the validation split.
        size_hw: Of each image, px; every second one stands upright.
        seed: Every image is a function of (seed, split, index).
    """
    out_dir = Path(out_dir)
    for split_index, (split, count) in enumerate(dict(train=num_train, val=num_val).items()):
        for folder in ('images', f'panoptic_{split}'):
            (out_dir / folder).mkdir(parents=True, exist_ok=True)
        images, annotations = [], []
        for index in range(count):
            rng = np.random.default_rng([seed, split_index, index])
            image, ids, names = panoptic_scene(rng, size_hw[:: -1 if index % 2 else 1])
            stem, image_id = f'panoptic_{split}_{index:05d}', index + 1
            _, encoded = cv2.imencode('.jpg', image, [cv2.IMWRITE_JPEG_QUALITY, 92])
            (out_dir / 'images' / f'{stem}.jpg').write_bytes(encoded.tobytes())
            (out_dir / f'panoptic_{split}' / f'{stem}.png').write_bytes(encode_id_png(ids))
            height, width = ids.shape
            images.append(dict(id=image_id, file_name=f'{stem}.jpg', height=height, width=width))
            segments = []
            for segment, name in enumerate(names, 1):
                mask = (ids == segment).astype(np.uint8)
                if mask.any():
                    segments.append(
                        dict(
                            id=segment,
                            category_id=_CATEGORY_ID[name],
                            iscrowd=0,
                            bbox=[*cv2.boundingRect(mask)],
                            area=int(mask.sum()),
                        )
                    )
            annotations.append(
                dict(image_id=image_id, file_name=f'{stem}.png', segments_info=segments)
            )
        content = dict(images=images, annotations=annotations, categories=PANOPTIC_CATEGORIES)
        with atomic_write(out_dir / f'panoptic_{split}.json') as file:
            json.dump(content, file)


def matte_object(rng: np.random.Generator, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw an object: colours [s, s, 3] and matte [s, s], uint8 both."""
    axis = np.linspace(-1.5, 1.5, side, dtype=np.float32)
    u, v = np.meshgrid(axis, axis)
    kind = KNOWN[str(rng.choice([*KNOWN]))]
    matte = kind(u, v, rng).astype(np.float32)
    hair = np.zeros_like(matte)
    for angle in rng.uniform(0, 2 * np.pi, int(rng.integers(4, 10))):
        ends = [(0.5 + 0.5 * r / 1.5 * np.array([np.cos(angle), np.sin(angle)])) * side
                for r in (0.5, rng.uniform(1, 1.35))]  # fmt: skip
        start, end = (tuple(point.round().astype(int).tolist()) for point in ends)
        cv2.line(hair, start, end, 1.0, 2, cv2.LINE_AA)
    matte = cv2.GaussianBlur(matte, (0, 0), rng.uniform(0.04, 0.07) * side)
    matte = np.maximum(matte, 0.9 * cv2.GaussianBlur(hair, (0, 0), 0.7))
    colours = texture(rng, u, v, KNOWN_HUES).clip(0, 255)
    return colours.astype(np.uint8), (255 * matte).round().astype(np.uint8)


def make_matte_data(
    out_dir: str | Path,
    num_pairs: int = 40,
    num_scenes: int = 40,
    size_hw: tuple[int, int] = (160, 224),
    seed: int = 0,
) -> None:
    """Write ``pairs/`` of one object each and ``scenes/`` of some, both as matting data are kept.

    That is ``images/*.png`` and ``mattes/``, see :mod:`mmdet_plugins.solo.matting_data`.

    Args:
        out_dir: Made if need be; files of the same name are replaced.
        num_pairs: Objects, without a background.
        num_scenes: Images of one or two other objects before a ground.
        size_hw: Of the scenes, px; every second one stands upright.
        seed: Every image is a function of (seed, pair or scene, index).
    """
    out_dir = Path(out_dir)
    for kind, count in enumerate((num_pairs, num_scenes)):
        folder = out_dir / ('pairs', 'scenes')[kind]
        (folder / 'images').mkdir(parents=True, exist_ok=True)
        for index in range(count):
            rng = np.random.default_rng([seed, kind, index])
            if kind == 0:
                image, matte = matte_object(rng, int(0.6 * min(size_hw)))
                mattes = [matte]
            else:
                hw = size_hw[:: -1 if index % 2 else 1]
                image = background(rng, hw).clip(0, 255).astype(np.uint8)
                mattes = []
                for _ in range(int(rng.integers(1, 3))):
                    side = int(rng.uniform(0.4, 0.8) * min(hw))
                    place = [int(rng.integers(-side // 6, n - 5 * side // 6)) for n in hw]
                    pasted, visible = paste_matte(image, mattes, *matte_object(rng, side), place)
                    if all(a.sum() > 0.6 * b.sum() for a, b in zip(visible, mattes, strict=False)):
                        image, mattes = pasted, visible
            _write_png(folder / 'images' / f'{index:05d}.png', image)
            for number, matte in enumerate(mattes):
                _write_png(folder / 'mattes' / f'{index:05d}' / f'{number}.png', matte)


def _write_png(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode('.png', image)[1].tobytes())


if __name__ == '__main__':
    dict(panoptic=make_panoptic_data, mattes=make_matte_data)[sys.argv[1]](sys.argv[2])
