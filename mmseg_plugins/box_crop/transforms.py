"""Cut one instance out of its image, and its mask to go with it."""

import numpy as np
from hotcoco.mask import decode
from mmcv.transforms import BaseTransform
from mmcv.transforms.utils import cache_randomness
from mmseg.registry import TRANSFORMS

from mmdet_plugins.ops.crops import expand_boxes


@TRANSFORMS.register_module()
class BoxCropFromMask(BaseTransform):
    """Crop the image to the instance's tight box, jittered, plus a margin (paper, section 3.2).

    Required keys: ``img``, ``bbox_xyxy``, ``rle``. Changed: ``img``, ``img_shape``, ``ori_shape``
    (both that of the crop). Added: ``crop_xyxy``, in pixels of the image.

    Args:
        margin_px: Pixels added on all sides after the jitter. :class:`BoxSegmenter` reads this
            value from the config, so that training and inference cut alike.
        jitter_ratio: Each side moves by up to this share of the box's width or height, uniformly
            and on its own; below 0.5, so that sides never meet. 0 for testing.
    """

    def __init__(self, margin_px: int = 20, jitter_ratio: float = 0.0) -> None:
        if margin_px < 0 or not 0 <= jitter_ratio < 0.5:
            raise ValueError(
                f'margin_px must be >= 0 and jitter_ratio in [0, 0.5), '
                f'got {margin_px} and {jitter_ratio}'
            )
        self.margin_px = margin_px
        self.jitter_ratio = jitter_ratio

    @cache_randomness
    def _shift(self) -> np.ndarray:
        return np.random.uniform(-self.jitter_ratio, self.jitter_ratio, size=4)

    def transform(self, results: dict) -> dict:
        image = results['img']
        if list(image.shape[:2]) != results['rle']['size']:
            raise ValueError(
                f'{results["img_path"]} has {list(image.shape[:2])} pixels (height, width), its '
                f'annotation {results.get("ann_id")} says {results["rle"]["size"]}; if the file is '
                "rotated by its EXIF data, load it with color_type='color_ignore_orientation'"
            )
        box = np.asarray(results['bbox_xyxy'], dtype=np.float64)
        if self.jitter_ratio:
            box = box + self._shift() * np.tile(box[2:] - box[:2], 2)
        x1, y1, x2, y2 = expand_boxes(box, self.margin_px, image.shape[:2])[0].tolist()
        results['img'] = np.ascontiguousarray(image[y1:y2, x1:x2])
        results['img_shape'] = results['ori_shape'] = (y2 - y1, x2 - x1)
        results['crop_xyxy'] = (x1, y1, x2, y2)
        return results

    def __repr__(self) -> str:
        name = type(self).__name__
        return f'{name}(margin_px={self.margin_px}, jitter_ratio={self.jitter_ratio})'


@TRANSFORMS.register_module()
class BoxCropLoadMask(BaseTransform):
    """Decode the instance's mask and cut it as :class:`BoxCropFromMask` cut the image.

    In training it comes before ``Resize``, which then resizes both; in testing after it, so that
    predictions are compared at the crop's own size. Required keys: ``rle``, ``crop_xyxy``,
    ``seg_fields``. Added: ``gt_seg_map`` (uint8, 1 is the object).
    """

    def transform(self, results: dict) -> dict:
        x1, y1, x2, y2 = results['crop_xyxy']
        results['gt_seg_map'] = np.ascontiguousarray(decode(results['rle'])[y1:y2, x1:x2])
        results['seg_fields'].append('gt_seg_map')
        return results
