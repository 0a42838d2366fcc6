"""Backbones out of checkpoints."""

import pytest
import torch
from mmengine.registry import init_default_scope

from mmdet_plugins.densecl.weights import load_backbone

CFG = dict(
    type='mmdet.ResNet',
    depth=18,
    base_channels=4,
    stem_channels=4,
    num_stages=1,
    strides=(1,),
    dilations=(1,),
    out_indices=(0,),
)


@pytest.mark.parametrize('prefix', ['', 'backbone.'])
def test_all_tensors_come_from_the_file(tmp_path, prefix):
    init_default_scope('mmdet')
    torch.manual_seed(0)
    state = load_backbone(CFG, None).state_dict()
    state = {name: torch.rand(value.shape).to(value.dtype) for name, value in state.items()}
    stored = {prefix + name: value for name, value in state.items()}
    if prefix:
        stored |= {'head.weight': torch.ones(1), 'key_encoder.backbone.conv1.weight': torch.ones(2)}
    torch.save(dict(state_dict=stored), tmp_path / 'model.pth')
    backbone = load_backbone(CFG, str(tmp_path / 'model.pth'))
    assert not backbone.training
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, state[name]), name
    with pytest.raises(
        ValueError, match=r'fits 1 of the \d+ tensors of the backbone, and not conv1'
    ):
        torch.save({'bn1.weight': torch.ones(4)}, tmp_path / 'other.pth')
        load_backbone(CFG, str(tmp_path / 'other.pth'))
