"""Both assignments of both cascade stages of one image: 89,523 priors x 50 objects, stride mode.

Priors are the five levels of an 800 x 1344 input (strides 4 to 64, anchor scale 8, one class);
objects have log-uniform sides of 16 to 400 px. Stage one compares the anchors themselves, stage
two anchors that were shifted and scaled at random, as a first stage leaves them. All tensors live
on the device under test. The peer is mmdet's ``SimOTAAssigner``, called with top-k 10 and 20 at
each stage.
"""

import torch
from _case import Case, Floor, Sides
from mmdet.models.task_modules.assigners import SimOTAAssigner
from mmengine.structures import InstanceData

from mmdet_plugins.ops.cascade_geometry import grid_anchors
from mmdet_plugins.ops.sim_ota import dual_sim_ota

SIZES_HW = [(200, 336), (100, 168), (50, 84), (25, 42), (13, 21)]
STRIDES = [4, 8, 16, 32, 64]
IMAGE_HW = (800, 1344)
NUM_OBJECTS = 50
TOPK = (10, 20)
RADIUS = 2.5


def _build(device: str) -> Sides:
    rng = torch.Generator().manual_seed(0)
    anchors = grid_anchors(SIZES_HW, STRIDES, 8)
    num = anchors.shape[0]
    strides = torch.cat(
        [torch.full((h * w,), float(s)) for (h, w), s in zip(SIZES_HW, STRIDES, strict=True)]
    )
    points = (anchors[:, :2] + anchors[:, 2:]) / 2
    centre = points + torch.randn(num, 2, generator=rng) * strides[:, None]
    half = 4 * strides[:, None] * torch.exp(torch.randn(num, 2, generator=rng) * 0.5)
    refined = torch.cat([centre - half, centre + half], dim=1)
    side = 16 * 25 ** torch.rand(NUM_OBJECTS, 2, generator=rng)
    middle = torch.rand(NUM_OBJECTS, 2, generator=rng) * torch.tensor(IMAGE_HW[::-1])
    gt = torch.cat([middle - side / 2, middle + side / 2], dim=1)
    scores = [torch.rand(num, 1, generator=rng) for _ in range(2)]

    points, strides, gt = points.to(device), strides.to(device), gt.to(device)
    stages = [(b.to(device), s.to(device)) for b, s in zip((anchors, refined), scores, strict=True)]
    labels = torch.zeros(NUM_OBJECTS, dtype=torch.long, device=device)
    priors = torch.cat([points, strides[:, None], strides[:, None]], dim=1)
    assigners = [SimOTAAssigner(RADIUS, candidate_topk=k) for k in TOPK]

    def ours() -> list:
        return [
            result
            for boxes, score in stages
            for result in dual_sim_ota(
                points,
                boxes,
                score,
                gt,
                topk=TOPK,
                center_rule='stride',
                center_radius=RADIUS,
                strides=strides,
            )
        ]

    def peer() -> list:
        return [
            assigner.assign(
                InstanceData(priors=priors, bboxes=boxes, scores=score),
                InstanceData(bboxes=gt, labels=labels),
            )
            for boxes, score in stages
            for assigner in assigners
        ]

    def parity(mine: list, theirs: list) -> str:
        positives = []
        for a, b in zip(mine, theirs, strict=True):
            assert torch.equal(a.gt_idx, b.gt_inds - 1), 'assignments differ'
            positive = a.gt_idx >= 0
            torch.testing.assert_close(a.iou[positive], b.max_overlaps[positive], rtol=1e-6, atol=0)
            positives.append(int(positive.sum()))
        return f'all four assignments equal ({positives} positives), IoU to 1e-6'

    return Sides(ours, peer, parity)


FLOORS = {'cpu': Floor(ratio=5, memory=1 / 10), 'cuda': Floor(ratio=12, syncs=0)}
CASES = [Case('two stages, top-k 10 and 20', _build, FLOORS)]
