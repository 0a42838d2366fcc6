"""Panoptic SOLOv2: a semantic branch beside the head, and one map from both (section 4.3.3).

The thesis adds "the semantic segmentation branch, analogue to the mask feature branch" and merges
"as in Panoptic-FPN"; it gives no more, and no code was released. The branch here is the one of
Panoptic-FPN (Kirillov et al., CVPR 2019, section 3), of which the mask feature branch of SOLOv2 is
the variant with coordinates: stuff classes are told apart, things are one class.

Shapes: N images, C input channels, S stuff classes, ``h w`` the map at a quarter of the input,
``H W`` the predicted map. Labels are those of mmdet's panoptic data sets, things before stuff.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmdet.models import PanopticFPNHead
from mmdet.registry import MODELS
from mmdet.structures import SampleList
from mmengine.structures import PixelData
from torch import Tensor

from ..common.finite import require_finite
from ..common.location_head import LocationSegmentor, frame_of
from ..ops.instance_masks import BYTE_BUDGET, Frame
from ..ops.panoptic import merge_panoptic


@MODELS.register_module()
class SOLOSemanticHead(PanopticFPNHead):
    """The semantic branch: parameters and logits are those of mmdet's ``PanopticFPNHead``.

    That one learns the label at the corner of the 4 x 4 pixels that a logit stands for, 1.5 pixels
    off its centre, and predicts by holding the logits of all classes at the image's full size.

    Args:
        **kwargs: As for ``PanopticFPNHead``.
    """

    def loss(self, x: Sequence[Tensor], batch_data_samples: SampleList) -> dict[str, Tensor]:
        """``loss_seg`` of the pyramid ``x``, maps [N, C, h_i, w_i].

        Args:
            x: As described.
            batch_data_samples: With ``gt_sem_seg``, padded as the input, 255 for void.

        Raises:
            FloatingPointError: The loss is not finite.
        """
        logits = self(x)['seg_preds']
        step = round(1 / self.seg_rescale_factor)
        middle = slice(step // 2, None, step)
        labels = torch.stack(
            [sample.gt_sem_seg.sem_seg[0, middle, middle] for sample in batch_data_samples]
        )
        with torch.autocast(logits.device.type, enabled=False):
            loss = self.loss_seg(
                logits.float().movedim(1, -1).flatten(0, -2),
                self._set_things_to_void(labels).flatten().long(),
            )
        losses = {'loss_seg': loss}
        require_finite(losses, [sample.metainfo for sample in batch_data_samples])
        return losses

    @torch.no_grad()
    def predict(
        self, x: Sequence[Tensor], batch_img_metas: Sequence[dict], rescale: bool = False
    ) -> list[Tensor]:
        """Label maps int64 [H, W]; a pixel of any thing has the label after the last one."""
        logits = self(x)['seg_preds'].float()
        step = round(1 / self.seg_rescale_factor)
        maps = []
        for one, meta in zip(logits, batch_img_metas, strict=True):
            frame = frame_of(tuple(one.shape[1:]), step, meta, rescale)
            maps.append(best_class(one, frame) + self.num_things_classes)
        return maps


def best_class(logits: Tensor, frame: Frame, byte_budget: int = BYTE_BUDGET) -> Tensor:
    """The class of the highest logit of each pixel, [S + 1, h, w] -> int64 [H, W].

    Logits are interpolated as masks are, some classes at a time.
    """
    area = sum(height * width for height, width in frame[1:])
    height, width = frame.image_hw
    found, highest = None, None
    for classes in torch.arange(len(logits)).split(max(1, byte_budget // (4 * area))):
        part = logits[None, classes[0] : classes[-1] + 1]
        part = F.interpolate(part, frame.padded_hw, mode='bilinear')[..., :height, :width]
        values, index = F.interpolate(part, frame.original_hw, mode='bilinear')[0].max(0)
        index += classes[0]
        if found is None:
            found, highest = index, values
        else:
            found = torch.where(values > highest, index, found)
            highest = torch.maximum(highest, values)
    return found


@MODELS.register_module()
class SOLOPanopticSegmentor(LocationSegmentor):
    """A SOLO-type detector with a semantic branch: predictions are panoptic maps.

    mmdet has panoptic segmentors with boxes in two stages, and with queries.

    Args:
        semantic_head: Config of :class:`SOLOSemanticHead`.
        test_cfg: Of the mask head, with dense masks, and in ``panoptic`` the options of
            :func:`~mmdet_plugins.ops.panoptic.merge_panoptic`: ``min_score``, ``max_overlap`` and
            ``min_stuff_area``.
        with_instances: Keep the instances beside the map, ``pred_instances``, for mask AP.
        *args, **kwargs: As for mmdet's ``SOLO``.
    """

    def __init__(
        self,
        *args: Any,
        semantic_head: dict,
        test_cfg: dict,
        with_instances: bool = False,
        **kwargs: Any,
    ) -> None:
        instances = {**test_cfg}
        merge = instances.pop('panoptic')
        super().__init__(*args, test_cfg=instances, **kwargs)
        if self.mask_head.postprocess.rle:
            raise ValueError("A panoptic map needs dense masks: test_cfg.mask_format='dense'.")
        self.semantic_head = MODELS.build(semantic_head)
        self.with_instances = with_instances
        num_things = self.semantic_head.num_things_classes
        if num_things != self.mask_head.num_classes:
            raise ValueError(
                f'The mask head has {self.mask_head.num_classes} classes, but the semantic head '
                f'{num_things} classes of things.'
            )
        self.merge = dict(
            merge,
            num_things=num_things,
            num_classes=num_things + self.semantic_head.num_stuff_classes,
        )

    def loss(self, batch_inputs: Tensor, batch_data_samples: SampleList) -> dict[str, Tensor]:
        """Losses of the mask head and ``loss_seg``."""
        x = self.extract_feat(batch_inputs)
        return {
            **self.mask_head.loss(x, batch_data_samples),
            **self.semantic_head.loss(x, batch_data_samples),
        }

    def predict(
        self, batch_inputs: Tensor, batch_data_samples: SampleList, rescale: bool = True
    ) -> SampleList:
        """Add ``pred_panoptic_seg``, whose ``sem_seg`` int64 [1, H, W] is a panoptic map."""
        x = self.extract_feat(batch_inputs)
        instances = self.mask_head.predict(x, batch_data_samples, rescale)
        metas = [sample.metainfo for sample in batch_data_samples]
        semantic = self.semantic_head.predict(x, metas, rescale)
        for sample, found, labels in zip(batch_data_samples, instances, semantic, strict=True):
            panoptic = merge_panoptic(found.masks, found.scores, found.labels, labels, **self.merge)
            sample.pred_panoptic_seg = PixelData(sem_seg=panoptic[None])
            if self.with_instances:
                sample.pred_instances = found
        return batch_data_samples

    def _forward(self, batch_inputs: Tensor, batch_data_samples: Any = None) -> tuple:
        x = self.extract_feat(batch_inputs)
        return self.mask_head(x), self.semantic_head(x)['seg_preds']
