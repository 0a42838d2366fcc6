"""timm models as backbones: any input size, channels first, weights only when asked for."""

import sys

import pytest
import torch
from mmdet.registry import MODELS as MMDET_MODELS
from mmengine.registry import MODELS

from mmdet_plugins.common.timm_backbone import TimmBackbone

timm = pytest.importorskip('timm')
SWIN = 'swin_tiny_patch4_window7_224'


@pytest.fixture(autouse=True)
def no_download(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError('a download was tried')

    for name in ('load_state_dict_from_url', 'load_state_dict_from_hf', 'download_cached_file'):
        monkeypatch.setattr(timm.models._builder, name, refuse)


@pytest.mark.parametrize(
    ('name', 'channels'),
    [
        ('resnet18', [64, 128, 256, 512]),
        (SWIN, [96, 192, 384, 768]),
    ],
)
@pytest.mark.parametrize('size_hw', [(96, 160), (97, 131)])
def test_channels_first_at_any_size(name, channels, size_hw):
    backbone = TimmBackbone(name)
    backbone.init_weights()
    backbone.eval()
    height, width = size_hw
    with torch.no_grad():
        feats = backbone(torch.randn(2, 3, height, width))
    assert backbone.out_channels == channels
    assert backbone.out_strides == [4, 8, 16, 32]
    assert [tuple(feat.shape) for feat in feats] == [
        (2, c, -(-height // s), -(-width // s))
        for c, s in zip(channels, (4, 8, 16, 32), strict=True)
    ]


@pytest.mark.parametrize('name', ['resnet18', SWIN])
def test_features_are_timms(name):
    """At the size that timm takes by itself, with its own weights copied by hand."""
    backbone = TimmBackbone(name, out_indices=(-2, -1)).eval()
    model = timm.create_model(name, num_classes=0).eval()
    state = {
        key.replace('layers_', 'layers.'): value
        for key, value in backbone.timm_model.state_dict().items()
    }
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert all(key.startswith('norm.') for key in missing)
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        last = model.forward_intermediates(image, intermediates_only=True, output_fmt='NCHW')[-1]
        feats = backbone(image)
    assert len(feats) == 2
    torch.testing.assert_close(feats[1], last, rtol=1e-4, atol=1e-4)


def test_found_from_both_hosts():
    import mmseg.registry

    for registry in (MODELS, MMDET_MODELS, mmseg.registry.MODELS):
        assert registry.get('TimmBackbone') is TimmBackbone


def test_weights_from_a_file(tmp_path):
    donor = TimmBackbone('resnet18')
    torch.save(donor.timm_model.state_dict(), tmp_path / 'weights.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'weights.pth'))
    backbone = TimmBackbone('resnet18', init_cfg=init_cfg)
    first = next(backbone.parameters())
    assert not torch.equal(first, next(donor.parameters()))
    backbone.init_weights()
    for mine, theirs in zip(backbone.parameters(), donor.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_wrong_weights_are_named(tmp_path):
    torch.save(dict(unrelated=torch.zeros(1)), tmp_path / 'weights.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'weights.pth'))
    backbone = TimmBackbone('resnet18', init_cfg=init_cfg)
    with pytest.raises(ValueError, match=r'weights\.pth lacks \d+ weights of timm model resnet18'):
        backbone.init_weights()


def test_timms_own_weights_are_fetched_by_init_weights_alone():
    """Building does not download; the refusal of the fixture is what reaches timm."""
    backbone = TimmBackbone(
        'resnet18.a1_in1k', init_cfg=dict(type='Pretrained', checkpoint='timm://')
    )
    with pytest.raises(AssertionError, match='a download was tried'):
        backbone.init_weights()


def test_norm_eval():
    for norm_eval in (False, True):
        backbone = TimmBackbone('resnet18', norm_eval=norm_eval).train()
        modes = {
            module.training
            for module in backbone.modules()
            if isinstance(module, torch.nn.BatchNorm2d)
        }
        assert modes == {not norm_eval}


def test_unknown_model():
    with pytest.raises(ValueError, match="has no model 'resnt18'; close to it are resnet18"):
        TimmBackbone('resnt18')


def test_timm_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, 'timm', None)
    with pytest.raises(ImportError, match='needs timm.*pip install timm'):
        TimmBackbone('resnet18')
