"""SimOTA label assignment for several top-k at once, without a priors x objects tensor.

Shapes: P priors, G ground truths, C classes, K = max(topk). Boxes are ``x1 y1 x2 y2`` in pixels.

The assignment (Ge et al., "YOLOX", 2021, section 2.1; the ratio centre rule and the two top-k: Du et
al., "1st Place Solution for the UVO Challenge 2021", section on the detector). A prior is a candidate
if its point lies strictly inside any ground-truth box or any centre region. Every ground truth g then
claims its ``k_g`` cheapest candidates, where ``k_g = max(1, int(sum of its topk best IoUs))`` and

    cost = cls_weight * BCE(score, onehot(label_g)) - iou_weight * log(IoU + 1e-7),

candidates inside both the box and the centre region of g coming before all others. A prior that
several ground truths claim goes to the one, of all of them, whose cost is lowest.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_EPS = 1e-7
_OUTSIDE = 100000.0  # stock mmdet's surcharge for candidates outside the centre
_INDEX_BITS = 30
_INDEX_MASK = (1 << _INDEX_BITS) - 1
_NEVER = torch.iinfo(torch.int64).max


class SimOTAResult(NamedTuple):
    """The assignment of one image for one top-k.

    Attributes:
        gt_idx: Int64 ``[P]``, the ground truth of each prior, -1 for background.
        iou: Float32 ``[P]``, the IoU of the prior's box with it, 0 for background.
    """

    gt_idx: Tensor
    iou: Tensor


class _Priors(NamedTuple):
    """Priors by coordinate, so that a slice of each is contiguous.

    Attributes:
        point: ``[2, ...]`` x and y; NaN for a prior that takes no part.
        low, high: ``[2, ...]`` corners of the box.
        area: ``[...]``.
        reach: ``[2, ...]`` half sides of the centre region, or ``None`` if they belong to the box
            of the ground truth.
        cls_cost: ``[C, ...]`` weighted class cost, by class.
        index: ``[...]`` int64.
    """

    point: Tensor
    low: Tensor
    high: Tensor
    area: Tensor
    reach: Tensor | None
    cls_cost: Tensor
    index: Tensor


class _Gts(NamedTuple):
    """Ground truths by coordinate: ``[2, G]``, or ``[G]`` for area, label and forced prior."""

    low: Tensor
    high: Tensor
    area: Tensor
    centre: Tensor
    reach: Tensor | None
    label: Tensor
    forced: Tensor | None

    def take(self, rows: slice | Tensor) -> '_Gts':
        return _Gts(*(None if t is None else t[..., rows] for t in self))


def _sortable(cost: Tensor) -> Tensor:
    """Map float32 to int64 of the same order, within +-2**31."""
    bits = cost.contiguous().view(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()


def _class_cost(scores: Tensor, weight: float) -> Tensor:
    """Binary cross entropy against each one-hot label, summed over classes: ``[P, C] -> [C, P]``."""
    scores = scores.t()
    positive = scores.log().clamp_(min=-100).neg_()
    if scores.shape[0] > 1:
        negative = scores.neg().log1p_().clamp_(min=-100).neg_()
        positive += negative.sum(0) - negative
    return positive.mul_(weight)


def _inside(priors: _Priors, gts: _Gts) -> tuple[Tensor, Tensor]:
    """Whether the points lie strictly in the boxes and in the centre regions."""
    point = priors.point
    box = (point > gts.low) & (point < gts.high)
    reach = gts.reach if priors.reach is None else priors.reach
    centre = (point > gts.centre - reach) & (point < gts.centre + reach)
    return box[0] & box[1], centre[0] & centre[1]


def _overlap(priors: _Priors, gts: _Gts) -> Tensor:
    side = torch.minimum(priors.high, gts.high).sub_(torch.maximum(priors.low, gts.low))
    side.clamp_(min=0)
    return side[0] * side[1]


def _iou(priors: _Priors, gts: _Gts) -> Tensor:
    inter = _overlap(priors, gts)
    union = (priors.area + gts.area).sub_(inter).clamp_(min=1e-6)
    return inter.div_(union)


def _central(priors: _Priors, gts: _Gts) -> Tensor:
    box, centre = _inside(priors, gts)
    both = box & centre
    return both if gts.forced is None else both | (priors.index == gts.forced)


def dual_sim_ota(points_xy: Tensor,
                 boxes_xyxy: Tensor,
                 scores: Tensor,
                 gt_xyxy: Tensor,
                 *,
                 gt_labels: Tensor | None = None,
                 topk: Sequence[int] = (10, 20),
                 center_rule: str = 'ratio',
                 center_radius: float = 0.25,
                 strides: Tensor | None = None,
                 iou_weight: float = 3.0,
                 cls_weight: float = 1.0,
                 ensure_positive: bool = False,
                 valid: Tensor | None = None) -> tuple[SimOTAResult, ...]:
    """Draft."""
    P, G = points_xy.shape[0], gt_xyxy.shape[0]
    device = points_xy.device
    if P == 0 or G == 0:
        return tuple(
            SimOTAResult(
                torch.full((P,), -1, dtype=torch.long, device=device),
                torch.zeros(P, device=device)) for _ in topk)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        points, boxes, gt = points_xy.float(), boxes_xyxy.float(), gt_xyxy.float()
        scores = scores.float().reshape(P, -1)
        ok = boxes.isfinite().all(-1) & ~scores.isnan().any(-1)
        if valid is not None:
            ok &= valid
        point = torch.where(ok, points.t(), torch.nan)
        low, high = boxes.t()[:2].contiguous(), boxes.t()[2:].contiguous()
        reach = None
        if center_rule == 'stride':
            reach = (center_radius * strides.float().reshape(P, -1).expand(P, 2)).t().contiguous()
        priors = _Priors(point, low, high, (high[0] - low[0]) * (high[1] - low[1]), reach,
                         _class_cost(scores, cls_weight), torch.arange(P, device=device))
        glow, ghigh = gt.t()[:2].contiguous(), gt.t()[2:].contiguous()
        label = torch.zeros(G, dtype=torch.long, device=device) if gt_labels is None else gt_labels
        gts = _Gts(glow, ghigh, (ghigh[0] - glow[0]) * (ghigh[1] - glow[1]), (glow + ghigh) / 2,
                   center_radius * (ghigh - glow) if reach is None else None, label, None)
        return _assign(priors, gts, topk, iou_weight, center_rule == 'stride')


def _assign(priors, gts, topk, iou_weight, stock_ties):
    P, G = priors.area.numel(), gts.label.numel()
    device = priors.area.device
    K = min(max(topk), P)
    rows = max(1, (1 << 20) // P)
    candidate = torch.zeros(P, dtype=torch.bool, device=device)
    wide = _Priors(*(t if t is None else (t if n in ('area', 'index') else t[:, None])
                     for n, t in zip(_Priors._fields, priors)))
    col = lambda g: _Gts(*(t if t is None else t[..., None] for t in g))
    for s in range(0, G, rows):
        box, centre = _inside(wide, col(gts.take(slice(s, s + rows))))
        candidate |= (box | centre).any(0)
    ious, keys = [], []
    for s in range(0, G, rows):
        part = gts.take(slice(s, s + rows))
        g = col(part)
        iou = _iou(wide, g)
        iou = torch.where(candidate & (iou > 0), iou, 0)
        cost = priors.cls_cost[part.label] + (iou + _EPS).log_().mul_(-iou_weight)
        key = (_sortable(cost) << _INDEX_BITS) | priors.index
        key += (~_central(wide, g)).long() << 62
        key = torch.where(candidate & ~cost.isnan(), key, _NEVER)
        ious.append(iou.topk(K, dim=1)[0])
        keys.append(key.topk(K, dim=1, largest=False)[0])
    iou, key = torch.cat(ious), torch.cat(keys)

    prior = (key & _INDEX_MASK).clamp(max=P - 1)
    p = prior.flatten()
    owner = torch.empty_like(p)
    best = iou.new_empty(p.shape)
    step = max(1, (1 << 20) // G)
    own = torch.arange(G, device=device)
    for s in range(0, p.numel(), step):
        q = p[s:s + step]
        sub = _Priors(*(t if t is None else t[..., q, None] for t in priors))
        row = _Gts(*(t if t is None else (t if t.ndim == 1 else t[:, None]) for t in gts))
        v = _iou(sub, row)
        cost = priors.cls_cost[gts.label[None], q[:, None]] + (v + _EPS).log().mul_(-iou_weight)
        central = _central(sub, row)
        if stock_ties:
            k = (_sortable(cost + (~central) * _OUTSIDE) << _INDEX_BITS) | own
        else:
            k = ((_sortable(cost) << _INDEX_BITS) | own) + ((~central).long() << 62)
        owner[s:s + step] = torch.where(cost.isnan(), _NEVER, k).amin(1) & _INDEX_MASK
    claimant = own[:, None].expand(G, K).flatten()
    results = []
    for t in topk:
        k = iou.t()[:t].contiguous().sum(0).int().clamp(min=1)
        take = (torch.arange(K, device=device) < k[:, None]) & (key != _NEVER)
        take = take.flatten()
        slot = torch.where(take, p, P)
        count = torch.zeros(P + 1, dtype=torch.int32, device=device).index_add_(
            0, slot, torch.ones_like(slot, dtype=torch.int32))
        won = torch.where(count[slot] > 1, owner, claimant)
        gt_idx = torch.full((P + 1,), -1, dtype=torch.long, device=device)
        gt_idx = gt_idx.scatter_(0, slot, won)[:P]
        pair_p = _Priors(*(t if t is None else t[..., p] for t in priors))
        v = _iou(pair_p, gts.take(won))
        out = iou.new_zeros(P + 1).scatter_(0, slot, v)[:P]
        results.append(SimOTAResult(gt_idx, out))
    return tuple(results)
