"""CARAFE FPN against mmdet's, whose operation is replaced by the definition where it cannot run."""

import sys

import pytest
import torch
import torch.nn.functional as F
from mmdet.models.necks import FPN_CARAFE
from mmdet.registry import MODELS

CONFIG = dict(
    in_channels=[4, 6, 8],
    out_channels=12,
    num_outs=4,
    upsample_cfg=dict(
        type='carafe',
        up_kernel=5,
        up_group=1,
        encoder_kernel=3,
        encoder_dilation=1,
        compressed_channels=5,
    ),
)


def defined_carafe(x, kernels, k, group, scale):
    """Each output pixel is its own kernel times the k x k patch around its source (equation 2)."""
    n, c, h, w = x.shape
    patches = F.unfold(x, k, padding=k // 2).view(n, group, c // group, k * k, h, w)
    patches = patches.repeat_interleave(scale, -2).repeat_interleave(scale, -1)
    kernels = kernels.view(n, group, 1, k * k, h * scale, w * scale)
    return (patches * kernels).sum(3).view(n, c, h * scale, w * scale)


def pyramid(device: str = 'cpu') -> list[torch.Tensor]:
    """Odd sizes, so that upsampled maps must be cut."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, c, h, w, generator=generator).to(device)
        for c, h, w in ((4, 13, 21), (6, 7, 11), (8, 4, 6))
    ]


def pair() -> tuple:
    torch.manual_seed(0)
    ours, stock = MODELS.build(dict(type='UVOCARAFEFPN', **CONFIG)), FPN_CARAFE(**CONFIG)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    stock.load_state_dict(ours.state_dict())
    return ours, stock


def test_equals_mmdets(monkeypatch):
    """The same weights by the same names give the same maps and gradients."""
    # mmcv.ops has a function of the module's name.
    monkeypatch.setattr(sys.modules['mmcv.ops.carafe'], 'carafe', defined_carafe)
    ours, stock = pair()
    inputs = pyramid()
    mine, theirs = ours(inputs), stock(inputs)
    assert [tuple(m.shape[-2:]) for m in mine] == [(13, 21), (7, 11), (4, 6), (2, 3)]
    for m, t in zip(mine, theirs, strict=True):
        torch.testing.assert_close(m, t, rtol=1e-4, atol=1e-4)
    sum(m.square().sum() for m in mine).backward()
    sum(t.square().sum() for t in theirs).backward()
    for (name, p), q in zip(ours.named_parameters(), stock.parameters(), strict=True):
        assert p.grad.abs().sum() > 0, name
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-2)


def test_initialisation_is_mmdets():
    """CARAFE's encoder starts near zero, that is as an average of the patch."""
    ours, _ = pair()
    ours.init_weights()
    for module in ours.upsample_modules:
        assert 0 < module.content_encoder.weight.std() < 0.002
    assert ours.lateral_convs[0].conv.weight.std() > 0.1


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    ours, _ = pair()
    full = ours(pyramid())
    with torch.autocast('cpu', dtype=dtype):
        half = ours(pyramid())
    for f, h in zip(full, half, strict=True):
        assert (f - h.float()).abs().max() < 0.05 * f.abs().max()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_equals_mmcvs_kernel():
    ours, stock = pair()
    for m, t in zip(ours(pyramid()), stock.cuda()(pyramid('cuda')), strict=True):
        torch.testing.assert_close(m, t.cpu(), rtol=1e-3, atol=1e-3)
    for m, t in zip(ours.cuda()(pyramid('cuda')), stock(pyramid('cuda')), strict=True):
        assert torch.equal(m, t)
