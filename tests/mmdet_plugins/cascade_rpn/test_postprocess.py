"""Top-k per level, NMS per level, filters: on boxes placed by hand."""

import torch

from mmdet_plugins.cascade_rpn.postprocess import select_proposals, top_per_level

CFG = dict(nms_pre=-1, min_bbox_size=0, nms=dict(type='nms', iou_threshold=0.8), max_per_img=100)


def test_top_per_level():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.3, 0.2], [0.7, 0.1, 0.2, 0.3, 0.8]])
    indices, levels = top_per_level(scores, [3, 2], 2)
    assert indices.tolist() == [[1, 2, 3, 4], [0, 2, 4, 3]]
    assert levels.tolist() == [0, 0, 1, 1]
    indices, levels = top_per_level(scores, [3, 2], -1)
    assert sorted(indices[0].tolist()) == [0, 1, 2, 3, 4]
    assert levels.tolist() == [0, 0, 0, 1, 1]


def select(boxes: list, scores: list, level_sizes: list, **changes):
    boxes = torch.tensor([boxes], dtype=torch.float32)
    return select_proposals(
        torch.tensor([scores]),
        level_sizes,
        lambda indices: boxes.gather(1, indices[..., None].expand(-1, -1, 4)),
        {**CFG, **changes},
    )[0]


def test_duplicates_fall_within_a_level_only():
    """IoU 0.81 and 0.79 with the first box, and its exact copy on the next level."""
    boxes = [[10, 20, 110, 40], [10, 20, 91, 40], [10, 20, 89, 40], [10, 20, 110, 40]]
    result = select(boxes, [0.9, 0.8, 0.7, 0.6], [3, 1])
    assert result.bboxes.tolist() == [boxes[0], boxes[2], boxes[3]]
    torch.testing.assert_close(result.scores, torch.tensor([0.9, 0.7, 0.6]))
    assert result.labels.tolist() == [0, 0, 0]


def test_boxes_without_extent_fall_out():
    boxes = [[5, 5, 5, 30], [5, 5, 30, 5], [5, 5, 30, 30]]
    assert select(boxes, [0.9, 0.8, 0.7], [3]).bboxes.tolist() == [boxes[2]]
    assert len(select(boxes, [0.9, 0.8, 0.7], [3], min_bbox_size=-1)) == 3
    nothing = select(boxes, [0.9, 0.8, 0.7], [3], min_bbox_size=50)
    assert nothing.bboxes.shape == (0, 4)
    assert nothing.scores.shape == (0,)
    assert nothing.labels.dtype == torch.long


def test_best_are_kept():
    boxes = [[40 * i, 0, 40 * i + 30, 20] for i in range(6)]
    result = select(boxes, [0.1, 0.6, 0.2, 0.5, 0.3, 0.4], [3, 3], max_per_img=3)
    assert [box[0] / 40 for box in result.bboxes.tolist()] == [1, 3, 5]
