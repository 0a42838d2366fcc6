"""From dense scores to proposals: top-k per level, decoding, NMS per level.

N images, P priors of all levels.
"""

from collections.abc import Callable, Sequence

import torch
from mmcv.ops import batched_nms
from mmengine.structures import InstanceData
from torch import Tensor


def top_per_level(
    scores: Tensor, level_sizes: Sequence[int], nms_pre: int
) -> tuple[Tensor, Tensor]:
    """Indices [N, K] of the ``nms_pre`` best priors of each level (all if <= 0), levels [K]."""
    indices, levels, start = [], [], 0
    for level, (chunk, size) in enumerate(
        zip(scores.split(list(level_sizes), dim=1), level_sizes, strict=True)
    ):
        k = min(nms_pre, size) if nms_pre > 0 else size
        indices.append(chunk.topk(k, dim=1).indices + start)
        levels.append(scores.new_full((k,), level, dtype=torch.long))
        start += size
    return torch.cat(indices, 1), torch.cat(levels)


def select_proposals(
    scores: Tensor, level_sizes: Sequence[int], decode: Callable[[Tensor], Tensor], cfg: dict
) -> list[InstanceData]:
    """Proposals of each image in the order of their score.

    Args:
        scores: [N, P].
        level_sizes: Priors per level, in the order of P.
        decode: Gives the boxes [N, K, 4] of the prior indices [N, K].
        cfg: ``nms_pre`` (per level), ``min_bbox_size`` (px, boxes must be larger; negative: any),
            ``nms`` (mmcv), ``max_per_img``.

    Returns:
        Per image ``bboxes`` [n, 4], ``scores`` [n], ``labels`` [n] (0).
    """
    indices, levels = top_per_level(scores, level_sizes, cfg.get('nms_pre', -1))
    proposals = []
    for boxes, box_scores in zip(decode(indices), scores.gather(1, indices), strict=True):
        box_levels = levels
        min_size = cfg.get('min_bbox_size', -1)
        if min_size >= 0:
            keep = (boxes[:, 2:] - boxes[:, :2] > min_size).all(1)
            boxes, box_scores, box_levels = boxes[keep], box_scores[keep], box_levels[keep]
        # mmcv's NMS per level raises without boxes.
        dets, _ = batched_nms(boxes, box_scores, box_levels, cfg['nms'] if len(boxes) else None)
        dets = dets[: cfg['max_per_img']]
        proposals.append(
            InstanceData(
                bboxes=dets[:, :4],
                scores=dets[:, 4],
                labels=dets.new_zeros(len(dets), dtype=torch.long),
            )
        )
    return proposals
