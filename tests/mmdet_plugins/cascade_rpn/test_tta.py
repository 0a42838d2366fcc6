"""Size ranges, mapping back and merging of augmented views; and two scales with flip end to end."""

import cv2
import numpy as np
import pytest
import torch
from mmdet.registry import MODELS, TRANSFORMS
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from torch import nn

from mmdet_plugins.cascade_rpn import UVODetTTAModel


class Stub(nn.Module):
    """Stands for the detector where only the merging is looked at."""

    def test_step(self, data):
        raise NotImplementedError


def view(boxes: list, scores: list, scale_factor: tuple, flip: bool) -> DetDataSample:
    """What the detector returns for one view: flipped, but in pixels of the original size."""
    sample = DetDataSample(
        metainfo=dict(
            ori_shape=(100, 200),
            scale_factor=scale_factor,
            flip=flip,
            flip_direction='horizontal' if flip else None,
        )
    )
    sample.pred_instances = InstanceData(
        bboxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        scores=torch.tensor(scores),
        labels=torch.zeros(len(scores), dtype=torch.long),
    )
    return sample


def tta(scale_ranges: list, module: nn.Module | None = None) -> UVODetTTAModel:
    return UVODetTTAModel(
        scale_ranges=scale_ranges,
        module=module or Stub(),
        tta_cfg=ConfigDict(nms=dict(type='nms', iou_threshold=0.8), max_per_img=10),
    )


def test_each_scale_counts_for_its_sizes():
    """20 x 5 px is a box of size 10 at scale 1, and of sqrt(40 * 15) = 24.5 at (2, 3)."""
    small, large = [10, 20, 30, 25], [20, 10, 100, 90]
    views = [
        view([small, large], [0.9, 0.8], (1.0, 1.0), False),
        view([small, large], [0.7, 0.6], (2.0, 3.0), False),
    ]
    merged = tta([(50, 1000), (0, 25)]).merge_preds([views])[0].pred_instances
    assert merged.bboxes.tolist() == [large, small]
    torch.testing.assert_close(merged.scores, torch.tensor([0.8, 0.7]))


def test_range_includes_its_ends():
    boxes = [[0, 0, 10, 10], [50, 0, 70, 20], [100, 0, 109, 10], [150, 0, 171, 20]]
    views = [view(boxes, [0.9, 0.8, 0.7, 0.6], (1.0, 1.0), False)]
    merged = tta([(10, 20)]).merge_preds([views])[0].pred_instances
    assert merged.bboxes.tolist() == boxes[:2]


def test_flipped_views_share_a_range_and_are_mapped_back():
    """Views vary the flip fastest: the first two are of the first scale."""
    views = [
        view([[10, 20, 30, 40]], [0.5], (1.0, 1.0), False),
        view([[170, 20, 190, 40], [0, 60, 30, 90]], [0.9, 0.4], (1.0, 1.0), True),
        view([[12, 60, 32, 80]], [0.8], (0.5, 0.5), False),
        view([[100, 10, 160, 90]], [0.3], (0.5, 0.5), True),
    ]
    merged = tta([(0, 1000), (15, 1000)]).merge_preds([views])[0].pred_instances
    # The first two are one object; the third is 10 px in its view.
    assert merged.bboxes.tolist() == [[10, 20, 30, 40], [170, 60, 200, 90], [40, 10, 100, 90]]
    torch.testing.assert_close(merged.scores, torch.tensor([0.9, 0.4, 0.3]))


def test_nothing_left():
    views = [view([], [], (1.0, 1.0), False), view([[0, 0, 5, 5]], [0.5], (2.0, 2.0), False)]
    merged = tta([(0, 9), (50, 99)]).merge_preds([views])[0].pred_instances
    assert merged.bboxes.shape == (0, 4)


def test_ranges_must_fit_the_views():
    views = [view([], [], (1.0, 1.0), False)] * 3
    with pytest.raises(ValueError, match='3 views of an image do not divide among 2 scale_ranges'):
        tta([(0, 9), (9, 99)]).merge_preds([views])


def test_two_scales_and_flip_end_to_end(tmp_path, make_head):
    """The head behind a blurring backbone; merged boxes all stem from views that may have them."""
    init_default_scope('mmdet')
    torch.manual_seed(0)
    pixels = np.random.default_rng(0).integers(0, 255, (50, 90, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / 'image.png'), pixels)

    class Detector(nn.Module):
        """Single-level-free stand-in with mmdet's interface."""

        def __init__(self) -> None:
            super().__init__()
            self.preprocess = MODELS.build(dict(type='DetDataPreprocessor', pad_size_divisor=32))
            self.stems = nn.ModuleList(nn.Conv2d(3, 8, s, s) for s in (8, 16, 32))
            self.head = make_head()
            self.views = []

        def test_step(self, data: dict) -> list:
            data = self.preprocess(data, False)
            feats = [stem(data['inputs'] / 255) for stem in self.stems]
            results = self.head.predict(feats, data['data_samples'], rescale=True)
            for sample, result in zip(data['data_samples'], results, strict=True):
                sample.pred_instances = result
                self.views.append((sample.metainfo, result.clone()))
            return data['data_samples']

    pipeline = Compose(
        [
            TRANSFORMS.build(dict(type='LoadImageFromFile')),
            TRANSFORMS.build(
                dict(
                    type='TestTimeAug',
                    transforms=[
                        [
                            dict(type='Resize', scale=s, keep_ratio=True)
                            for s in ((96, 64), (192, 128))
                        ],
                        [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0)],
                        [
                            dict(
                                type='PackDetInputs',
                                meta_keys=(
                                    'img_path',
                                    'ori_shape',
                                    'img_shape',
                                    'scale_factor',
                                    'flip',
                                    'flip_direction',
                                ),
                            )
                        ],
                    ],
                )
            ),
        ]
    )
    detector = Detector()
    model = tta([(20, 1000), (0, 40)], detector)
    data = pseudo_collate([pipeline(dict(img_path=str(tmp_path / 'image.png'), img_id=0))])
    with torch.no_grad():
        merged = model.test_step(data)[0].pred_instances

    assert [meta['flip'] for meta, _ in detector.views] == [False, True] * 2
    allowed = []
    for i, (meta, result) in enumerate(detector.views):
        low, high = [(20, 1000), (0, 40)][i // 2]
        for (x1, y1, x2, y2), score in zip(result.bboxes.tolist(), result.scores, strict=True):
            size = (
                (x2 - x1) * meta['scale_factor'][0] * (y2 - y1) * meta['scale_factor'][1]
            ) ** 0.5
            if low <= size <= high:
                allowed.append(
                    (score.item(), (90 - x2, y1, 90 - x1, y2) if meta['flip'] else (x1, y1, x2, y2))
                )
    assert 0 < len(merged) <= 10
    assert merged.scores[0].item() == pytest.approx(max(allowed)[0])
    for box, score in zip(merged.bboxes, merged.scores, strict=True):
        assert any(
            abs(s - score.item()) < 1e-6 and torch.allclose(box, torch.tensor(b), atol=1e-3)
            for s, b in allowed
        )
