"""Pairwise colour affinity of BoxInst, forward and backward: 2 images, 64 masks of 200 x 304 each.

From a batch of 800 x 1216 images, normalised and padded, and the logits of 64 positives an image,
as many as BoxInst trains, to the loss and its gradient, Lab conversion included. The peer is
mmdet's ``BoxInstDataPreprocessor`` and the pairwise term of its ``BoxInstMaskHead``; ours the
preprocessor and the loss of FreeSOLO. Both get the boxes of 8 objects an image, with COCO's share
of small, medium and large ones; in the second case every box is the whole image. mmdet takes Lab
from scikit-image; where that is not installed, from the same formula in NumPy.
"""

from types import SimpleNamespace

import numpy as np
import torch
from _case import Case, Floor, Sides
from mmdet.models.data_preprocessors import data_preprocessor
from mmdet.models.dense_heads import BoxInstMaskHead
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import Tensor

import mmdet_plugins.freesolo  # noqa: F401
from mmdet_plugins.ops.affinity import pairwise_affinity_loss

IMAGE_HW = (800, 1216)
STRIDE = 4
NUM_IMAGES, NUM_OBJECTS, NUM_POSITIVES = 2, 8, 64
SETTINGS = dict(mean=[0, 0, 0], std=[1, 1, 1], bgr_to_rgb=True, pad_size_divisor=32)
# Sides of boxes, px: 41 % small, 34 % medium and 24 % large ones are COCO's.
SIDES = ((16, 32), (16, 32), (16, 32), (32, 96), (32, 96), (32, 96), (96, 600), (96, 600))


def rgb_to_lab(image: np.ndarray) -> np.ndarray:
    """What mmdet takes from scikit-image: uint8 [H, W, 3] to Lab in float64."""
    value = image.astype(np.float64) / 255
    high = value > 0.04045
    value[high] = ((value[high] + 0.055) / 1.055) ** 2.4
    value[~high] /= 12.92
    to_xyz = np.array([[0.412453, 0.35758, 0.180423], [0.212671, 0.71516, 0.072169],
                       [0.019334, 0.119193, 0.950227]])  # fmt: skip
    ratio = value @ to_xyz.T / (0.95047, 1, 1.08883)
    high = ratio > 0.008856
    ratio[high] = np.cbrt(ratio[high])
    ratio[~high] = 7.787 * ratio[~high] + 16 / 116
    x, y, z = (ratio[..., i] for i in range(3))
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def _build(device: str, whole: bool) -> Sides:
    if data_preprocessor.skimage is None:
        data_preprocessor.skimage = SimpleNamespace(color=SimpleNamespace(rgb2lab=rgb_to_lab))
    rng = np.random.default_rng(0)
    height, width = IMAGE_HW
    images, boxes = [], []
    for _ in range(NUM_IMAGES):
        shades = rng.integers(0, 256, (3, height // 100, width // 152)).astype(np.float32)
        smooth = shades.repeat(100, 1).repeat(152, 2) + rng.normal(0, 6, (3, height, width))
        images.append(torch.from_numpy(smooth.clip(0, 255).astype(np.uint8)).to(device))
        sides = [np.exp(rng.uniform(*np.log(span), 2)) for span in SIDES]
        corners = [(rng.uniform(0, width - w), rng.uniform(0, height - h)) for w, h in sides]
        found = [[x, y, x + w, y + h] for (x, y), (w, h) in zip(corners, sides, strict=True)]
        if whole:
            found = [[0, 0, width - 1, height - 1]] * NUM_OBJECTS
        boxes.append(torch.tensor(found, dtype=torch.float32, device=device))
    # Larger objects have more positive cells.
    share = [max(1, round(np.sqrt(w * h))) for w, h in (span for span in SIDES)]
    owner = rng.choice(NUM_OBJECTS, (NUM_IMAGES, NUM_POSITIVES), p=np.array(share) / sum(share))
    owner = torch.from_numpy(owner).to(device)
    generator = torch.Generator().manual_seed(0)
    map_hw = tuple(side // STRIDE for side in IMAGE_HW)
    logits = 4 * torch.randn(NUM_IMAGES * NUM_POSITIVES, *map_hw, generator=generator)
    logits = logits.to(device).requires_grad_()

    def batch() -> dict:
        meta = dict(img_shape=IMAGE_HW, ori_shape=IMAGE_HW)
        samples = [
            DetDataSample(gt_instances=InstanceData(bboxes=found), metainfo=meta) for found in boxes
        ]
        return dict(inputs=images, data_samples=samples)

    mine = MODELS.build(dict(type='FreeSOLODataPreprocessor', **SETTINGS)).to(device)
    theirs = MODELS.build(dict(type='BoxInstDataPreprocessor', **SETTINGS)).to(device)
    image_idx = torch.arange(NUM_IMAGES, device=device).repeat_interleave(NUM_OBJECTS)
    object_idx = (owner + NUM_OBJECTS * torch.arange(NUM_IMAGES, device=device)[:, None]).flatten()

    def ours() -> tuple[Tensor, Tensor]:
        samples = mine(batch(), True)['data_samples']
        affinity = torch.stack([sample.affinity for sample in samples])
        on_map = _boxes_on_map(torch.cat([sample.gt_instances.bboxes for sample in samples]))
        loss, pairs = pairwise_affinity_loss(logits, affinity, on_map, image_idx, object_idx)
        loss = loss.sum() / pairs.sum()
        return loss, torch.autograd.grad(loss, logits)[0]

    settings = SimpleNamespace(
        pairwise_size=3,
        pairwise_dilation=2,
        max_masks_to_train=-1,
        topk_masks_per_img=-1,
        mask_out_stride=STRIDE,
    )

    def peer() -> tuple[Tensor, Tensor]:
        samples = theirs(batch(), True)['data_samples']
        total = pairs = 0
        for sample, part, mine_idx in zip(samples, logits.split(NUM_POSITIVES), owner, strict=True):
            info = InstanceData(pos_assigned_gt_inds=mine_idx)
            part, _, weights, _ = BoxInstMaskHead._get_targets_single(
                settings, part, sample.gt_instances, info
            )
            terms = BoxInstMaskHead.get_pairwise_affinity(settings, part)
            total = total + (terms * weights).sum()
            pairs = pairs + weights.sum()
        loss = total / pairs
        return loss, torch.autograd.grad(loss, logits)[0]

    def parity(mine: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> str:
        torch.testing.assert_close(mine[0], theirs[0], rtol=1e-4, atol=0)
        scale = theirs[1].abs().max()
        # A colour distance that float32 puts on the other side of the threshold moves few pixels.
        off = ((mine[1] - theirs[1]).abs() > 1e-4 * scale).float().mean().item()
        assert off < 1e-4, f'{off:.1e} of the gradient differs'
        return f'loss equal to 1e-4, gradient to 1e-4 of its largest at all but {off:.0e} of pixels'

    return Sides(ours, peer, parity)


def _boxes_on_map(boxes_xyxy: Tensor) -> Tensor:
    """The pixels of the map whose middles mmdet's box masks cover, the ends exclusive."""
    ends = boxes_xyxy.int() + torch.tensor([0, 0, 1, 1], device=boxes_xyxy.device)
    # mmdet truncates after adding 1, and takes every fourth pixel from the third on.
    return (ends - STRIDE // 2 + STRIDE - 1).div(STRIDE, rounding_mode='floor').clamp(min=0).long()


CASES = [
    Case(
        'boxes as in COCO',
        lambda device: _build(device, whole=False),
        {'cpu': Floor(ratio=10, memory=1 / 20), 'cuda': Floor(ratio=10, memory=1 / 20)},
    ),
    Case(
        'every box the whole image',
        lambda device: _build(device, whole=True),
        {'cpu': Floor(memory=1 / 20), 'cuda': Floor(ratio=10, memory=1 / 20)},
    ),
]
