"""The post-processor: its options against literal formulas, and what takes its results."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmdet.evaluation import CocoMetric
from mmdet.structures import DetDataSample
from mmdet.visualization import DetLocalVisualizer
from mmengine.structures import InstanceData
from pycocotools import mask as coco_mask

from mmdet_plugins.common.mask_postprocess import EncodedMasks, grid_scores
from mmdet_plugins.ops.instance_masks import Frame
from mmdet_plugins.solo import SOLOPostProcessor

FRAME = Frame((4, 6), (16, 24), (14, 23), (28, 46))


def maps() -> torch.Tensor:
    """Four probability maps [4, 4, 6]: two that overlap by half, one apart, one of one pixel."""
    probs = torch.zeros(4, 4, 6)
    probs[0, 0:2, 0:4] = 0.9
    probs[1, 0:2, 2:6] = 0.8
    probs[2, 3, 0:3] = 1.0
    probs[3, 3, 5] = 0.7
    return probs


SCORES = torch.tensor([[0.9, 0.0], [0.8, 0.0], [0.0, 0.5], [0.3, 0.0]])


def run(min_area: float = 0, frame: Frame = FRAME, **options) -> InstanceData:
    options = dict(score_thr=0.1, filter_thr=0.0, mask_format='dense') | options
    return SOLOPostProcessor(**options)(
        SCORES, torch.full((4,), min_area), lambda cells: maps()[cells], frame, False
    )


# IoU of masks 0 and 1, of 8 pixels each, 4 of them common.
IOU = 4 / 12


@pytest.mark.parametrize(
    ('options', 'expected'),
    [
        (dict(), [0.81, 0.64 * np.exp(-2 * IOU**2), 0.5, 0.21]),
        (dict(kernel='linear'), [0.81, 0.64 * (1 - IOU), 0.5, 0.21]),
        (dict(maskness=False), [0.9, 0.8 * np.exp(-2 * IOU**2), 0.5, 0.3]),
        (dict(nms='soft'), [0.81, 0.64 * np.exp(-2 * IOU**2), 0.5, 0.21]),
        (dict(nms='hard', iou_thr=0.3), [0.81, 0.5, 0.21]),
        (dict(nms='hard', iou_thr=0.4), [0.81, 0.64, 0.5, 0.21]),
        (dict(nms='fast', iou_thr=0.3), [0.81, 0.5, 0.21]),
        (dict(nms='hard', max_per_img=2), [0.81, 0.64]),
        (dict(nms='soft', nms_pre=1), [0.81]),
        (dict(filter_thr=0.6), [0.81]),
        (dict(score_thr=0.85), [0.81]),
    ],
    ids=str,
)
def test_scores(options, expected):
    found = run(**options)
    assert found.scores.tolist() == pytest.approx(sorted(expected, reverse=True), rel=1e-5)
    assert len(found.masks) == len(found.bboxes) == len(found.labels) == len(expected)


@pytest.mark.parametrize('nms', ['matrix', 'hard'])
def test_masks_must_exceed_the_least_area(nms):
    assert len(run(min_area=1, nms=nms)) == 3
    assert len(run(min_area=8, nms=nms)) == 0


@pytest.mark.parametrize('nms', ['matrix', 'fast'])
def test_run_lengths_are_those_of_the_dense_masks(nms):
    dense, encoded = run(nms=nms), run(nms=nms, mask_format='rle')
    assert dense.masks.shape == (4, 28, 46)
    reference = coco_mask.encode(np.asfortranarray(dense.masks.permute(1, 2, 0).numpy(), np.uint8))
    assert [rle['counts'].encode() for rle in encoded.masks] == [r['counts'] for r in reference]
    x, y, w, h = coco_mask.toBbox(reference).T
    expected = np.stack([x, y, x + w, y + h], 1)
    np.testing.assert_array_equal(encoded.bboxes, expected)
    np.testing.assert_array_equal(dense.bboxes, expected)


def test_masks_are_resized_twice_as_mmdet_does():
    """To the padded input, cropped to the image, to the original; then the threshold."""
    found = run(maskness=False)
    big = F.interpolate(maps()[None], size=(16, 24), mode='bilinear')[..., :14, :23]
    expected = F.interpolate(big, size=(28, 46), mode='bilinear')[0] > 0.5
    assert torch.equal(found.masks, expected)


def test_points_nms():
    """A cell survives if none above, to the left, or above to the left of it scores more."""
    logits = torch.tensor([[[1.0, 2.0], [0.0, 1.5]]])
    scores = grid_scores([logits, torch.zeros(1, 1, 1)])
    expected = [1 / (1 + np.exp(-1.0)), 1 / (1 + np.exp(-2.0)), 0, 0, 0.5]
    assert scores[:, 0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize('option', [dict(mask_format='png'), dict(nms='greedy')])
def test_unknown_options(option):
    with pytest.raises(ValueError, match='must be'):
        SOLOPostProcessor(**option)


def test_mmdet_draws_run_lengths():
    """Its visualizer draws encoded masks as it draws dense ones, a score threshold included."""
    drawn = []
    for mask_format in ('dense', 'rle'):
        np.random.seed(0)  # colours of the text are drawn by lot
        data_sample = DetDataSample(pred_instances=run(mask_format=mask_format))
        visualizer = DetLocalVisualizer(alpha=0.5)
        visualizer.dataset_meta = dict(classes=('a', 'b'), palette=[(255, 0, 0), (0, 255, 0)])
        image = np.full((28, 46, 3), 128, np.uint8)
        visualizer.add_datasample('x', image, data_sample, draw_gt=False, pred_score_thr=0.4)
        drawn.append(visualizer.get_image())
    assert (drawn[0] != 128).any()
    np.testing.assert_array_equal(*drawn)


def test_encoded_masks_are_lists_that_stay_encoded():
    masks = run(mask_format='rle').masks
    assert isinstance(masks, EncodedMasks) and isinstance(masks[1:], EncodedMasks)
    assert masks[:1] + masks[1:] == masks
    assert masks.astype(bool).shape == (4, 28, 46)
    assert EncodedMasks().astype(bool).shape == (0, 0, 0)


def test_mmdets_coco_metric_takes_run_lengths(tmp_path):
    """Objects that are what is predicted: AP 1 of boxes and of masks."""
    found = run(mask_format='rle', maskness=False, nms='hard', iou_thr=0.9)
    instances = [
        dict(bbox_label=int(label), bbox=box.tolist(), mask=rle, ignore_flag=0)
        for label, box, rle in zip(found.labels, found.bboxes, found.masks, strict=True)
    ]
    metric = CocoMetric(metric=['bbox', 'segm'], outfile_prefix=str(tmp_path / 'x'))
    metric.dataset_meta = dict(classes=('a', 'b'))
    metric.process(
        {},
        [
            dict(
                img_id=1,
                ori_shape=(28, 46),
                instances=instances,
                pred_instances={key: found[key] for key in found.keys()},  # noqa: SIM118
            )
        ],
    )
    results = metric.evaluate(size=1)
    assert results['coco/bbox_mAP'] == results['coco/segm_mAP'] == 1
