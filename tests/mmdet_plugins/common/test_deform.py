import pytest
import torch
from mmcv.ops import DeformConv2d, ModulatedDeformConv2dPack

from mmdet_plugins.common import deform

SHAPES = [
    dict(kernel_size=3, padding=1),
    dict(kernel_size=(1, 3), padding=1),
    dict(kernel_size=3, stride=(2, 1)),
    dict(kernel_size=3, deform_groups=2),
]
ORDERS = pytest.mark.parametrize('order', [torch.contiguous_format, torch.channels_last])


@ORDERS
@pytest.mark.parametrize('options', SHAPES)
def test_layers_of_any_shape_give_what_mmcvs_give(options, order):
    torch.manual_seed(0)
    ours = deform.AnyDeviceDCNv2(4, 5, **options)
    torch.nn.init.normal_(ours.conv_offset.weight)
    theirs = ModulatedDeformConv2dPack(4, 5, **options)
    theirs.load_state_dict(ours.state_dict())
    ours.conv_offset.to(memory_format=order)
    x = torch.randn(2, 4, 9, 13)
    found = ours(x.contiguous(memory_format=order))
    torch.testing.assert_close(found, theirs(x), rtol=1e-4, atol=1e-4)


@ORDERS
@pytest.mark.parametrize('options', SHAPES)
def test_offsets_from_elsewhere(options, order):
    torch.manual_seed(0)
    ours = deform.AnyDeviceDeformConv2d(4, 5, **options)
    theirs = DeformConv2d(4, 5, **options)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 4, 9, 13)
    plain = {key: value for key, value in options.items() if key != 'deform_groups'}
    places = ours.deform_groups * ours.weight[0, 0].numel()
    offset = torch.nn.Conv2d(4, 2 * places, **plain)(x).detach()
    found = ours(*(maps.contiguous(memory_format=order) for maps in (x, offset)))
    torch.testing.assert_close(found, theirs(x, offset), rtol=1e-4, atol=1e-4)
