"""Matting of single instances by SOLOv2 (section 4.3.4): a soft matte for each detected object.

The mask features are refined with the image itself at its full resolution, a mean absolute error
joins the Dice loss, the category branch stays as it was trained on COCO, and the sigmoid is the
matte. Where the thesis is silent: the 3x3 convolutions have group norm and ReLU, and the 1x1
convolution after them nothing and starts at zero, so that training sets out from SOLOv2's own
masks; as long as categories are frozen their loss is left out, since matting data name few of the
objects they show.

Shapes: N images, E mask feature channels, D channels inside the refinement, Q cells, G objects of
an image, ``H W`` the padded input, ``h w`` a quarter of it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmdet.registry import MODELS
from mmengine.model import BaseModule
from mmengine.structures import InstanceData
from torch import Tensor, nn

from ..common.location_head import LocationSegmentor, SOLODynamicHead, convolve_at, frame_of
from ..common.ranks import mean_over_ranks
from ..ops.dice import dynamic_mask_logits, wide
from ..ops.grid_targets import GridTargets
from ..ops.instance_masks import BYTE_BUDGET, Frame
from ..ops.matting import matte_dice_loss
from .matting_data import MIDDLE

STRIDE = 4
NORM = dict(type='GN', num_groups=8)


class DetailsRefinement(BaseModule):
    """Low-level features at full resolution, from mask features and image (Figure 4.5).

    The thesis convolves the sum of E enlarged and E refined channels with each kernel. Both are
    linear in the kernel, so the E channels at full resolution, a gigabyte for 800 x 1333 pixels,
    are never formed: see :meth:`logits`.

    Args:
        in_channels: E.
        feat_channels: D.
        norm_cfg: Of the 3x3 convolutions.
    """

    def __init__(
        self,
        in_channels: int,
        feat_channels: int = 32,
        norm_cfg: dict | None = NORM,
        init_cfg: dict | list | None = None,
    ) -> None:
        super().__init__(
            init_cfg
            or dict(
                type='Kaiming',
                layer='Conv2d',
                override=dict(type='Constant', name='expand', val=0),
            )
        )
        self.reduce = nn.Conv2d(in_channels, feat_channels, 1)
        self.convs = nn.Sequential(
            *(
                ConvModule(feat_channels + 3 * (i == 0), feat_channels, 3, padding=1,
                           norm_cfg=norm_cfg)
                for i in range(3)
            )
        )  # fmt: skip
        self.expand = nn.Conv2d(feat_channels, in_channels, 1)

    def forward(self, features: Tensor, image: Tensor) -> Tensor:
        """[N, E, h, w] and [N, 3, H, W] -> [N, D, H, W]."""
        coarse = F.interpolate(self.reduce(features), scale_factor=STRIDE, mode='bilinear')
        return self.convs(torch.cat([coarse, image], 1))

    def logits(
        self, features: Tensor, details: Tensor, kernels: Tensor, counts: Sequence[int]
    ) -> Tensor:
        """Mattes of N images, by 1x1 kernels on the final mask features.

        Args:
            features: [N, E, h, w], the mask features.
            details: [N, D, H, W], or at the size of ``features``.
            kernels: [Q, E], grouped by image.
            counts: How many kernels each image has.

        Returns:
            [Q, H, W], or [Q, h, w].
        """
        weight = self.expand.weight.flatten(1).to(kernels.dtype)
        bias = self.expand.bias.to(kernels.dtype)
        coarse = dynamic_mask_logits(features, kernels, counts) + (kernels @ bias)[:, None, None]
        if details.shape[2:] != features.shape[2:]:
            coarse = F.interpolate(coarse[:, None], scale_factor=STRIDE, mode='bilinear')[:, 0]
        return coarse + dynamic_mask_logits(details, kernels @ weight, counts)


@MODELS.register_module()
class SOLOMattingHead(SOLODynamicHead):
    """SOLOv2's head with mattes: takes the pyramid and, after it, the image [N, 3, H, W].

    Candidates are chosen as everywhere, by maps at a quarter of the input: the coarse logits as
    they are, and the mean of the details over the 4 x 4 pixels. The mattes themselves are exact.

    Args:
        loss_matte_weight: Of the mean absolute error; the thesis gives none.
        freeze_categories: Keep the category branch as it is, without a loss.
        refinement: Arguments of :class:`DetailsRefinement`.
        byte_budget: Memory for mattes in the making.
        **kwargs: As for ``SOLODynamicHead``. ``loss_mask``, a ``SOLODiceLoss``, gives the Dice
            loss its weight.
    """

    def __init__(
        self,
        *args: Any,
        loss_matte_weight: float = 1.0,
        freeze_categories: bool = True,
        refinement: dict | None = None,
        byte_budget: int = BYTE_BUDGET,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.kernel_size != 1 or not self.unified or self.in_strides[0] != STRIDE:
            raise ValueError(
                'mattes need 1x1 kernels on one map of mask features at stride 4: kernel_size=1 '
                "and mask_features of type 'UnifiedMaskFeatures'"
            )
        self.loss_matte_weight = loss_matte_weight
        self.freeze_categories = freeze_categories
        self.byte_budget = byte_budget
        self.refinement = DetailsRefinement(
            self.mask_feature_head.out_channels, **(refinement or {})
        )
        if freeze_categories:
            for module in (self.cls_convs, self.conv_cls):
                module.requires_grad_(False)

    def forward(self, x: Sequence[Tensor]) -> tuple[list[Tensor], ...]:
        """As SOLOv2's, and the details, one map [N, D, H, W]."""
        *pyramid, image = x
        cls_logits, kernel_feats, features = super().forward(pyramid)
        return cls_logits, kernel_feats, features, [self.refinement(features[0], image)]

    def loss_by_feat(
        self, outputs: tuple, batch_gt_instances: list[InstanceData]
    ) -> dict[str, Tensor]:
        """``loss_mask`` (Dice), ``loss_matte``, and ``loss_cls`` unless that branch is frozen.

        Memory grows with positives times pixels of the input: they are held at full resolution.
        The masks of the instances are mattes, uint8 of 0 to 255, or masks of 0 and 1.
        """
        _, kernel_feats, (features,), (details,) = outputs
        targets = self.get_targets(outputs, batch_gt_instances)
        positives, counts = targets.by_image()
        kernels_at = convolve_at(self.conv_kernel, kernel_feats)
        kernels = kernels_at(positives.image_idx, positives.cell_idx)
        logits = self.refinement.logits(features, details, kernels, counts)
        probs = logits.to(wide(logits.dtype)).sigmoid()
        mattes = torch.cat([_padded(_mattes(gts), probs) for gts in batch_gt_instances])
        mattes = mattes[positives.object_idx]
        dice = matte_dice_loss(probs, mattes, self.loss_mask.eps).sum()
        absolute = (probs - mattes).abs().mean((1, 2)).sum()
        num_pos = mean_over_ranks(targets.num_positives)
        losses = dict(
            loss_mask=self.loss_mask.loss_weight * dice / num_pos,
            loss_matte=self.loss_matte_weight * absolute / num_pos,
        )
        if not self.freeze_categories:
            losses['loss_cls'] = self.category_loss(outputs, targets)
        return losses

    def get_targets(self, outputs: tuple, batch_gt_instances: list[InstanceData]) -> GridTargets:
        """As SOLOv2's, of the pixels that belong to an object by half at least."""
        return super().get_targets(
            outputs,
            [
                InstanceData(
                    bboxes=gts.bboxes,
                    labels=gts.labels,
                    masks=torch.from_numpy(_mattes(gts) >= MIDDLE),
                )
                for gts in batch_gt_instances
            ],
        )

    def candidate_maps(self, outputs: tuple, image: int) -> Callable[[Tensor], Tensor]:
        details = F.avg_pool2d(outputs[3][0][image : image + 1], STRIDE)
        return self._logits_of(outputs, image, details)

    def _logits_of(self, outputs: tuple, image: int, details: Tensor) -> Callable[[Tensor], Tensor]:
        """What gives logits [Q, h, w] of cells ([Q], in P), by details [1, D, h, w]."""
        features = outputs[2][0][image : image + 1]
        kernels_of = self.image_kernels(outputs, image)
        return lambda cells: self.refinement.logits(
            features, details, kernels_of(cells), [len(cells)]
        )

    def predict_by_feat(
        self, outputs: tuple, batch_img_metas: list[dict], rescale: bool = False
    ) -> list[InstanceData]:
        """SOLOv2's instances with ``mattes``, uint8 [n, H, W] of the image, 255 for 1."""
        results = super().predict_by_feat(outputs, batch_img_metas, rescale)
        map_hw = self.mask_sizes(outputs)[0]
        for image, (found, meta) in enumerate(zip(results, batch_img_metas, strict=True)):
            frame = frame_of(map_hw, STRIDE, meta, rescale)
            found.mattes = self.mattes(outputs, image, found.cells, frame)
        return results

    def mattes(self, outputs: tuple, image: int, cells: Tensor, frame: Frame) -> Tensor:
        """Mattes of cells ([n], in P), uint8 of the size ``frame.original_hw``."""
        (height, width), original_hw = frame.image_hw, frame.original_hw
        details = outputs[3][0][image : image + 1]
        logits_of = self._logits_of(outputs, image, details)
        mattes = torch.empty(len(cells), *original_hw, dtype=torch.uint8, device=cells.device)
        pixels = 3 * details[0, 0].numel() + 2 * original_hw[0] * original_hw[1]
        size = max(1, self.byte_budget // (4 * pixels))
        for chunk, out in zip(cells.split(size), mattes.split(size), strict=True):
            alpha = logits_of(chunk).sigmoid()[:, None, :height, :width]
            if original_hw != frame.image_hw:
                alpha = F.interpolate(alpha, original_hw, mode='bilinear')
            out.copy_(alpha[:, 0].mul(255).round_())
        return mattes


@MODELS.register_module()
class SOLOMattingSegmentor(LocationSegmentor):
    """A detector whose head sees the image, too."""

    def extract_feat(self, batch_inputs: Tensor) -> tuple[Tensor, ...]:
        """The pyramid, and the normalised image as its last entry."""
        return *super().extract_feat(batch_inputs), batch_inputs


def _mattes(gts: InstanceData) -> np.ndarray:
    """uint8 [G, H, W] of 0 to 255; masks of 0 and 1 are mattes without transitions."""
    masks = gts.masks.to_ndarray()
    return masks if masks.max(initial=0) > 1 else masks * np.uint8(255)


def _padded(mattes: np.ndarray, like: Tensor) -> Tensor:
    """[G, H, W] in [0, 1], of the size, type and device of ``like``."""
    height, width = like.shape[-2:]
    mattes = torch.from_numpy(mattes).to(like.device, non_blocking=True).to(like.dtype) / 255
    return F.pad(mattes, (0, width - mattes.shape[2], 0, height - mattes.shape[1]))
