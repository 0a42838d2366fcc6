"""Losses of masks whose targets are coarse (section 6.2.3).

Shapes: Q positive cells, G objects and N images of the batch, ``h w`` a mask map.
"""

import torch
from mmdet.registry import MODELS
from torch import Tensor, nn

from ..common.location_head import PositiveMasks
from ..common.ranks import mean_over_ranks
from ..ops.affinity import pairwise_affinity_loss
from ..ops.instance_masks import mask_boxes
from ..ops.projection import projection_losses


@MODELS.register_module()
class FreeSOLOWeakMaskLoss(nn.Module):
    """Projections and colour affinity, ``alpha L_avg + L_max + L_pairwise`` (equation 6.6).

    Projection losses are means over all positive cells, the pairwise loss one over all pairs; the
    released code takes them level by level and then the mean of levels.

    Args:
        max_weight: Of the projections by maximum (equation 6.4).
        avg_weight: alpha, of the projections by average (equation 6.5).
        pairwise_weight: Of the pairwise affinity.
        warmup_iters: Steps over which the pairwise weight rises from zero; the thesis is silent,
            this is the released code's. They are counted in a buffer, so that a resumed run goes
            on where it was.
    """

    def __init__(
        self,
        max_weight: float = 1.0,
        avg_weight: float = 0.1,
        pairwise_weight: float = 1.0,
        warmup_iters: int = 1000,
    ) -> None:
        super().__init__()
        self.max_weight = max_weight
        self.avg_weight = avg_weight
        self.pairwise_weight = pairwise_weight
        self.warmup_iters = warmup_iters
        self.register_buffer('steps', torch.zeros((), dtype=torch.long))

    def forward(
        self, masks: PositiveMasks, num_positives: Tensor, affinity: Tensor, image_idx: Tensor
    ) -> dict[str, Tensor]:
        """Losses ``loss_max_proj``, ``loss_avg_proj`` and ``loss_pairwise``.

        Args:
            masks: Of one factor.
            num_positives: What sums over cells are divided by.
            affinity: uint8 [N, h, w], of :func:`..ops.affinity.color_affinity`.
            image_idx: [G].
        """
        (logits,) = masks.factors
        projections = projection_losses(logits, masks.targets, masks.object_idx)
        pairwise, pairs = pairwise_affinity_loss(
            logits, affinity, mask_boxes(masks.targets).long(), image_idx, masks.object_idx
        )
        if self.training:
            self.steps += 1
        warmup = (self.steps / max(self.warmup_iters, 1)).clamp(max=1)
        return dict(
            loss_max_proj=self.max_weight * projections.maximum.sum() / num_positives,
            loss_avg_proj=self.avg_weight * projections.average.sum() / num_positives,
            loss_pairwise=self.pairwise_weight
            * warmup
            * (pairwise.sum() / mean_over_ranks(pairs.sum())),
        )
