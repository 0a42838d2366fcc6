"""``torch.compile`` takes the networks whole."""

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmdet_plugins.ops import shared_conv

CONFIGS = dict(
    vanilla='solo/tiny/solo_tiny_demo.py',
    decoupled='decoupled_solo/tiny/decoupled-solo_tiny_demo.py',
    dynamic='solov2/tiny/solov2_tiny_demo.py',
    deformable='solov2/tiny/solov2_tiny_demo.py',
)


@pytest.mark.parametrize('kind', CONFIGS)
def test_no_graph_break_from_pixels_to_maps(repo, kind, monkeypatch):
    """Backbone, neck and head are one graph, of eager's values, forward and backward."""
    init_default_scope('mmdet')
    cfg = Config.fromfile(repo / 'configs' / CONFIGS[kind]).model
    if kind == 'deformable':
        cfg.mask_head.update(dcn='last', stacked_convs=1)
    torch.manual_seed(0)
    model = MODELS.build(cfg).train()
    # As the detector orders them in memory where nothing is compiled.
    pixels = torch.randn(2, 3, 64, 96).contiguous(memory_format=torch.channels_last)
    pixels.requires_grad_()

    def network(pixels):
        return model.mask_head(model.extract_feat(pixels))

    torch._dynamo.reset()
    compiled = torch.compile(network, backend='eager', fullgraph=True)
    gradients = []
    with monkeypatch.context() as patch:
        patch.setattr(shared_conv, '_MIN_CHANNELS', 1)  # channels enough, as in a full-size head
        found = compiled(pixels)
    expected = network(pixels)
    for part, expected_part in zip(found, expected, strict=True):
        torch.testing.assert_close(part, expected_part)
    for outputs in (found, expected):
        total = sum(maps.square().sum() for part in outputs for maps in part)
        gradients += torch.autograd.grad(total, pixels)
    torch.testing.assert_close(*gradients)
