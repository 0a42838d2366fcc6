import pytest
import torch
from mmcv.ops import deform_conv2d as mmcv_deform_conv2d
from mmcv.ops import modulated_deform_conv2d
from torch.nn import functional as F

from mmdet_plugins.ops.deform_conv import deform_conv2d

SETTINGS = [dict(), dict(padding=1), dict(stride=2, padding=1), dict(padding=3, dilation=3)]


def _inputs(modulated, stride=1, padding=0, dilation=1, k=3):
    torch.manual_seed(0)
    h, w = ((size + 2 * padding - dilation * (k - 1) - 1) // stride + 1 for size in (9, 13))
    tensors = dict(
        features=torch.randn(2, 6, 9, 13),
        # Large enough to leave the map on all sides, by less and by more than a pixel.
        offset=torch.randn(2, 2 * k * k, h, w) * 4,
        weight=torch.randn(5, 6, k, k),
    )
    if modulated:
        tensors |= dict(bias=torch.randn(5), mask=torch.rand(2, k * k, h, w))
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


@pytest.mark.parametrize('settings', SETTINGS)
@pytest.mark.parametrize('modulated', [False, True])
def test_values_and_gradients_are_mmcvs(settings, modulated):
    inputs = _inputs(modulated, **settings)
    ours = deform_conv2d(**inputs, **settings)
    geometry = [settings.get('stride', 1), settings.get('padding', 0), settings.get('dilation', 1)]
    if modulated:
        order = [inputs[name] for name in ('features', 'offset', 'mask', 'weight', 'bias')]
        theirs = modulated_deform_conv2d(*order, *geometry)
    else:
        theirs = mmcv_deform_conv2d(*inputs.values(), *geometry)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    upstream = torch.randn_like(ours)
    got = torch.autograd.grad(ours, list(inputs.values()), upstream)
    expected = torch.autograd.grad(theirs, list(inputs.values()), upstream)
    for name, a, b in zip(inputs, got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3, msg=lambda m, n=name: f'{n}: {m}')


def test_whole_offsets_shift_the_image():
    image = torch.arange(48.0).view(1, 1, 6, 8)
    offset = torch.zeros(1, 18, 6, 8)
    offset[:, 0::2], offset[:, 1::2] = 2, -1
    weight = torch.randn(3, 1, 3, 3)
    shifted = F.pad(image, (1, 0, 0, 2))[..., 2:, :8]
    got = deform_conv2d(image, offset, weight, padding=1)
    expected = F.conv2d(shifted, weight, padding=1)
    # A tap that the padding of the convolution hides is a pixel to the shifted sampling.
    torch.testing.assert_close(got[..., 1:3, 2:-1], expected[..., 1:3, 2:-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_an_offset_that_is_not_finite_spoils_its_location_alone(value):
    inputs = {name: tensor.detach() for name, tensor in _inputs(True, padding=1).items()}
    expected = deform_conv2d(**inputs, padding=1)
    inputs['offset'][1, 7, 3, 5] = value
    inputs['offset'].requires_grad_()
    got = deform_conv2d(**inputs, padding=1)
    assert got[1, :, 3, 5].isnan().all()
    got, expected = got.detach().clone(), expected.clone()
    got[1, :, 3, 5] = expected[1, :, 3, 5] = 0
    torch.testing.assert_close(got, expected)


def test_half_precision_keeps_its_type_and_is_computed_in_float():
    inputs = {name: tensor.detach() for name, tensor in _inputs(True, padding=1).items()}
    halves = {name: tensor.half() for name, tensor in inputs.items()}
    expected = deform_conv2d(**{k: v.float() for k, v in halves.items()}, padding=1)
    got = deform_conv2d(**halves, padding=1)
    assert got.dtype == torch.float16
    torch.testing.assert_close(got, expected.half())


def test_sizes_that_do_not_fit_are_named():
    inputs = _inputs(False, padding=1)
    with pytest.raises(ValueError, match=r'offset of \[2, 18, 7, 11\]'):
        deform_conv2d(**inputs)
