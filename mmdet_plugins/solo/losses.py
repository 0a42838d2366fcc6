"""Losses of predicted masks other than Dice (Table 3.4), one number for each mask.

A prediction is a tuple of logit maps [Q, h, w], its factors: the mask is the product of their
sigmoids. SOLO and SOLOv2 have one factor, Decoupled SOLO two.

mmdet's losses take one target for each prediction, which repeats an object's mask for every cell
that predicts it, and keep half a dozen maps a mask for the gradient.
"""

from mmdet.registry import MODELS
from torch import Tensor, nn

from ..ops.dice import mask_bce_loss, mask_focal_loss


@MODELS.register_module()
class SOLOMaskBCELoss(nn.Module):
    """Binary cross entropy, the mean over each mask; for masks of one factor.

    Args:
        loss_weight: lambda of equation 3.1.
        positive_weight: Weight of the pixels of the object.
    """

    def __init__(self, loss_weight: float = 10.0, positive_weight: float = 2.0) -> None:
        super().__init__()
        self.loss_weight = loss_weight
        self.positive_weight = positive_weight

    def forward(self, factors: tuple[Tensor, ...], targets: Tensor, object_idx: Tensor) -> Tensor:
        """As :meth:`.SOLODiceLoss.forward`."""
        (logits,) = factors
        return self.loss_weight * mask_bce_loss(logits, targets, object_idx, self.positive_weight)


@MODELS.register_module()
class SOLOMaskFocalLoss(nn.Module):
    """Focal loss, the mean over each mask; for masks of one factor.

    Args:
        loss_weight: lambda of equation 3.1.
        alpha: Weight of the pixels of the object, 1 - alpha that of the others.
        gamma: Power of the probability of the wrong class.
    """

    def __init__(self, loss_weight: float = 20.0, alpha: float = 0.25, gamma: float = 2.0) -> None:
        super().__init__()
        self.loss_weight = loss_weight
        self.alpha = alpha
        self.gamma = gamma

    def forward(self, factors: tuple[Tensor, ...], targets: Tensor, object_idx: Tensor) -> Tensor:
        """As :meth:`.SOLODiceLoss.forward`."""
        (logits,) = factors
        return self.loss_weight * mask_focal_loss(
            logits, targets, object_idx, self.alpha, self.gamma
        )
