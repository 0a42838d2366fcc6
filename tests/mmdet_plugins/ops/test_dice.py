import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmdet.models.dense_heads import SOLOV2Head
from mmdet.models.losses import DiceLoss
from mmdet.models.losses.focal_loss import py_sigmoid_focal_loss
from mmdet.structures.mask import BitmapMasks
from mmengine.structures import InstanceData

from mmdet_plugins.ops import dice
from mmdet_plugins.ops.dice import (
    dynamic_mask_logits,
    mask_bce_loss,
    mask_dice_loss,
    mask_focal_loss,
)
from mmdet_plugins.ops.grid_targets import grid_targets

LOSSES = [mask_dice_loss, mask_bce_loss, mask_focal_loss]


def make_inputs(num: int = 13, objects: int = 4, hw=(9, 14), dtype=torch.float32, seed: int = 0):
    """Logits, targets (one of them empty, one a pixel, one full) and which is whose."""
    rng = torch.Generator().manual_seed(seed)
    logits = (torch.randn(num, *hw, generator=rng, dtype=torch.float64) * 3).to(dtype)
    targets = torch.rand(objects, *hw, generator=rng) < 0.3
    targets[:3] = torch.tensor([False, False, True])[:, None, None]
    targets[1, -1, -1] = True
    return logits, targets, torch.randint(objects, (num,), generator=rng)


def reference(loss, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """mmdet's or torch's loss of each mask."""
    if loss is mask_dice_loss:
        return DiceLoss(reduction='none')(logits, targets)
    if loss is mask_focal_loss:
        values = py_sigmoid_focal_loss(logits.flatten(1), targets.flatten(1), reduction='none')
        return values.mean(1)
    weight = logits.new_tensor(2.0)
    values = F.binary_cross_entropy_with_logits(
        logits, targets.to(logits.dtype), pos_weight=weight, reduction='none'
    )
    return values.mean((1, 2))


def with_gradient(call, *leaves: torch.Tensor) -> list[torch.Tensor]:
    """The result, and the gradients of a fixed combination of its entries."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = call(*leaves)
    weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)]


def assert_equal(mine: list, theirs: list, rtol: float = 1e-5, atol: float = 1e-7) -> None:
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def test_values_by_hand():
    logits = torch.zeros(1, 2, 2)
    targets = torch.tensor([[[True, False], [False, False]]])
    index = torch.tensor([0])
    # p = 1/2: overlap 1/2, squares 4 * 1/4 and 1
    torch.testing.assert_close(
        mask_dice_loss(logits, targets, index), torch.tensor([1 - 1 / 2.002])
    )
    # both factors 1/2: p = 1/4, squares 4 / 16 and 1
    torch.testing.assert_close(
        mask_dice_loss((logits, logits), targets, index), torch.tensor([1 - 0.5 / 1.252])
    )
    log2 = np.log(2)
    torch.testing.assert_close(
        mask_bce_loss(logits, targets, index), torch.tensor([5 / 4 * log2]).float()
    )
    torch.testing.assert_close(
        mask_focal_loss(logits, targets, index),
        torch.tensor([(0.25 + 3 * 0.75) / 4 * log2 / 4]).float(),
    )


@pytest.mark.parametrize('loss', LOSSES)
@pytest.mark.parametrize('chunk', [1, 300, 1 << 18])
def test_equal_to_stock(monkeypatch, loss, chunk):
    monkeypatch.setattr(dice, '_CHUNK_CPU', chunk)
    logits, targets, index = make_inputs()
    mine = with_gradient(lambda x: loss(x, targets, index), logits)
    theirs = with_gradient(lambda x: reference(loss, x, targets[index].to(torch.uint8)), logits)
    assert_equal(mine, theirs)
    as_bytes = with_gradient(lambda x: loss(x, targets.to(torch.uint8), index), logits)
    assert_equal(as_bytes, mine, 0, 0)


def test_product_of_two_is_stocks():
    x, targets, index = make_inputs()
    y = make_inputs(seed=1)[0]
    stock = DiceLoss(reduction='none', activate=False)
    mine = with_gradient(lambda x, y: mask_dice_loss((x, y), targets, index), x, y)
    theirs = with_gradient(lambda x, y: stock(x.sigmoid() * y.sigmoid(), targets[index]), x, y)
    assert_equal(mine, theirs)


@pytest.mark.parametrize('loss', LOSSES)
def test_gradients_are_those_of_differences(loss):
    logits, targets, index = make_inputs(5, hw=(3, 4), dtype=torch.float64)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, targets, index), logits)


def test_gradients_of_a_product_are_those_of_differences():
    x, targets, index = make_inputs(5, hw=(3, 4), dtype=torch.float64)
    y = make_inputs(5, hw=(3, 4), dtype=torch.float64, seed=1)[0]
    leaves = x.requires_grad_(), y.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: mask_dice_loss((x, y), targets, index), leaves)


@pytest.mark.parametrize('loss', LOSSES)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_is_widened(loss, dtype):
    logits, targets, index = make_inputs(dtype=dtype)
    logits[0], logits[1] = 60, -60
    value, gradient = with_gradient(lambda x: loss(x, targets, index), logits)
    wide = with_gradient(lambda x: loss(x, targets, index), logits.float())
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    assert torch.equal(value, wide[0])
    assert torch.equal(gradient, wide[1].to(dtype))


@pytest.mark.parametrize('loss', LOSSES)
def test_extreme_logits_stay_finite(loss):
    _, targets, index = make_inputs(4)
    logits = torch.tensor([1e4, -1e4, 88.0, -88.0])[:, None, None].expand(4, 9, 14)
    for out in with_gradient(lambda x: loss(x, targets, index), logits):
        assert out.isfinite().all()


def test_no_subnormal_gradient_slows_the_convolution_before_it():
    logits = -torch.linspace(0, 60, 4 * 64 * 64).view(4, 64, 64)
    factors = tuple(logits.clone().requires_grad_() for _ in range(2))
    targets = torch.ones(1, 64, 64, dtype=torch.bool)
    mask_dice_loss(factors, targets, torch.zeros(4, dtype=torch.long)).sum().backward()
    for factor in factors:
        size = factor.grad.abs()
        assert ((size == 0) | (size > 1e-30)).all()
        assert (size == 0).any()
        assert (size > 0).any()


@pytest.mark.parametrize('loss', LOSSES)
def test_no_predictions(loss):
    _, targets, index = make_inputs(0)
    for shape, some in (((0, 9, 14), targets), ((0, 9, 14), targets[:0])):
        out, gradient = with_gradient(lambda x, t=some: loss(x, t, index), torch.zeros(shape))
        assert out.shape == (0,) and gradient.shape == shape


def test_any_layout_of_logits():
    logits, targets, index = make_inputs()
    columns = logits.transpose(1, 2).contiguous().transpose(1, 2)
    for loss in LOSSES:
        mine = with_gradient(lambda x, loss=loss: loss(x, targets, index), columns)
        assert_equal(mine, with_gradient(lambda x, loss=loss: loss(x, targets, index), logits))


@pytest.mark.parametrize('loss', LOSSES)
def test_only_logits_and_objects_are_kept(loss):
    logits, targets, index = make_inputs(200, 5, (40, 50))
    logits.requires_grad_()
    kept = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss(logits, targets, index)
    assert sum(kept.values()) <= logits.nbytes + targets.nbytes + 5000


COUNTS = [[2, 0, 3], [0, 0, 5], [5, 0, 0]]


@pytest.mark.parametrize('size', [1, 3])
@pytest.mark.parametrize('counts', COUNTS)
def test_dynamic_logits_are_a_padded_convolution(size, counts):
    rng = torch.Generator().manual_seed(0)
    features = torch.randn(3, 4, 6, 9, generator=rng)
    kernels = torch.randn(5, 4 * size**2, generator=rng)

    def slow(features: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
        """Tap by tap."""
        pad = size // 2
        padded = F.pad(features, [pad] * 4)
        image = torch.repeat_interleave(torch.tensor(counts))
        taps = kernels.view(5, 4, size, size)
        return sum(
            (padded[image, :, y : y + 6, x : x + 9] * taps[:, :, y, x, None, None]).sum(1)
            for y in range(size)
            for x in range(size)
        )

    mine = with_gradient(lambda f, k: dynamic_mask_logits(f, k, counts), features, kernels)
    assert_equal(mine, with_gradient(slow, features, kernels), atol=1e-5)


def test_dynamic_logits_without_kernels():
    features = torch.randn(2, 4, 6, 9)
    for width in (4, 36):
        out, to_features, to_kernels = with_gradient(
            lambda f, k: dynamic_mask_logits(f, k, [0, 0]), features, torch.zeros(0, width)
        )
        assert out.shape == (0, 6, 9) and to_kernels.shape == (0, width)
        assert torch.equal(to_features, torch.zeros_like(features))


@pytest.mark.parametrize('size', [1, 3])
def test_dynamic_logits_follow_autocast(size):
    features = torch.randn(1, 4, 6, 9).requires_grad_()
    kernels = torch.randn(2, 4 * size**2).bfloat16().requires_grad_()
    with torch.autocast('cpu', torch.bfloat16):
        logits = dynamic_mask_logits(features, kernels, [2])
    assert logits.dtype == torch.bfloat16
    wide = dynamic_mask_logits(features.bfloat16().float(), kernels.float(), [2])
    torch.testing.assert_close(logits.float(), wide, rtol=2e-2, atol=2e-2)
    logits.float().sum().backward()
    assert features.grad.dtype == torch.float32 and features.grad.isfinite().all()


def test_loss_of_solov2_is_stocks():
    """From mask features and kernels to loss and gradients, two crowded non-square images."""
    grids, scales, hw = (10, 8, 5), ((1, 24), (12, 48), (32, 200)), (96, 160)
    head = SOLOV2Head(
        3,
        in_channels=32,
        feat_channels=32,
        stacked_convs=1,
        strides=(8, 16, 32),
        scale_ranges=scales,
        num_grids=grids,
        mask_feature_head=dict(
            feat_channels=32, start_level=0, end_level=2, out_channels=8, mask_stride=4
        ),
    )
    rng = np.random.default_rng(0)
    images = []
    for num in (25, 9):
        low = rng.random((num, 2)) * [120, 60]
        boxes = np.concatenate([low, low + 4 + 30 * rng.random((num, 2))], 1).astype(np.float32)
        masks = np.zeros((num, *hw), np.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.astype(int), strict=True):
            mask[y1:y2, x1:x2] = rng.random((y2 - y1, x2 - x1)) < 0.8
        images.append(
            InstanceData(
                masks=BitmapMasks(masks, *hw),
                bboxes=torch.from_numpy(boxes),
                labels=torch.from_numpy(rng.integers(0, 3, num)),
            )
        )
    torch.manual_seed(0)
    features = torch.randn(2, 8, 24, 40)
    kernels = [torch.randn(2, 8, size, size) for size in grids]
    scores = [torch.zeros(2, 3, size, size) for size in grids]

    def theirs(features: torch.Tensor, *kernels: torch.Tensor) -> torch.Tensor:
        return head.loss_by_feat(list(kernels), scores, features, images, [{}, {}])['loss_mask']

    def mine(features: torch.Tensor, *kernels: torch.Tensor) -> torch.Tensor:
        targets = grid_targets(
            [image.masks.masks for image in images],
            [image.bboxes for image in images],
            [image.labels for image in images],
            grid_sizes=grids,
            scale_ranges=scales,
            mask_strides=[4] * 3,
            mask_hw=[(24, 40)] * 3,
            num_classes=3,
        )
        positives, counts = targets.by_image()
        cells = torch.cat([level.flatten(2) for level in kernels], 2).transpose(1, 2)
        own = cells[positives.image_idx, positives.cell_idx]
        logits = dynamic_mask_logits(features, own, counts)
        losses = mask_dice_loss(logits, targets.masks[0], positives.object_idx)
        return 3 * losses.sum() / targets.num_positives

    assert_equal(with_gradient(mine, features, *kernels), with_gradient(theirs, features, *kernels))


def test_bad_sizes_are_refused():
    logits, targets, index = make_inputs()
    with pytest.raises(ValueError, match=r'need targets \[G, 9, 14\]'):
        mask_dice_loss(logits, targets[:, :5], index)
    with pytest.raises(ValueError, match=r'target_idx \[13\]'):
        mask_bce_loss(logits, targets, index[:4])
    with pytest.raises(ValueError, match='bool or uint8, got torch.float32'):
        mask_focal_loss(logits, targets.float(), index)
    with pytest.raises(ValueError, match=r'must be \[Q, h, w\]'):
        mask_dice_loss((logits, logits[:4]), targets, index)
    features = torch.zeros(2, 4, 6, 9)
    with pytest.raises(ValueError, match='odd k'):
        dynamic_mask_logits(features, torch.zeros(3, 16), [1, 2])
    with pytest.raises(ValueError, match='2 images and 3 kernels'):
        dynamic_mask_logits(features, torch.zeros(3, 4), [1, 1])
