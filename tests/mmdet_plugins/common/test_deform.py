import pytest
import torch
from mmcv.ops import ModulatedDeformConv2dPack

from mmdet_plugins.common import deform


@pytest.mark.parametrize(
    'options',
    [dict(kernel_size=3, padding=1), dict(kernel_size=(1, 3), padding=1)]
    + [dict(kernel_size=3, stride=(2, 1)), dict(kernel_size=3, deform_groups=2)],
)
def test_layers_of_any_shape_give_what_mmcvs_give(options):
    torch.manual_seed(0)
    ours = deform.AnyDeviceDCNv2(4, 5, **options)
    torch.nn.init.normal_(ours.conv_offset.weight)
    theirs = ModulatedDeformConv2dPack(4, 5, **options)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 4, 9, 13)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
