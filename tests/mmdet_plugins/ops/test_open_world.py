"""The evaluator against pycocotools, and its base/novel split against a literal reference."""

import contextlib
import copy
import io
import json
import pickle

import numpy as np
import pytest
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mmdet_plugins.ops.coco_json import to_detections, to_objects
from mmdet_plugins.ops.open_world import OpenWorldEvaluator, _GreedyEngine, evaluate_json

HEIGHT, WIDTH = 150, 240
MAX_DETS = (1, 10, 40, 100)
AREAS = ('all', 'small', 'medium', 'large')


def _mask(rng, box):
    x, y, w, h = box
    mask = np.zeros((HEIGHT, WIDTH), np.uint8, order='F')
    ys, xs = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    mask[((xs - x - w / 2) / (w / 2))**2 + ((ys - y - h / 2) / (h / 2))**2 <= 1] = 1
    mask[rng.integers(0, HEIGHT, 40), rng.integers(0, WIDTH, 40)] ^= 1
    rle = mask_utils.encode(mask)
    return {'size': rle['size'], 'counts': rle['counts'].decode()}


def make_data(seed, num_images=12, num_dets=60):
    """Overlapping objects of all sizes in two classes, crowds, ties of score and of IoU, empty images."""
    rng = np.random.default_rng(seed)
    images, annotations, results = [], [], []
    for image_id in rng.permutation(1000)[:num_images].tolist():
        images.append({'id': image_id, 'height': HEIGHT, 'width': WIDTH, 'file_name': f'{image_id}.jpg'})
        boxes = []
        for i in range(rng.integers(0, 9)):
            size = rng.choice([8, 30, 60, 130]) * rng.uniform(0.7, 1.3, 2)
            size = np.minimum(size, (WIDTH - 20, HEIGHT - 20))
            box = [*(rng.random(2) * (np.array([WIDTH, HEIGHT]) - size)), *size]
            if i == 1:
                box = boxes[0]  # the same object twice: a tie of IoU
            boxes.append(box)
            annotations.append({
                'id': len(annotations) + 1, 'image_id': image_id, 'category_id': int(rng.choice([3, 7])),
                'bbox': [float(v) for v in box], 'area': float(box[2] * box[3] * rng.uniform(0.6, 1)),
                'iscrowd': int(rng.random() < 0.2), 'segmentation': _mask(rng, box)})
        for _ in range(rng.integers(0, num_dets)):
            if boxes and rng.random() < 0.8:
                box = np.array(boxes[rng.integers(len(boxes))])
                if rng.random() < 0.8:
                    box = box + rng.normal(size=4) * np.tile(box[2:], 2) * rng.choice([0.02, 0.1, 0.3])
            else:
                box = np.array([*(rng.random(2) * 100), *(5 + rng.random(2) * 100)])
            box[2:] = np.maximum(box[2:], 2)
            results.append({'image_id': image_id, 'category_id': int(rng.choice([3, 7])),
                            'bbox': [float(v) for v in box], 'score': float(rng.integers(1, 30) / 30),
                            'segmentation': _mask(rng, box)})
    return {'images': images, 'annotations': annotations,
            'categories': [{'id': 3, 'name': 'seen'}, {'id': 7, 'name': 'unseen'}]}, results


def pycocotools_metrics(truth, results, iou_type, max_dets=MAX_DETS):
    """The same names from pycocotools with useCats=0."""
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO()
        gt.dataset = copy.deepcopy(truth)
        gt.createIndex()
        results = copy.deepcopy(results)
        for result in results:
            if iou_type == 'segm':
                result.pop('bbox')  # as mmdet does, so that areas are those of the masks
            else:
                result.pop('segmentation')
        evaluation = COCOeval(gt, gt.loadRes(results), iou_type)
        evaluation.params.useCats = 0
        evaluation.params.maxDets = sorted({*max_dets, 100})
        evaluation.evaluate()
        evaluation.accumulate()
    return summary(evaluation.eval['precision'][:, :, 0], evaluation.eval['recall'][:, 0],
                   evaluation.params.maxDets, iou_type, max_dets)


def summary(precision, recall, budgets, name, max_dets=MAX_DETS):
    def mean(values):
        return values[values > -1].mean() if (values > -1).any() else -1

    precision = precision[..., budgets.index(100)]
    metrics = {f'{name}_AP': mean(precision[:, :, 0]), f'{name}_AP50': mean(precision[0, :, 0]),
               f'{name}_AP75': mean(precision[5, :, 0])}
    for a, area in enumerate(AREAS):
        suffix = f'_{area}' if a else ''
        metrics[f'{name}_AP{suffix}'] = mean(precision[:, :, a])
        for k in max_dets:
            metrics[f'{name}_AR@{k}{suffix}'] = mean(recall[:, a, budgets.index(k)])
    return metrics


@pytest.mark.parametrize('iou_type', ['bbox', 'segm'])
@pytest.mark.parametrize('seed', range(3))
def test_equals_pycocotools(iou_type, seed):
    truth, results = make_data(seed)
    ours = evaluate_json(truth, results, (iou_type,), MAX_DETS)
    theirs = pycocotools_metrics(truth, results, iou_type)
    assert ours == pytest.approx(theirs, abs=1e-9)
    assert 0.05 < ours[f'{iou_type}_AR@10'] < ours[f'{iou_type}_AR@100'] < 1  # a case with room on both sides
