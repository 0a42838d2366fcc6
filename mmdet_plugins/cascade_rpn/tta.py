"""Multi-scale test-time augmentation that trusts each scale for its own range of box sizes."""

from mmdet.models.test_time_augs import DetTTAModel
from mmdet.structures import DetDataSample
from mmengine.registry import MODELS


@MODELS.register_module()
class UVODetTTAModel(DetTTAModel):
    """mmdet's ``DetTTAModel`` that keeps of each view only boxes of that scale's size range.

    A box's size is the square root of its area in pixels of the *resized* image that it was found
    in, as in the released code: the range says what the network sees well, not what the object
    measures in the original image.

    Args:
        scale_ranges: (smallest, largest) size in px, both included, per scale of the
            ``tta_pipeline`` and in its order. The pipeline varies the scale slowest:
            ``transforms=[[resizes...], [flips...], [PackDetInputs]]`` with ``scale_factor`` among
            the meta keys.
        **kwargs: As ``DetTTAModel``: ``tta_cfg`` with ``nms`` and ``max_per_img``, ``module``.

    Raises:
        ValueError: If the number of views is no multiple of the number of ranges.
    """

    def __init__(self, scale_ranges: list[tuple[float, float]], **kwargs) -> None:
        super().__init__(**kwargs)
        self.scale_ranges = scale_ranges

    def _merge_single_sample(self, data_samples: list[DetDataSample]) -> DetDataSample:
        """Merge the views of one image, predictions in pixels of the original image."""
        views_per_scale, rest = divmod(len(data_samples), len(self.scale_ranges))
        if rest or not views_per_scale:
            raise ValueError(
                f'{len(data_samples)} views of an image do not divide among '
                f'{len(self.scale_ranges)} scale_ranges: give tta_model.scale_ranges one range '
                'per scale of tta_pipeline'
            )
        for i, sample in enumerate(data_samples):
            low, high = self.scale_ranges[i // views_per_scale]
            results = sample.pred_instances
            wh = results.bboxes[:, 2:] - results.bboxes[:, :2]
            area = (wh * wh.new_tensor(sample.scale_factor[:2])).prod(1)
            sample.pred_instances = results[(area >= low**2) & (area <= high**2)]
        return super()._merge_single_sample(data_samples)
