"""Colour affinity of a training batch, on the device.

mmdet's ``BoxInstDataPreprocessor`` sends every image to the host for scikit-image's Lab in float64,
compares neighbours by unfolding them, repeats the result for each object, and replaces the masks.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any

from mmdet.models import DetDataPreprocessor
from mmdet.registry import MODELS

from ..ops.affinity import color_affinity


@MODELS.register_module()
class FreeSOLODataPreprocessor(DetDataPreprocessor):
    """mmdet's, which also gives each training sample its ``affinity``, uint8 [h, w] at stride 4.

    The constants are BoxInst's: neighbours at a distance of two, similarity from 0.3 on.

    Args:
        color_threshold: theta, the least similarity.
        bottom_pixels_removed: Rows of the original image, from below, in which no neighbour
            counts; the released code's, for COCO.
        *args, **kwargs: As for ``DetDataPreprocessor``; mean and std are needed.
    """

    def __init__(
        self,
        *args: Any,
        color_threshold: float = 0.3,
        bottom_pixels_removed: int = 10,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.color_threshold = color_threshold
        self.bottom_pixels_removed = bottom_pixels_removed

    def forward(self, data: dict, training: bool = False) -> dict:
        """As mmdet's; the views of :class:`.FreeSOLOStrongView` become images of one batch."""
        if isinstance(data['inputs'], Sequence) and isinstance(data['inputs'][0], Sequence):
            data = {key: [*chain(*views)] for key, views in data.items()}
        data = super().forward(data, training)
        if not training:
            return data
        valid_hw = []
        for sample in data['data_samples']:
            height, width = sample.img_shape[:2]
            removed = int(self.bottom_pixels_removed * height / sample.ori_shape[0])
            valid_hw.append((height - removed, width))
        images = data['inputs'] * self.std + self.mean
        affinities = color_affinity(images, valid_hw, threshold=self.color_threshold)
        for sample, affinity in zip(data['data_samples'], affinities, strict=True):
            sample.affinity = affinity
        return data
