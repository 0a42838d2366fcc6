"""SOLOv2 post-processing as in ``solo_masks``, but to the COCO RLE that evaluation reads.

The peer's masks go to the host and through mmdet's ``encode_mask_results``, as in its
``CocoMetric``. The second case is the encoding of the 100 masks alone, from the layout in which
each side's interpolation leaves them: ours the columns of the masks' boxes (on CUDA of whole
masks), the peer's a bool tensor.
"""

import torch
from _case import Case, Floor, Sides
from mmdet.structures.mask import encode_mask_results
from solo_masks import FRAME, build_scene, compare, ours, peer, stock_head

from mmdet_plugins.ops.rle import column_buffer, decode_rle, encode_columns


def _encode(masks: torch.Tensor) -> list[dict]:
    return encode_mask_results(masks.cpu().numpy())


def _whole(device: str) -> Sides:
    scene, head = build_scene(device), stock_head()

    def stock() -> tuple:
        result = peer(head, scene)
        return result, _encode(result.masks)

    def parity(mine: tuple, theirs: tuple) -> str:
        masks = torch.from_numpy(decode_rle(mine[1].masks)).to(device)
        return compare(mine[0], masks, theirs[0])

    return Sides(lambda: ours(scene, rle=True), stock, parity)


def _stage(device: str) -> Sides:
    found = ours(build_scene(device), rle=False)[1]
    masks, boxes = found.masks, found.boxes_xyxy.long().tolist()
    if device != 'cpu':  # there, masks are interpolated whole
        boxes = [(0, 0, *FRAME.original_hw[::-1])] * len(masks)
    shapes, offsets = [(y2 - y1, x2 - x1) for x1, y1, x2, y2 in boxes], [box[:2] for box in boxes]
    buffer, views = column_buffer(shapes, device)
    for view, mask, (x1, y1, x2, y2) in zip(views, masks, boxes, strict=True):
        view.copy_(mask[y1:y2, x1:x2].T)

    def parity(mine: list, theirs: list) -> str:
        theirs = [rle | {'counts': rle['counts'].decode()} for rle in theirs]
        assert mine == theirs, 'encodings differ'
        return f'{len(mine)} encodings equal'

    return Sides(
        lambda: encode_columns(buffer, shapes, offsets, FRAME.original_hw),
        lambda: _encode(masks),
        parity,
    )


CASES = [
    Case('500 candidates to 100 encodings', _whole, {'cpu': Floor(6), 'cuda': Floor(20)}),
    Case('encoding alone, 100 masks', _stage, {'cpu': Floor(10), 'cuda': Floor(20)}),
]
