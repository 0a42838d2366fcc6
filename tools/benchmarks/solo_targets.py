"""Targets of one 800 x 1216 image with 7, 30 or 100 objects: grids 40 to 12, five scale ranges.

Objects are blobs with log-uniform sides of 16 to 500 px, their masks uint8 on the device under
test. The peers are ``SOLOV2Head._get_targets_single`` and, in the last case, ``SOLOHead``'s, which
get the same masks: on the CPU in the data pipeline's ``BitmapMasks``, on CUDA in a tensor there, so
that no side pays for the upload. The peers repeat the target of an object for each of its cells;
ours has it once at each stride, with the cells beside it.
"""

import math
from collections.abc import Sequence

import cv2
import numpy as np
import torch
from _case import Case, Floor, Sides
from mmdet.models.dense_heads import SOLOHead, SOLOV2Head
from mmdet.structures.mask import BitmapMasks
from mmengine.structures import InstanceData
from torch import Tensor

from mmdet_plugins.ops.grid_targets import GridTargets, grid_targets

IMAGE_HW = (800, 1216)
NUM_CLASSES = 80
GRIDS = (40, 36, 24, 16, 12)
SCALES = ((1, 96), (48, 192), (96, 384), (192, 768), (384, 2048))
STRIDES = (8, 8, 16, 32, 32)


class TensorMasks:
    """Masks that are on a device already, for heads that ask ``BitmapMasks`` for them."""

    def __init__(self, masks: Tensor) -> None:
        self.masks = masks

    def to_tensor(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self.masks.to(device, dtype)


def blobs(seed: int, num: int, device: str) -> InstanceData:
    """Objects of random size, place and outline, with their boxes and labels."""
    rng = np.random.default_rng(seed)
    height, width = IMAGE_HW
    masks = np.zeros((num, height, width), np.uint8)
    angle = np.linspace(0, 2 * math.pi, 64, endpoint=False)
    for mask in masks:
        waves = sum(rng.normal(0, 0.1) * np.cos(k * angle + rng.uniform(0, 6)) for k in (2, 3, 5))
        radius = (1 + waves) * 8 * 31 ** rng.random((2, 1))
        centre = rng.random((2, 1)) * [[width], [height]]
        outline = centre + radius * np.stack([np.cos(angle), np.sin(angle)])
        cv2.fillPoly(mask, [outline.T.round().astype(np.int32)], 1)
    boxes = np.array([cv2.boundingRect(mask) for mask in masks], np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    on_device = device != 'cpu'
    return InstanceData(
        masks=TensorMasks(torch.from_numpy(masks).to(device))
        if on_device
        else BitmapMasks(masks, height, width),
        bboxes=torch.from_numpy(boxes).to(device),
        labels=torch.from_numpy(rng.integers(0, NUM_CLASSES, num)).to(device),
    )


def targets_of(images: Sequence[InstanceData], strides: Sequence[int]) -> GridTargets:
    height, width = IMAGE_HW
    return grid_targets(
        [image.masks.masks for image in images],
        [image.bboxes for image in images],
        [image.labels for image in images],
        grid_sizes=GRIDS,
        scale_ranges=SCALES,
        mask_strides=strides,
        mask_hw=[(height // stride, width // stride) for stride in strides],
        num_classes=NUM_CLASSES,
    )


def build_solov2_head(channels: int = 32) -> SOLOV2Head:
    return SOLOV2Head(
        NUM_CLASSES,
        in_channels=channels,
        feat_channels=channels,
        strides=STRIDES,
        scale_ranges=SCALES,
        num_grids=GRIDS,
        mask_feature_head=dict(
            feat_channels=channels, start_level=0, end_level=3, out_channels=channels, mask_stride=4
        ),
    )


def _parity(mine: GridTargets, theirs: tuple, *, repeated: bool) -> str:
    masks, labels, flags = theirs[:3]
    assert torch.equal(mine.labels[0], torch.cat([x.flatten() for x in labels])), 'labels differ'
    assert torch.equal(mine.owner[0] >= 0, torch.cat([x.flatten() for x in flags])), 'cells differ'
    positives, _ = mine.by_image() if repeated else mine.by_level()
    start = num = 0
    for level, size in enumerate(GRIDS):
        cells = positives.cell_idx - start
        here = (cells >= 0) & (cells < size**2)
        if repeated:
            assert cells[here].tolist() == theirs[3][level], f'positives of level {level} differ'
        target = mine.masks[level][positives.object_idx[here]]
        assert torch.equal(target, masks[level].bool()), f'masks of level {level} differ'
        start, num = start + size**2, num + len(target)
    return f'labels, {num} positives and their masks equal'


def _build_solov2(num: int, device: str) -> Sides:
    head, image = build_solov2_head(), blobs(num, num, device)
    size = tuple(extent // 4 for extent in IMAGE_HW)
    return Sides(
        lambda: targets_of([image], [4] * 5),
        lambda: head._get_targets_single(image, featmap_sizes=size),
        lambda mine, theirs: _parity(mine, theirs, repeated=True),
    )


def _build_solo(num: int, device: str) -> Sides:
    head = SOLOHead(
        NUM_CLASSES, 32, 32, strides=STRIDES, scale_ranges=SCALES, num_grids=list(GRIDS)
    )
    image = blobs(num, num, device)
    strides = [stride // 2 for stride in STRIDES]
    sizes = [tuple(extent // stride for extent in IMAGE_HW) for stride in strides]
    return Sides(
        lambda: targets_of([image], strides),
        lambda: head._get_targets_single(image, featmap_sizes=sizes),
        lambda mine, theirs: _parity(mine, theirs, repeated=False),
    )


FLOORS = {'cpu': Floor(ratio=12), 'cuda': Floor(ratio=20, syncs=0)}
CASES = [
    Case(f'SOLOv2, {num} objects', lambda device, num=num: _build_solov2(num, device), FLOORS)
    for num in (7, 30, 100)
] + [Case('SOLO, 30 objects', lambda device: _build_solo(30, device), FLOORS)]
