"""SOLOv2 post-processing of 500 candidates, 256 channels at 200 x 304, to 100 masks at 480 x 640.

Kernels and mask features lie on the device under test. The features hold the polynomials of the
coordinates, beside smooth noise, and a kernel the ellipse of an object, with a little of the noise:
one object for every eight candidates, its semi-axes log-uniform from 3 to 36 % of the image's
sides, of 80 classes; class scores fall steeply from 1 to 0.1. A 480 x 640 image is at 800 x 1066 in
a 800 x 1216 input. The peer is mmdet's ``SOLOV2Head._predict_by_feat_single``.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from _case import Case, Floor, Sides
from mmdet.models.dense_heads import SOLOV2Head
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData
from torch import Tensor

from mmdet_plugins.ops.instance_masks import (
    Frame,
    InstanceMasks,
    Selection,
    resize_instances,
    select_instances,
)

FRAME = Frame((200, 304), (800, 1216), (800, 1066), (480, 640))
CHANNELS, CLASSES, CANDIDATES = 256, 80, 500
GRIDS, STRIDES = [40, 36, 24, 16, 12], [8, 8, 16, 32, 32]
CONFIG = ConfigDict(
    nms_pre=500,
    score_thr=0.1,
    mask_thr=0.5,
    filter_thr=0.05,
    kernel='gaussian',
    sigma=2.0,
    max_per_img=100,
)


class Scene(NamedTuple):
    """What a head hands to its post-processing: P cells.

    Attributes:
        kernels: ``[P, 256]``.
        scores: ``[P, 80]``.
        features: ``[1, 256, h, w]``.
    """

    kernels: Tensor
    scores: Tensor
    features: Tensor


def build_scene(device: str, num: int = CANDIDATES) -> Scene:
    rng = torch.Generator().manual_seed(0)
    height, width = FRAME.map_hw
    y = torch.linspace(-1, 1, height)[:, None].expand(height, width)
    x = torch.linspace(-1, 1, width).expand(height, width)
    noise = torch.randn(1, CHANNELS, height // 8, width // 8, generator=rng)
    features = F.interpolate(noise, FRAME.map_hw, mode='bicubic')
    features[0, :5] = torch.stack([torch.ones_like(x), x, y, x * x, y * y])

    objects = torch.rand(num // 8, 4, generator=rng)
    of = torch.randint(len(objects), (num,), generator=rng)
    drawn = objects[of] + 0.02 * torch.randn(num, 4, generator=rng)
    cx, cy = 2 * drawn[:, :2].T - 1
    rx, ry = 0.06 * 12 ** drawn[:, 2:].T
    cells = torch.randperm(sum(g * g for g in GRIDS), generator=rng)[:num]
    kernels = torch.zeros(sum(g * g for g in GRIDS), CHANNELS)
    kernels[cells] = 0.03 * torch.randn(num, CHANNELS, generator=rng)
    ellipse = [1 - (cx / rx) ** 2 - (cy / ry) ** 2, 2 * cx / rx**2, 2 * cy / ry**2]
    ellipse += [-1 / rx**2, -1 / ry**2]
    kernels[cells, :5] = 4 * torch.stack(ellipse, dim=1)
    scores = torch.zeros(len(kernels), CLASSES)
    labels = torch.randint(CLASSES, (len(objects),), generator=rng)[of]
    scores[cells, labels] = 0.101 + 0.899 * torch.rand(num, generator=rng) ** 3
    return Scene(*(t.to(device) for t in (kernels, scores, features)))


def ours(scene: Scene, *, rle: bool) -> tuple[Selection, InstanceMasks]:
    areas = torch.tensor([float(s) for s in STRIDES], device=scene.scores.device)
    areas = areas.repeat_interleave(torch.tensor([g * g for g in GRIDS], device=areas.device))
    cells, labels = (scene.scores > CONFIG.score_thr).nonzero().T
    kernels, features = scene.kernels[cells], scene.features[0].flatten(1)

    def maps_of(index: Tensor) -> Tensor:
        return (kernels[index] @ features).unflatten(1, FRAME.map_hw)

    selection = select_instances(
        scene.scores[cells, labels], labels, maps_of, FRAME.map_hw, min_area=areas[cells]
    )
    return selection, resize_instances(selection, maps_of, FRAME, rle=rle)


def stock_head() -> SOLOV2Head:
    """Only its post-processing is used; the layers are as small as they get."""
    norm = dict(type='GN', num_groups=1)
    mask_features = dict(
        feat_channels=1, start_level=0, end_level=3, out_channels=CHANNELS, mask_stride=4
    )
    return SOLOV2Head(
        mask_feature_head=mask_features,
        num_classes=CLASSES,
        in_channels=1,
        feat_channels=1,
        stacked_convs=1,
        strides=STRIDES,
        num_grids=GRIDS,
        norm_cfg=norm,
        test_cfg=CONFIG,
    )


def peer(head: SOLOV2Head, scene: Scene) -> InstanceData:
    meta = dict(img_shape=FRAME.image_hw, ori_shape=FRAME.original_hw)
    return head._predict_by_feat_single(*scene, meta)


def compare(selection: Selection, found: Tensor, stock: InstanceData) -> str:
    assert torch.equal(selection.labels, stock.labels), 'labels differ'
    torch.testing.assert_close(selection.scores, stock.scores, rtol=1e-6, atol=0)
    differ = int((found != stock.masks).sum())
    assert differ <= 1e-6 * found.numel(), f'{differ} pixels differ'
    return f'{len(found)} instances, scores to 1e-6, {differ} of {found.numel()} pixels differ'


def _build(device: str) -> Sides:
    scene, head = build_scene(device), stock_head()
    return Sides(
        lambda: ours(scene, rle=False),
        lambda: peer(head, scene),
        lambda mine, theirs: compare(mine[0], mine[1].masks, theirs),
    )


FLOORS = {'cpu': Floor(ratio=5), 'cuda': Floor(ratio=4, memory=1 / 5)}
CASES = [Case('500 candidates to 100 masks', _build, FLOORS)]
