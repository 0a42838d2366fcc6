"""Matrix NMS of 500, 1000 and 2000 masks at 200 x 304, of one class and of 80, IoU included.

Masks are ellipses on the device under test: an object for every eight of them, its sides
log-uniform from 3 to 30 % of the image's, each mask a jittered copy of one. Classes are drawn
unevenly, 11 % of the objects in the first. Both sides give scores, labels and masks of the best
100. The peer is mmdet's ``mask_matrix_nms``. In the last case the IoU is taken out: ours gets it
ready, the peer gets the same ellipses at 8 x 12 pixels, whose product takes next to nothing.
"""

from functools import partial

import torch
from _case import Case, Floor, Sides
from mmdet.models.layers import mask_matrix_nms

from mmdet_plugins.ops.matrix_nms import decay_scores, mask_iou, mask_nms

MAP_HW = (200, 304)
KEEP = 100


def _scene(num: int, num_classes: int, hw: tuple[int, int], device: str) -> tuple:
    rng = torch.Generator().manual_seed(0)
    objects = torch.rand(num // 8, 5, generator=rng)
    of = torch.randint(len(objects), (num,), generator=rng)
    drawn = objects[of, :4] + 0.02 * torch.randn(num, 4, generator=rng)
    centre, radius = drawn[:, :2], 0.03 * 10 ** drawn[:, 2:]
    axes = [(torch.arange(length) + 0.5) / length for length in hw]
    offsets = [
        (axis - centre[:, side, None]) / radius[:, side, None] for side, axis in enumerate(axes)
    ]
    masks = offsets[0][:, :, None] ** 2 + offsets[1][:, None] ** 2 < 1
    labels = (objects[of, 4] ** 2 * num_classes).long()
    scores = torch.rand(num, generator=rng)
    covers = masks.flatten(1).any(1)
    return tuple(x[covers].to(device) for x in (masks, labels, scores))


def _parity(ours: tuple, peer: tuple) -> str:
    torch.testing.assert_close(ours[0], peer[0], rtol=1e-6, atol=0)
    for a, b in zip(ours[1:], peer[1:], strict=True):
        assert torch.equal(a, b), 'labels, masks or indices differ'
    return f'labels, masks and indices of {len(ours[0])} equal, scores to 1e-6'


def _whole(num: int, num_classes: int, device: str) -> Sides:
    masks, labels, scores = _scene(num, num_classes, MAP_HW, device)

    def ours() -> tuple:
        scored, classes, keep = mask_nms(masks, scores, labels, max_num=KEEP)
        return scored, classes, masks[keep], keep

    return Sides(ours, lambda: mask_matrix_nms(masks, labels, scores, max_num=KEEP), _parity)


def _decay(num: int, device: str) -> Sides:
    masks, labels, scores = _scene(num, 1, (8, 12), device)
    scores = scores.sort(descending=True).values
    iou = mask_iou(masks)

    def parity(mine: tuple, theirs: tuple) -> str:
        found = mine[0].sort(descending=True).values
        torch.testing.assert_close(found, theirs[0], rtol=1e-6, atol=0)
        return f'{len(found)} scores to 1e-6'

    return Sides(
        lambda: decay_scores(iou, scores), lambda: mask_matrix_nms(masks, labels, scores), parity
    )


FLOORS = {'cpu': Floor(ratio=6), 'cuda': Floor(ratio=5)}
CASES = [
    Case(f'{num} masks, {name}', partial(_whole, num, count), FLOORS)
    for num in (500, 1000, 2000)
    for name, count in (('one class', 1), ('80 classes', 80))
] + [Case('decay alone, 500 masks', partial(_decay, 500))]
