"""Anchors, adaptive offsets, refinement between cascade stages: 89,523 priors, batch 2 and 16.

The five levels of an 800 x 1344 input (strides 4 to 64, anchor scale 8); images of different sizes
within it, so that validity and clipping differ. Deltas are ``[B, 4, h, w]`` per level, as a
convolution leaves them, drawn once; all tensors live on the device under test. Both sides end with
validity flags, refined boxes, and the offsets of the refined boxes as the deformable convolution of
the second stage takes them. The peer is mmdet's ``StageCascadeRPNHead`` (``get_anchors``,
``refine_bboxes``, ``anchor_offset``, and the permutation in ``AdaptiveConv.forward``).
"""

from functools import partial

import torch
from _case import Case, Floor, Sides
from mmdet.models.dense_heads import StageCascadeRPNHead

from mmdet_plugins.ops.cascade_geometry import (
    adaptive_offsets,
    decode_deltas,
    grid_anchors,
    valid_flags,
)

SIZES_HW = [(200, 336), (100, 168), (50, 84), (25, 42), (13, 21)]
STRIDES = [4, 8, 16, 32, 64]
STDS = (0.1, 0.1, 0.5, 0.5)


def _build(batch: int, device: str) -> Sides:
    rng = torch.Generator().manual_seed(0)
    deltas = [torch.randn(batch, 4, h, w, generator=rng).to(device) for h, w in SIZES_HW]
    shapes = [(800 - 40 * (i % 4), 1344 - 72 * (i % 5)) for i in range(batch)]
    shapes_tensor = torch.tensor(shapes, device=device)
    metas = [dict(img_shape=shape, pad_shape=shape) for shape in shapes]
    head = StageCascadeRPNHead(
        in_channels=8,
        feat_channels=8,
        anchor_generator=dict(type='AnchorGenerator', scales=[8], ratios=[1.0], strides=STRIDES),
        adapt_cfg=dict(type='dilation', dilation=3),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_means=(0.0,) * 4, target_stds=STDS),
    )

    def ours() -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        anchors = grid_anchors(SIZES_HW, STRIDES, 8, device)
        flags = valid_flags(SIZES_HW, STRIDES, shapes, device)
        flat = torch.cat([d.flatten(2) for d in deltas], dim=2).transpose(1, 2)
        boxes = decode_deltas(anchors, flat, STDS, max_shape_hw=shapes_tensor)
        return flags, boxes, adaptive_offsets(boxes, SIZES_HW, STRIDES)

    def peer() -> tuple[list, list, list[torch.Tensor]]:
        anchors, flags = head.get_anchors(SIZES_HW, metas, device=device)
        boxes = head.refine_bboxes(anchors, deltas, metas)
        offsets = head.anchor_offset(boxes, STRIDES, SIZES_HW)
        return (
            flags,
            boxes,
            [
                o.permute(0, 2, 1).reshape(batch, 18, h, w).contiguous()
                for o, (h, w) in zip(offsets, SIZES_HW, strict=True)
            ],
        )

    def parity(mine: tuple, theirs: tuple) -> str:
        flags, boxes, offsets = mine
        for i in range(batch):
            assert torch.equal(flags[i], torch.cat(theirs[0][i])), 'validity flags differ'
            torch.testing.assert_close(boxes[i], torch.cat(theirs[1][i]), rtol=1e-6, atol=1e-4)
        for (h, w), a, b in zip(SIZES_HW, offsets, theirs[2], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-4)
            assert a.shape == (batch, 18, h, w) and a.is_contiguous()
        exact = torch.equal(boxes, torch.stack([torch.cat(b) for b in theirs[1]]))
        exact &= all(map(torch.equal, offsets, theirs[2]))
        return f'flags equal, boxes and offsets {"bit for bit" if exact else "to 1e-4"}'

    return Sides(ours, peer, parity)


CASES = [
    Case('batch 2', partial(_build, 2), {'cpu': Floor(ratio=4)}),
    Case('batch 16', partial(_build, 16), {'cpu': Floor(ratio=4), 'cuda': Floor(ratio=20)}),
]
