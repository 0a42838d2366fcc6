"""A small head, features and annotations for it; sizes are not square."""

import copy
from collections.abc import Callable

import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData

from mmdet_plugins.cascade_rpn import UVOCascadeRPNHead

SIMOTA = dict(type='UVOSimOTAAssigner', topk=10)

HEAD = ConfigDict(
    in_channels=8,
    feat_channels=8,
    strides=[8, 16, 32],
    anchor_scale=4,
    num_tower_convs=2,
    dcn_tower='first',
    norm_cfg=dict(type='GN', num_groups=4),
    loss_cls=dict(type='FocalLoss', gamma=2.0, alpha=0.25),
    loss_bbox=dict(type='GIoULoss', loss_weight=2.0),
    loss_iou=dict(type='CrossEntropyLoss', use_sigmoid=True),
    stages=[
        dict(
            adapt_type='dilation',
            bridged_feature=True,
            with_cls=False,
            target_stds=[0.1, 0.1, 0.2, 0.2],
        ),
        dict(adapt_type='offset', target_stds=[0.05, 0.05, 0.1, 0.1]),
    ],
    train_cfg=dict(assigner=SIMOTA, reg_assigner=dict(SIMOTA, topk=20)),
    test_cfg=dict(
        nms_pre=60, max_per_img=40, nms=dict(type='nms', iou_threshold=0.8), min_bbox_size=0
    ),
)


@pytest.fixture
def make_head() -> Callable[..., UVOCascadeRPNHead]:
    """A head with everything on, changed by keyword; weights large enough to move boxes."""

    def make(seed: int = 0, **changes) -> UVOCascadeRPNHead:
        torch.manual_seed(seed)
        head = UVOCascadeRPNHead(**{**copy.deepcopy(HEAD), **changes})
        for parameter in head.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        return head

    return make


@pytest.fixture
def make_samples() -> Callable[..., list[DetDataSample]]:
    """Data samples from one list of ground truths per image."""

    def make(
        boxes: list, ignored: list | None = None, img_shape: tuple = (96, 160), **metainfo
    ) -> list[DetDataSample]:
        samples = []
        for i, gts in enumerate(boxes):
            meta = dict(
                img_shape=img_shape,
                pad_shape=img_shape,
                ori_shape=img_shape,
                scale_factor=(1.0, 1.0),
            )
            sample = DetDataSample(metainfo={**meta, **metainfo})
            sample.gt_instances = _instances(gts)
            if ignored is not None:
                sample.ignored_instances = _instances(ignored[i])
            samples.append(sample)
        return samples

    return make


def _instances(boxes: list) -> InstanceData:
    return InstanceData(
        bboxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        labels=torch.zeros(len(boxes), dtype=torch.long),
    )


@pytest.fixture
def features() -> list[torch.Tensor]:
    """Two images of 96 x 160 at strides 8, 16, 32."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 8, 96 // s, 160 // s, generator=generator) for s in (8, 16, 32)]


@pytest.fixture
def gts() -> list[list[list[float]]]:
    """Objects of two images: one for each level, a tall one, and two that overlap at the border."""
    return [
        [[10, 12, 90, 70], [100, 30, 118, 47], [60, 5, 75, 90], [8, 2, 150, 94]],
        [[120, 50, 160, 96], [110, 40, 160, 90]],
    ]
