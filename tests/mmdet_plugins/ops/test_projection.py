"""Projection losses by hand, and against the formula written out with autograd."""

import math

import pytest
import torch

from mmdet_plugins.ops.projection import projection_losses


def literal(logits, targets, target_idx, eps=1e-5):
    """Equations 6.4 and 6.5, each term as it is written."""

    def dice(a, b):
        return 1 - 2 * (a * b).sum(1) / ((a * a).sum(1) + (b * b).sum(1) + eps)

    p, t = logits.sigmoid(), targets[target_idx].to(logits.dtype)
    maximum = sum(dice(p.max(axis)[0], t.max(axis)[0]) for axis in (1, 2))
    average = sum(dice(p.mean(axis), t.mean(axis)) for axis in (1, 2))
    return maximum, average


def scene(hw=(9, 14), dtype=torch.float64):
    torch.manual_seed(0)
    targets = torch.zeros(3, *hw, dtype=torch.bool)
    targets[0, 2:6, 3:11] = True
    targets[1, 4, 7] = True
    return torch.randn(5, *hw, dtype=dtype) * 3, targets, torch.tensor([0, 2, 1, 0, 1])


def test_by_hand():
    """A mask of certain pixels: one full row of two predicted, of which the target has one pixel.

    Maxima: columns (1, 1) and (1, 0): 1 - 2/3; rows (1, 0) and (1, 0): 0. Averages: columns
    (1/2, 1/2) and (1/2, 0): 1 - 2/3; rows (1, 0) and (1/2, 0): 1 - 1/1.25.
    """
    logits = torch.tensor([[[40.0, 40.0], [-40.0, -40.0]]])
    targets = torch.tensor([[[True, False], [False, False]]])
    maximum, average = projection_losses(logits, targets, torch.tensor([0]), eps=0.0)
    assert maximum.item() == pytest.approx(1 / 3, rel=1e-6)
    assert average.item() == pytest.approx(1 / 3 + 0.2, rel=1e-6)


def test_an_outlier_costs_the_maximum_more():
    """One stray pixel of a predicted square, the reason for the average (section 6.2.3)."""
    targets = torch.zeros(1, 20, 30, dtype=torch.bool)
    targets[0, 5:10, 5:10] = True
    logits = torch.where(targets, 40.0, -40.0)
    logits[0, 15, 25] = 40.0
    maximum, average = projection_losses(logits, targets, torch.tensor([0]))
    assert maximum > 3 * average > 0


@pytest.mark.parametrize('chunk', [1, 1 << 18])
def test_values_and_gradients_are_those_of_the_formula(monkeypatch, chunk):
    monkeypatch.setattr('mmdet_plugins.ops.dice._CHUNK_CPU', chunk)
    logits, targets, idx = scene()
    sides = []
    for function in (projection_losses, literal):
        leaf = logits.clone().requires_grad_()
        maximum, average = function(leaf, targets, idx)
        weights = torch.arange(1, 6)
        (grad,) = torch.autograd.grad((weights * (maximum + 0.1 * average)).sum(), leaf)
        sides.append((maximum.detach(), average.detach(), grad))
    for found, expected in zip(*sides, strict=True):
        torch.testing.assert_close(found, expected)


def test_each_loss_has_its_own_gradient():
    """The maximum's is nowhere but at the maxima of rows and columns."""
    logits, targets, idx = scene()
    for which in (0, 1):
        leaf = logits.clone().requires_grad_()
        (grad,) = torch.autograd.grad(projection_losses(leaf, targets, idx)[which].sum(), leaf)
        assert torch.autograd.gradcheck(
            lambda x, which=which: projection_losses(x, targets, idx)[which], leaf
        )
        assert (grad != 0).sum(dim=(1, 2)).le(9 + 14 if which == 0 else 9 * 14).all()


def test_transposed_masks_cost_the_same():
    logits, targets, idx = scene()
    flat = projection_losses(logits, targets, idx)
    turned = projection_losses(logits.mT, targets.mT, idx)
    for a, b in zip(flat, turned, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    logits, targets, idx = scene(dtype=torch.float32)
    leaf = (30 * logits).to(dtype).requires_grad_()
    losses = projection_losses(leaf, targets, idx)
    expected = literal(leaf.detach().float(), targets, idx)
    sum(loss.sum() for loss in losses).backward()
    for loss, wanted in zip(losses, expected, strict=True):
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, wanted)
    assert leaf.grad.dtype == dtype and leaf.grad.isfinite().all()


def test_no_predictions():
    _, targets, idx = scene()
    logits = torch.zeros(0, 9, 14, requires_grad=True)
    losses = projection_losses(logits, targets, idx[:0])
    sum(loss.sum() for loss in losses).backward()
    assert logits.grad.shape == (0, 9, 14) and math.prod(losses.maximum.shape) == 0


def test_wrong_sizes_are_named():
    logits, targets, idx = scene()
    with pytest.raises(ValueError, match='need bool targets'):
        projection_losses(logits, targets.byte(), idx)
    with pytest.raises(ValueError, match='need bool targets'):
        projection_losses(logits, targets[:, :-1], idx)
    with pytest.raises(ValueError, match='as many targets'):
        projection_losses(logits, targets, idx[:-1])
