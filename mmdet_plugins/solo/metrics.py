"""Panoptic quality, LVIS AP, and COCO AP with the masks' share of the error.

Shapes: N predictions and G annotated objects of one image, ``H W`` its original size, K classes.
Panoptic quality and LVIS AP are in [0, 1] and streamed: images are matched as they come, and only
the outcome is kept and joined over ranks.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hotcoco
from mmdet.evaluation.metrics import CocoMetric
from mmdet.registry import METRICS
from mmengine.logging import MMLogger
from torch import Tensor

from ..common.files import atomic_write
from ..common.streamed_metric import StreamedMetric, xyxy_to_xywh
from ..ops.coco_json import check_coco, check_entries, listed
from ..ops.panoptic import PanopticQuality, Segments, encode_id_png, panoptic_to_ids
from ..ops.rle import encode_masks
from .datasets import read_ids


def _category_ids(metric: StreamedMetric) -> list[int]:
    """Category ids by label."""
    ids = {category['name']: category['id'] for category in metric.categories}
    classes = metric.dataset_meta['classes']
    if missing := [name for name in classes if name not in ids]:
        raise ValueError(
            f'{metric.ann_file} lacks the classes {listed(missing, 5)} of the data set: the two '
            'read different files.'
        )
    return [ids[name] for name in classes]


@METRICS.register_module()
class SOLOPanopticMetric(StreamedMetric):
    """PQ, SQ and RQ of all classes, things (``_th``) and stuff (``_st``), in [0, 1].

    In place of ``CocoPanopticMetric``, which needs ``panopticapi``, gives percent, and takes a
    stuff class of label 0 for void. Predictions are what mmdet's panoptic segmentors give:
    ``pred_panoptic_seg.sem_seg`` ``[1, H, W]``, see :mod:`..ops.panoptic`.

    Args:
        ann_file: COCO panoptic JSON.
        seg_prefix: Folder of its PNGs.
        classwise: Also log the values of every class.
        outfile_prefix: Write predictions as COCO does: ``{outfile_prefix}.panoptic/*.png`` and
            ``{outfile_prefix}.panoptic.json``.
        format_only: Write them and evaluate nothing; for images without annotations.
        backend_args, collect_device, prefix, collect_dir: As for ``CocoMetric``.
    """

    default_prefix = 'coco_panoptic'

    def __init__(
        self,
        ann_file: str,
        seg_prefix: str | None = None,
        classwise: bool = False,
        outfile_prefix: str | None = None,
        format_only: bool = False,
        backend_args: dict | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            ann_file, _without_annotations if format_only else check_coco, backend_args, **kwargs
        )
        if format_only and outfile_prefix is None:
            raise ValueError('format_only=True writes results only: say where by outfile_prefix.')
        if not format_only and seg_prefix is None:
            raise ValueError('seg_prefix must name the folder of the annotated PNGs.')
        if any('isthing' not in category for category in self.categories):
            raise ValueError(
                f'{ann_file}: the categories do not say "isthing"; a panoptic annotation file is '
                'needed, panoptic_val2017.json say.'
            )
        self.seg_prefix, self.backend_args = seg_prefix, backend_args
        self.classwise, self.format_only = classwise, format_only
        self.outfile_prefix = outfile_prefix
        self._state = self._new_state()

    def _new_state(self) -> tuple[PanopticQuality, list[dict]]:
        return PanopticQuality(self.categories), []

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Match the segments of a batch of images.

        Raises:
            FileNotFoundError, ValueError: An image is not in ``ann_file``, or its PNG is missing
                or does not fit.
        """
        quality, written = self._state
        # mmdet's data set numbers the classes in the order of the file
        category_ids = {*_category_ids(self)}
        category_ids = [c['id'] for c in self.categories if c['id'] in category_ids]
        for sample in data_samples:
            image = self._image(sample)
            panoptic = sample['pred_panoptic_seg']['sem_seg'][0].cpu().numpy()
            ids, labels = panoptic_to_ids(panoptic, len(category_ids))
            found = Segments(ids, {i: category_ids[label] for i, label in labels.items()})
            if self.outfile_prefix is not None:
                written.append(self._write_png(image, found))
            if not self.format_only:
                quality.update(image['id'], self._truth(image), found)

    def _truth(self, image: dict) -> Segments:
        annotations = self._annotations[image['id']]
        if len(annotations) != 1 or 'segments_info' not in annotations[0]:
            raise ValueError(
                f'{self.ann_file}: image {image["id"]} needs one annotation with "segments_info".'
            )
        (annotation,) = annotations
        segments = annotation['segments_info']
        return Segments(
            read_ids(os.path.join(self.seg_prefix, annotation['file_name']), self.backend_args),
            {segment['id']: segment['category_id'] for segment in segments},
            {segment['id'] for segment in segments if segment.get('iscrowd')},
        )

    def _write_png(self, image: dict, found: Segments) -> dict:
        name = f'{Path(image["file_name"]).stem}.png'
        with atomic_write(f'{self.outfile_prefix}.panoptic/{name}', 'wb') as file:
            file.write(encode_id_png(found.ids))
        segments = [{'id': i, 'category_id': c} for i, c in found.category_of.items()]
        return {'image_id': image['id'], 'file_name': name, 'segments_info': segments}

    def compute_metrics(self, results: list) -> dict[str, float]:
        parts, written = zip(*results, strict=True)
        if self.outfile_prefix is not None:
            by_id = {entry['image_id']: entry for part in written for entry in part}
            with atomic_write(f'{self.outfile_prefix}.panoptic.json') as file:
                json.dump({'annotations': [by_id[i] for i in sorted(by_id)]}, file)
        if self.format_only:
            return {}
        quality = PanopticQuality.merge(parts)
        self._warn_of_unseen(quality.image_ids)
        metrics = quality.compute()
        rows = {
            name: [metrics[key + suffix] for key in ('PQ', 'SQ', 'RQ')]
            for name, suffix in (('all', ''), ('things', '_th'), ('stuff', '_st'))
        }
        if self.classwise:
            names = {category['id']: category['name'] for category in self.categories}
            rows |= {names[i]: scores for i, scores in quality.per_class().items()}
        width = max(map(len, rows))
        lines = [f'{"":{width}}     PQ     SQ     RQ']
        lines += [
            f'{name:{width}}' + ''.join(f'{x:7.3f}' for x in row) for name, row in rows.items()
        ]
        MMLogger.get_current_instance().info('\n' + '\n'.join(lines))
        return metrics


@METRICS.register_module()
class SOLOLVISMetric(StreamedMetric):
    """AP of LVIS v0.5 and v1 (Gupta et al., CVPR 2019), of rare, common and frequent classes too.

    In place of ``LVISMetric``, which needs ``lvis`` (broken on NumPy 2) and keeps every mask. A
    class counts on the images where it is annotated or known to be absent; where it is not
    annotated exhaustively, unmatched predictions are ignored.

    Predictions are ``pred_instances`` as for :class:`SOLOCocoMetric`.

    Args:
        ann_file: LVIS annotation file.
        metric: ``'segm'``, ``'bbox'`` or both.
        max_dets: Predictions counted for an image, the best of all its classes; 300 is LVIS's.
        backend_args, collect_device, prefix, collect_dir: As for ``CocoMetric``.
    """

    default_prefix = 'lvis'

    def __init__(
        self,
        ann_file: str,
        metric: str | Sequence[str] = 'segm',
        max_dets: int = 300,
        backend_args: dict | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(ann_file, _checked_lvis, backend_args, **kwargs)
        self.metrics = [metric] if isinstance(metric, str) else list(metric)
        if unknown := set(self.metrics) - {'segm', 'bbox'}:
            raise ValueError(f"metric must be 'segm' or 'bbox', not {sorted(unknown)}.")
        self.max_dets = max_dets
        self._state = self._new_state()

    def _new_state(self) -> tuple[set[int], dict[str, hotcoco.StreamingEval]]:
        streams = {}
        for iou_type in self.metrics:
            params = hotcoco.Params(iou_type)
            params.max_dets = [self.max_dets]
            streams[iou_type] = hotcoco.StreamingEval(self.categories, iou_type, True, params)
        return set(), streams

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Match the predictions of a batch of images, and forget them.

        Raises:
            ValueError: An image is not in ``ann_file``, or ``'segm'`` finds no masks.
        """
        seen, streams = self._state
        category_ids = _category_ids(self)
        for sample in data_samples:
            image = self._image(sample)
            if image['id'] in seen:
                continue
            seen.add(image['id'])
            found = sample['pred_instances']
            scores = found['scores'].detach().cpu().double().numpy()
            best = (-scores).argsort(kind='stable')[: self.max_dets].tolist()
            labels = found['labels'].tolist()
            for iou_type, stream in streams.items():
                key, shapes = _shapes(iou_type, found, best, image['id'])
                results = [
                    {
                        'image_id': image['id'],
                        'category_id': category_ids[labels[i]],
                        'score': scores[i].item(),
                        key: shape,
                    }
                    for i, shape in zip(best, shapes, strict=True)
                ]
                stream.update([image], self._annotations[image['id']], results)

    def compute_metrics(self, results: list) -> dict[str, float]:
        seen, streams = zip(*results, strict=True)
        self._warn_of_unseen(set().union(*seen))
        metrics = {}
        for iou_type in self.metrics:
            stream = hotcoco.StreamingEval.merge([part[iou_type] for part in streams])
            evaluation = stream.finalize()
            evaluation.accumulate()
            MMLogger.get_current_instance().info('\n' + '\n'.join(evaluation.summary_lines()))
            values = evaluation.get_results()
            metrics |= {f'{iou_type}_{key}': values[key] for key in evaluation.metric_keys()}
        return metrics


def _without_annotations(data: Any, name: str) -> dict:
    """The check of a file of images and categories only."""
    return check_coco({**data, 'annotations': []} if isinstance(data, Mapping) else data, name)


def _checked_lvis(data: Any, name: str) -> dict:
    # LVIS v1 names images by their address.
    data = check_entries(check_coco(data, name), name, unchecked=('file_name',))
    for entries, keys in (
        (data['images'], ('neg_category_ids', 'not_exhaustive_category_ids')),
        (data['categories'], ('frequency',)),
    ):
        for key in keys:
            if any(key not in entry for entry in entries):
                raise ValueError(f'{name}: not an LVIS annotation file: it lacks "{key}".')
    return data


def _shapes(iou_type: str, found: Mapping, index: list[int], image_id: int) -> tuple[str, list]:
    """Name and values of what is matched, boxes as x, y, width, height or masks as RLE."""
    if iou_type == 'bbox':
        return 'bbox', xyxy_to_xywh(found['bboxes'])[index].tolist()
    masks = found.get('masks')
    if masks is None:
        raise ValueError(f"Image {image_id}: predictions without masks; evaluate 'bbox' only.")
    if isinstance(masks, Tensor):
        return 'segmentation', encode_masks(masks[index])
    return 'segmentation', [masks[i] for i in index]


@METRICS.register_module()
class SOLOCocoMetric(CocoMetric):
    """``CocoMetric`` that encodes masks where they lie, and can tell the masks' share of the error.

    The stock class copies dense masks to the CPU and encodes them one by one. Predictions are
    ``pred_instances`` with ``bboxes`` ``[N, 4]``, ``labels`` ``[N]``, ``scores`` ``[N]`` and
    ``masks``, a ``[N, H, W]`` tensor or N COCO RLE dicts, in pixels of the original image.

    Args:
        mask_oracle: Add ``oracle_segm_*``: the mask AP if every predicted mask were the annotated
            one that it overlaps most, of whatever class (thesis section 3.3.5, Table 3.7). A mask
            that overlaps none stays; crowds replace nothing. Doubles the time.
        **kwargs: As for ``CocoMetric``.
    """

    def __init__(self, *args: Any, mask_oracle: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if mask_oracle and 'segm' not in self.metrics:
            raise ValueError("mask_oracle=True is about masks: add 'segm' to metric.")
        self.mask_oracle = mask_oracle

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        for sample in data_samples:
            found = sample['pred_instances']
            if isinstance(found.get('masks'), Tensor):
                found = {**found, 'masks': encode_masks(found['masks'])}
            super().process(data_batch, [{**sample, 'pred_instances': found}])

    def compute_metrics(self, results: list) -> dict[str, float]:
        metrics = super().compute_metrics(results)
        if self.mask_oracle and not self.format_only:
            settings = self.metrics, self.outfile_prefix
            self.metrics, self.outfile_prefix = ['segm'], None
            MMLogger.get_current_instance().info('With the masks of the annotations:')
            ideal = super().compute_metrics([(gt, self._with_true_masks(r)) for gt, r in results])
            self.metrics, self.outfile_prefix = settings
            metrics.update({f'oracle_{name}': value for name, value in ideal.items()})
        return metrics

    def _with_true_masks(self, result: dict) -> dict:
        ids = self._coco_api.get_ann_ids(img_ids=[result['img_id']])
        annotations = [a for a in self._coco_api.load_anns(ids) if not a.get('iscrowd')]
        if not annotations or not result['masks']:
            return result
        true = [self._coco_api.annToRLE(annotation) for annotation in annotations]
        overlaps = hotcoco.primitives.mask_iou(result['masks'], true, [False] * len(true))
        masks = [
            true[row.argmax()] if row.any() else mask
            for row, mask in zip(overlaps, result['masks'], strict=True)
        ]
        return {**result, 'masks': masks}
