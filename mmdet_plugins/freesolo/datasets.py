"""Pseudo-labels, and a part of labels to fine-tune with.

Pseudo-labels are two files: a COCO JSON of one category, whose annotations have run lengths, boxes,
scores, and ids that rise from one to the next; and beside it ``<stem>.embeddings.npy``, float16
``[n, E]``, whose row i belongs to the annotation at position i.
"""

import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from mmdet.registry import DATASETS

from ..common.datasets import OpenWorldCocoDataset
from ..ops.coco_json import listed


def embeddings_file(ann_file: str) -> Path:
    """The embeddings that belong to a pseudo-label file."""
    return Path(ann_file).with_suffix('.embeddings.npy')


def open_embeddings(path: str) -> np.ndarray:
    """A file of embeddings, [n, E], mapped into memory once in each process."""
    return _open(path, os.stat(path).st_mtime_ns)


@lru_cache(maxsize=8)
def _open(path: str, version: int) -> np.ndarray:
    return np.load(path, mmap_mode='r')


def check_embeddings(ann_file: str, count: int) -> np.ndarray:
    """The embeddings [n, E] of a pseudo-label file with ``count`` annotations.

    Raises:
        FileNotFoundError, ValueError: There are none, or they are not of these annotations.
    """
    path = embeddings_file(ann_file)
    advice = 'make the pseudo-labels again, or set with_embeddings=False.'
    if not path.is_file():
        raise FileNotFoundError(f'{path}: the embeddings of {ann_file} are missing; {advice}')
    try:
        found = open_embeddings(str(path))
    except (OSError, ValueError) as error:
        raise ValueError(f'{path}: not a whole file of embeddings ({error}); {advice}') from None
    if found.ndim != 2 or len(found) != count:
        raise ValueError(
            f'{path}: an array of the shape {found.shape}, but {ann_file} has {count} '
            f'annotations: one of them was edited or belongs to another run; {advice}'
        )
    return found


@DATASETS.register_module()
class FreeSOLODataset(OpenWorldCocoDataset):
    """Pseudo-labels, each with its embedding.

    Objects get an ``embedding_row``, images the ``embeddings_path``, which
    :class:`.FreeSOLOLoadAnnotations` reads.

    Args:
        with_embeddings: Look for the embeddings; without them the head has to do without its
            branch.
        **kwargs: As for :class:`.OpenWorldCocoDataset`.
    """

    def __init__(self, *, with_embeddings: bool = True, **kwargs: Any) -> None:
        self.with_embeddings = with_embeddings and not kwargs.get('test_mode', False)
        super().__init__(**kwargs)

    def load_data_list(self) -> list[dict]:
        """Read the annotations, and see whether the embeddings fit them.

        Raises:
            FileNotFoundError: There are no embeddings.
            ValueError: They are not of these annotations, or an annotation cannot be used.
        """
        self._rows: dict[int, int] = {}
        return super().load_data_list()

    def _read(self) -> dict:
        data = super()._read()
        if self.with_embeddings:
            ids = [annotation['id'] for annotation in data['annotations']]
            check_embeddings(self.ann_file, len(ids))
            if any(a >= b for a, b in zip(ids, ids[1:], strict=False)):
                raise ValueError(
                    f'{self.ann_file}: the ids of annotations do not rise from one to the next, so '
                    'that it was edited, and embeddings cannot be told to whom they belong: '
                    'restore the file, or set with_embeddings=False.'
                )
            self._rows = {ann_id: row for row, ann_id in enumerate(ids)}
        return data

    def parse_data_info(self, raw_data_info: dict) -> dict:
        info = super().parse_data_info(raw_data_info)
        annotations = raw_data_info['raw_ann_info']
        if not self.with_embeddings:
            return info
        if len(info['instances']) != len(annotations):
            ids = [annotation['id'] for annotation in annotations]
            raise ValueError(
                f'{self.ann_file}: of the annotations {listed(ids, 5)} of image {info["img_id"]} '
                'some cannot be used, having no area or a box outside the image. Pseudo-labels '
                'have none such, so that the file was edited: restore it, or set '
                'with_embeddings=False.'
            )
        info['embeddings_path'] = str(embeddings_file(self.ann_file))
        for instance, annotation in zip(info['instances'], annotations, strict=True):
            instance['embedding_row'] = self._rows[annotation['id']]
        return info


@DATASETS.register_module()
class FreeSOLOFewShotDataset(OpenWorldCocoDataset):
    """A labelled set of which a part is used: of the images, or of their masks (section 6.3).

    The images are drawn by ``seed`` from all that the file lists, and a smaller part is a subset of
    a larger one.

    Args:
        fraction: Of the images, in (0, 1].
        limit: ``'images'`` leaves the others out; ``'masks'`` keeps them for their classes, with
            ``has_masks=False`` (:class:`.FreeSOLOHead`).
        seed: Of the choice.
        **kwargs: As for :class:`.OpenWorldCocoDataset`.
    """

    def __init__(
        self,
        *,
        fraction: float,
        limit: str = 'images',
        seed: int = 1,
        class_agnostic: bool = False,
        **kwargs: Any,
    ) -> None:
        if not 0 < fraction <= 1 or limit not in ('images', 'masks'):
            raise ValueError(
                "fraction must be in (0, 1] and limit 'images' or 'masks', not "
                f'{fraction!r} and {limit!r}.'
            )
        self.fraction = fraction
        self.limit = limit
        self.seed = seed
        super().__init__(class_agnostic=class_agnostic, **kwargs)

    def load_data_list(self) -> list[dict]:
        data_list = super().load_data_list()
        order = np.random.default_rng(self.seed).permutation(len(data_list))
        chosen = set(order[: max(1, round(self.fraction * len(data_list)))].tolist())
        for index, info in enumerate(data_list):
            info['has_masks'] = index in chosen
        if self.limit == 'masks':
            return data_list
        return [info for info in data_list if info['has_masks']]
