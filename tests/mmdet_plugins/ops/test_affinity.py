"""Colour affinity against scikit-image's numbers, hand-made cases, and mmdet's BoxInst."""

import math
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmdet.models.dense_heads.boxinst_head import BoxInstMaskHead
from mmdet.models.utils.misc import unfold_wo_center

from mmdet_plugins.ops.affinity import (
    color_affinity,
    pairwise_affinity_loss,
    rgb_to_lab,
)
from mmdet_plugins.ops.instance_masks import mask_boxes

# The centre-less 3 x 3 neighbourhood of unfold, row by row, as bits of the affinity.
BITS_OF_UNFOLD = (7, 6, 5, 4, 0, 1, 2, 3)


def test_lab_of_known_colours():
    """White, black and primaries as CIE tables and scikit-image have them."""
    colours = dict(
        white=((255, 255, 255), (100.0, -0.00245, 0.00465)),
        black=((0, 0, 0), (0.0, 0.0, 0.0)),
        red=((255, 0, 0), (53.2406, 80.0923, 67.2032)),
        green=((0, 255, 0), (87.7351, -86.1830, 83.1797)),
        blue=((0, 0, 255), (32.2957, 79.1856, -107.8573)),
        dark=((10, 20, 30), (5.9485, -0.6693, -8.1364)),
    )
    images = torch.tensor([rgb for rgb, _ in colours.values()], dtype=torch.uint8).T[:, :, None]
    expected = torch.tensor([lab for _, lab in colours.values()]).T[:, :, None]
    torch.testing.assert_close(rgb_to_lab(images), expected, rtol=0, atol=1e-3)


def lab_by_definition(image: np.ndarray) -> np.ndarray:
    """sRGB uint8 [H, W, 3] to Lab in float64, as CIE and IEC 61966-2-1 write it."""
    value = image / 255
    linear = np.where(value > 0.04045, ((value + 0.055) / 1.055) ** 2.4, value / 12.92)
    to_xyz = [[0.412453, 0.35758, 0.180423], [0.212671, 0.71516, 0.072169],
              [0.019334, 0.119193, 0.950227]]  # fmt: skip
    ratio = linear @ np.array(to_xyz).T / (0.95047, 1, 1.08883)
    x, y, z = np.moveaxis(
        np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116), -1, 0
    )
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def every_fifth_value() -> np.ndarray:
    """uint8 [1, 52^3, 3]."""
    line = np.arange(0, 256, 5, dtype=np.uint8)
    return np.stack(np.meshgrid(line, line, line), -1).reshape(1, -1, 3)


def test_lab_of_all_colours():
    """The definition in float64; OpenCV's approximation, which agrees less."""
    image = every_fifth_value()
    found = rgb_to_lab(torch.from_numpy(image).permute(2, 0, 1)).permute(1, 2, 0).numpy()
    assert np.abs(found - lab_by_definition(image)).max() < 1e-3
    theirs = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    assert np.abs(found - theirs).mean() < 0.1 and np.abs(found - theirs).max() < 0.6


def test_definition_is_scikit_images():
    color = pytest.importorskip('skimage.color')
    image = every_fifth_value()
    np.testing.assert_allclose(lab_by_definition(image), color.rgb2lab(image), atol=1e-9)


def smooth_images(num: int, hw: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """uint8 [num, 3, H, W]: a few shades, with noise about as large as the threshold."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(40, 215, (num, hw[0] // 32 + 1, hw[1] // 32 + 1, 3))
    shades = coarse.repeat(32, 1).repeat(32, 2)[:, : hw[0], : hw[1]]
    fine = shades + rng.normal(0, 8, (num, *hw, 3))
    return torch.from_numpy(fine.clip(0, 255).astype(np.uint8)).permute(0, 3, 1, 2).contiguous()


def weights_by_unfold(images: torch.Tensor, valid_hw: list, threshold: float = 0.3):
    """BoxInst's weights bool [N, 8, h, w] by unfolding; also how near a pair is to the limit."""
    weights, margins = [], []
    for image, (valid_h, valid_w) in zip(images, valid_hw, strict=True):
        small = F.avg_pool2d(image[None].float(), 4).byte()[0].permute(1, 2, 0).numpy()
        lab = torch.from_numpy(lab_by_definition(small)).float().permute(2, 0, 1)[None]
        inside = torch.zeros(image.shape[1:])
        inside[:valid_h, :valid_w] = 1
        unfold = dict(kernel_size=3, dilation=2)
        norm = torch.norm(lab[:, :, None] - unfold_wo_center(lab, **unfold), dim=1)
        valid = unfold_wo_center(inside[2::4, 2::4][None, None], **unfold)[:, 0]
        weights.append(torch.exp(-0.5 * norm) * valid >= threshold)
        margins.append((norm + 2 * math.log(threshold)).abs())
    return torch.cat(weights), torch.cat(margins)


def test_affinity_is_boxinsts():
    hw = (96, 160)
    images, valid_hw = smooth_images(3, hw), [hw, (86, 160), (70, 101)]
    expected, margins = weights_by_unfold(images, valid_hw)
    affinity = color_affinity(images, valid_hw)
    found = torch.stack([affinity >> bit & 1 for bit in BITS_OF_UNFOLD], 1).bool()
    sure = margins > 1e-4
    assert sure.float().mean() > 0.999
    assert torch.equal(found[sure], expected[sure])
    assert 0.1 < expected.float().mean() < 0.9


def test_affinity_survives_normalisation():
    """What denormalisation does to the last bits does not shift a value to the one below."""
    images = torch.full((1, 3, 32, 48), 128, dtype=torch.uint8)
    images[..., 20:] = 129
    off = images.float() - 1e-4
    assert torch.equal(color_affinity(images, [(32, 48)]), color_affinity(off, [(32, 48)]))


def test_affinity_by_hand():
    """Three grey levels in a row at distance one: 100 and 101 are alike, 140 is not."""
    image = torch.tensor([100, 101, 140], dtype=torch.uint8).expand(1, 3, 1, 3)
    affinity = color_affinity(image, [(1, 3)], stride=1, dilation=1)
    assert affinity.tolist() == [[[1 << 0, 1 << 4, 0]]]
    # The second pixel lies outside: it no longer counts as a neighbour, though its own one does.
    affinity = color_affinity(image, [(1, 1)], stride=1, dilation=1)
    assert affinity.tolist() == [[[0, 1 << 4, 0]]]


def test_boxes_of_masks():
    masks = torch.zeros(3, 5, 7, dtype=torch.bool)
    masks[0, 1:3, 4:7] = True
    masks[1, 4, 0] = True
    assert mask_boxes(masks).tolist() == [[4, 1, 7, 3], [0, 4, 1, 5], [0, 0, 0, 0]]
    assert mask_boxes(masks[:0]).shape == (0, 4)


def scene(hw: tuple[int, int] = (24, 40), dtype=torch.float32, spread: float = 4.0):
    """Logits, affinity, boxes, image and object indices: 2 images, 5 objects, 9 predictions."""
    torch.manual_seed(0)
    images = smooth_images(2, (4 * hw[0], 4 * hw[1]))
    affinity = color_affinity(images, [(4 * hw[0], 4 * hw[1]), (80, 130)])
    height, width = hw
    boxes = torch.tensor(
        [
            [0, 0, width, height],
            [3, 5, 20, 18],
            [width - 4, height - 9, width, height],
            [7, 7, 8, 8],  # one pixel
            [0, 0, 0, 0],  # none
        ]
    )
    logits = (spread * torch.randn(9, *hw)).to(dtype)
    return (
        logits,
        affinity,
        boxes,
        torch.tensor([0, 1, 0, 1, 1]),
        torch.tensor([1, 0, 3, 1, 2, 4, 0, 2, 3]),
    )


def by_boxinst(logits, affinity, boxes, image_idx, object_idx):
    """mmdet's formula and its weights for each prediction."""
    box_masks = torch.zeros(len(boxes), *logits.shape[1:])
    for mask, (x1, y1, x2, y2) in zip(box_masks, boxes.tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    alike = torch.stack([affinity >> bit & 1 for bit in BITS_OF_UNFOLD], 1).to(logits.dtype)
    weights = (alike[image_idx] * box_masks[:, None])[object_idx]
    settings = SimpleNamespace(pairwise_size=3, pairwise_dilation=2)
    terms = BoxInstMaskHead.get_pairwise_affinity(settings, logits[:, None][:, 0])
    return (terms * weights).sum((1, 2, 3)), weights.sum((1, 2, 3))


@pytest.mark.parametrize('spread', [0.1, 4, 30])
@pytest.mark.parametrize('chunk', [1, 1 << 17])
def test_loss_and_gradient_are_boxinsts(monkeypatch, spread, chunk):
    monkeypatch.setattr('mmdet_plugins.ops.affinity._CHUNK_CPU', chunk)
    logits, *rest = scene(spread=spread)
    sides = []
    for function in (pairwise_affinity_loss, by_boxinst):
        leaf = logits.clone().requires_grad_()
        loss, weights = function(leaf, *rest)
        (grad,) = torch.autograd.grad((loss * torch.arange(1.0, 10)).sum(), leaf)
        sides.append((loss.detach(), weights, grad))
    (loss, weights, grad), (their_loss, their_weights, their_grad) = sides
    assert torch.equal(weights, their_weights)
    assert (weights[torch.tensor([0, 1, 2])] > 0).all() and weights[5] == 0
    torch.testing.assert_close(loss, their_loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad, their_grad, rtol=1e-4, atol=1e-4 * their_grad.abs().max())


def test_whole_maps_give_the_same(monkeypatch):
    """The way of a device, on which nothing is cropped."""
    from mmdet_plugins.ops import affinity as module

    logits, *rest = scene()
    expected = pairwise_affinity_loss(logits, *rest)
    real = module._parts
    on_device = SimpleNamespace(type='cuda')

    def parts(logits, *args):
        class Elsewhere:
            shape, device = logits.shape, on_device

            def __len__(self):
                return len(logits)

        original = torch.arange
        monkeypatch.setattr(torch, 'arange', lambda *a, device=None, **k: original(*a, **k))
        yield from real(Elsewhere(), *args)

    monkeypatch.setattr(module, '_parts', parts)
    monkeypatch.setattr(module, '_CHUNK_DEVICE', 3000)
    for found, wanted in zip(pairwise_affinity_loss(logits, *rest), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_loss_by_hand():
    """Two like pixels, the left one in the box: -log(p q + (1 - p)(1 - q)), once."""
    logits = torch.tensor([[[math.log(3.0), 0.0, math.log(4.0)]]], requires_grad=True)
    affinity = torch.tensor([[[0, 0, 0]]], dtype=torch.uint8)
    affinity[0, 0, 0], affinity[0, 0, 2] = 1 << 0, 1 << 4
    box, zero = torch.tensor([[0, 0, 1, 1]]), torch.tensor([0])
    loss, weights = pairwise_affinity_loss(logits, affinity, box, zero, zero)
    # p = 3/4 and q = 4/5: 0.6 + 0.05
    assert loss.item() == pytest.approx(-math.log(0.65), rel=1e-6) and weights.item() == 1
    loss.backward()
    # d/dx of -log: -(2 q - 1) p (1 - p) / 0.65
    expected = [-0.6 * 0.1875 / 0.65, 0, -0.5 * 0.16 / 0.65]
    torch.testing.assert_close(logits.grad[0, 0], torch.tensor(expected))
    both = torch.tensor([[0, 0, 3, 1]])
    loss, weights = pairwise_affinity_loss(logits, affinity, both, zero, zero)
    assert loss.item() == pytest.approx(-2 * math.log(0.65), rel=1e-6) and weights.item() == 2


def test_gradient_is_that_of_the_value():
    logits, *rest = scene((6, 10), torch.float64)
    rest[1] = rest[1].clamp(max=6)
    small = logits[:3].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: pairwise_affinity_loss(x, *rest[:-1], rest[-1][:3])[0], small
    )


def test_half_precision_and_extremes():
    logits, *rest = scene(spread=30)
    for dtype in (torch.bfloat16, torch.float16):
        leaf = logits.to(dtype).requires_grad_()
        loss, _ = pairwise_affinity_loss(leaf, *rest)
        assert loss.dtype == torch.float32 and loss.isfinite().all()
        loss.sum().backward()
        assert leaf.grad.dtype == dtype and leaf.grad.isfinite().all()
        torch.testing.assert_close(loss, pairwise_affinity_loss(leaf.float(), *rest)[0])
    loss, _ = pairwise_affinity_loss(1e4 * logits.sign(), *rest)
    assert loss.isfinite().all()


def test_nothing_to_do():
    _, affinity, boxes, image_idx, _ = scene()
    none = torch.zeros(0, dtype=torch.long)
    logits = torch.zeros(0, 24, 40, requires_grad=True)
    loss, weights = pairwise_affinity_loss(logits, affinity, boxes, image_idx, none)
    loss.sum().backward()
    assert loss.shape == weights.shape == (0,) and logits.grad.shape == logits.shape


def test_maps_smaller_than_the_distance():
    affinity = torch.full((1, 1, 2), 255, dtype=torch.uint8)
    box, zero = torch.tensor([[0, 0, 2, 1]]), torch.tensor([0])
    loss, weights = pairwise_affinity_loss(torch.zeros(1, 1, 2), affinity, box, zero, zero)
    assert loss.item() == weights.item() == 0


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(affinity=torch.zeros(1, 3, 3)), 'need a uint8 affinity'),
        (dict(affinity=torch.zeros(1, 3, 4, dtype=torch.uint8)), 'need a uint8 affinity'),
        (dict(object_idx=torch.zeros(2, dtype=torch.long)), 'need object_idx'),
    ],
)
def test_wrong_sizes_are_named(change, message):
    arguments = dict(
        logits=torch.zeros(1, 3, 3),
        affinity=torch.zeros(1, 3, 3, dtype=torch.uint8),
        boxes_xyxy=torch.zeros(1, 4, dtype=torch.long),
        image_idx=torch.zeros(1, dtype=torch.long),
        object_idx=torch.zeros(1, dtype=torch.long),
    )
    with pytest.raises(ValueError, match=message):
        pairwise_affinity_loss(**{**arguments, **change})
