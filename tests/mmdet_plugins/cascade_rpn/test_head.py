"""The head against mmdet's Cascade RPN, against losses added up by hand, and at its edges."""

import math

import pytest
import torch
import torch.nn.functional as F
from mmcv.ops import ModulatedDeformConv2dPack
from mmdet.models.dense_heads import CascadeRPNHead
from mmdet.models.losses import FocalLoss, GIoULoss
from mmdet.models.task_modules import DeltaXYWHBBoxCoder
from mmdet.structures.bbox import bbox_overlaps
from mmengine.config import ConfigDict

from mmdet_plugins.cascade_rpn import assigner as assigner_module
from mmdet_plugins.cascade_rpn.head import StageOutput

REGION = dict(type='RegionAssigner', center_ratio=0.2, ignore_ratio=0.5)
MAX_IOU = dict(type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.3, min_pos_iou=0.3)
STDS = [(0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1)]
PLAIN = dict(num_tower_convs=0, loss_iou=None)


def stock_head(seed: int = 0) -> CascadeRPNHead:
    """mmdet's head with the layout of the small head without towers and IoU branch."""
    torch.manual_seed(seed)
    anchors = dict(type='AnchorGenerator', scales=[4], ratios=[1.0], strides=[8, 16, 32])
    losses = dict(
        loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=True),
        loss_bbox=dict(type='GIoULoss', loss_weight=2.0),
    )
    head = CascadeRPNHead(
        num_classes=1,
        num_stages=2,
        stages=[
            ConfigDict(
                type='StageCascadeRPNHead',
                in_channels=8,
                feat_channels=8,
                anchor_generator=anchors,
                adapt_cfg=dict(type='dilation', dilation=3),
                bridged_feature=True,
                with_cls=False,
                reg_decoded_bbox=True,
                bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_stds=STDS[0]),
                **losses,
            ),
            ConfigDict(
                type='StageCascadeRPNHead',
                in_channels=8,
                feat_channels=8,
                anchor_generator=anchors,
                adapt_cfg=dict(type='offset'),
                bridged_feature=False,
                with_cls=True,
                reg_decoded_bbox=True,
                bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_stds=STDS[1]),
                **losses,
            ),
        ],
        train_cfg=[
            ConfigDict(assigner=REGION, allowed_border=-1, pos_weight=-1),
            ConfigDict(assigner=MAX_IOU, allowed_border=-1, pos_weight=-1),
        ],
        test_cfg=ConfigDict(
            nms_pre=60, max_per_img=40, nms=dict(type='nms', iou_threshold=0.8), min_bbox_size=0
        ),
    )
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return head


def test_is_mmdets_cascade_rpn_without_towers_and_iou_branch(make_head, make_samples, features):
    """The same weights fit, and give the same refined anchors, deltas, logits and proposals."""
    stock = stock_head()
    head = make_head(**PLAIN)
    head.load_state_dict(stock.state_dict())
    samples = make_samples(
        [[], []], img_shape=(90, 151), ori_shape=(180, 302), scale_factor=(0.5, 0.5)
    )
    metas = [sample.metainfo for sample in samples]

    sizes = [feat.shape[-2:] for feat in features]
    anchors, _ = stock.stages[0].get_anchors(sizes, metas, device='cpu')
    feats, _, deltas = stock.stages[0](features)
    refined = stock.stages[0].refine_bboxes(anchors, deltas, metas)
    offsets = stock.stages[1].anchor_offset(refined, [8, 16, 32], sizes)
    _, cls_logits, deltas2 = stock.stages[1](feats, offsets)

    first, second = head(features, torch.tensor([[90.0, 151.0], [90.0, 151.0]]))
    torch.testing.assert_close(first.anchors, torch.stack([torch.cat(a) for a in anchors]))
    torch.testing.assert_close(second.anchors, torch.stack([torch.cat(a) for a in refined]))
    torch.testing.assert_close(second.deltas, flat(deltas2), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(second.cls_logits, flat(cls_logits)[..., 0], rtol=1e-4, atol=1e-4)
    assert second.iou_logits is None

    theirs = stock.predict(features, samples, rescale=True)
    for ours, other in zip(head.predict(features, samples, rescale=True), theirs, strict=True):
        assert len(ours) == len(other) > 10
        torch.testing.assert_close(ours.bboxes, other.bboxes, rtol=1e-4, atol=1e-2)
        torch.testing.assert_close(ours.scores, other.scores, rtol=1e-4, atol=1e-4)
        assert ours.labels.tolist() == other.labels.tolist()


def flat(maps: list) -> torch.Tensor:
    return torch.cat([m.permute(0, 2, 3, 1).flatten(1, 2) for m in maps], 1)


def spy_on_assignments(head) -> list:
    """Collects (cls_idx, reg_idx) of each stage."""
    seen = []
    for stage in head.stages:

        def loss(output, boxes, gt_boxes, cls_idx, reg_idx, original=stage.loss):
            seen.append((cls_idx, reg_idx))
            return original(output, boxes, gt_boxes, cls_idx, reg_idx)

        stage.loss = loss
    return seen


@pytest.mark.parametrize('img_shape', [(96, 160), (70, 100)])
def test_region_and_max_iou_targets_are_mmdets(make_head, make_samples, features, gts, img_shape):
    """Also with an image smaller than the batch, whose padding holds no priors."""
    stock = stock_head()
    head = make_head(train_cfg=[dict(assigner=REGION), dict(assigner=MAX_IOU)], **PLAIN)
    head.load_state_dict(stock.state_dict())
    seen = spy_on_assignments(head)
    samples = make_samples(gts, img_shape=img_shape)
    head.loss(features, samples)

    sizes = [feat.shape[-2:] for feat in features]
    metas = [sample.metainfo for sample in samples]
    anchors, flags = stock.stages[0].get_anchors(sizes, metas, device='cpu')
    _, _, deltas = stock.stages[0](features)
    refined = stock.stages[0].refine_bboxes(anchors, deltas, metas)
    instances = [sample.gt_instances for sample in samples]
    for stage, priors, (cls_idx, reg_idx) in zip(
        stock.stages, (anchors, refined), seen, strict=True
    ):
        labels, weights, targets, *_ = stage.get_targets(priors, flags, sizes, instances, metas)
        weights, targets = torch.cat(weights, 1), torch.cat(targets, 1)
        assert torch.equal(cls_idx, reg_idx)
        assert torch.equal(cls_idx > -2, weights > 0)
        positive = targets.any(-1)
        assert torch.equal(cls_idx >= 0, positive)
        assert positive.any()
        for i in range(2):
            rows = cls_idx[i][positive[i]]
            assert torch.equal(instances[i].bboxes[rows], targets[i][positive[i]])


def test_losses_are_those_of_each_positive_added_up(make_head, make_samples, features, gts):
    """Focal loss over all valid priors, GIoU and BCE positive by positive, from the logits."""
    head = make_head()
    seen = spy_on_assignments(head)
    samples = make_samples(gts)
    losses = head.loss(features, samples)
    outputs = head(features, torch.tensor([[96.0, 160.0], [96.0, 160.0]]))
    assert set(losses) == {
        's0.loss_rpn_reg',
        's0.loss_rpn_iou',
        's1.loss_rpn_reg',
        's1.loss_rpn_iou',
        's1.loss_rpn_cls',
    }
    for i, (output, (cls_idx, reg_idx)) in enumerate(zip(outputs, seen, strict=True)):
        coder = DeltaXYWHBBoxCoder(target_stds=STDS[i])
        giou_sum = iou_sum = bce_sum = num_pos = 0
        for image in range(2):
            for prior in (reg_idx[image] >= 0).nonzero().flatten().tolist():
                gt = samples[image].gt_instances.bboxes[reg_idx[image, prior]][None]
                box = coder.decode(
                    output.anchors[image, prior][None], output.deltas[image, prior][None]
                )
                iou = bbox_overlaps(box, gt).item()
                giou_sum += GIoULoss()(box, gt).item() * 2.0 * iou
                bce_sum += F.binary_cross_entropy_with_logits(
                    output.iou_logits[image, prior], torch.tensor(iou)
                ).item()
                iou_sum += iou
                num_pos += 1
        assert num_pos > 5
        assert iou_sum > 1
        assert losses[f's{i}.loss_rpn_reg'].item() == pytest.approx(giou_sum / iou_sum, rel=1e-4)
        assert losses[f's{i}.loss_rpn_iou'].item() == pytest.approx(bce_sum / num_pos, rel=1e-4)
        if output.cls_logits is not None:
            focal = FocalLoss()(
                output.cls_logits.flatten()[:, None],
                (cls_idx.flatten() < 0).long(),
                reduction_override='none',
            ).sum()
            expected = focal / (cls_idx >= 0).sum()
            assert losses[f's{i}.loss_rpn_cls'].item() == pytest.approx(expected.item(), rel=1e-4)


def test_without_iou_branch_positives_weigh_alike(make_head, make_samples, features, gts):
    head = make_head(loss_iou=None)
    seen = spy_on_assignments(head)
    samples = make_samples(gts)
    losses = head.loss(features, samples)
    output = head(features, torch.tensor([[96.0, 160.0], [96.0, 160.0]]))[1]
    positive = seen[1][1] >= 0
    boxes = DeltaXYWHBBoxCoder(target_stds=STDS[1]).decode(
        output.anchors[positive], output.deltas[positive]
    )
    targets = torch.cat(
        [samples[i].gt_instances.bboxes[seen[1][1][i][positive[i]]] for i in range(2)]
    )
    expected = GIoULoss(loss_weight=2.0)(boxes, targets)
    torch.testing.assert_close(losses['s1.loss_rpn_reg'], expected, rtol=1e-4, atol=1e-5)
    assert not any('iou' in name for name in losses)


def test_cross_entropy_in_place_of_focal_loss(make_head, make_samples, features, gts):
    head = make_head(loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=True))
    seen = spy_on_assignments(head)
    losses = head.loss(features, make_samples(gts))
    logits = head(features, torch.tensor([[96.0, 160.0], [96.0, 160.0]]))[1].cls_logits
    positive = (seen[1][0] >= 0).float()
    expected = F.binary_cross_entropy_with_logits(logits, positive, reduction='sum')
    torch.testing.assert_close(
        losses['s1.loss_rpn_cls'], expected / positive.sum(), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize('bridged', [True, False])
def test_stage_2_takes_stage_1s_features_only_if_bridged(make_head, features, bridged):
    """With stage 1 moving no box, its adaptive convolution reaches stage 2 by features alone."""
    stages = [
        dict(adapt_type='dilation', bridged_feature=bridged, with_cls=False, target_stds=STDS[0]),
        dict(adapt_type='offset', target_stds=STDS[1]),
    ]
    head = make_head(feat_channels=12, stages=stages)
    assert head.stages[1].rpn_conv.conv.in_channels == (12 if bridged else 8)
    with torch.no_grad():
        head.stages[0].rpn_reg.weight.zero_()
        head.stages[0].rpn_reg.bias.zero_()
        before = head(features)[1].deltas
        head.stages[0].rpn_conv.conv.weight.neg_()
        after = head(features)[1].deltas
    assert torch.equal(before, after) is not bridged


def test_first_branch_learns_from_the_first_assignment(make_head, make_samples, features, gts):
    """The regression slot has twice the top-k, hence more positives, and contains the first."""
    head = make_head()
    seen = spy_on_assignments(head)
    head.loss(features, make_samples(gts))
    for cls_idx, reg_idx in seen:
        assert (reg_idx >= 0).sum() > (cls_idx >= 0).sum() > 0


def test_two_simotas_share_one_pass(make_head, make_samples, features, gts, monkeypatch):
    calls = []
    original = assigner_module.dual_sim_ota

    def spy(*args, topk, **kwargs):
        calls.append(topk)
        return original(*args, topk=topk, **kwargs)

    monkeypatch.setattr(assigner_module, 'dual_sim_ota', spy)
    simota = dict(type='UVOSimOTAAssigner', topk=10)
    for changes, expected in [
        (dict(), [(10, 20)]),
        (dict(center_radius=0.4), [(10,), (20,)]),
    ]:
        calls.clear()
        head = make_head(
            train_cfg=dict(assigner=simota, reg_assigner=dict(simota, topk=20, **changes))
        )
        head.loss(features, make_samples(gts))
        assert calls == expected * 4  # two stages, two images


def test_one_assigner_serves_both_slots(make_head, make_samples, features, gts):
    head = make_head(train_cfg=dict(assigner=dict(type='UVOSimOTAAssigner'), reg_assigner=None))
    seen = spy_on_assignments(head)
    head.loss(features, make_samples(gts))
    for cls_idx, reg_idx in seen:
        assert torch.equal(cls_idx, reg_idx)
        assert (cls_idx >= 0).any()


@pytest.mark.parametrize('slot', ['assigner', 'reg_assigner'])
@pytest.mark.parametrize(
    'other',
    [
        MAX_IOU,
        dict(type='ATSSAssigner', topk=3),
        dict(type='TaskAlignedAssigner', topk=5),
        dict(type='UVOSimOTAAssigner', center_rule='stride', center_radius=2.5),
    ],
)
def test_any_assigner_in_either_slot(make_head, make_samples, features, gts, slot, other, recwarn):
    """The other slot keeps what SimOTA gives it."""
    simota = dict(type='UVOSimOTAAssigner', topk=10)
    slots = dict(assigner=simota, reg_assigner=simota)
    assignments = []
    for cfg in (slots, {**slots, slot: other}):
        head = make_head(train_cfg=cfg)
        seen = spy_on_assignments(head)
        losses = head.loss(features, make_samples(gts))
        assert all(torch.isfinite(loss) for loss in losses.values())
        assignments.append(seen)
    changed = int(slot == 'reg_assigner')
    for plain, mixed in zip(*assignments, strict=True):
        assert torch.equal(plain[1 - changed], mixed[1 - changed])
        assert not torch.equal(plain[changed], mixed[changed])
        assert (mixed[changed] >= 0).any()
    assert not [w for w in recwarn if 'alpha' in str(w.message)]


def test_padding_of_a_smaller_image_has_no_priors(make_head, make_samples, features, gts):
    head = make_head()
    seen = spy_on_assignments(head)
    head.loss(features, make_samples(gts, img_shape=(60, 97), pad_shape=(64, 128)))
    levels = [torch.zeros(96 // s, 160 // s, dtype=torch.bool) for s in (8, 16, 32)]
    for level, s in zip(levels, (8, 16, 32), strict=True):
        level[: 64 // s, : 128 // s] = True
    inside = torch.cat([level.flatten() for level in levels])
    for assignments in seen:
        for idx in assignments:
            assert (idx[:, ~inside] == -2).all()
            assert (idx[:, inside] > -2).all()


def test_batch_of_two_is_two_of_one(make_head, make_samples, features, gts):
    head = make_head()
    both = head.predict(features, make_samples(gts))
    seen = spy_on_assignments(head)
    head.loss(features, make_samples(gts))
    batched = list(seen)
    for i in range(2):
        seen.clear()
        feats = [feat[i : i + 1] for feat in features]
        single = head.predict(feats, make_samples(gts[i : i + 1]))[0]
        torch.testing.assert_close(single.bboxes, both[i].bboxes, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(single.scores, both[i].scores, rtol=1e-4, atol=1e-5)
        head.loss(feats, make_samples(gts[i : i + 1]))
        for alone, together in zip(seen, batched, strict=True):
            for a, t in zip(alone, together, strict=True):
                assert torch.equal(a[0], t[i])


@pytest.mark.parametrize('boxes', ['some', 'none', 'one image'])
@pytest.mark.parametrize('train_cfg', [None, [dict(assigner=REGION), dict(assigner=MAX_IOU)]])
def test_every_parameter_gets_a_gradient(make_head, make_samples, features, gts, boxes, train_cfg):
    """With objects each is non-zero; without any they exist, so that ranks can wait for them."""
    head = make_head(**({} if train_cfg is None else dict(train_cfg=train_cfg)))
    gts = {'some': gts, 'none': [[], []], 'one image': [[], gts[1]]}[boxes]
    losses = head.loss(features, make_samples(gts))
    assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        if boxes == 'some' and train_cfg is None:
            assert parameter.grad.abs().sum() > 0, name
    if boxes == 'none':
        assert losses['s0.loss_rpn_reg'] == losses['s1.loss_rpn_reg'] == 0
        assert losses['s0.loss_rpn_iou'] == losses['s1.loss_rpn_iou'] == 0
        assert losses['s1.loss_rpn_cls'] > 0


def test_crowds_are_exempt_only_if_asked(make_head, make_samples, features, gts):
    crowd = [[[80, 0, 160, 96]], [[0, 0, 80, 96]]]
    counts = []
    for thr in (-1, 0.5):
        simota = dict(type='UVOSimOTAAssigner', ignore_iof_thr=thr)
        head = make_head(train_cfg=dict(assigner=simota))
        seen = spy_on_assignments(head)
        head.loss(features, make_samples(gts, ignored=crowd))
        output = head(features)[0]
        covered = torch.stack(
            [
                bbox_overlaps(output.anchors[i], torch.tensor(crowd[i]).float(), 'iof').amax(1)
                > 0.5
                for i in range(2)
            ]
        )
        counts.append((seen[0][0] == -2).sum())
        if thr > 0:
            assert torch.equal(seen[0][0] == -2, covered)
    assert counts[0] == 0 < counts[1]


def test_all_ignored_is_finite(make_head, make_samples, features):
    simota = dict(type='UVOSimOTAAssigner', ignore_iof_thr=0.0)
    head = make_head(train_cfg=dict(assigner=simota))
    everything = [[[-100, -100, 400, 400]]] * 2
    losses = head.loss(features, make_samples([[[10, 10, 60, 60]], []], ignored=everything))
    assert all(loss == 0 for loss in losses.values())
    sum(losses.values()).backward()


def test_scores():
    """sqrt(cls * iou) at test; sqrt(iou) and cbrt(cls * iou) in the assignment."""
    cls_logits, iou_logits = torch.tensor([[0.0, math.log(3)]]), torch.tensor([[math.log(4), 0.0]])
    boxes = torch.zeros(1, 2, 4)
    both = StageOutput(boxes, boxes, cls_logits, iou_logits)
    torch.testing.assert_close(both.score(), torch.tensor([[0.4**0.5, 0.375**0.5]]))
    torch.testing.assert_close(
        both.assignment_score(), torch.tensor([[0.4 ** (1 / 3), 0.375 ** (1 / 3)]])
    )
    iou_only = StageOutput(boxes, boxes, None, iou_logits)
    torch.testing.assert_close(iou_only.assignment_score(), torch.tensor([[0.8**0.5, 0.5**0.5]]))
    cls_only = StageOutput(boxes, boxes, cls_logits, None)
    torch.testing.assert_close(cls_only.score(), torch.tensor([[0.5, 0.75]]))
    neither = StageOutput(boxes, boxes, None, None)
    assert neither.assignment_score().tolist() == [[1.0, 1.0]]


def test_predictions_are_scored_by_both_branches(make_head, make_samples, features):
    head = make_head()
    output = head(features, torch.tensor([[96.0, 160.0], [96.0, 160.0]]))[-1]
    expected = (output.cls_logits.sigmoid() * output.iou_logits.sigmoid()).sqrt()
    results = head.predict(features, make_samples([[], []]))
    for i, result in enumerate(results):
        assert result.scores[0].item() == pytest.approx(expected[i].max().item(), rel=1e-5)
        assert (result.scores.diff() <= 0).all()
        assert result.bboxes[:, 0::2].max() <= 160
        assert result.bboxes[:, 1::2].max() <= 96
        assert result.bboxes.min() >= 0
        assert not result.bboxes.requires_grad


def test_loss_and_predict_serves_two_stage_detectors(make_head, make_samples, features, gts):
    head = make_head()
    samples = make_samples(gts, scale_factor=(0.5, 0.5))
    losses, proposals = head.loss_and_predict(
        features, samples, proposal_cfg=ConfigDict(head.test_cfg, max_per_img=7)
    )
    assert losses.keys() == head.loss(features, samples).keys()
    plain = head.predict(features, samples)
    scaled = head.predict(features, samples, rescale=True)
    for i in range(2):
        assert len(proposals[i]) == 7
        torch.testing.assert_close(proposals[i].bboxes, plain[i].bboxes[:7])
        torch.testing.assert_close(scaled[i].bboxes, plain[i].bboxes * 2)


@pytest.mark.parametrize('dcn_tower', ['first', 'last'])
def test_bf16_autocast(make_head, make_samples, features, gts, dcn_tower):
    head = make_head(dcn_tower=dcn_tower)
    samples = make_samples(gts)
    full = head.loss(features, samples)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        losses = head.loss([feat.bfloat16() for feat in features], samples)
        proposals = head.predict(features, samples)
    sum(losses.values()).backward()
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(full[name].item(), rel=0.2), name
    assert all(torch.isfinite(p.grad).all() for p in head.parameters())
    assert all(result.bboxes.dtype == torch.float32 for result in proposals)


@pytest.mark.parametrize(
    ('dcn_tower', 'expected'),
    [
        (None, set()),
        ('first', {'cls_convs.0', 'reg_convs.0'}),
        ('last', {'cls_convs.2', 'reg_convs.2'}),
    ],
)
def test_which_tower_convolution_is_deformable(make_head, dcn_tower, expected):
    stage = make_head(num_tower_convs=3, dcn_tower=dcn_tower).stages[1]
    found = {
        name.removesuffix('.conv')
        for name, module in stage.named_modules()
        if isinstance(module, ModulatedDeformConv2dPack)
    }
    assert found == expected


def test_initialisation(make_head):
    """Deformable towers start as plain ones, and objectness at the focal loss's prior."""
    head = make_head()
    head.init_weights()
    stage = head.stages[1]
    assert stage.rpn_cls.bias.item() == pytest.approx(-math.log(99), rel=1e-6)
    assert stage.rpn_iou.bias.item() == stage.rpn_reg.bias.abs().max().item() == 0
    assert stage.cls_convs[0].conv.conv_offset.weight.abs().max() == 0
    assert 0.005 < stage.reg_convs[1].conv.weight.std() < 0.02


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(dcn_tower='middle'), "dcn_tower must be 'first', 'last' or None"),
        (dict(num_classes=80), 'num_classes must be 1'),
        (dict(train_cfg=[dict(assigner=MAX_IOU)]), 'train_cfg lists 1 stages, the head has 2'),
    ],
)
def test_bad_settings(make_head, changes, message):
    with pytest.raises(ValueError, match=message):
        make_head(**changes)
