"""SimOTA label assignment for several top-k in one pass, without a priors x objects tensor.

Shapes: P priors, G ground truths, C classes, K = max(topk). Boxes are ``x1 y1 x2 y2`` in pixels.

SimOTA is section 2.1 of Ge et al., "YOLOX: Exceeding YOLO Series in 2021"; the centre region in
proportion to the object and the two values of top-k are those of Du et al., "1st Place Solutions
for UVO Challenge 2021". A prior is a *candidate* if its point lies strictly inside any ground-truth
box or any centre region, and *central* to one ground truth if it lies in both of these. Each ground
truth claims its ``k`` best candidates, ``k = max(1, int(sum of its topk highest IoUs))``, central
ones first, then by

    cost = cls_weight * BCE(score, onehot(label)) - iou_weight * log(IoU + 1e-7).

A prior claimed more than once goes to the ground truth, of all of them, that it costs least.

On the CPU, blocks of consecutive priors that lie apart from a ground truth are never compared with
it. Elsewhere every shape is static: no value is read back to the host.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_EPS = 1e-7
_STOCK_INF = 100000.0
_BLOCK = 64
_BUDGET = 1 << 17  # pairs compared at a time on the CPU: what stays in its caches
_BUDGET_DEVICE = 1 << 23

# A pair's rank is one int64: not central (1 bit), cost (32), index of the prior or of the ground
# truth (30), so that ranks are unique and the lowest index wins a tie on every device.
_INDEX_BITS = 30
_INDEX_MASK = (1 << _INDEX_BITS) - 1
_NOT_CENTRAL = 1 << 62
_NEVER = torch.iinfo(torch.int64).max


class SimOTAResult(NamedTuple):
    """The assignment of one image for one top-k.

    Attributes:
        gt_idx: Int64 ``[P]``, the ground truth of each prior, -1 for background.
        iou: Float32 ``[P]``, the IoU of the prior's box with it, 0 for background.
    """

    gt_idx: Tensor
    iou: Tensor


def dual_sim_ota(
    points_xy: Tensor,
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
    image_hw: tuple[int, int] | None = None,
    valid: Tensor | None = None,
) -> tuple[SimOTAResult, ...]:
    """Assign priors to ground truths by SimOTA, once for each top-k, from one pass over the pairs.

    With ``center_rule='stride'`` the result is that of mmdet's ``SimOTAAssigner``; where its
    ``cost + 100000`` rounds candidates outside the centre to a tie, they go by cost. With
    ``'ratio'`` it is that of the UVO winner's release, except outside the centre, where ``cost +
    1e8`` in float32 leaves the release's order to chance and this one goes by cost.

    Of priors that tie, a ground truth claims the one of lowest index; of ground truths that tie for
    a prior, the one of lowest index gets it.

    Args:
        points_xy: ``[P, 2]`` points that are tested against boxes and centre regions.
        boxes_xyxy: ``[P, 4]`` boxes whose IoU with the ground truth counts.
        scores: ``[P]`` or ``[P, C]`` probabilities in ``[0, 1]``.
        gt_xyxy: ``[G, 4]``.
        gt_labels: ``[G]`` classes in ``0 .. C-1``; all 0 by default.
        topk: How many of the highest IoUs are summed into k; one result for each.
        center_rule: ``'ratio'``: the region reaches ``center_radius`` times the width and height of
            the ground truth from its centre; ``'stride'``: ``center_radius`` times the prior's
            stride.
        center_radius: See ``center_rule``.
        strides: ``[P]``, or ``[P, 2]`` for x and y; for ``'stride'`` only.
        iou_weight: Weight of ``-log(IoU)``, not negative.
        cls_weight: Weight of the class cost, not negative.
        ensure_positive: A deviation from SimOTA, under which a small object between the points may
            claim nothing or something far away: a ground truth of positive area with no central
            prior takes the prior of highest GIoU as central. Every such ground truth then has a
            positive unless another one outbids it for all its claims.
        image_hw: With ``ensure_positive``, leave ground truths outside an image of this size alone.
        valid: ``[P]`` bool, priors that take part; all by default. A prior whose point, box or
            score is not finite never does.

    Returns:
        One :class:`SimOTAResult` for each entry of ``topk``, on the device of the points. Computed
        in float32 whatever the input; no gradient.

    Raises:
        ValueError: Sizes do not fit each other, or strides are missing.
    """
    _check(points_xy, boxes_xyxy, scores, gt_xyxy, gt_labels, topk, center_rule, strides)
    num_priors, num_gts = points_xy.shape[0], gt_xyxy.shape[0]
    device = points_xy.device
    if num_priors == 0 or num_gts == 0:
        return tuple(
            SimOTAResult(
                torch.full((num_priors,), -1, dtype=torch.long, device=device),
                torch.zeros(num_priors, device=device),
            )
            for _ in topk
        )
    with torch.no_grad():
        cls_cost = _class_cost(scores.float().reshape(num_priors, -1), cls_weight)
        priors = _priors(points_xy.float(), boxes_xyxy.float(), cls_cost, valid)
        gts = _ground_truths(gt_xyxy.float(), gt_labels)
        if center_rule == 'ratio':
            gts = gts._replace(reach=center_radius * (gts.high - gts.low))
        else:
            reach = center_radius * strides.float().reshape(num_priors, -1).expand(-1, 2)
            priors = priors._replace(reach=reach.t().contiguous())
        on_cpu = device.type == 'cpu'
        candidate, has_central = (_find_blockwise if on_cpu else _find)(priors, gts)
        if ensure_positive:
            wanted = ~has_central & _is_inside(gts, image_hw)
            gts = gts._replace(forced=_best_giou(priors, gts, wanted))
            # -1, of ground truths that need none, falls on a slot of its own.
            slot = gts.forced.remainder(num_priors + 1)
            candidate = F.pad(candidate, (0, 1)).index_fill_(0, slot, True)[:num_priors]
        rank = _rank_blockwise if on_cpu else _rank
        tops = rank(
            priors._replace(index=priors.index.where(candidate, -1)),
            gts,
            cls_cost,
            max(topk),
            iou_weight,
        )
        return _match(priors, gts, cls_cost, *tops, topk, iou_weight, center_rule == 'stride')


def _check(
    points: Tensor,
    boxes: Tensor,
    scores: Tensor,
    gt: Tensor,
    labels: Tensor | None,
    topk: Sequence[int],
    rule: str,
    strides: Tensor | None,
) -> None:
    num = points.shape[0]
    if points.shape != (num, 2) or boxes.shape != (num, 4) or scores.shape[:1] != (num,):
        raise ValueError(
            'points_xy must be [P, 2], boxes_xyxy [P, 4], scores [P] or [P, C]; got '
            f'{tuple(points.shape)}, {tuple(boxes.shape)}, {tuple(scores.shape)}'
        )
    if gt.ndim != 2 or gt.shape[1] != 4:
        raise ValueError(f'gt_xyxy must be [G, 4], got {tuple(gt.shape)}')
    if labels is not None and labels.shape != gt.shape[:1]:
        raise ValueError(f'gt_labels must be [{gt.shape[0]}], got {tuple(labels.shape)}')
    if not topk or min(topk) < 1:
        raise ValueError(f'topk must name one positive number or more, got {tuple(topk)}')
    if rule not in ('ratio', 'stride'):
        raise ValueError(f"center_rule must be 'ratio' or 'stride', got {rule!r}")
    if rule == 'stride' and (strides is None or strides.shape[:1] != (num,)):
        raise ValueError("center_rule='stride' needs strides, one (or one pair) per prior")
    if max(num, gt.shape[0]) > _INDEX_MASK:
        raise ValueError(f'more than {_INDEX_MASK} priors or ground truths')


class _Priors(NamedTuple):
    """Priors by coordinate: ``[2, ...]``, or ``[...]`` for area and index.

    ``point`` is NaN for priors that take no part, ``index`` -1 for those that are no candidates;
    ``reach`` is half of the centre region where that belongs to the prior.
    """

    point: Tensor
    low: Tensor
    high: Tensor
    area: Tensor
    index: Tensor
    reach: Tensor | None

    def map(self, fn) -> '_Priors':
        return _Priors(*(None if t is None else fn(t) for t in self))


class _GroundTruths(NamedTuple):
    """Ground truths by coordinate: ``[2, ...]``, or ``[...]`` for area, label, index and forced.

    Coordinates are NaN where one of a box is not finite. ``forced`` is the prior that counts as
    central whatever its point, or -1; ``reach`` as in :class:`_Priors`.
    """

    low: Tensor
    high: Tensor
    centre: Tensor
    area: Tensor
    label: Tensor
    index: Tensor
    reach: Tensor | None
    forced: Tensor | None

    def map(self, fn) -> '_GroundTruths':
        return _GroundTruths(*(None if t is None else fn(t) for t in self))

    def column(self, rows: slice | Tensor = slice(None)) -> '_GroundTruths':
        """Some of them, to be compared with a row of priors."""
        return self.map(lambda t: t[..., rows, None])


def _class_cost(scores: Tensor, weight: float) -> Tensor:
    """Weighted binary cross entropy of ``[P, C]`` with each one-hot label: ``[C, P]``.

    Each logarithm is at least -100, as in torch. The sum over classes is formed once, not per pair.
    """
    scores = scores.t()
    cost = scores.log().clamp_(min=-100).neg_()
    if scores.shape[0] > 1:
        negative = scores.neg().log1p_().clamp_(min=-100).neg_()
        cost += negative.sum(0) - negative
    return cost.mul_(weight)


def _priors(points: Tensor, boxes: Tensor, cls_cost: Tensor, valid: Tensor | None) -> _Priors:
    usable = boxes.isfinite().all(1) & cls_cost.isfinite().all(0)
    if valid is not None:
        usable &= valid
    low, high = boxes.t().contiguous().split(2)
    return _Priors(
        point=torch.where(usable, points.t(), torch.nan),
        low=low,
        high=high,
        area=(high - low).prod(0),
        index=torch.arange(points.shape[0], device=points.device),
        reach=None,
    )


def _ground_truths(gt: Tensor, labels: Tensor | None) -> _GroundTruths:
    gt = torch.where(gt.isfinite().all(1, keepdim=True), gt, torch.nan)
    low, high = gt.t().contiguous().split(2)
    index = torch.arange(gt.shape[0], device=gt.device)
    return _GroundTruths(
        low=low,
        high=high,
        centre=(low + high) / 2,
        area=(high - low).prod(0),
        label=torch.zeros_like(index) if labels is None else labels.long(),
        index=index,
        reach=None,
        forced=None,
    )


def _inside(priors: _Priors, gts: _GroundTruths) -> tuple[Tensor, Tensor]:
    """Whether points lie strictly in the boxes, and strictly in the centre regions."""
    point = priors.point
    reach = gts.reach if priors.reach is None else priors.reach
    box = (point > gts.low) & (point < gts.high)
    centre = (point > gts.centre - reach) & (point < gts.centre + reach)
    return box[0] & box[1], centre[0] & centre[1]


def _central(priors: _Priors, gts: _GroundTruths) -> Tensor:
    box, centre = _inside(priors, gts)
    box &= centre
    return box if gts.forced is None else box.logical_or_(priors.index == gts.forced)


def _overlap(priors: _Priors, gts: _GroundTruths) -> tuple[Tensor, Tensor]:
    """Intersection and union, in the order of operations of mmdet's ``bbox_overlaps``."""
    side = torch.minimum(priors.high, gts.high).sub_(torch.maximum(priors.low, gts.low))
    side.clamp_(min=0)
    inter = side[0] * side[1]
    return inter, (priors.area + gts.area).sub_(inter).clamp_(min=1e-6)


def _iou(priors: _Priors, gts: _GroundTruths) -> Tensor:
    inter, union = _overlap(priors, gts)
    return inter.div_(union)


def _cost(iou: Tensor, cls_cost: Tensor, iou_weight: float) -> Tensor:
    return (iou + _EPS).log_().mul_(-iou_weight).add_(cls_cost)


def _sortable(cost: Tensor) -> Tensor:
    """Float32, which is overwritten, as int64 of the same order, with room for an index below."""
    bits = cost.view(torch.int32)
    bits ^= (bits >> 31).bitwise_and_(0x7FFFFFFF)
    return bits.long().bitwise_left_shift_(_INDEX_BITS)


def _batches(num_gts: int, num_priors: int, device: torch.device) -> Iterator[slice]:
    """Rows of ground truths, such that one batch against all priors keeps to the budget."""
    budget = _BUDGET if device.type == 'cpu' else _BUDGET_DEVICE
    count = min(num_gts, -(-num_gts * num_priors // budget))
    step = -(-num_gts // count)
    for start in range(0, num_gts, step):
        yield slice(start, min(start + step, num_gts))


def _find(priors: _Priors, gts: _GroundTruths) -> tuple[Tensor, Tensor]:
    """Which priors are candidates ``[P]``, and which ground truths have a central one ``[G]``."""
    candidate = torch.zeros_like(priors.index, dtype=torch.bool)
    has_central = torch.zeros_like(gts.index, dtype=torch.bool)
    row = priors.map(lambda t: t.unsqueeze(-2))
    for rows in _batches(gts.index.numel(), priors.index.numel(), priors.index.device):
        box, centre = _inside(row, gts.column(rows))
        candidate |= (box | centre).any(0)
        has_central[rows] = (box & centre).any(1)
    return candidate, has_central


def _rank(
    priors: _Priors, gts: _GroundTruths, cls_cost: Tensor, k: int, iou_weight: float
) -> tuple[Tensor, Tensor]:
    """The k highest IoUs ``[G, k]``, descending, and the k first ranks ``[G, k]`` of candidates."""
    row = priors.map(lambda t: t.unsqueeze(-2))
    tops = [
        _top(row, gts.column(rows), cls_cost[gts.label[rows]], k, iou_weight)
        for rows in _batches(gts.index.numel(), priors.index.numel(), priors.index.device)
    ]
    return torch.cat([t[0] for t in tops]), torch.cat([t[1] for t in tops])


def _top(
    priors: _Priors, gts: _GroundTruths, cls_cost: Tensor, k: int, iou_weight: float
) -> tuple[Tensor, Tensor]:
    out = priors.index < 0
    iou = _iou(priors, gts)
    rank = _sortable(_cost(iou, cls_cost, iou_weight)).bitwise_or_(priors.index)
    rank = torch.where(_central(priors, gts), rank, rank + _NOT_CENTRAL).masked_fill_(out, _NEVER)
    size = min(k, rank.shape[1])
    top_iou = iou.new_zeros(iou.shape[0], k)
    top_iou[:, :size] = iou.masked_fill_(out, 0).topk(size)[0]
    top_rank = rank.new_full(top_iou.shape, _NEVER)
    top_rank[:, :size] = rank.topk(size, largest=False)[0]
    return top_iou, top_rank.masked_fill_(gts.area.isnan(), _NEVER)


def _is_inside(gts: _GroundTruths, image_hw: tuple[int, int] | None) -> Tensor:
    inside = (gts.high > gts.low).all(0)
    if image_hw is not None:
        inside &= (gts.low[0] < image_hw[1]) & (gts.low[1] < image_hw[0]) & (gts.high > 0).all(0)
    return inside


def _best_giou(priors: _Priors, gts: _GroundTruths, wanted: Tensor) -> Tensor:
    """The prior of highest GIoU for each wanted ground truth, -1 for others: ``[G]``."""
    best = torch.full_like(gts.index, -1)
    if wanted.device.type == 'cpu':
        gts = gts.map(lambda t: t[..., wanted])
        if gts.index.numel() == 0:
            return best
    row = priors.map(lambda t: t.unsqueeze(-2))
    for rows in _batches(gts.index.numel(), priors.index.numel(), best.device):
        some = gts.column(rows)
        inter, union = _overlap(row, some)
        hull = (torch.maximum(row.high, some.high) - torch.minimum(row.low, some.low)).prod(0)
        gap = (hull - union) / hull.clamp(min=1e-6)
        rank = _sortable(gap - inter / union).bitwise_or_(row.index)
        rank = rank.masked_fill_(row.point.isnan().any(0), _NEVER).amin(1)
        index = gts.index[rows]
        best[index] = (rank & _INDEX_MASK).where(wanted[index] & (rank != _NEVER), -1)
    return best


class _Blocks:
    """Priors in blocks of consecutive ones, each with the bounds of all it holds.

    One block more, of priors that take no part, stands in where a row needs filling up.
    """

    def __init__(self, priors: _Priors, low: Tensor, high: Tensor) -> None:
        num = priors.index.numel()
        self.num = -(-num // _BLOCK)
        self.missing = (self.num + 1) * _BLOCK - num
        self.priors = priors.map(self.cut)._replace(
            point=self.cut(priors.point, torch.nan), index=self.cut(priors.index, -1)
        )
        out = priors.point.isnan()
        self.low = self.cut(low.masked_fill(out, torch.inf), torch.inf)[:, : self.num].amin(2)
        self.high = self.cut(high.masked_fill(out, -torch.inf), -torch.inf)[:, : self.num].amax(2)

    def cut(self, values: Tensor, fill: float = 0) -> Tensor:
        """``[..., P]`` to ``[..., blocks, size]``."""
        return F.pad(values, (0, self.missing), value=fill).unflatten(-1, (-1, _BLOCK))

    def near(self, low: Tensor, high: Tensor) -> Tensor:
        """Blocks whose bounds touch the regions ``[2, G]``: bool ``[G, blocks]``."""
        touch = (self.low[:, None] <= high[..., None]) & (self.high[:, None] >= low[..., None])
        return touch[0] & touch[1]

    def batches(self, near: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Ground truths ``[g]`` with similar numbers of near blocks, and these ``[g, b]``."""
        counts, order = near.sum(1).sort(descending=True)
        counts, start = counts.tolist(), 0
        ids = torch.arange(self.num)
        while start < len(counts) and counts[start]:
            rows = order[start : start + max(1, _BUDGET // (counts[start] * _BLOCK))]
            blocks = ids.where(near[rows], self.num).sort(1)[0][:, : counts[start]]
            yield rows, blocks
            start += len(rows)

    @staticmethod
    def gather(values: Tensor, blocks: Tensor) -> Tensor:
        """``[..., blocks, size]`` to ``[..., g, b * size]``."""
        taken = values.index_select(-2, blocks.flatten())
        return taken.view(*values.shape[:-2], blocks.shape[0], -1)


def _find_blockwise(priors: _Priors, gts: _GroundTruths) -> tuple[Tensor, Tensor]:
    """:func:`_find`, skipping blocks that lie apart from a ground truth."""
    low = high = priors.point
    if priors.reach is not None:
        # A little wider than the exact test, whose rounding differs.
        reach = priors.reach * 1.01 + priors.point.abs() * 1e-6
        low, high = low - reach, high + reach
    reach = 0 if gts.reach is None else gts.reach
    blocks = _Blocks(priors, low, high)
    near = blocks.near(
        torch.minimum(gts.low, gts.centre - reach), torch.maximum(gts.high, gts.centre + reach)
    )
    candidate = torch.zeros_like(priors.index, dtype=torch.bool)
    has_central = torch.zeros_like(gts.index, dtype=torch.bool)
    unused = dict(low=None, high=None, area=None)
    for rows, ids in blocks.batches(near):
        some = blocks.priors._replace(**unused).map(lambda t, ids=ids: blocks.gather(t, ids))
        box, centre = _inside(some, gts.column(rows))
        has_central[rows] = (box & centre).any(1)
        candidate[some.index[box | centre]] = True
    return candidate, has_central


def _rank_blockwise(
    priors: _Priors, gts: _GroundTruths, cls_cost: Tensor, k: int, iou_weight: float
) -> tuple[Tensor, Tensor]:
    """:func:`_rank`, skipping blocks that lie apart from a ground truth.

    What is skipped has an IoU of 0 and is not central. It can matter only to a ground truth that
    has to fill up its claims with worse than that; those few are ranked against all candidates.
    """
    num_gts = gts.index.numel()
    top_iou = priors.area.new_zeros(num_gts, k)
    top_rank = priors.index.new_full((num_gts, k), _NEVER)
    chosen = (priors.index >= 0).nonzero().squeeze(1)
    if chosen.numel() == 0:
        return top_iou, top_rank
    priors, cls_cost = priors.map(lambda t: t[..., chosen]), cls_cost[:, chosen]
    blocks = _Blocks(
        priors, torch.minimum(priors.low, priors.point), torch.maximum(priors.high, priors.point)
    )
    near = blocks.near(gts.low, gts.high)
    if gts.forced is not None:
        at = torch.searchsorted(chosen, gts.forced).div_(_BLOCK, rounding_mode='floor')
        near[gts.index, at] |= gts.forced >= 0
    cut_cost = blocks.cut(cls_cost)
    for rows, ids in blocks.batches(near):
        some = blocks.priors.map(lambda t, ids=ids: blocks.gather(t, ids))
        if cls_cost.shape[0] == 1:
            cost = blocks.gather(cut_cost, ids)[0]
        else:
            cost = cut_cost[gts.label[rows, None], ids].flatten(1)
        top_iou[rows], top_rank[rows] = _top(some, gts.column(rows), cost, k, iou_weight)
    skipped = _sortable(_cost(top_iou.new_zeros(1), 0, iou_weight)) + _NOT_CENTRAL
    last = _dynamic_k(top_iou, k).clamp_(max=k) - 1
    short = (top_rank.gather(1, last[:, None])[:, 0] >= skipped).nonzero().squeeze(1)
    if short.numel():
        top_iou[short], top_rank[short] = _rank(
            priors, gts.map(lambda t: t[..., short]), cls_cost, k, iou_weight
        )
    return top_iou, top_rank


def _dynamic_k(top_iou: Tensor, k: int) -> Tensor:
    # Summed over rows, as mmdet lays it out: near an integer the order of additions decides.
    return top_iou.t()[:k].contiguous().sum(0).int().clamp_(min=1).long()


def _match(
    priors: _Priors,
    gts: _GroundTruths,
    cls_cost: Tensor,
    top_iou: Tensor,
    top_rank: Tensor,
    topk: Sequence[int],
    iou_weight: float,
    stock_ties: bool,
) -> tuple[SimOTAResult, ...]:
    """Claims ``[G, K]`` for each top-k, contested ones settled."""
    num_priors, (num_gts, width) = priors.index.numel(), top_rank.shape
    counts = torch.stack([_dynamic_k(top_iou, k) for k in topk])
    claimed = torch.arange(width, device=counts.device) < counts[..., None]
    claimed = (claimed & (top_rank != _NEVER)).flatten(1)  # [T, G*K]
    prior = (top_rank & _INDEX_MASK).flatten().clamp_(max=num_priors - 1)
    claimant = gts.index[:, None].expand(num_gts, width).flatten()
    # Slot P collects what is not claimed.
    slot = prior.where(claimed, num_priors)
    claims = torch.zeros(len(topk), num_priors + 1, dtype=torch.int32, device=slot.device)
    claims.scatter_add_(1, slot, torch.ones_like(slot, dtype=torch.int32))
    contested = claimed & (claims.gather(1, slot) > 1)
    owner = _cheapest(priors, gts, cls_cost, prior, contested.any(0), iou_weight, stock_ties)
    winner = torch.where(contested, owner, claimant)
    iou = _iou(priors.map(lambda t: t[..., prior].unsqueeze(-2)), gts.map(lambda t: t[..., winner]))
    gt_idx = torch.full_like(claims, -1, dtype=torch.long).scatter_(1, slot, winner)
    iou = torch.zeros_like(claims, dtype=iou.dtype).scatter_(1, slot, iou)
    return tuple(
        SimOTAResult(*row) for row in zip(gt_idx[:, :num_priors], iou[:, :num_priors], strict=True)
    )


def _cheapest(
    priors: _Priors,
    gts: _GroundTruths,
    cls_cost: Tensor,
    prior: Tensor,
    wanted: Tensor,
    iou_weight: float,
    stock_ties: bool,
) -> Tensor:
    """The ground truth that costs each of the priors ``[M]`` least; 0 where it is not wanted."""
    best = torch.zeros_like(prior)
    on_cpu = prior.device.type == 'cpu'
    which = wanted.nonzero().squeeze(1) if on_cpu else torch.arange(len(prior), device=prior.device)
    row = gts.map(lambda t: t.unsqueeze(-2))
    for part in which.split(max(1, (_BUDGET if on_cpu else _BUDGET_DEVICE) // gts.index.numel())):
        index = prior[part, None]
        some = priors.map(lambda t, index=index: t[..., index])
        cost = _cost(_iou(some, row), cls_cost[row.label, index], iou_weight)
        central = _central(some, row)
        if stock_ties:
            rank = _sortable(cost.add_(~central * _STOCK_INF))
        else:
            rank = _sortable(cost).add_((~central).long(), alpha=_NOT_CENTRAL)
        rank = (rank | row.index).masked_fill_(row.area.isnan(), _NEVER)
        best[part] = rank.amin(1) & _INDEX_MASK
    return best
