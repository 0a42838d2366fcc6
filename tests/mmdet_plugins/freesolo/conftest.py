"""A small head, features, and samples of two non-square images with embeddings and affinity."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.structures import InstanceData

import mmdet_plugins.freesolo  # noqa: F401
from mmdet_plugins.ops.affinity import color_affinity

PAD_HW = (96, 160)
STRIDES = (4, 8, 16, 32)
EMBED_DIMS = 6


def build_head(seed: int = 0, **changes):
    torch.manual_seed(seed)
    cfg = dict(
        type='FreeSOLOHead',
        in_channels=8,
        feat_channels=8,
        stacked_convs=1,
        num_grids=(10, 8, 6, 4),
        in_strides=STRIDES,
        strides=(8, 8, 16, 16),
        scale_ranges=((1, 32), (16, 64), (32, 128), (64, 512)),
        norm_cfg=dict(type='GN', num_groups=2),
        mask_features=dict(
            type='UnifiedMaskFeatures',
            feat_channels=4,
            out_channels=6,
            norm_cfg=dict(type='GN', num_groups=2),
        ),
        embed_dims=EMBED_DIMS,
        loss_cls=dict(type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
        loss_mask=dict(type='FreeSOLOWeakMaskLoss', warmup_iters=4),
        test_cfg=dict(score_thr=0.05, filter_thr=0.01, max_per_img=20),
    )
    cfg.update(changes)
    if cfg['type'] == 'SOLODynamicHead':
        del cfg['embed_dims']
    head = MODELS.build(cfg)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return head


def pyramid(images: int = 2, seed: int = 0) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(images, 8, PAD_HW[0] // s, PAD_HW[1] // s) for s in STRIDES]


def ellipses(count: int, hw: tuple[int, int], seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: hw[0], : hw[1]]
    masks = np.zeros((count, *hw), np.uint8)
    for mask in masks:
        cx, cy, rx, ry = rng.uniform((10, 10, 6, 6), (hw[1] - 10, hw[0] - 10, 40, 30))
        mask[((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 <= 1] = 1
    return masks


def sample(count: int, hw: tuple[int, int] = PAD_HW, seed: int = 0) -> DetDataSample:
    masks = ellipses(count, hw, seed)
    boxes = [
        [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        for ys, xs in (np.nonzero(mask) for mask in masks)
    ]
    rng = torch.Generator().manual_seed(seed)
    gts = InstanceData(
        bboxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        labels=torch.zeros(count, dtype=torch.long),
        masks=BitmapMasks(list(masks), *hw),
        embeddings=torch.randn(count, EMBED_DIMS, generator=rng),
    )
    meta = dict(
        img_id=seed, img_shape=hw, ori_shape=(hw[0] * 2, hw[1] * 2), scale_factor=(0.5, 0.5)
    )
    found = DetDataSample(gt_instances=gts, metainfo=meta)
    shades = torch.randint(0, 256, (1, 3, 3, 5), generator=rng).float()
    image = shades.repeat_interleave(32, 2).repeat_interleave(32, 3)
    image += 6 * torch.randn(image.shape, generator=rng)
    found.affinity = color_affinity(image, [hw])[0]
    return found


@pytest.fixture(scope='session')
def freesolo() -> SimpleNamespace:
    """The builders of this file."""
    return SimpleNamespace(
        build_head=build_head,
        pyramid=pyramid,
        sample=sample,
        ellipses=ellipses,
        pad_hw=PAD_HW,
        embed_dims=EMBED_DIMS,
    )


@pytest.fixture
def samples() -> list[DetDataSample]:
    """Two images, five and three objects."""
    return [sample(5, seed=1), sample(3, (80, 133), seed=2)]
