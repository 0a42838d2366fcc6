"""UVOSimOTAAssigner in mmdet's protocol, against the assignment written out loop by loop."""

import pytest
import torch
from mmdet.registry import MODELS, TASK_UTILS
from mmdet.structures.bbox import bbox_overlaps
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData

from mmdet_plugins.cascade_rpn import UVOSimOTAAssigner
from mmdet_plugins.cascade_rpn.assigner import assign_slots


def scene(num_priors: int, gts: list, seed: int = 0) -> tuple[InstanceData, InstanceData]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.rand(num_priors, 2, generator=generator) * torch.tensor([200.0, 120.0])
    sides = torch.rand(num_priors, 2, generator=generator) * 60 + 8
    priors = InstanceData(
        priors=torch.cat([centres - sides / 2, centres + sides / 2], 1),
        scores=torch.rand(num_priors, 1, generator=generator),
    )
    boxes = torch.tensor(gts, dtype=torch.float32).reshape(-1, 4)
    return priors, InstanceData(bboxes=boxes, labels=torch.zeros(len(boxes), dtype=torch.long))


def literal_simota(priors, scores, gts, topk, radius=0.25):
    """1-based ground truth of each prior by the paper's recipe, one ground truth at a time."""
    centres = (priors[:, :2] + priors[:, 2:]) / 2
    ious = bbox_overlaps(priors, gts)
    candidates, costs = [], {}
    for p in range(len(priors)):
        x, y = centres[p].tolist()
        in_box, in_centre = [], []
        for x1, y1, x2, y2 in gts.tolist():
            in_box.append(x1 < x < x2 and y1 < y < y2)
            in_centre.append(
                abs(x - (x1 + x2) / 2) < radius * (x2 - x1)
                and abs(y - (y1 + y2) / 2) < radius * (y2 - y1)
            )
        if any(in_box):
            candidates.append(p)
            for g in range(len(gts)):
                cost = -3 * torch.log(ious[p, g] + 1e-7) - torch.log(scores[p, 0])
                costs[p, g] = (not (in_box[g] and in_centre[g]), cost.item())
    claims = {}
    for g in range(len(gts)):
        best = sorted((ious[p, g].item() for p in candidates), reverse=True)[:topk]
        for p in sorted(candidates, key=lambda p: costs[p, g])[: max(int(sum(best)), 1)]:
            claims.setdefault(p, []).append(g)
    assigned = [0] * len(priors)
    for p, claimants in claims.items():
        rivals = claimants if len(claimants) == 1 else range(len(gts))
        assigned[p] = 1 + min(rivals, key=lambda g: costs[p, g])
    return assigned


@pytest.mark.parametrize('topk', [3, 10, 20])
def test_literal(topk):
    gts = [[20, 10, 110, 60], [50, 30, 90, 110], [150, 60, 190, 75], [-20, -10, 40, 30]]
    pred, gt = scene(300, gts)
    result = TASK_UTILS.build(dict(type='UVOSimOTAAssigner', topk=topk)).assign(pred, gt)
    expected = literal_simota(pred.priors, pred.scores, gt.bboxes, topk)
    assert result.gt_inds.tolist() == expected
    assert len(set(expected)) == 5
    positive = result.gt_inds > 0
    ious = bbox_overlaps(pred.priors, gt.bboxes)
    torch.testing.assert_close(
        result.max_overlaps[positive], ious[positive, result.gt_inds[positive] - 1]
    )
    assert (result.labels[positive] == 0).all()
    assert (result.labels[~positive] == -1).all()


def test_no_objects():
    pred, gt = scene(20, [])
    result = UVOSimOTAAssigner().assign(pred, gt)
    assert result.gt_inds.tolist() == [0] * 20
    assert result.labels.tolist() == [-1] * 20
    assert result.num_gts == 0


def test_object_outside_the_priors_gets_none():
    pred, gt = scene(20, [[500, 500, 520, 540]])
    assert UVOSimOTAAssigner().assign(pred, gt).gt_inds.tolist() == [0] * 20


def test_no_positive_is_forced_on_an_object_outside_the_image():
    pred, gt = scene(20, [[500, 500, 520, 540]])
    first, second = (UVOSimOTAAssigner(topk, ensure_positive=True) for topk in (10, 20))
    pred.valid_flags = torch.ones(20, dtype=torch.bool)
    for height, forced in ((600, 1), (500, 0)):
        meta = dict(img_shape=(height, 600))
        geometry = dict(strides=torch.ones(20), img_meta=meta)
        assert (first.assign(pred, gt, img_meta=meta).gt_inds > 0).sum() == forced
        for other in (second, UVOSimOTAAssigner(20, iou_weight=1.0, ensure_positive=True)):
            for slot in assign_slots(first, other, pred, gt, None, geometry):
                assert (slot >= 0).sum() == forced


def test_invalid_and_ignored_priors_take_no_part():
    pred, gt = scene(200, [[20, 10, 110, 60]])
    pred.valid_flags = torch.arange(200) % 2 == 0
    crowd = InstanceData(bboxes=torch.tensor([[90.0, 0.0, 200.0, 120.0]]))
    plain = UVOSimOTAAssigner().assign(pred, gt, crowd).gt_inds
    assert torch.equal(plain == -1, ~pred.valid_flags)
    spared = UVOSimOTAAssigner(ignore_iof_thr=0.5).assign(pred, gt, crowd).gt_inds
    covered = bbox_overlaps(pred.priors, crowd.bboxes, 'iof')[:, 0] > 0.5
    assert torch.equal(spared == -1, ~pred.valid_flags | covered)
    assert (spared > 0).any()


def test_sharing_a_pass_needs_the_same_cost():
    first = UVOSimOTAAssigner(topk=10)
    assert first.shares_pass_with(UVOSimOTAAssigner(topk=20))
    assert not first.shares_pass_with(UVOSimOTAAssigner(topk=20, iou_weight=2.0))
    assert not first.shares_pass_with(UVOSimOTAAssigner(topk=20, ignore_iof_thr=0.5))
    assert not first.shares_pass_with(TASK_UTILS.build(dict(type='ATSSAssigner', topk=9)))


def test_serves_mmdets_anchor_heads():
    """They hand over priors and no scores: as if all were 1. A RetinaNet trains with it."""
    pred, gt = scene(200, [[20, 10, 110, 60], [50, 30, 90, 110]])
    without = UVOSimOTAAssigner().assign(InstanceData(priors=pred.priors), gt)
    pred.scores = torch.ones(200, 1)
    assert torch.equal(without.gt_inds, UVOSimOTAAssigner().assign(pred, gt).gt_inds)

    head = MODELS.build(
        dict(
            type='RetinaHead',
            num_classes=3,
            in_channels=4,
            feat_channels=4,
            stacked_convs=1,
            anchor_generator=dict(
                type='AnchorGenerator', ratios=[1.0], scales=[4], strides=[8, 16]
            ),
            train_cfg=ConfigDict(
                assigner=dict(type='UVOSimOTAAssigner'),
                sampler=dict(type='PseudoSampler'),
                allowed_border=-1,
                pos_weight=-1,
            ),
        )
    )
    gt.labels = torch.tensor([2, 0])
    feats = [torch.randn(1, 4, 12, 20), torch.randn(1, 4, 6, 10)]
    meta = dict(img_shape=(96, 160), pad_shape=(96, 160))
    losses = head.loss_by_feat(*head(feats), [gt], [meta])
    assert all(0 < loss < 100 for losses in losses.values() for loss in losses)
