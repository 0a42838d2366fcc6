"""Ours against mmdet's heads with the same weights: names, losses, gradients."""

import copy

import pytest
import torch

KINDS = ('vanilla', 'decoupled', 'light', 'dynamic')


def losses_and_gradients(head, features: list, samples: list) -> tuple[dict, dict]:
    """Losses, and the gradients of their sum by parameter name and by level."""
    head.zero_grad()
    features = [feat.clone().requires_grad_() for feat in features]
    losses = head.loss(features, copy.deepcopy(samples))
    sum(losses.values()).backward()
    gradients = {name: parameter.grad for name, parameter in head.named_parameters()}
    gradients |= {f'level {i}': feat.grad for i, feat in enumerate(features)}
    return losses, gradients


@pytest.mark.parametrize('kind', KINDS)
def test_losses_and_gradients(solo, kind, samples):
    """In double precision, where the order of sums plays no part; mmdet's sums are as they are."""
    ours, stock = (head.double() for head in solo.build_pair(kind, spread=0.1))
    features = [feat.double() for feat in solo.pyramid()]
    losses, gradients = losses_and_gradients(ours, features, samples)
    expected, expected_gradients = losses_and_gradients(stock, features, samples)
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-5, atol=1e-7, msg=name)
    for name, value in expected_gradients.items():
        torch.testing.assert_close(gradients[name], value, rtol=1e-5, atol=1e-7, msg=name)
    assert expected['loss_mask'] > 0.5


@pytest.mark.parametrize('kind', KINDS)
def test_losses_in_single_precision(solo, kind, samples):
    ours, stock = solo.build_pair(kind, spread=0.1)
    losses = ours.loss(solo.pyramid(), copy.deepcopy(samples))
    expected = stock.loss(solo.pyramid(), copy.deepcopy(samples))
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize('kind', KINDS)
def test_no_objects_and_no_positives(solo, kind):
    """An empty image, and one whose only object is out of every level's range."""
    ours, stock = (head.double() for head in solo.build_pair(kind, spread=0.1))
    ours.scale_ranges = stock.scale_ranges = ((1, 2),) * 5
    features = [feat.double() for feat in solo.pyramid()]
    samples = [solo.sample(solo.ellipses((128, 160), count), (128, 160)) for count in (0, 1)]
    losses, gradients = losses_and_gradients(ours, features, samples)
    expected, _ = losses_and_gradients(stock, features, samples)
    assert losses['loss_mask'] == 0
    torch.testing.assert_close(losses['loss_cls'], expected['loss_cls'], rtol=1e-5, atol=1e-7)
    assert all(gradient is not None for gradient in gradients.values()), 'every rank must sync'


@pytest.mark.parametrize('kind', KINDS)
def test_masks_of_one_pixel_and_of_none(solo, kind):
    """One-pixel objects in a corner and inside, and an annotation without a pixel."""
    masks = solo.ellipses((128, 160), 4) * 0
    masks[0, 127, 159] = masks[1, 0, 0] = masks[2, 60, 71] = 1
    samples = [solo.sample(masks, (128, 160))] * 2
    ours, stock = (head.double() for head in solo.build_pair(kind, spread=0.1))
    features = [feat.double() for feat in solo.pyramid()]
    losses, _ = losses_and_gradients(ours, features, samples)
    expected, _ = losses_and_gradients(stock, features, samples)
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-5, atol=1e-7, msg=name)
