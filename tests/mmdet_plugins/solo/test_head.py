"""The heads beyond mmdet's: their options, precision, names of parameters, and edges."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.utils import get_installed_path

from mmdet_plugins.solo.network import SOLOMergeNeck, align_to_grid

KINDS = ('vanilla', 'decoupled', 'light', 'dynamic')
SMALL_NORM = dict(type='GN', num_groups=2)


def step(head, solo, samples) -> dict:
    """Losses of a backward pass that reaches every parameter."""
    losses = head.loss(solo.pyramid(), copy.deepcopy(samples))
    sum(losses.values()).backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    return losses


@pytest.fixture
def few(solo) -> list:
    """Two images with three objects each."""
    return [solo.sample(solo.ellipses(hw, 3), hw) for hw in ((128, 160), (101, 192))]


def test_kernels_of_3x3_against_padded_convolutions(solo, few):
    """The loss of one object, from the kernel of its cell and its target, written out."""
    head = solo.build_ours(kernel_size=3, scale_ranges=((1, 512),) + ((1, 2),) * 4).double()
    masks = solo.ellipses((128, 192), 1) * 0
    masks[0, 40:80, 60:140] = 1
    features = [feat[:1].double() for feat in solo.pyramid()]
    losses = head.loss(features, [solo.sample(masks, (128, 192))])
    _, kernel_feats, (mask_features,) = head(features)
    kernels = head.conv_kernel(kernel_feats[0])
    # Centre (99.5, 59.5) of 192x128 on 12 cells; the region is x 91.5 to 107.5, y 55.5 to 63.5.
    cells = [(5, 5), (5, 6)]
    total = 0
    target = torch.zeros(32, 48, dtype=torch.double)
    target[10:20, 15:35] = 1
    for row, column in cells:
        weight = kernels[0, :, row, column].view(1, -1, 3, 3)
        p = F.conv2d(F.pad(mask_features, (1, 1, 1, 1)), weight)[0, 0].sigmoid()
        total += 3 * (1 - 2 * (p * target).sum() / (p.square().sum() + target.sum() + 2e-3))
    torch.testing.assert_close(losses['loss_mask'], total / len(cells))
    solo.build_ours(kernel_size=3).eval().predict(solo.pyramid(), few)


@pytest.mark.parametrize(
    ('kind', 'changes'),
    [
        ('vanilla', dict(num_coord_convs=0)),
        ('vanilla', dict(num_coord_convs=2)),
        ('decoupled', dict(num_coord_convs=2)),
        ('light', dict(dcn='last')),
        ('dynamic', dict(dcn='all')),
        ('vanilla', dict(cls_align='adaptive_pool')),
        ('decoupled', dict(cls_align='region_grid')),
        ('vanilla', dict(loss_mask=dict(type='SOLOMaskBCELoss'))),
        ('dynamic', dict(loss_mask=dict(type='SOLOMaskFocalLoss'))),
        ('dynamic', dict(kernel_coords=False)),
        (
            'dynamic',
            dict(
                mask_features=dict(
                    type='SOLOSeparateMaskFeatures',
                    out_channels=6,
                    stacked_convs=2,
                    norm_cfg=SMALL_NORM,
                )
            ),
        ),
        ('vanilla', dict(num_classes=1)),
    ],
    ids=str,
)
def test_options_train_and_predict(solo, few, kind, changes):
    head = solo.build_ours(kind, score_thr=0.001, filter_thr=1e-5, **changes)
    for data_sample in few:
        data_sample.gt_instances.labels %= head.num_classes
    losses = step(head, solo, few)
    assert all(value > 0 for value in losses.values())
    for found, data_sample in zip(head.eval().predict(solo.pyramid(), few), few, strict=True):
        assert all(rle['size'] == list(data_sample.img_shape) for rle in found.masks)


def test_coordinates_reach_what_the_options_say(solo):
    """With constant features only zero padding and coordinates tell places apart."""

    def widths(**changes) -> list[int]:
        head = solo.build_ours('vanilla', stacked_convs=3, **changes)
        return [layer.conv.in_channels - 8 for layer in head.mask_convs]

    assert widths(num_coord_convs=0) == [0, 0, 0]
    assert widths(num_coord_convs=3) == [2, 2, 2]
    decoupled = solo.build_ours('decoupled')
    assert decoupled.mask_convs_x[0].conv.in_channels == 9


def test_category_alignment():
    """A ramp of 8x12 on 4 cells: bilinear samples, maxima, and means over each cell."""
    x = torch.arange(12.0).expand(1, 1, 8, 12)
    assert align_to_grid(x, 4, 'interpolate')[0, 0, 0].tolist() == [1, 4, 7, 10]
    assert align_to_grid(x, 4, 'adaptive_pool')[0, 0, 0].tolist() == [2, 5, 8, 11]
    # Samples at 0.375 + 0.75 i - 0.5, the outermost clamped to the border.
    means = align_to_grid(x, 4, 'region_grid')[0, 0, 0].tolist()
    assert means == pytest.approx([1.03125, 4, 7, 9.96875])
    with pytest.raises(ValueError, match='cls_align must be'):
        align_to_grid(x, 4, 'nearest')


def test_one_image_at_a_time_is_the_same(solo, few):
    """A batch of two gives the detections of two batches of one."""
    for kind in KINDS:
        head, _ = solo.build_pair(kind, spread=0.5)
        features = solo.pyramid()
        both = head.eval().predict(features, few)
        for i, expected in enumerate(both):
            (alone,) = head.predict([feat[i : i + 1] for feat in features], [few[i]])
            torch.testing.assert_close(alone.scores, expected.scores)
            assert alone.masks == expected.masks


@pytest.mark.parametrize('kind', KINDS)
def test_bf16_autocast_on_the_cpu(solo, few, kind):
    """Losses are float32, finite, and near those of full precision."""
    head = solo.build_ours(kind, dcn='last')
    full = head.loss(solo.pyramid(), copy.deepcopy(few))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        losses = head.loss([feat.bfloat16() for feat in solo.pyramid()], copy.deepcopy(few))
        found = head.eval().predict([feat.bfloat16() for feat in solo.pyramid()], few)
    for name, value in losses.items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(full[name].item(), rel=0.1), name
    sum(losses.values()).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in head.parameters())
    assert all(one.scores.dtype == torch.float32 for one in found)


def test_a_loss_that_is_not_finite_names_itself_and_the_images(solo, few):
    head = solo.build_ours()
    with torch.no_grad():
        head.conv_kernel.bias.fill_(float('nan'))
    few[1].set_metainfo(dict(img_id=42))
    with pytest.raises(FloatingPointError, match=r'loss_mask is nan in .* images 7, 42:'):
        head.loss(solo.pyramid(), few)


def test_levels_must_fit_each_other(solo):
    with pytest.raises(ValueError, match='name the same levels, but there are 2, 5 and 5'):
        solo.build_ours(num_grids=(12, 9))


def test_merged_neck():
    """C3 to C5 of ones: the sum of three laterals, at the size of C3."""
    neck = SOLOMergeNeck([2, 3, 4], out_channels=5)
    feats = [torch.ones(1, c, 16 // 2**i, 24 // 2**i) for i, c in enumerate((2, 3, 4))]
    for conv in neck.lateral_convs:
        torch.nn.init.ones_(conv.conv.weight)
        torch.nn.init.zeros_(conv.conv.bias)
    torch.nn.init.zeros_(neck.out_conv.conv.weight)
    neck.out_conv.conv.weight.data[:, :, 1, 1] = 1
    torch.nn.init.zeros_(neck.out_conv.conv.bias)
    (merged,) = neck(feats)
    assert merged.shape == (1, 5, 16, 24)
    torch.testing.assert_close(merged, torch.full_like(merged, 5 * (2 + 3 + 4)))


@pytest.mark.parametrize(
    ('ours', 'theirs'),
    [
        ('solo/solo_r50_fpn_8xb2-3x_coco', 'solo/solo_r50_fpn_3x_coco'),
        (
            'decoupled_solo/decoupled-solo_r50_fpn_8xb2-3x_coco',
            'solo/decoupled-solo_r50_fpn_3x_coco',
        ),
        (
            'decoupled_solo/decoupled-solo-light_r50_fpn_8xb2-3x_coco',
            'solo/decoupled-solo-light_r50_fpn_3x_coco',
        ),
        ('solov2/solov2_r50_fpn_8xb2-1x_coco', 'solov2/solov2_r50_fpn_1x_coco'),
        ('solov2/solov2_r101-dcn_fpn_8xb2-3x_coco', 'solov2/solov2_r101-dcn_fpn_ms-3x_coco'),
        (
            'solov2/solov2-light-448_r50_fpn_8xb2-3x_coco',
            'solov2/solov2-light_r50_fpn_ms-3x_coco',
        ),
        (
            'solov2/solov2-light-512_r50-dcn_fpn_8xb2-3x_coco',
            'solov2/solov2-light_r50-dcn_fpn_ms-3x_coco',
        ),
    ],
)
def test_heads_have_the_parameters_and_settings_of_mmdets_models(repo, ours, theirs):
    """Its checkpoints load strictly: backbone and neck are mmdet's own, the detector derives."""
    root = Path(get_installed_path('mmdet')) / '.mim' / 'configs'
    pair = [
        Config.fromfile(path).model
        for path in (repo / 'configs' / f'{ours}.py', root / f'{theirs}.py')
    ]
    heads = [MODELS.build(cfg.mask_head) for cfg in pair]
    mine, stock = ({name: p.shape for name, p in head.state_dict().items()} for head in heads)
    assert mine == stock
    for name in ('num_grids', 'strides', 'scale_ranges'):
        settings = [
            [tuple(v) if name == 'scale_ranges' else v for v in getattr(h, name)] for h in heads
        ]
        assert settings[0] == settings[1], name
    mine, stock = (MODELS.get(cfg.type) for cfg in pair)
    assert issubclass(mine, stock.__base__)
    for name, value in pair[1].test_cfg.items():
        assert pair[0].test_cfg[name] == value, name
