"""Small heads, mmdet's beside ours, with the same weights; objects on non-square images."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData

import mmdet_plugins.solo  # noqa: F401

PAD_HW = (128, 192)
IN_STRIDES = (4, 8, 16, 32, 64)
SCALE_RANGES = ((1, 24), (12, 48), (24, 96), (48, 192), (96, 512))
NUM_GRIDS = (12, 9, 6, 5, 3)
CHANNELS = 8
COMMON = dict(
    num_classes=3,
    in_channels=CHANNELS,
    feat_channels=CHANNELS,
    strides=(8, 8, 16, 32, 32),
    scale_ranges=SCALE_RANGES,
    num_grids=NUM_GRIDS,
    norm_cfg=dict(type='GN', num_groups=2),
    loss_cls=dict(type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
)
TEST_CFG = dict(
    nms_pre=60,
    score_thr=0.1,
    mask_thr=0.5,
    filter_thr=0.05,
    kernel='gaussian',
    sigma=2.0,
    max_per_img=20,
)
FEATURES = dict(out_channels=6, norm_cfg=dict(type='GN', num_groups=2))
# Ours, mmdet's, and what each needs beyond COMMON.
HEADS = dict(
    vanilla=('SOLOVanillaHead', 'SOLOHead', dict(stacked_convs=2), dict(stacked_convs=2)),
    decoupled=(
        'SOLODecoupledHead',
        'DecoupledSOLOHead',
        dict(stacked_convs=2),
        dict(stacked_convs=2),
    ),
    light=(
        'SOLODecoupledHead',
        'DecoupledSOLOLightHead',
        dict(stacked_convs=2, shared_tower=True),
        dict(stacked_convs=2),
    ),
    dynamic=(
        'SOLODynamicHead',
        'SOLOV2Head',
        dict(
            stacked_convs=2,
            mask_features=dict(type='UnifiedMaskFeatures', feat_channels=4, **FEATURES),
        ),
        dict(
            stacked_convs=2,
            mask_feature_head=dict(
                feat_channels=4, start_level=0, end_level=3, mask_stride=4, **FEATURES
            ),
        ),
    ),
)


POST_PROCESSING = ('mask_format', 'maskness', 'nms', *TEST_CFG)


def build_ours(kind: str = 'dynamic', seed: int = 0, **changes):
    """One of our heads; changes are of the head or, by name, of its test settings."""
    name, _, ours, _ = HEADS[kind]
    torch.manual_seed(seed)
    test_cfg = {**TEST_CFG, **{k: changes.pop(k) for k in POST_PROCESSING if k in changes}}
    loss_mask = dict(type='SOLODiceLoss')
    cfg = dict(COMMON, type=name, in_strides=IN_STRIDES, loss_mask=loss_mask, test_cfg=test_cfg)
    return MODELS.build(copy.deepcopy({**cfg, **ours, **changes}))


def build_pair(kind: str, seed: int = 0, spread: float = 0.0, **changes) -> tuple:
    """Ours and mmdet's with the same weights; changes are of test settings.

    Noise of scale ``spread`` livens up the weights, and lets some cells have objects.
    """
    ours = build_ours(kind, seed, **changes)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter += spread * torch.randn_like(parameter)
        ours.conv_cls.bias.fill_(-3.0)
    _, name, _, stock = HEADS[kind]
    activate = {'activate': False} if kind in ('decoupled', 'light') else {}
    loss_mask = dict(type='DiceLoss', use_sigmoid=True, loss_weight=3.0, **activate)
    settings = {k: changes.get(k, value) for k, value in TEST_CFG.items()}
    cfg = dict(COMMON, type=name, loss_mask=loss_mask, test_cfg=settings, **stock)
    head = MODELS.build(ConfigDict(copy.deepcopy(cfg)))
    head.load_state_dict(ours.state_dict(), strict=True)
    return ours, head


def pyramid(hw: tuple[int, int] = PAD_HW, images: int = 2, seed: int = 0) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    return [
        torch.randn(images, CHANNELS, hw[0] // stride, hw[1] // stride) for stride in IN_STRIDES
    ]


def ellipses(hw: tuple[int, int], count: int, seed: int = 0) -> np.ndarray:
    """Masks [count, H, W] of ellipses of all sizes, some cut off by the border."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: hw[0], : hw[1]]
    masks = np.zeros((count, *hw), np.uint8)
    for mask in masks:
        cx, cy = rng.uniform(0, hw[1]), rng.uniform(0, hw[0])
        rx, ry = np.exp(rng.uniform(np.log(2), np.log(min(hw) / 2), 2))
        mask[((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 <= 1] = 1
    return masks


def sample(masks: np.ndarray, hw: tuple[int, int], num_classes: int = 3) -> DetDataSample:
    """A data sample of ``masks``, in an image of size ``hw``, padded in its batch to ``PAD_HW``."""
    boxes = [
        [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] if len(xs) else [0, 0, 0, 0]
        for ys, xs in (np.nonzero(mask) for mask in masks)
    ]
    gts = InstanceData(
        bboxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        labels=torch.arange(len(masks)) % num_classes,
        masks=BitmapMasks(list(masks), *hw),
    )
    meta = dict(
        img_id=7,
        img_shape=hw,
        ori_shape=(hw[0] * 2 - 3, hw[1] * 2 + 1),
        batch_input_shape=PAD_HW,
        pad_shape=PAD_HW,
        scale_factor=(0.5, 0.5),
    )
    return DetDataSample(gt_instances=gts, metainfo=meta)


@pytest.fixture(scope='session')
def solo() -> SimpleNamespace:
    """The builders of this file."""
    return SimpleNamespace(
        build_ours=build_ours,
        build_pair=build_pair,
        ellipses=ellipses,
        pyramid=pyramid,
        sample=sample,
    )


@pytest.fixture(params=['random', 'crowded'])
def samples(request) -> list[DetDataSample]:
    """Two images of different size; 5 and 9 objects, or 60 small and large ones in each."""
    counts = (5, 9) if request.param == 'random' else (60, 60)
    return [
        sample(ellipses(hw, count, seed), hw)
        for seed, (hw, count) in enumerate(zip(((128, 160), (101, 192)), counts, strict=True))
    ]
