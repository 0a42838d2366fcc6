import math

import pytest
import torch
from mmdet.models.task_modules.assigners import SimOTAAssigner
from mmengine.structures import InstanceData
from torch.utils._python_dispatch import TorchDispatchMode

from mmdet_plugins.ops import sim_ota
from mmdet_plugins.ops.sim_ota import dual_sim_ota


def make_scene(seed: int, num_gts: int, num_classes: int = 1, hw: tuple[int, int] = (72, 136)):
    """Jittered anchors of three levels on a non-square image, and objects in and around it."""
    rng = torch.Generator().manual_seed(seed)
    points, strides = [], []
    for s in (4, 8, 16):
        y, x = torch.meshgrid(torch.arange(0, hw[0], s), torch.arange(0, hw[1], s), indexing='ij')
        points.append(torch.stack([x.flatten(), y.flatten()], dim=1).float())
        strides.append(torch.full((y.numel(),), float(s)))
    points, strides = torch.cat(points), torch.cat(strides)
    num = len(points)
    centre = points + torch.randn(num, 2, generator=rng) * strides[:, None]
    half = 3 * strides[:, None] * torch.exp(torch.randn(num, 2, generator=rng) * 0.5)
    middle = torch.rand(num_gts, 2, generator=rng) * torch.tensor([hw[1] * 1.1, hw[0] * 1.1])
    side = torch.exp(torch.rand(num_gts, 2, generator=rng) * 4)
    return dict(
        points_xy=points,
        boxes_xyxy=torch.cat([centre - half, centre + half], dim=1),
        scores=torch.rand(num, num_classes, generator=rng),
        gt_xyxy=torch.cat([middle - side / 2, middle + side / 2], dim=1),
        gt_labels=torch.randint(num_classes, (num_gts,), generator=rng),
        strides=strides,
    )


def stock(scene: dict, k: int, radius: float) -> torch.Tensor:
    """The assignment of mmdet, -1 for background, and its IoU."""
    strides = scene['strides'][:, None].expand(-1, 2)
    result = SimOTAAssigner(radius, candidate_topk=k).assign(
        InstanceData(
            priors=torch.cat([scene['points_xy'], strides], dim=1),
            bboxes=scene['boxes_xyxy'],
            scores=scene['scores'],
        ),
        InstanceData(bboxes=scene['gt_xyxy'], labels=scene['gt_labels']),
    )
    return result.gt_inds - 1, result.max_overlaps


def literal(scene: dict, k: int, radius: float, iou_weight: float = 3.0) -> list[int]:
    """The ratio rule prior by prior and ground truth by ground truth, in double precision."""
    points, boxes = scene['points_xy'].tolist(), scene['boxes_xyxy'].tolist()
    scores, gts = scene['scores'].tolist(), scene['gt_xyxy'].tolist()
    inside, central = {}, {}
    for p, (x, y) in enumerate(points):
        for g, (x1, y1, x2, y2) in enumerate(gts):
            cx, cy, rx, ry = (x1 + x2) / 2, (y1 + y2) / 2, radius * (x2 - x1), radius * (y2 - y1)
            in_box = x1 < x < x2 and y1 < y < y2
            in_centre = cx - rx < x < cx + rx and cy - ry < y < cy + ry
            inside[p, g], central[p, g] = in_box or in_centre, in_box and in_centre
    candidates = [p for p in range(len(points)) if any(inside[p, g] for g in range(len(gts)))]
    iou, order = {}, {}
    for p in candidates:
        a = boxes[p]
        for g, b in enumerate(gts):
            w = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
            h = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
            union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h
            iou[p, g] = w * h / max(union, 1e-6)
            cost = -math.log(scores[p][0]) - iou_weight * math.log(iou[p, g] + 1e-7)
            order[p, g] = (not central[p, g], cost)
    claims = {}
    for g in range(len(gts)):
        best = sorted((iou[p, g] for p in candidates), reverse=True)[:k]
        count = max(1, int(sum(best)))
        for p in sorted(candidates, key=lambda p, g=g: (*order[p, g], p))[:count]:
            claims.setdefault(p, []).append(g)
    result = [-1] * len(points)
    for p, claimants in claims.items():
        result[p] = claimants[0]
        if len(claimants) > 1:
            result[p] = min(range(len(gts)), key=lambda g, p=p: order[p, g])
    return result


def run(scene: dict, **kwargs):
    return dual_sim_ota(**{**scene, **kwargs})


# Four priors on one 10 x 10 object.
QUARTERS = dict(
    points_xy=torch.tensor([[5.0, 5.0], [4.5, 5.0], [5.0, 4.5], [5.5, 5.5]]),
    boxes_xyxy=torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 5, 5], [0, 0, 10, 9]]),
    scores=torch.tensor([0.1, 0.9, 0.9, 0.9]),
    gt_xyxy=torch.tensor([[0.0, 0, 10, 10]]),
)


def test_k_is_the_whole_part_of_the_summed_ious_and_the_cheapest_are_claimed():
    # IoUs 1, .5, .25, .9: two of them sum to 1.9, all to 2.65. Costs -ln(score) - 3 ln(IoU): 2.303,
    # 2.185, 4.264, 0.421.
    one, two = run(QUARTERS, topk=(2, 4))
    assert one.gt_idx.tolist() == [-1, -1, -1, 0]
    assert two.gt_idx.tolist() == [-1, 0, -1, 0]
    torch.testing.assert_close(two.iou, torch.tensor([0, 0.5, 0, 0.9]))
    # With the class cost left out, the first prior costs 0 and the second 2.079.
    (two,) = run(QUARTERS, topk=(4,), cls_weight=0.0)
    assert two.gt_idx.tolist() == [0, -1, -1, 0]


def test_central_priors_come_first():
    # The third prior leaves the centre region (2.5 < x, y < 7.5) of the object but not its box.
    points = QUARTERS['points_xy'].clone()
    points[3] = torch.tensor([8.0, 5.0])
    (result,) = run(QUARTERS, points_xy=points, topk=(4,))
    assert result.gt_idx.tolist() == [0, 0, -1, -1]


def test_order_outside_the_centre_is_by_cost():
    # Costs of 2.303 and 0.421, which 1e8 + cost cannot tell apart in float32.
    points = torch.tensor([[1.0, 1.0], [1, 2], [2, 1], [9, 9]])
    (result,) = run(QUARTERS, points_xy=points, topk=(2,))
    assert result.gt_idx.tolist() == [-1, -1, -1, 0]


def test_ties_go_to_the_lowest_index():
    scene = dict(
        points_xy=torch.full((6, 2), 5.0),
        boxes_xyxy=torch.tensor([[0.0, 0, 10, 8]]).repeat(6, 1),
        scores=torch.full((6,), 0.5),
        gt_xyxy=torch.tensor([[0.0, 0, 10, 10]]).repeat(3, 1),
    )
    for result, claims in zip(run(scene, topk=(3, 6)), (2, 4), strict=True):
        assert result.gt_idx.tolist() == [0] * claims + [-1] * (6 - claims)


@pytest.mark.parametrize('num_classes', [1, 4])
@pytest.mark.parametrize('num_gts', [1, 3, 12, 40])
def test_equal_to_mmdet_in_stride_mode(num_gts, num_classes):
    for seed in range(6):
        scene = make_scene(seed, num_gts, num_classes)
        radius = (0.4, 1.5, 2.5)[seed % 3]
        results = run(scene, center_rule='stride', center_radius=radius, topk=(10, 20))
        for result, k in zip(results, (10, 20), strict=True):
            gt_idx, iou = stock(scene, k, radius)
            torch.testing.assert_close(result.gt_idx, gt_idx, rtol=0, atol=0)
            positive = gt_idx >= 0
            assert torch.equal(result.iou[positive], iou[positive])
            assert not result.iou[~positive].any()


@pytest.mark.parametrize('num_gts', [1, 4, 15])
def test_equal_to_the_literal_rule_in_ratio_mode(num_gts):
    for seed in range(3):
        scene = make_scene(100 + seed, num_gts, hw=(56, 104))
        radius = (0.25, 0.1, 0.7)[seed % 3]
        results = run(scene, center_radius=radius, topk=(10, 20))
        for result, k in zip(results, (10, 20), strict=True):
            assert result.gt_idx.tolist() == literal(scene, k, radius)


@pytest.mark.parametrize('rule', ['ratio', 'stride'])
@pytest.mark.parametrize('ensure_positive', [False, True])
def test_blocks_change_nothing(monkeypatch, rule, ensure_positive):
    options = dict(
        center_rule=rule,
        center_radius=0.25 if rule == 'ratio' else 1.5,
        ensure_positive=ensure_positive,
    )
    scenes = [make_scene(seed, 1 + seed, 1 + seed % 3, hw=(64, 200)) for seed in range(0, 20, 4)]
    blockwise = [run(scene, **options) for scene in scenes]
    monkeypatch.setattr(sim_ota, '_BUDGET', 3000)  # several batches
    small = [run(scene, **options) for scene in scenes]
    monkeypatch.setattr(sim_ota, '_find_blockwise', sim_ota._find)
    monkeypatch.setattr(sim_ota, '_rank_blockwise', sim_ota._rank)
    for scene, a, b in zip(scenes, blockwise, small, strict=True):
        for x, y, z in zip(a, b, run(scene, **options), strict=True):
            assert torch.equal(x.gt_idx, y.gt_idx) and torch.equal(x.gt_idx, z.gt_idx)
            assert torch.equal(x.iou, y.iou) and torch.equal(x.iou, z.iou)


def test_claims_are_filled_up_with_priors_that_miss_the_object():
    # One object has candidates around it; the other, out of reach of all boxes, must claim one of
    # those, by class cost alone. It is outbid for it in the end, unless it costs less.
    for seed in range(5):
        scene = make_scene(seed, 1, hw=(56, 104))
        scene['gt_xyxy'] = torch.tensor([[30.0, 20, 60, 50], [900, 900, 940, 940]])
        scene['gt_labels'] = torch.zeros(2, dtype=torch.long)
        (ratio,) = run(scene, topk=(10,))
        assert ratio.gt_idx.tolist() == literal(scene, 10, 0.25)
        (stride,) = run(scene, topk=(10,), center_rule='stride', center_radius=1.5)
        claims = stock(scene, 10, 1.5)[0]
        # mmdet adds 1e5 in float32: costs less than 2**-7 apart tie, and it takes any one of them.
        differ = stride.gt_idx != claims
        assert differ.sum() in (0, 2)
        costs = -scene['scores'][differ, 0].log()
        assert not differ.any() or costs.max() - costs.min() <= 2**-7


def test_crowd_of_500_objects():
    scene = make_scene(7, 500, hw=(128, 200))
    results = run(scene, center_rule='stride', center_radius=2.5)
    for result, k in zip(results, (10, 20), strict=True):
        assert (result.gt_idx == stock(scene, k, 2.5)[0]).all()


@pytest.mark.parametrize('ensure_positive', [False, True])
def test_nothing_to_assign(ensure_positive):
    scene = make_scene(0, 3)
    none = {'gt_xyxy': torch.empty(0, 4), 'gt_labels': torch.empty(0, dtype=torch.long)}
    num = len(scene['points_xy'])
    empty = {name: scene[name][:0] for name in ('points_xy', 'boxes_xyxy', 'scores', 'strides')}
    ignored = torch.zeros(num, dtype=torch.bool)
    for kwargs, size in ((none, num), (empty, 0), (dict(valid=ignored), num)):
        for result in run({**scene, **kwargs}, ensure_positive=ensure_positive):
            assert result.gt_idx.tolist() == [-1] * size
            assert result.iou.tolist() == [0.0] * size


def test_objects_out_of_reach_leave_everything_to_the_background():
    scene = make_scene(0, 1)
    gts = torch.tensor([[-90.0, -90, -60, -60], [400, 10, 420, 30]])
    for result in run(scene, gt_xyxy=gts, gt_labels=None):
        assert (result.gt_idx == -1).all()


def test_degenerate_objects_and_priors():
    scene = make_scene(3, 6)
    flat = torch.tensor([[20.0, 20, 20, 40], [50, 50, 40, 40]])
    flat = {
        **scene,
        'gt_xyxy': torch.cat([scene['gt_xyxy'], flat]),
        'gt_labels': torch.zeros(8, dtype=torch.long),
    }
    (result,) = run(flat, topk=(10,), center_rule='stride', center_radius=1.5)
    assert torch.equal(result.gt_idx, stock(flat, 10, 1.5)[0])

    unusable = torch.tensor([[math.nan, 1, 30, 30], [10, 10, math.inf, 30]])
    gts = torch.cat([scene['gt_xyxy'], unusable])
    for a, b in zip(run(scene), run(scene, gt_xyxy=gts, gt_labels=None), strict=True):
        assert torch.equal(a.gt_idx, b.gt_idx)

    broken = {name: scene[name].clone() for name in ('points_xy', 'boxes_xyxy', 'scores')}
    broken['points_xy'][100, 0] = math.nan
    broken['boxes_xyxy'][110:130, 3] = math.nan
    broken['boxes_xyxy'][130:150, 2] = math.inf
    broken['scores'][150:200] = math.nan
    valid = torch.ones(len(scene['points_xy']), dtype=torch.bool)
    valid[100] = False
    valid[110:200] = False
    for a, b in zip(run(scene, **broken), run(scene, valid=valid), strict=True):
        assert torch.equal(a.gt_idx, b.gt_idx)
        assert torch.equal(a.iou, b.iou)


def test_invalid_priors_are_as_if_absent():
    scene = make_scene(5, 8)
    valid = torch.rand(len(scene['points_xy']), generator=torch.Generator().manual_seed(0)) < 0.6
    kept = {
        k: v[valid] if k in ('points_xy', 'boxes_xyxy', 'scores', 'strides') else v
        for k, v in scene.items()
    }
    for a, b in zip(run(scene, valid=valid), run(kept), strict=True):
        assert torch.equal(a.gt_idx[valid], b.gt_idx)
        assert (a.gt_idx[~valid] == -1).all()


def test_order_of_objects_does_not_matter():
    scene = make_scene(11, 9, 3)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    shuffled = dict(gt_xyxy=scene['gt_xyxy'][order], gt_labels=scene['gt_labels'][order])
    for a, b in zip(run(scene), run(scene, **shuffled), strict=True):
        assert torch.equal(a.gt_idx, torch.where(b.gt_idx >= 0, order[b.gt_idx], -1))


def test_more_top_k_than_priors():
    scene = make_scene(0, 2)
    some = {k: v[200:215] if len(v) > 2 else v for k, v in scene.items()}
    some['gt_xyxy'] = some['boxes_xyxy'][3:5].clone()
    for result, k in zip(
        run(some, topk=(5, 300), center_rule='stride', center_radius=2.5), (5, 300), strict=True
    ):
        assert torch.equal(result.gt_idx, stock(some, k, 2.5)[0])


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    scene = make_scene(2, 5, 2)
    half = {k: v.to(dtype) if v.is_floating_point() else v for k, v in scene.items()}
    full = {k: v.float() if v.is_floating_point() else v for k, v in half.items()}
    for a, b in zip(run(half), run(full), strict=True):
        assert torch.equal(a.gt_idx, b.gt_idx)
        assert a.iou.dtype == torch.float32 and torch.equal(a.iou, b.iou)


def test_a_small_object_between_the_points_takes_its_best_prior_if_asked():
    scene = make_scene(4, 1)
    boxes = torch.cat([scene['points_xy'] - 2, scene['points_xy'] + 2], dim=1)
    # Between the points (40, 20), (44, 20), (40, 24) and (44, 24), in the box of the last.
    gts = torch.tensor([[42.0, 22, 43.5, 23.9]])
    scene.update(boxes_xyxy=boxes, gt_xyxy=gts, gt_labels=None)
    assert all((r.gt_idx == -1).all() for r in run(scene))
    nearest = int((scene['points_xy'] - torch.tensor([44.0, 24])).abs().sum(1).argmin())
    for result in run(scene, ensure_positive=True):
        assert result.gt_idx[nearest] == 0 and (result.gt_idx == 0).sum() == 1
        torch.testing.assert_close(result.iou[nearest].item(), 1.5 * 1.9 / 16)
    # Two such objects at one place: the second is outbid for the only prior that it claims.
    twice = run(scene, gt_xyxy=gts.repeat(2, 1), ensure_positive=True)
    assert all(r.gt_idx[nearest] == 0 and (r.gt_idx >= 0).sum() == 1 for r in twice)


def test_the_best_prior_is_found_apart_from_the_object():
    # A sliver of the first prior overlaps the object, but the last, beside it, has a higher GIoU.
    # The others belong to a second object and keep the two in different blocks.
    num = 100
    points = torch.tensor([230.0, 25]).repeat(num, 1) + torch.arange(num)[:, None] * 0.01
    boxes = torch.cat([points - 5, points + 5], dim=1)
    boxes[0] = torch.tensor([43.4, 23.8, 143, 24])
    points[-1] = torch.tensor([44.3, 23])
    boxes[-1] = torch.tensor([43.6, 22, 45.1, 23.9])
    gts = torch.tensor([[42.0, 22, 43.5, 23.9], [200, 20, 260, 30]])
    (result,) = dual_sim_ota(
        points, boxes, torch.full((num,), 0.5), gts, topk=(10,), ensure_positive=True
    )
    assert result.gt_idx[-1] == 0
    assert (result.gt_idx[:-1] != 0).all()


def test_no_positive_is_forced_outside_the_image_or_without_area():
    scene = make_scene(4, 1)
    outside = torch.tensor([[140.0, 10, 150, 20], [10, 72, 20, 80], [-9, -9, 0, 0]])
    flat = torch.tensor([[41.0, 22, 41, 23]])
    for gts in (outside, flat):
        for result in run(
            scene, gt_xyxy=gts, gt_labels=None, ensure_positive=True, image_hw=(72, 136)
        ):
            assert (result.gt_idx == -1).all()
    (result,) = run(scene, gt_xyxy=outside, gt_labels=None, ensure_positive=True, topk=(10,))
    assert set(result.gt_idx.tolist()) == {-1, 0, 1, 2}


@pytest.mark.parametrize('rule', ['ratio', 'stride'])
def test_with_positives_ensured_only_the_outbid_go_without(rule):
    for seed in range(4):
        scene = make_scene(seed, 25)
        low, high = scene['gt_xyxy'].split(2, dim=1)
        # Small enough to fall between points, and inside the image.
        scene['gt_xyxy'] = torch.cat([low, torch.minimum(high, low + 6)], dim=1)
        (result,) = run(scene, topk=(10,), center_rule=rule, ensure_positive=True)
        got = set(result.gt_idx.tolist())
        for g in range(25):
            if g in got:
                continue
            # Alone, it has a positive; and another object holds it now.
            (alone,) = run(
                scene,
                gt_xyxy=scene['gt_xyxy'][g : g + 1],
                gt_labels=scene['gt_labels'][g : g + 1],
                topk=(10,),
                center_rule=rule,
                ensure_positive=True,
            )
            held = alone.gt_idx == 0
            assert held.any()
            assert (result.gt_idx[held] >= 0).all()


class _Largest(TorchDispatchMode):
    """The most elements that any operation returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and t.untyped_storage().nbytes():
                self.numel = max(self.numel, t.untyped_storage().nbytes() // t.element_size())
        return out


@pytest.mark.parametrize('big', [False, True])
def test_no_tensor_holds_all_pairs(monkeypatch, big):
    monkeypatch.setattr(sim_ota, '_BUDGET', 4000)
    scene = make_scene(0, 60, hw=(96, 160))
    if big:  # every object covers every prior
        scene['gt_xyxy'] = torch.tensor([[-10.0, -10, 170, 110]]) - torch.rand(60, 1)
    with _Largest() as largest:
        run(scene, center_rule='stride', center_radius=2.5)
    num = len(scene['points_xy'])
    assert largest.numel < num * 60 / 4


@pytest.mark.parametrize('rule', ['ratio', 'stride'])
def test_shapes_are_static_off_the_cpu(rule):
    # A meta tensor has no values: whatever reads one back, or sizes a result by one, raises.
    meta = {k: v.to('meta') for k, v in make_scene(0, 5, 3).items()}
    valid = torch.empty(len(meta['points_xy']), dtype=torch.bool, device='meta')
    for result in run(meta, center_rule=rule, valid=valid, ensure_positive=True, image_hw=(9, 9)):
        assert result.gt_idx.shape == result.iou.shape == valid.shape
        assert result.gt_idx.device.type == 'meta'


@pytest.mark.parametrize(
    'change, words',
    [
        (dict(center_rule='circle'), 'center_rule'),
        (dict(center_rule='stride', strides=None), 'needs strides'),
        (dict(topk=()), 'topk'),
        (dict(gt_labels=torch.zeros(9)), 'gt_labels'),
        (dict(gt_xyxy=torch.zeros(2, 5)), 'gt_xyxy'),
        (dict(scores=torch.zeros(3)), 'scores'),
    ],
)
def test_bad_arguments_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        run(make_scene(0, 2), **change)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('rule', ['ratio', 'stride'])
def test_cuda_agrees_without_a_sync(rule):
    for seed in range(5):
        scene = make_scene(seed, 10, 1 + seed % 2)
        options = dict(
            center_rule=rule,
            center_radius=0.25 if rule == 'ratio' else 2.5,
            ensure_positive=bool(seed % 2),
            image_hw=(72, 136),
        )
        expected = run(scene, **options)
        cuda = {k: v.cuda() for k, v in scene.items()}
        run(cuda, **options)
        torch.cuda.set_sync_debug_mode('error')
        try:
            results = run(cuda, **options)
        finally:
            torch.cuda.set_sync_debug_mode('default')
        for a, b in zip(results, expected, strict=True):
            assert torch.equal(a.gt_idx.cpu(), b.gt_idx)
            torch.testing.assert_close(a.iou.cpu(), b.iou)
