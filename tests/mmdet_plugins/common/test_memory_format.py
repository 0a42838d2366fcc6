import pytest
import torch
from mmcv.ops import DeformConv2dPack, ModulatedDeformConv2dPack, RoIAlign
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import nn

from mmdet_plugins.common.deform import AnyDeviceDCNv2
from mmdet_plugins.common.memory_format import channels_first_module, reordered_on_cpu


class Derived(ModulatedDeformConv2dPack):
    """As users have them."""


LAYERS = [
    ModulatedDeformConv2dPack(4, 4, 3),
    DeformConv2dPack(4, 4, 3),
    RoIAlign(7),
    Derived(4, 4, 3),
]


@pytest.mark.parametrize('layer', LAYERS, ids=lambda layer: type(layer).__name__)
def test_who_reads_channels_first_is_found_by_name(layer):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(layer))
    assert channels_first_module(model) == f'1.0 ({type(layer).__name__})'
    images = torch.randn(2, 3, 8, 12)
    assert reordered_on_cpu(images, model) is images


def test_ours_reads_any_order():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), AnyDeviceDCNv2(4, 4, 3), nn.BatchNorm2d(4))
    assert channels_first_module(model) is None
    images = torch.randn(2, 3, 8, 12)
    reordered = reordered_on_cpu(images, model)
    assert reordered.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(reordered, images)


def test_graphs_keep_the_order_of_their_input():
    model = nn.Conv2d(3, 4, 3)
    images = torch.randn(2, 3, 8, 12)

    def reorder(images):
        return reordered_on_cpu(images, model)

    torch._dynamo.reset()
    compiled = torch.compile(reorder, backend='eager', fullgraph=True)
    assert not reorder(images).is_contiguous()
    assert compiled(images).is_contiguous()
    assert torch.jit.trace(reorder, (images,))(images).is_contiguous()


@pytest.fixture(params=[None, 'AnyDeviceDCNv2', 'DCNv2'])
def detectors(request, repo):
    """Ours and mmdet's around the same head, with the same weights; and the kind of DCN."""
    init_default_scope('mmdet')
    cfg = Config.fromfile(repo / 'configs/solov2/tiny/solov2_tiny_demo.py').model
    cfg.backbone.update(depth=50, base_channels=8)
    cfg.neck.in_channels = [32, 64, 128, 256]
    if request.param:
        cfg.backbone.dcn = dict(type=request.param, deform_groups=1, fallback_on_stride=False)
        cfg.backbone.stage_with_dcn = (False, False, True, True)
    torch.manual_seed(0)
    ours = MODELS.build(cfg)
    for name, weight in ours.named_parameters():
        if 'conv_offset' in name:
            nn.init.normal_(weight, std=0.1)
    stock = MODELS.build({**cfg, 'type': 'SOLOv2'})
    stock.load_state_dict(ours.state_dict())
    return ours.eval(), stock.eval(), request.param


@torch.no_grad()
def test_the_detector_reorders_maps_and_nothing_else(detectors):
    ours, stock, dcn = detectors
    images = torch.randn(2, 3, 64, 96)
    found, expected = ours.extract_feat(images), stock.extract_feat(images)
    reordered = dcn != 'DCNv2'  # mmcv's, which would read other values
    for level, stock_level in zip(found[:2], expected[:2], strict=True):
        assert level.is_contiguous(memory_format=torch.channels_last) == reordered
        assert stock_level.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(ours.mask_head(found), stock.mask_head(expected), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
