"""Label assignment of the UVO proposal network: SimOTA, and any stock assigner, in two slots.

A cascade stage assigns twice: once for objectness and once for boxes (and their IoU). Both slots
take any mmdet assigner; two SimOTAs that differ in ``topk`` alone share one pass over the priors.

P priors, G ground truths of one image. Assignments are ``gt_idx`` [P]: the index of the ground
truth, ``BACKGROUND`` or ``IGNORED``.
"""

import inspect

import torch
from mmdet.models.task_modules import AssignResult, ATSSAssigner, BaseAssigner
from mmdet.registry import TASK_UTILS
from mmdet.structures.bbox import bbox_overlaps
from mmengine.structures import InstanceData
from torch import Tensor

from mmdet_plugins.ops.sim_ota import dual_sim_ota

BACKGROUND = -1
IGNORED = -2


@TASK_UTILS.register_module()
class UVOSimOTAAssigner(BaseAssigner):
    """SimOTA with a centre region that is a share of the object (UVO 2021, section 1.1).

    mmdet's ``SimOTAAssigner`` measures the centre region in strides and needs priors of the form
    (x, y, stride, stride); this one takes box priors and measures by default in object sizes. The
    boxes whose IoU counts are the priors themselves, that is the stage's *input* boxes, and not
    its predictions: so does the released code.

    Args:
        topk: Number of best IoUs whose sum is the number of positives of an object; 10 for the
            classification and 20 for the regression branch.
        center_rule: ``'ratio'`` (of the object's size) or ``'stride'`` (of the prior's stride).
        center_radius: Half size of the centre region in that unit.
        iou_weight: Weight of -log(IoU) in the cost.
        cls_weight: Weight of -log(score) in the cost.
        ensure_positive: Give every object inside the image a positive unless outbid; a deviation
            from the paper (see ``mmdet_plugins.ops.sim_ota``).
        ignore_iof_thr: Priors covered by an ignored box (crowd) by more than this share take no
            part, neither as positive nor as negative. Negative: no prior is exempt, as in the
            paper and by default in mmdet.
    """

    def __init__(
        self,
        topk: int = 10,
        center_rule: str = 'ratio',
        center_radius: float = 0.25,
        iou_weight: float = 3.0,
        cls_weight: float = 1.0,
        ensure_positive: bool = False,
        ignore_iof_thr: float = -1,
    ) -> None:
        self.topk = topk
        self.ignore_iof_thr = ignore_iof_thr
        self.cost = dict(
            center_rule=center_rule,
            center_radius=center_radius,
            iou_weight=iou_weight,
            cls_weight=cls_weight,
            ensure_positive=ensure_positive,
        )

    def shares_pass_with(self, other: BaseAssigner) -> bool:
        """Whether one pass over the priors serves both assigners."""
        return (
            isinstance(other, UVOSimOTAAssigner)
            and self.cost == other.cost
            and self.ignore_iof_thr == other.ignore_iof_thr
        )

    def assign_topk(
        self,
        topk: tuple[int, ...],
        pred_instances: InstanceData,
        gt_instances: InstanceData,
        gt_instances_ignore: InstanceData | None,
        strides: Tensor | None = None,
        img_meta: dict | None = None,
    ) -> tuple[AssignResult, ...]:
        """One ``AssignResult`` per entry of ``topk``; arguments as in :meth:`assign`."""
        priors = pred_instances.priors
        valid = pred_instances.get('valid_flags', None)
        if (
            self.ignore_iof_thr >= 0
            and gt_instances_ignore is not None
            and len(gt_instances_ignore) > 0
        ):
            covered = bbox_overlaps(priors, gt_instances_ignore.bboxes, mode='iof').amax(1)
            free = covered <= self.ignore_iof_thr
            valid = free if valid is None else valid & free
        scores, cost_labels = pred_instances.get('scores', None), gt_instances.labels
        if scores is None:
            scores, cost_labels = priors.new_ones(len(priors)), None
        results = dual_sim_ota(
            (priors[:, :2] + priors[:, 2:]) / 2,
            priors,
            scores,
            gt_instances.bboxes,
            gt_labels=cost_labels,
            topk=topk,
            strides=strides,
            image_hw=None if img_meta is None else img_meta['img_shape'][:2],
            valid=valid,
            **self.cost,
        )
        labels = gt_instances.labels
        no_label = labels.new_full((1,), -1)
        assign_results = []
        for gt_idx, iou in results:
            gt_inds = gt_idx + 1
            if valid is not None:
                gt_inds = gt_inds.masked_fill(~valid, -1)
            assign_results.append(
                AssignResult(len(gt_instances), gt_inds, iou, torch.cat([labels, no_label])[gt_idx])
            )
        return tuple(assign_results)

    def assign(
        self,
        pred_instances: InstanceData,
        gt_instances: InstanceData,
        gt_instances_ignore: InstanceData | None = None,
        strides: Tensor | None = None,
        img_meta: dict | None = None,
        **kwargs,
    ) -> AssignResult:
        """Assign in mmdet's protocol.

        Args:
            pred_instances: ``priors`` [P, 4] xyxy; optionally ``scores`` [P, K] in [0, 1] of K
                classes (absent, as in mmdet's anchor heads: all 1) and ``valid_flags`` [P].
            gt_instances: ``bboxes`` [G, 4], ``labels`` [G].
            gt_instances_ignore: ``bboxes`` of crowds; used if ``ignore_iof_thr`` is set.
            strides: [P], for ``center_rule='stride'``.
            img_meta: ``img_shape``, beyond which ``ensure_positive`` gives no object a positive.
        """
        return self.assign_topk(
            (self.topk,), pred_instances, gt_instances, gt_instances_ignore, strides, img_meta
        )[0]


def assign_slots(
    cls_assigner: BaseAssigner,
    reg_assigner: BaseAssigner,
    pred_instances: InstanceData,
    gt_instances: InstanceData,
    gt_instances_ignore: InstanceData | None,
    geometry: dict,
) -> tuple[Tensor, Tensor]:
    """Assignments of one image for classification and for regression, each [P].

    Args:
        pred_instances: ``priors``, ``bboxes``, ``scores``, ``valid_flags`` of all P priors.
        gt_instances_ignore: Handed on to those assigners that ask for it.
        geometry: What else an assigner's ``assign`` may ask for by name.
    """
    pair = (cls_assigner, reg_assigner)
    if isinstance(cls_assigner, UVOSimOTAAssigner) and cls_assigner.shares_pass_with(reg_assigner):
        results = cls_assigner.assign_topk(
            (cls_assigner.topk, reg_assigner.topk),
            pred_instances,
            gt_instances,
            gt_instances_ignore,
            geometry['strides'],
            geometry['img_meta'],
        )
        gt_inds = [result.gt_inds for result in results]
    else:
        gt_inds = [
            _assign_by_protocol(
                assigner, pred_instances, gt_instances, gt_instances_ignore, geometry
            )
            for assigner in dict.fromkeys(pair)
        ]
    return gt_inds[0] - 1, gt_inds[-1] - 1


def _assign_by_protocol(
    assigner: BaseAssigner,
    pred_instances: InstanceData,
    gt_instances: InstanceData,
    gt_instances_ignore: InstanceData | None,
    geometry: dict,
) -> Tensor:
    """mmdet's ``gt_inds`` [P] (-1 ignored, 0 background, 1 + index) by any of its assigners.

    As in mmdet's anchor heads the assigner sees only valid priors, unless it asks for the whole
    grid (``RegionAssigner``).
    """
    wanted = inspect.signature(assigner.assign).parameters
    kwargs = {name: value for name, value in geometry.items() if name in wanted}
    if 'featmap_sizes' in wanted:
        # RegionAssigner refuses ignored boxes, and mmdet's Cascade RPN never passes them.
        return assigner.assign(
            pred_instances=pred_instances, gt_instances=gt_instances, **kwargs
        ).gt_inds

    valid = pred_instances.valid_flags
    inside = pred_instances[valid]
    if isinstance(assigner, ATSSAssigner) and assigner.alpha is None:
        # It warns about predictions that it does not use.
        inside = InstanceData(priors=inside.priors)
    for name in {'strides'} & kwargs.keys():
        kwargs[name] = kwargs[name][valid]
    if 'num_level_priors' in kwargs:
        kwargs['num_level_priors'] = [
            int(flags.sum()) for flags in valid.split(geometry['num_level_priors'])
        ]
    gt_inds = valid.new_full(valid.shape, -1, dtype=torch.long)
    gt_inds[valid] = assigner.assign(
        pred_instances=inside,
        gt_instances=gt_instances,
        gt_instances_ignore=gt_instances_ignore,
        **kwargs,
    ).gt_inds
    return gt_inds
