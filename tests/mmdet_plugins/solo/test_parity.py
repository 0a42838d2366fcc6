"""Ours against mmdet's heads with the same weights: names, losses, gradients."""

import copy

import pytest
import torch

from mmdet_plugins.common import dynamic_mask_head

KINDS = ('vanilla', 'decoupled', 'light', 'dynamic')


def run_towers(monkeypatch, together: bool) -> None:
    """All levels at once or each by itself, whatever is faster for these small heads."""
    monkeypatch.setattr(dynamic_mask_head, 'is_faster', lambda *_: together)


def losses_and_gradients(head, features: list, samples: list) -> tuple[dict, dict]:
    """Losses, and the gradients of their sum by parameter name and by level."""
    head.zero_grad()
    features = [feat.clone().requires_grad_() for feat in features]
    losses = head.loss(features, copy.deepcopy(samples))
    sum(losses.values()).backward()
    gradients = {name: parameter.grad for name, parameter in head.named_parameters()}
    gradients |= {f'level {i}': feat.grad for i, feat in enumerate(features)}
    return losses, gradients


@pytest.mark.parametrize('together', [False, True])
@pytest.mark.parametrize('kind', KINDS)
def test_losses_and_gradients(solo, kind, together, samples, monkeypatch):
    """In double precision, where the order of sums plays no part; mmdet's sums are as they are."""
    run_towers(monkeypatch, together)
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


@pytest.mark.parametrize('together', [False, True])
@pytest.mark.parametrize('kind', KINDS)
def test_losses_in_single_precision(solo, kind, together, samples, monkeypatch):
    run_towers(monkeypatch, together)
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


class _Near:
    """mmdet's test settings, but the last threshold of each image is off by ``shift``."""

    def __init__(self, cfg: dict, shift: float) -> None:
        self._cfg, self._shift, self._asked = cfg, shift, 0

    def __getattr__(self, name: str):
        if name != 'mask_thr':
            return self._cfg[name]
        self._asked += 1
        return self._cfg['mask_thr'] + self._shift * (self._asked % 2 == 0)


@pytest.mark.parametrize('seed', range(2))
@pytest.mark.parametrize('nms', [{}, dict(kernel='linear'), dict(nms_pre=7, max_per_img=5)])
@pytest.mark.parametrize('kind', KINDS)
def test_detections(solo, kind, nms, seed, record_property, monkeypatch):
    """Masks may differ where mmdet's probability is within 1e-5 of the threshold."""
    run_towers(monkeypatch, together=seed == 1)
    ours, stock = solo.build_pair(kind, seed, spread=0.5, mask_format='dense', **nms)
    samples = [solo.sample(solo.ellipses(hw, 1), hw) for hw in ((128, 160), (101, 192))]
    features = solo.pyramid(seed=seed)
    found = ours.eval().predict(features, samples, rescale=True)
    cfg, expected = stock.eval().test_cfg, {}
    for shift in (-1e-5, 0, 1e-5):
        stock.test_cfg = _Near(cfg, shift)
        with torch.no_grad():
            expected[shift] = stock.predict(features, samples, rescale=True)
    close = 0
    for ours_, low, stock_, high in zip(found, *expected.values(), strict=True):
        assert len(ours_) == len(stock_) == nms.get('max_per_img', 20)
        torch.testing.assert_close(ours_.scores, stock_.scores, rtol=0, atol=1e-6)
        assert ours_.labels.tolist() == stock_.labels.tolist()
        assert ours_.masks.shape == stock_.masks.shape
        differ = ours_.masks != stock_.masks
        assert not (differ & ~(low.masks & ~high.masks)).any()
        close += int(differ.sum())
        for mask, box in zip(ours_.masks, ours_.bboxes.int().tolist(), strict=True):
            ys, xs = mask.nonzero(as_tuple=True)
            if len(xs):
                assert box == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    record_property('pixels_that_differ', close)
    assert close < 20


@pytest.mark.parametrize('kind', KINDS)
def test_nothing_found(solo, kind):
    ours = solo.build_ours(kind, mask_format='dense', score_thr=1.0).eval()
    samples = [solo.sample(solo.ellipses((90, 160), 1), (90, 160))]
    (found,) = ours.predict(solo.pyramid(images=1), samples, rescale=True)
    assert len(found) == 0
    assert found.masks.shape == (0, 177, 321)
    assert found.labels.dtype == torch.long
