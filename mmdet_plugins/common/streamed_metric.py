"""Metrics that match images as they come, and keep only what has to be joined over ranks."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from mmengine.dist import get_world_size
from mmengine.evaluator import BaseMetric
from mmengine.fileio import get_local_path
from mmengine.logging import MMLogger
from torch import Tensor

from ..ops.coco_json import by_image, listed, read_json

_NOTHING = {'images': [], 'annotations': [], 'categories': []}


class StreamedMetric(BaseMetric):
    """A metric that keeps one mergeable state instead of a result for each image.

    ``process`` updates ``self._state``; ``compute_metrics`` gets the states of all ranks.

    Args:
        ann_file: Annotation file; None if there is nothing to compare with.
        check: Takes what the file holds and its name, and returns it with the lists ``images``,
            ``annotations`` and ``categories``, or raises.
        backend_args: As for ``CocoMetric``.
        **kwargs: As for ``BaseMetric``.
    """

    def __init__(
        self,
        ann_file: str | None,
        check: Callable[[Any, str], dict],
        backend_args: dict | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.ann_file = ann_file
        data = _NOTHING
        if ann_file is not None:
            with get_local_path(ann_file, backend_args=backend_args) as path:
                data = check(read_json(path), ann_file)
        self.categories = data['categories']
        self._images = {image['id']: image for image in data['images']}
        self._annotations = by_image(data['annotations'])
        self._state: Any = None

    @abstractmethod
    def _new_state(self) -> Any:
        """A state that has seen no image; the subclass sets it when it is ready."""

    def _image(self, sample: Mapping) -> dict:
        image_id = sample['img_id']
        if image_id not in self._images:
            raise ValueError(
                f'Image {image_id} is not in {self.ann_file} (which has '
                f'{listed(self._images, 3)}): data set and metric read different files.'
            )
        return self._images[image_id]

    def _warn_of_unseen(self, seen: set[int]) -> None:
        if unseen := self._images.keys() - seen:
            MMLogger.get_current_instance().warning(
                f'{len(unseen)} of the {len(self._images)} images of {self.ann_file} were not '
                'shown and do not count.'
            )

    def evaluate(self, size: int) -> dict[str, float]:
        """Join what the ranks have matched and compute the metrics (of all ranks, on all)."""
        self.results = [self._state]
        self._state = self._new_state()
        return super().evaluate(get_world_size())


def xyxy_to_xywh(boxes_xyxy: Tensor) -> np.ndarray:
    """[N, 4] on any device -> float64 [N, 4]: left, top, width and height."""
    boxes = boxes_xyxy.detach().cpu().double().numpy()
    return np.concatenate((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), 1)
