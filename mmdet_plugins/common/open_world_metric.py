"""Class-agnostic AP and AR@k as a metric of mmengine's evaluation loops.

Shapes: N predictions and G annotated objects of one image, ``H W`` its original size.
"""

import json
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from mmdet.registry import METRICS
from mmengine.fileio import list_from_file
from mmengine.logging import MMLogger
from torch import Tensor

from ..ops.coco_json import (
    Detections,
    Objects,
    base_category_ids,
    check_entries,
    to_objects,
)
from ..ops.open_world import OpenWorldEvaluator, format_table
from ..ops.rle import area, encode_masks, segmentation_to_rle
from .files import atomic_write
from .streamed_metric import StreamedMetric, xyxy_to_xywh
from .uvo import coco_or_uvo


@METRICS.register_module()
class OpenWorldMetric(StreamedMetric):
    """Class-agnostic average precision and recall of boxes and masks, whatever the class.

    In place of ``CocoMetric(metric='proposal')``, which knows boxes only, names the result AR@100
    whatever budget was set, rounds to three digits, and keeps a dict for each box. Images are
    matched as they come; only the outcome is kept and joined over ranks.

    Predictions are ``pred_instances`` with ``bboxes`` [N, 4] (xyxy) and ``scores`` [N], and for
    masks ``masks``, a [N, H, W] tensor or N COCO RLE dicts, all in pixels of the original image.

    Args:
        ann_file: COCO or UVO annotation file. ``None`` takes the objects from ``gt_instances``
            (and, as crowds, ``ignored_instances``) of the data samples, which a test pipeline
            supplies that loads annotations after resizing.
        metric: Of ``'bbox'``, ``'segm'`` and ``'boundary'``.
        max_dets: Budgets k of AR@k.
        base_categories: Names of the categories seen in training, or a text file with one a line;
            adds AR and AP of base and of novel objects. Needs ``ann_file``.
        tide: Add TIDE's kinds of error. Keeps the first 100 predictions of every image.
        outfile_prefix: Write the predictions as COCO results to ``{outfile_prefix}.bbox.json``, or
            ``.segm.json`` if they have masks, with category 1. Keeps them in memory.
        format_only: Write the results and evaluate nothing; for images without annotations.
        backend_args, collect_device, prefix, collect_dir: As for ``CocoMetric``.
    """

    default_prefix = 'open_world'

    def __init__(
        self,
        ann_file: str | None = None,
        metric: str | Sequence[str] = ('bbox', 'segm'),
        max_dets: Sequence[int] = (1, 10, 100),
        base_categories: Collection[str] | str | None = None,
        tide: bool = False,
        outfile_prefix: str | None = None,
        format_only: bool = False,
        backend_args: dict | None = None,
        collect_device: str = 'cpu',
        prefix: str | None = None,
        collect_dir: str | None = None,
    ) -> None:
        if format_only and outfile_prefix is None:
            raise ValueError('format_only=True writes results only: say where by outfile_prefix.')
        if base_categories is not None and ann_file is None:
            raise ValueError('base_categories needs ann_file, which says the category of objects.')
        super().__init__(
            None if format_only else ann_file,
            _checked,
            backend_args,
            collect_device=collect_device,
            prefix=prefix,
            collect_dir=collect_dir,
        )
        self.format_only = format_only
        self.outfile_prefix = outfile_prefix
        self._settings = {
            'iou_types': (metric,) if isinstance(metric, str) else tuple(metric),
            'max_dets': tuple(max_dets),
            'split': base_categories is not None,
            'tide': tide,
        }
        self._base_ids = None
        if base_categories is not None and not format_only:
            if isinstance(base_categories, str):
                base_categories = list_from_file(base_categories)
            self._base_ids = base_category_ids(self.categories, base_categories)
        self._with_masks = any(t != 'bbox' for t in self._settings['iou_types'])
        self._state = self._new_state()

    def _new_state(self) -> tuple[OpenWorldEvaluator, dict[int, Detections]]:
        return OpenWorldEvaluator(**self._settings), {}

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Match the predictions of a batch of images, and forget them.

        Raises:
            ValueError: An image is not in ``ann_file``, or predictions cannot be evaluated; the
                image is named.
        """
        evaluator, found = self._state
        for sample in data_samples:
            image_id = sample['img_id']
            detections = self._detections(sample)
            if self.outfile_prefix is not None:
                found[image_id] = detections
            if not self.format_only:
                evaluator.update(image_id, self._objects(sample), detections)

    def compute_metrics(self, results: list) -> dict[str, float]:
        evaluators, found = zip(*results, strict=True)
        if self.outfile_prefix is not None:
            self._write({i: detections for part in found for i, detections in part.items()})
        if self.format_only:
            return {}
        evaluator = OpenWorldEvaluator.merge(evaluators)
        self._warn_of_unseen(evaluator.image_ids)
        metrics = evaluator.compute()
        MMLogger.get_current_instance().info('\n' + format_table(metrics))
        return metrics

    def _detections(self, sample: dict) -> Detections:
        pred = sample['pred_instances']
        masks = pred.get('masks')
        if isinstance(masks, Tensor):
            if len(masks) and tuple(masks.shape[1:]) != tuple(sample['ori_shape'][:2]):
                raise ValueError(
                    f'Image {sample["img_id"]}: masks of size {tuple(masks.shape[1:])}, but the '
                    f'image is {tuple(sample["ori_shape"][:2])}: predict in original pixels.'
                )
            masks = encode_masks(masks)
        elif masks is not None:
            masks = [segmentation_to_rle(rle, sample['ori_shape'][:2]) for rle in masks]
        return Detections(
            xyxy_to_xywh(pred['bboxes']), pred['scores'].detach().cpu().double().numpy(), masks
        )

    def _objects(self, sample: dict) -> Objects:
        image_id = sample['img_id']
        if self.ann_file is not None:
            image = self._image(sample)
            return to_objects(self._annotations[image_id], image, self._with_masks, self._base_ids)
        if 'gt_instances' not in sample:
            raise ValueError(
                f'Image {image_id} comes without gt_instances: load annotations in '
                'the test pipeline, or give the metric an ann_file.'
            )
        parts = [sample['gt_instances'], sample.get('ignored_instances', {'bboxes': []})]
        crowd = np.repeat([False, True], [len(part['bboxes']) for part in parts])
        parts = [part for part in parts if len(part['bboxes'])]
        boxes = [xyxy_to_xywh(getattr(part['bboxes'], 'tensor', part['bboxes'])) for part in parts]
        boxes = np.concatenate([np.zeros((0, 4)), *boxes])
        if not self._with_masks:
            return Objects(boxes, boxes[:, 2] * boxes[:, 3], crowd)
        masks = [part['masks'] for part in parts]
        rles = [
            rle
            for part in masks
            for rle in encode_masks(part if isinstance(part, Tensor) else part.to_ndarray())
        ]
        return Objects(boxes, area(rles).astype(np.float64), crowd, rles)

    def _write(self, found: dict[int, Detections]) -> None:
        masked = any(detections.rles is not None for detections in found.values())
        path = f'{self.outfile_prefix}.{"segm" if masked else "bbox"}.json'
        with atomic_write(path) as file:
            separator = '['
            for image_id in sorted(found):
                detections = found[image_id]
                for i, (box, score) in enumerate(
                    zip(detections.boxes_xywh.tolist(), detections.scores.tolist(), strict=True)
                ):
                    result = {'image_id': image_id, 'category_id': 1, 'bbox': box, 'score': score}
                    if detections.rles is not None:
                        result['segmentation'] = detections.rles[i]
                    file.write(separator + json.dumps(result))
                    separator = ',\n'
            file.write(']' if separator != '[' else '[]')
        MMLogger.get_current_instance().info(f'Results of {len(found)} images are in {path}.')


def _checked(data: Any, name: str) -> dict:
    return check_entries(coco_or_uvo(data, name), name, unchecked=('file_name', 'height', 'width'))
