"""Losses of SOLOv2, forward and backward: 720 positives on 256 x 200 x 304 mask features.

From mask features, kernels and class scores, all of which get a gradient, with targets given: on
CUDA 16 images of 7 to 8 objects; on the CPU 4 images of 31, since the time of the peer grows with
the square of the batch. The peer is ``SOLOV2Head.loss_by_feat`` with the targets that it makes for
itself, each of them repeated for every cell; ours has one for each object. Both take mmdet's focal
loss for the classes. On CUDA, convolutions run in float32 without TF32, as products do by default.
"""

from collections.abc import Callable

import torch
from _case import Case, Floor, Sides
from solo_targets import GRIDS, IMAGE_HW, NUM_CLASSES, blobs, build_solov2_head, targets_of
from torch import Tensor

from mmdet_plugins.ops.dice import dynamic_mask_logits, mask_dice_loss
from mmdet_plugins.ops.grid_targets import GridTargets

CHANNELS = 256
NUM_POSITIVES = 720
LOSS_WEIGHT = 3.0  # mmdet's default
# The objects of each image, and the seed of the first, with which that many positives come out.
OBJECTS = {'cpu': (31,) * 4, 'cuda': (7, 8) * 8}
SEED = {'cpu': 18, 'cuda': 13}


def _build(device: str) -> Sides:
    counts = OBJECTS[device]
    images = [blobs(SEED[device] + i, num, device) for i, num in enumerate(counts)]
    mask_hw = tuple(extent // 4 for extent in IMAGE_HW)
    head = build_solov2_head(CHANNELS).to(device)

    rng = torch.Generator().manual_seed(0)

    def leaf(*shape: int, scale: float) -> Tensor:
        values = torch.randn(len(images), *shape, generator=rng) * scale
        return values.to(device).requires_grad_()

    features = leaf(CHANNELS, *mask_hw, scale=1)
    kernels = [leaf(CHANNELS, size, size, scale=0.1) for size in GRIDS]
    scores = [leaf(NUM_CLASSES, size, size, scale=1) for size in GRIDS]
    leaves = [features, *kernels, *scores]

    targets = targets_of(images, [4] * len(GRIDS))
    # Passed through below, in place of the instances that they were made from.
    theirs = [head._get_targets_single(image, featmap_sizes=mask_hw) for image in images]
    head._get_targets_single = lambda target, featmap_sizes: target

    def ours() -> tuple[Tensor, ...]:
        losses = _losses(features, kernels, scores, targets, head.loss_cls)
        return *losses, *torch.autograd.grad(sum(losses), leaves)

    def peer() -> tuple[Tensor, ...]:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            losses = head.loss_by_feat(kernels, scores, features, theirs, [{}] * len(images))
            losses = losses['loss_mask'], losses['loss_cls']
            return *losses, *torch.autograd.grad(sum(losses), leaves)

    def parity(mine: tuple, theirs: tuple) -> str:
        num = (targets.cells >= 0).sum()
        assert num == NUM_POSITIVES, f'{num} positives'
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.detach().abs().max().item())
        return f'both losses and all gradients of {num} positives equal to 1e-5 of their largest'

    return Sides(ours, peer, parity)


def _losses(
    features: Tensor,
    kernels: list[Tensor],
    scores: list[Tensor],
    targets: GridTargets,
    loss_cls: Callable[..., Tensor],
) -> tuple[Tensor, Tensor]:
    positives, counts = targets.by_image()
    kernels = torch.cat([level.flatten(2) for level in kernels], dim=2).transpose(1, 2)
    kernels = kernels[positives.image_idx, positives.cell_idx]
    logits = dynamic_mask_logits(features, kernels, counts)
    num = targets.num_positives
    dice = mask_dice_loss(logits, targets.masks[0], positives.object_idx).sum() / num
    scores = torch.cat([level.flatten(2) for level in scores], dim=2).transpose(1, 2)
    cls = loss_cls(scores.flatten(0, 1), targets.labels.flatten(), avg_factor=num + 1)
    return LOSS_WEIGHT * dice, cls


FLOORS = {'cpu': Floor(ratio=3, memory=1 / 3), 'cuda': Floor(ratio=4)}
CASES = [Case('SOLOv2, 720 positives, forward and backward', _build, FLOORS)]
