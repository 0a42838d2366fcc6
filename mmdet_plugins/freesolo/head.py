"""SOLOv2's head, trained on coarse masks and on the embeddings that came with them.

Section 6.2.3. Shapes: N images, L levels, S cells a side of a level's grid, P cells of all levels,
F channels of the category tower, E of an embedding, Q cells, G objects of the batch.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmdet.models.utils import unpack_gt_instances
from mmdet.registry import MODELS
from mmengine.structures import InstanceData
from torch import Tensor, nn

from ..common.finite import require_finite
from ..common.location_head import SOLODynamicHead, convolve_at
from ..common.ranks import mean_over_ranks
from ..ops.dice import wide
from ..ops.grid_targets import Positives, image_of_objects
from .losses import FreeSOLOWeakMaskLoss


@MODELS.register_module()
class FreeSOLOHead(SOLODynamicHead):
    """SOLOv2's head with a semantic embedding of each object beside its foreground score.

    The branch is one convolution, parallel to the category branch's last. As kernels are, it is
    computed for the cells that are trained or found, which counts with the 2048 channels of a
    ResNet's queries.

    Args:
        embed_dims: E, as the pseudo-labels have it; None for no branch (Table 6.7(f)).
        embed_weight: beta of equation 6.8.
        loss_mask: Config of :class:`.FreeSOLOWeakMaskLoss`, or of a loss for masks that are taken
            for true, such as ``SOLODiceLoss`` (Table 6.7(e)).
        num_classes: 1, the foreground; those of the labels in fine-tuning.
        **kwargs: As for ``SOLODynamicHead``.
    """

    def __init__(
        self,
        *args: Any,
        embed_dims: int | None = 2048,
        embed_weight: float = 4.0,
        feat_channels: int = 512,
        num_classes: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, num_classes=num_classes, feat_channels=feat_channels, **kwargs)
        if not self.unified:
            raise ValueError(
                "FreeSOLO needs one map of mask features: mask_features.type='UnifiedMaskFeatures'"
            )
        self.embed_dims = embed_dims
        self.embed_weight = embed_weight
        self.weak = isinstance(self.loss_mask, FreeSOLOWeakMaskLoss)
        if embed_dims is not None:
            self.conv_embed = nn.Conv2d(feat_channels, embed_dims, 3, padding=1)

    def forward(self, x: Sequence[Tensor]) -> tuple[list[Tensor], ...]:
        """As SOLOv2's, and what embeddings are made of, L maps [N, F, S, S]."""
        return self.forward_features(x)

    def loss(
        self, x: Sequence[Tensor], batch_data_samples: list, positive_infos: None = None
    ) -> dict[str, Tensor]:
        """Losses of masks, ``loss_cls`` and, with the branch, ``loss_embed``.

        Args:
            x: The pyramid, L maps [N, C, h, w].
            batch_data_samples: With ``bboxes``, ``labels``, ``masks`` and, for the branch,
                ``embeddings`` in ``gt_instances``; for the weak loss with ``affinity``, of
                :class:`.FreeSOLODataPreprocessor`. Objects of images whose meta information says
                ``has_masks=False`` train no masks (Table 6.6); as in the released code their cells
                are chosen by the masks nevertheless.
            positive_infos: What mmdet's detector passes; None.

        Raises:
            KeyError: Samples lack embeddings or affinity.
            FloatingPointError: A loss is not finite.
        """
        gt_instances, _, img_metas = unpack_gt_instances(batch_data_samples)
        affinity = None
        if self.weak:
            if any('affinity' not in sample for sample in batch_data_samples):
                raise KeyError(
                    'images come without colour affinity: set the model.data_preprocessor.type '
                    'FreeSOLODataPreprocessor'
                )
            affinity = torch.stack([sample.affinity for sample in batch_data_samples])
        has_masks = [meta.get('has_masks', True) for meta in img_metas]
        losses = self.loss_by_feat(self(x), gt_instances, affinity, has_masks)
        require_finite(losses, img_metas)
        return losses

    def loss_by_feat(
        self,
        outputs: tuple,
        batch_gt_instances: list[InstanceData],
        affinity: Tensor | None = None,
        has_masks: Sequence[bool] | None = None,
    ) -> dict[str, Tensor]:
        """Losses from the network's outputs (equations 6.6 and 6.8).

        Args:
            outputs: Of :meth:`forward`.
            batch_gt_instances: Of N images.
            affinity: uint8 [N, h, w], for the weak loss.
            has_masks: Which of the N images train masks; None for all.
        """
        targets = self.get_targets(outputs, batch_gt_instances)
        positives, counts = targets.by_image()
        owned, trained = targets.owner >= 0, positives
        if has_masks is not None and not all(has_masks):
            usable = torch.tensor(has_masks, device=owned.device)
            owned = owned[usable]
            trained = Positives(*(part[usable[positives.image_idx]] for part in positives))
            counts = [n if has else 0 for n, has in zip(counts, has_masks, strict=True)]
        masks = self.unified_masks(outputs, targets, trained, counts)
        num_positives = mean_over_ranks(owned.sum())
        if self.weak:
            image_idx = image_of_objects(targets.num_objects, owned.device)
            losses = self.loss_mask(masks, num_positives, affinity, image_idx)
        else:
            losses = dict(loss_mask=self.loss_mask(*masks).sum() / num_positives)
        losses['loss_cls'] = self.category_loss(outputs, targets)
        if self.embed_dims is not None:
            losses['loss_embed'] = self.embedding_loss(outputs, positives, batch_gt_instances)
        return losses

    def embedding_loss(
        self, outputs: tuple, positives: Positives, batch_gt_instances: list[InstanceData]
    ) -> Tensor:
        """``beta (1 - cos)``, the mean over positive cells (equation 6.7).

        Args:
            outputs: Of :meth:`forward`.
            positives: The cells, each with its object.
            batch_gt_instances: Of N images, with ``embeddings``.

        Raises:
            KeyError, ValueError: There are no embeddings, or they are not of E numbers.
        """
        if missing := [i for i, gts in enumerate(batch_gt_instances) if 'embeddings' not in gts]:
            raise KeyError(
                f'image {missing[0]} of the batch comes without embeddings: load them by '
                'FreeSOLOLoadAnnotations and pack them by FreeSOLOPackInputs, or train without '
                'the branch by model.mask_head.embed_dims=None'
            )
        found = self.embeddings(outputs[3], positives.image_idx, positives.cell_idx)
        wanted = torch.cat([gts.embeddings.to(found) for gts in batch_gt_instances])
        if wanted.shape[1] != self.embed_dims:
            raise ValueError(
                f'the pseudo-labels have embeddings of {wanted.shape[1]} numbers: set '
                f'model.mask_head.embed_dims={wanted.shape[1] or None} (it is {self.embed_dims})'
            )
        cosine = F.cosine_similarity(found, wanted[positives.object_idx], dim=1)
        return (
            self.embed_weight * (1 - cosine).sum() / mean_over_ranks(cosine.new_tensor(len(cosine)))
        )

    def embeddings(self, cls_feats: list[Tensor], images: Tensor, cells: Tensor) -> Tensor:
        """What the convolution gives at some cells.

        Args:
            cls_feats: L maps [N, F, S, S].
            images: [Q].
            cells: [Q], in P.

        Returns:
            [Q, E], float32.
        """
        found = convolve_at(self.conv_embed, cls_feats)(images, cells)
        return found.to(wide(found.dtype))

    def predict_by_feat(
        self, outputs: tuple, batch_img_metas: list[dict], rescale: bool = False
    ) -> list[InstanceData]:
        """Instances, each with its ``embeddings`` [n, E] of length 1 if there is the branch."""
        results = super().predict_by_feat(outputs, batch_img_metas, rescale)
        if self.embed_dims is not None:
            for image, found in enumerate(results):
                raw = self.embeddings(outputs[3], torch.full_like(found.cells, image), found.cells)
                found.embeddings = F.normalize(raw, dim=1)
        return results
