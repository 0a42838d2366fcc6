"""Losses of one cascade stage on all priors of all images at once.

Background priors take part with weight zero: shapes do not depend on the number of positives, so
nothing is read back from the device, and images without objects still reach every parameter.

N images, P priors per image.
"""

import torch
from mmdet.structures.bbox import bbox_overlaps
from torch import Tensor, nn

from ..common.ranks import mean_over_ranks
from .assigner import BACKGROUND


def objectness_loss(loss_cls: nn.Module, logits: Tensor, gt_idx: Tensor) -> Tensor:
    """Classification loss over the positives, all [N, P]; ignored priors weigh nothing."""
    positive = gt_idx >= 0
    # mmdet: the objects are class 0, background is the number of classes.
    labels = (~positive).long().flatten()
    weights = (gt_idx >= BACKGROUND).flatten().to(logits)
    return loss_cls(
        logits.flatten()[:, None], labels, weights, avg_factor=mean_over_ranks(_count(positive))
    )


def box_losses(
    loss_bbox: nn.Module,
    loss_iou: nn.Module | None,
    boxes: Tensor,
    iou_logits: Tensor | None,
    targets: Tensor,
    gt_idx: Tensor,
) -> dict[str, Tensor]:
    """Regression loss and, with an IoU branch, its loss.

    With an IoU branch each positive weighs as much as the IoU of its prediction and the sum is
    normalised by the sum of IoUs (the released code; the paper does not tell); without, positives
    weigh alike.

    Args:
        boxes: Decoded predictions [N, P, 4].
        iou_logits: [N, P].
        targets: Boxes of the assigned objects [N, P, 4]; anything finite where there is none.
        gt_idx: [N, P].
    """
    positive = gt_idx >= 0
    weights = positive.to(boxes)
    losses = {}
    if loss_iou is None:
        avg_factor = _count(positive)
    else:
        ious = bbox_overlaps(boxes.detach(), targets, is_aligned=True)
        losses['loss_rpn_iou'] = loss_iou(
            iou_logits.flatten(),
            ious.flatten(),
            weights.flatten(),
            avg_factor=mean_over_ranks(_count(positive)),
        )
        weights = weights * ious
        avg_factor = weights.sum()
    per_prior = loss_bbox(boxes.flatten(0, 1), targets.flatten(0, 1), reduction_override='none')
    losses['loss_rpn_reg'] = (per_prior * weights.flatten()).sum() / mean_over_ranks(avg_factor)
    return losses


def _count(positive: Tensor) -> Tensor:
    """Number of positives of [N, P], one at least per image (mmdet's convention)."""
    return positive.sum(1).clamp(min=1).sum()


def gather_targets(gt_boxes: list[Tensor], gt_idx: Tensor) -> Tensor:
    """Box of the assigned object of each prior, zeros where there is none; -> [N, P, 4].

    Args:
        gt_boxes: One [G, 4] per image.
        gt_idx: [N, P].
    """
    return torch.stack(
        [
            torch.cat([boxes, boxes.new_zeros(1, 4)])[idx]
            for boxes, idx in zip(gt_boxes, gt_idx.clamp(min=BACKGROUND), strict=True)
        ]
    )
