"""Head of the UVO proposal network: a cascade of stages with one anchor per location.

N images, P priors of all levels concatenated, L levels, ``h w`` a level's feature map. Boxes are
xyxy in pixels of the network's input.
"""

from typing import NamedTuple

import torch
from mmcv.cnn import ConvModule, Scale
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.dense_heads.cascade_rpn_head import AdaptiveConv
from mmdet.models.utils import unpack_gt_instances
from mmdet.registry import MODELS, TASK_UTILS
from mmdet.structures.bbox import scale_boxes
from mmengine.model import BaseModule, ModuleList
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmdet_plugins.common.deform import AnyDeviceDeformConv2d
from mmdet_plugins.ops.cascade_geometry import (
    adaptive_offsets,
    decode_deltas,
    grid_anchors,
    valid_flags,
)

from .assigner import IGNORED, assign_slots
from .losses import box_losses, gather_targets, objectness_loss
from .postprocess import select_proposals


class StageOutput(NamedTuple):
    """What one stage knows about all priors."""

    anchors: Tensor
    """Input boxes [N, P, 4]."""
    deltas: Tensor
    """[N, P, 4], relative to ``anchors``."""
    cls_logits: Tensor | None
    """[N, P]."""
    iou_logits: Tensor | None
    """[N, P]."""

    def score(self) -> Tensor:
        """Geometric mean of the branches' probabilities, [N, P] without gradient."""
        return self._root(0)

    def assignment_score(self) -> Tensor:
        """Score that enters SimOTA's cost, [N, P] without gradient.

        The released code takes sqrt(iou) in a stage without classification and cbrt(cls * iou) in
        one with it: the root of one degree more than there are factors. 1 without a branch.
        """
        return self._root(1)

    def _root(self, extra_degree: int) -> Tensor:
        factors = [
            logits.detach().sigmoid()
            for logits in (self.cls_logits, self.iou_logits)
            if logits is not None
        ]
        if not factors:
            return torch.ones_like(self.deltas[..., 0])
        return torch.stack(factors).prod(0) ** (1 / (len(factors) + extra_degree))


class UVOCascadeStage(BaseModule):
    """One stage: adaptive convolution, towers, branches.

    Module names are those of mmdet's ``StageCascadeRPNHead`` and of the released weights.

    Args:
        in_channels: Channels of each feature map.
        num_levels: L; with towers each level scales its deltas by a learned factor.
        adapt_type: ``'dilation'`` (uniform anchors) or ``'offset'`` (a deformable convolution that
            looks at the anchor it is given).
        target_stds: Of the box deltas.
        loss_bbox: On decoded boxes.
        loss_cls: On objectness logits; needed if ``with_cls``.
        loss_iou: On IoU logits; None: no IoU branch.
        target_means: Of the box deltas.
        dilation: Of the adaptive convolution if it is dilated.
        bridged_feature: Hand the adapted features on to the next stage instead of the input.
        with_cls: Has an objectness branch.
        feat_channels: Channels of adapted features and towers.
        num_tower_convs: 3x3 convolutions in each of the decoupled towers; 0: the branches share
            the adapted features.
        dcn_tower: Which convolution of a tower is deformable (v2): ``'first'`` as the paper says,
            ``'last'`` as the released code has it, None.
        norm_cfg: Of the towers.
        init_cfg: By default as in the released code, N(0, 0.01), even of what predicts the offsets
            in a tower, which DCNv2 starts at 0; but for the objectness bias, which starts at the
            log-odds of 0.01, as the focal loss wants it.
    """

    def __init__(
        self,
        in_channels: int,
        num_levels: int,
        adapt_type: str,
        target_stds: tuple[float, ...],
        loss_bbox: dict,
        loss_cls: dict | None = None,
        loss_iou: dict | None = None,
        target_means: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0),
        dilation: int = 3,
        bridged_feature: bool = False,
        with_cls: bool = True,
        feat_channels: int = 256,
        num_tower_convs: int = 4,
        dcn_tower: str | None = 'first',
        norm_cfg: dict | None = None,
        init_cfg: dict | list | None = None,
    ) -> None:
        if init_cfg is None:
            init_cfg = dict(type='Normal', layer='Conv2d', std=0.01)
            if with_cls:
                init_cfg['override'] = dict(type='Normal', name='rpn_cls', std=0.01, bias_prob=0.01)
        super().__init__(init_cfg)
        if dcn_tower not in (None, 'first', 'last'):
            raise ValueError(f"dcn_tower must be 'first', 'last' or None, not {dcn_tower!r}")
        self.adapt_type = adapt_type
        self.bridged_feature = bridged_feature
        self.target_means = tuple(target_means)
        self.target_stds = tuple(target_stds)

        self.rpn_conv = AdaptiveConv(
            in_channels, feat_channels, dilation=dilation, adapt_type=adapt_type
        )
        if adapt_type == 'offset':
            self.rpn_conv.conv = AnyDeviceDeformConv2d(in_channels, feat_channels, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        dcn_index = {None: -1, 'first': 0, 'last': num_tower_convs - 1}[dcn_tower]

        def tower() -> nn.Sequential:
            return nn.Sequential(
                *(
                    ConvModule(
                        feat_channels,
                        feat_channels,
                        3,
                        padding=1,
                        conv_cfg=dict(type='AnyDeviceDCNv2') if i == dcn_index else None,
                        norm_cfg=norm_cfg,
                    )
                    for i in range(num_tower_convs)
                )
            )

        self.reg_convs = tower()
        self.rpn_reg = nn.Conv2d(feat_channels, 4, 1)
        self.scales = nn.ModuleList(
            Scale(1.0) if num_tower_convs else nn.Identity() for _ in range(num_levels)
        )
        self.loss_bbox = MODELS.build(loss_bbox)
        self.with_cls = with_cls
        if with_cls:
            self.cls_convs = tower()
            self.rpn_cls = nn.Conv2d(feat_channels, 1, 1)
            self.loss_cls = MODELS.build(loss_cls)
        self.with_iou = loss_iou is not None
        if self.with_iou:
            self.rpn_iou = nn.Conv2d(feat_channels, 1, 3, padding=1)
        self.loss_iou = MODELS.build(loss_iou) if self.with_iou else None

    def forward(
        self, feats: tuple[Tensor, ...], offsets: list[Tensor | None], anchors: Tensor
    ) -> tuple[list[Tensor], StageOutput]:
        """Features for the next stage, and predictions in float32.

        Args:
            feats: L maps [N, C, h, w].
            offsets: L maps [N, 18, h, w] if ``adapt_type`` is ``'offset'``, otherwise L Nones.
            anchors: [N, P, 4].
        """
        bridged, deltas, cls_logits, iou_logits = [], [], [], []
        for feat, offset, scale in zip(feats, offsets, self.scales, strict=True):
            if offset is None:
                adapted = self.rpn_conv.conv(feat)
            else:
                adapted = self.rpn_conv.conv(feat, offset)
            adapted = self.relu(adapted)
            bridged.append(adapted if self.bridged_feature else feat)
            reg_feat = self.reg_convs(adapted)
            deltas.append(scale(self.rpn_reg(reg_feat)))
            if self.with_iou:
                iou_logits.append(self.rpn_iou(reg_feat))
            if self.with_cls:
                cls_logits.append(self.rpn_cls(self.cls_convs(adapted)))
        return bridged, StageOutput(
            anchors,
            _flatten_levels(deltas),
            _flatten_levels(cls_logits)[..., 0] if self.with_cls else None,
            _flatten_levels(iou_logits)[..., 0] if self.with_iou else None,
        )

    def decode(self, anchors: Tensor, deltas: Tensor, max_shape_hw: Tensor | None = None) -> Tensor:
        """Boxes [N, K, 4], clipped to the images' sizes [N, 2] if these are given."""
        return decode_deltas(
            anchors, deltas, self.target_stds, self.target_means, max_shape_hw=max_shape_hw
        )

    def loss(
        self,
        output: StageOutput,
        boxes: Tensor,
        gt_boxes: list[Tensor],
        cls_idx: Tensor,
        reg_idx: Tensor,
    ) -> dict[str, Tensor]:
        """Losses of this stage.

        Args:
            output: Of :meth:`forward`.
            boxes: The deltas of ``output``, decoded and not clipped, [N, P, 4].
            gt_boxes: One [G, 4] per image.
            cls_idx: Assignment [N, P] for the objectness branch.
            reg_idx: Assignment [N, P] for the regression and the IoU branch.
        """
        losses = box_losses(
            self.loss_bbox,
            self.loss_iou,
            boxes,
            output.iou_logits,
            gather_targets(gt_boxes, reg_idx),
            reg_idx,
        )
        if self.with_cls:
            losses['loss_rpn_cls'] = objectness_loss(self.loss_cls, output.cls_logits, cls_idx)
        return losses


@MODELS.register_module()
class UVOCascadeRPNHead(BaseDenseHead):
    """Cascade RPN with SimOTA, IoU branch and decoupled heads (UVO 2021, section 1.1).

    mmdet's ``CascadeRPNHead`` has no IoU branch, no towers and one assigner a stage, and loops
    over images and levels; this head does a batch and all its levels at once and reads nothing
    back from the device. With ``num_tower_convs=0, loss_iou=None`` the network is the stock one
    and shares its weights.

    The heads are shared over levels. Differences to the released code: boxes are regressed to the
    ground truth itself, not to its encoded and decoded copy, which clips extreme shapes;
    normalisers are clamped at 1 over all ranks together; the objectness bias is initialised for
    the focal loss.

    Args:
        stages: Arguments of each ``UVOCascadeStage``.
        in_channels: Channels of the input features.
        feat_channels: Channels inside the stages.
        strides: Of the L levels.
        anchor_scale: Side of the one square anchor per location, in strides.
        train_cfg: ``assigner`` for the objectness branch and ``reg_assigner`` for the regression
            and the IoU branch (None or absent: the same one), any of mmdet's; a dict for all
            stages or a list with one dict per stage. Assigners that can tell ignored regions from
            background get the ignored instances; in all others these play no part.
        test_cfg: ``nms_pre``, ``max_per_img``, ``nms``, ``min_bbox_size``.
        num_classes: 1.
        **stage_defaults: Arguments that all stages share.
    """

    def __init__(
        self,
        stages: list[dict],
        in_channels: int = 256,
        feat_channels: int = 256,
        strides: tuple[int, ...] = (4, 8, 16, 32, 64),
        anchor_scale: float = 8,
        train_cfg: dict | list | None = None,
        test_cfg: dict | None = None,
        num_classes: int = 1,
        init_cfg: dict | list | None = None,
        **stage_defaults,
    ) -> None:
        super().__init__(init_cfg)
        if num_classes != 1:
            raise ValueError(
                f'a proposal network is class-agnostic: num_classes must be 1, not {num_classes}'
            )
        self.strides = tuple(strides)
        self.anchor_scale = anchor_scale
        self.train_cfg = train_cfg
        self.test_cfg = test_cfg
        self.stages = ModuleList()
        for stage in stages:
            self.stages.append(
                UVOCascadeStage(
                    **{
                        **stage_defaults,
                        'in_channels': in_channels,
                        'num_levels': len(self.strides),
                        'feat_channels': feat_channels,
                        **stage,
                    }
                )
            )
            if self.stages[-1].bridged_feature:
                in_channels = feat_channels
        if train_cfg is not None:
            self.assigners = [_build_assigners(cfg) for cfg in self._per_stage(train_cfg)]

    def _per_stage(self, train_cfg: dict | list) -> list[dict]:
        if isinstance(train_cfg, dict):
            return [train_cfg] * len(self.stages)
        if len(train_cfg) != len(self.stages):
            raise ValueError(
                f'train_cfg lists {len(train_cfg)} stages, the head has '
                f'{len(self.stages)}: give one dict per stage, or one for all'
            )
        return list(train_cfg)

    def forward(
        self, x: tuple[Tensor, ...], img_sizes_hw: Tensor | None = None
    ) -> list[StageOutput]:
        """Predictions of each stage.

        Args:
            x: L maps [N, C, h, w].
            img_sizes_hw: [N, 2]; refined boxes are clipped to it.
        """
        sizes = [feat.shape[-2:] for feat in x]
        anchors = grid_anchors(sizes, self.strides, self.anchor_scale, x[0].device, torch.float32)
        anchors = anchors.expand(len(x[0]), -1, -1)
        outputs = []
        for i, stage in enumerate(self.stages):
            if i > 0:
                anchors = self.stages[i - 1].decode(
                    anchors, outputs[-1].deltas.detach(), img_sizes_hw
                )
            offsets = [None] * len(x)
            if stage.adapt_type == 'offset':
                offsets = adaptive_offsets(anchors, sizes, self.strides)
            x, output = stage(x, offsets, anchors)
            outputs.append(output)
        return outputs

    def loss(self, x: tuple[Tensor, ...], batch_data_samples: list) -> dict[str, Tensor]:
        """Losses by name, ``s{stage}.loss_rpn_{cls,reg,iou}``."""
        return self._loss(x, batch_data_samples)[0]

    def loss_and_predict(
        self, x: tuple[Tensor, ...], batch_data_samples: list, proposal_cfg: dict | None = None
    ) -> tuple[dict, list[InstanceData]]:
        """Losses, and proposals in pixels of the network's input, for two-stage detectors."""
        losses, output = self._loss(x, batch_data_samples)
        img_metas = [sample.metainfo for sample in batch_data_samples]
        return losses, self.predict_by_feat(x, output, img_metas, cfg=proposal_cfg)

    def predict(
        self, x: tuple[Tensor, ...], batch_data_samples: list, rescale: bool = False
    ) -> list[InstanceData]:
        """Proposals, in pixels of the original images if ``rescale``."""
        img_metas = [sample.metainfo for sample in batch_data_samples]
        output = self(x, _to_device([meta['img_shape'][:2] for meta in img_metas], x[0]))[-1]
        return self.predict_by_feat(x, output, img_metas, rescale=rescale)

    def _loss(
        self, x: tuple[Tensor, ...], batch_data_samples: list
    ) -> tuple[dict[str, Tensor], StageOutput]:
        gt_instances, gt_ignored, img_metas = unpack_gt_instances(batch_data_samples)
        outputs = self(x, _to_device([meta['img_shape'][:2] for meta in img_metas], x[0]))
        with torch.autocast(x[0].device.type, enabled=False):
            losses = self.loss_by_feat(x, outputs, gt_instances, img_metas, gt_ignored)
        return losses, outputs[-1]

    def loss_by_feat(
        self,
        x: tuple[Tensor, ...],
        outputs: list[StageOutput],
        batch_gt_instances: list[InstanceData],
        batch_img_metas: list[dict],
        batch_gt_instances_ignore: list[InstanceData | None],
    ) -> dict[str, Tensor]:
        """Losses of all stages from their outputs.

        Args:
            x: The features, for the sizes of the levels.
            outputs: Of :meth:`forward`.
            batch_gt_instances: ``bboxes`` [G, 4] and ``labels`` [G] (0) per image.
            batch_img_metas: ``pad_shape`` (absent: ``img_shape``) bounds the priors that count.
            batch_gt_instances_ignore: Crowds per image.
        """
        sizes = [tuple(feat.shape[-2:]) for feat in x]
        level_sizes = [h * w for h, w in sizes]
        grid = outputs[0].anchors
        # Locations beyond an image's own padding are no priors.
        valid = valid_flags(
            sizes,
            self.strides,
            [meta.get('pad_shape', meta['img_shape'])[:2] for meta in batch_img_metas],
            grid.device,
        )
        geometry = dict(
            num_level_priors=level_sizes,
            num_level_anchors=level_sizes,
            featmap_sizes=sizes,
            anchor_scale=self.anchor_scale,
            anchor_strides=self.strides,
            allowed_border=-1,
            strides=(grid[0, :, 2] - grid[0, :, 0]) / self.anchor_scale,
        )
        gt_boxes = [gts.bboxes for gts in batch_gt_instances]
        losses = {}
        for i, (stage, output) in enumerate(zip(self.stages, outputs, strict=True)):
            boxes = stage.decode(output.anchors, output.deltas)
            predictions = zip(
                output.anchors,
                boxes.detach(),
                output.assignment_score()[..., None],
                valid,
                strict=True,
            )
            slots = [
                assign_slots(
                    *self.assigners[i],
                    InstanceData(priors=priors, bboxes=bboxes, scores=scores, valid_flags=flags),
                    gts,
                    ignored,
                    {**geometry, 'img_meta': meta},
                )
                for (priors, bboxes, scores, flags), gts, ignored, meta in zip(
                    predictions,
                    batch_gt_instances,
                    batch_gt_instances_ignore,
                    batch_img_metas,
                    strict=True,
                )
            ]
            cls_idx, reg_idx = (
                torch.stack(idx).masked_fill(~valid, IGNORED) for idx in zip(*slots, strict=True)
            )
            for name, value in stage.loss(output, boxes, gt_boxes, cls_idx, reg_idx).items():
                losses[f's{i}.{name}'] = value
        return losses

    def predict_by_feat(
        self,
        x: tuple[Tensor, ...],
        output: StageOutput,
        batch_img_metas: list[dict],
        cfg: dict | None = None,
        rescale: bool = False,
    ) -> list[InstanceData]:
        """Proposals from the last stage's output; score = sqrt(cls * iou).

        Args:
            x: The features, for the sizes of the levels.
            output: Of the last stage.
            batch_img_metas: ``img_shape``, and ``scale_factor`` (w, h) if ``rescale``.
            cfg: In place of ``test_cfg``.
            rescale: Return boxes in pixels of the original images.
        """
        img_sizes_hw = _to_device(
            [meta['img_shape'][:2] for meta in batch_img_metas], output.deltas
        )

        def decode(indices: Tensor) -> Tensor:
            rows = indices[..., None].expand(-1, -1, 4)
            return self.stages[-1].decode(
                output.anchors.gather(1, rows), output.deltas.detach().gather(1, rows), img_sizes_hw
            )

        proposals = select_proposals(
            output.score(),
            [feat.shape[-2] * feat.shape[-1] for feat in x],
            decode,
            self.test_cfg if cfg is None else cfg,
        )
        if rescale:
            for result, meta in zip(proposals, batch_img_metas, strict=True):
                result.bboxes = scale_boxes(result.bboxes, [1 / s for s in meta['scale_factor']])
        return proposals


def _build_assigners(cfg: dict) -> tuple:
    """Assigners (objectness, regression); one object if the slots share it."""
    assigner = TASK_UTILS.build(cfg['assigner'])
    reg_cfg = cfg.get('reg_assigner')
    return assigner, assigner if reg_cfg is None else TASK_UTILS.build(reg_cfg)


def _to_device(rows: list, like: Tensor) -> Tensor:
    """Host numbers as float32 where ``like`` is, without waiting for the device."""
    return torch.tensor(rows, dtype=torch.float32).to(like.device, non_blocking=True)


def _flatten_levels(maps: list[Tensor]) -> Tensor:
    """L maps [N, C, h, w] -> [N, P, C] in float32."""
    return torch.cat([m.flatten(2) for m in maps], 2).transpose(1, 2).float()
