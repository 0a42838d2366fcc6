"""The converter of SOLO's checkpoints, on state dicts with the names and shapes of the originals.

The tensors are numbers spread over a shape: one per name, so that each can be followed.
"""

import argparse
import copy
import shlex

import numpy as np
import pytest
import torch
from mmengine.config import DictAction

BLOCKS = (3, 4, 6, 3)
GRIDS = (40, 36, 24, 16, 12)
OURS = {
    'solo': 'configs/solo/solo_r50_fpn_8xb2-3x_coco.py',
    'decoupled': 'configs/decoupled_solo/decoupled-solo_r50_fpn_8xb2-3x_coco.py',
    'decoupled-light-dcn': (
        'configs/decoupled_solo/decoupled-solo-light_r50-dcn_fpn_8xb2-3x_coco.py'
    ),
    'solov2': 'configs/solov2/solov2_r50_fpn_8xb2-3x_coco.py',
    'solov2-light': 'configs/solov2/solov2-light-448_r50_fpn_8xb2-3x_coco.py',
    'solov2-light-dcn': 'configs/solov2/solov2-light-512_r50-dcn_fpn_8xb2-3x_coco.py',
}


@pytest.fixture(scope='module')
def configs():
    return {}


@pytest.fixture
def tool(load_script, monkeypatch, configs):
    """The script; configs, whose bases take seconds to look up, are read once."""
    tool = load_script('tools/convert/solo_checkpoint.py')
    load_config = tool.load_config

    def load_once(path, options):
        if path not in configs:
            configs[path] = load_config(path, None)
        cfg = copy.deepcopy(configs[path])
        cfg.merge_from_dict(options or {})
        return cfg

    monkeypatch.setattr(tool, 'load_config', load_once)
    return tool


def numbered(shapes):
    """A state dict with the value 1 in its first tensor, 2 in the next, ..."""
    return {
        name: torch.tensor(float(i)).expand(shape)
        for i, (name, shape) in enumerate(shapes.items(), start=1)
    }


def batch_norm(name, channels, counted=True):
    shapes = {
        f'{name}.{part}': (channels,) for part in ('weight', 'bias', 'running_mean', 'running_var')
    }
    return shapes | ({f'{name}.num_batches_tracked': ()} if counted else {})


def resnet50(dcn=False):
    """torchvision's names; deformable in the last three stages, without modulation."""
    shapes = {'backbone.conv1.weight': (64, 3, 7, 7), **batch_norm('backbone.bn1', 64)}
    inputs = 64
    for stage, count in enumerate(BLOCKS, start=1):
        width = 32 * 2**stage
        for block in range(count):
            name = f'backbone.layer{stage}.{block}'
            shapes[f'{name}.conv1.weight'] = (width, inputs, 1, 1)
            shapes[f'{name}.conv2.weight'] = (width, width, 3, 3)
            if dcn and stage > 1:
                shapes[f'{name}.conv2_offset.weight'] = (18, width, 3, 3)
                shapes[f'{name}.conv2_offset.bias'] = (18,)
            shapes[f'{name}.conv3.weight'] = (4 * width, width, 1, 1)
            for i, channels in enumerate((width, width, 4 * width), start=1):
                shapes |= batch_norm(f'{name}.bn{i}', channels)
            if block == 0:
                shapes[f'{name}.downsample.0.weight'] = (4 * width, inputs, 1, 1)
                shapes |= batch_norm(f'{name}.downsample.1', 4 * width)
            inputs = 4 * width
    return shapes


def with_bias(name, shape):
    return {f'{name}.weight': shape, f'{name}.bias': shape[:1]}


def fpn():
    shapes = {}
    for i in range(4):
        shapes |= with_bias(f'neck.lateral_convs.{i}.conv', (256, 256 * 2**i, 1, 1))
        shapes |= with_bias(f'neck.fpn_convs.{i}.conv', (256, 256, 3, 3))
    return shapes


def tower(name, depth, channels, inputs, dcn_from=99):
    """ConvModules of mmdet 1.x with GN."""
    shapes = {}
    for i in range(depth):
        here = inputs if i == 0 else channels
        shapes[f'{name}.{i}.conv.weight'] = (channels, here, 3, 3)
        if i >= dcn_from:
            shapes |= with_bias(f'{name}.{i}.conv.conv_offset', (18, here, 3, 3))
        shapes |= with_bias(f'{name}.{i}.gn', (channels,))
    return shapes


def released(model):
    """What the checkpoints of WXinlong/SOLO hold, by the configs and heads there."""
    dcn = model.endswith('dcn')
    shapes = resnet50(dcn) | fpn()
    light = 'light' in model
    if model.startswith('solov2'):
        channels, out = (256, 128) if light else (512, 256)
        depth = {'solov2': 4, 'solov2-light': 2, 'solov2-light-dcn': 3}[model]
        last = depth - 1 if dcn else 99
        shapes |= tower('bbox_head.cate_convs', depth, channels, 256, last)
        shapes |= tower('bbox_head.kernel_convs', depth, channels, 258, last)
        shapes |= with_bias('bbox_head.solo_cate', (80, channels, 3, 3))
        shapes |= with_bias('bbox_head.solo_kernel', (out, channels, 3, 3))
        for level in range(4):
            for i in range(max(level, 1)):
                name = f'mask_feat_head.convs_all_levels.{level}.conv{i}'
                inputs = 128 if i else 258 if level == 3 else 256
                shapes[f'{name}.conv.weight'] = (128, inputs, 3, 3)
                shapes |= with_bias(f'{name}.gn', (128,))
        shapes['mask_feat_head.conv_pred.0.conv.weight'] = (out, 128, 1, 1)
        return shapes | with_bias('mask_feat_head.conv_pred.0.gn', (out,))
    depth, last = (4, 3 if dcn else 99) if light else (7, 99)
    shapes |= tower('bbox_head.cate_convs', depth, 256, 256, last)
    if model == 'solo':
        shapes |= tower('bbox_head.ins_convs', depth, 256, 258)
        for i, size in enumerate(GRIDS):
            shapes |= with_bias(f'bbox_head.solo_ins_list.{i}', (size**2, 256, 1, 1))
        return shapes | with_bias('bbox_head.solo_cate', (80, 256, 3, 3))
    if light:
        shapes |= tower('bbox_head.ins_convs', depth, 256, 258, last)
    for axis in 'xy':
        if not light:
            shapes |= tower(f'bbox_head.ins_convs_{axis}', depth, 256, 257)
        for i, size in enumerate(GRIDS):
            shapes |= with_bias(f'bbox_head.dsolo_ins_list_{axis}.{i}', (size, 256, 3, 3))
    return shapes | with_bias('bbox_head.dsolo_cate', (80, 256, 3, 3))


def adelaidet():
    """What the checkpoints of AdelaiDet's SOLOv2 hold: detectron2's backbone, its own heads."""
    stem = 'backbone.bottom_up.stem.conv1'
    shapes = {f'{stem}.weight': (64, 3, 7, 7), **batch_norm(f'{stem}.norm', 64, counted=False)}
    inputs = 64
    for stage, count in enumerate(BLOCKS):
        width = 64 * 2**stage
        for block in range(count):
            name = f'backbone.bottom_up.res{stage + 2}.{block}'
            convs = [
                ('conv1', width, inputs, 1),
                ('conv2', width, width, 3),
                ('conv3', 4 * width, width, 1),
            ]
            if block == 0:
                convs.append(('shortcut', 4 * width, inputs, 1))
            for conv, out, into, size in convs:
                shapes[f'{name}.{conv}.weight'] = (out, into, size, size)
                shapes |= batch_norm(f'{name}.{conv}.norm', out, counted=False)
            inputs = 4 * width
    for level in range(2, 6):
        shapes |= with_bias(f'backbone.fpn_lateral{level}', (256, 64 * 2**level, 1, 1))
        shapes |= with_bias(f'backbone.fpn_output{level}', (256, 256, 3, 3))
    for name, first in (('cate', 256), ('kernel', 258)):
        for i in range(4):  # convolution, norm and ReLU are numbered in one row
            shapes[f'ins_head.{name}_tower.{3 * i}.weight'] = (512, 512 if i else first, 3, 3)
            shapes |= with_bias(f'ins_head.{name}_tower.{3 * i + 1}', (512,))
    shapes |= with_bias('ins_head.cate_pred', (80, 512, 3, 3))
    shapes |= with_bias('ins_head.kernel_pred', (256, 512, 3, 3))
    for level in range(4):
        for i in range(max(level, 1)):
            name = f'mask_head.convs_all_levels.{level}.conv{i}'
            shapes[f'{name}.0.weight'] = (128, 128 if i else 258 if level == 3 else 256, 3, 3)
            shapes |= with_bias(f'{name}.1', (128,))
    shapes['mask_head.conv_pred.0.weight'] = (256, 128, 1, 1)
    return shapes | with_bias('mask_head.conv_pred.1', (256,))


def load_strictly(path, config, tool):
    """The tensors that a model of the config takes, all of them."""
    state = torch.load(path, weights_only=True)['state_dict']
    model = tool.build_model(tool.load_config(config, None))
    model.load_state_dict(state, strict=True, assign=True)
    return state


def follow(source, state, names):
    """``names`` are pairs of a source name and the name that it should have got."""
    for old, new in names:
        value = source[old].flatten()[0]
        assert torch.equal(state[new], value.expand(state[new].shape)), (old, new)


@pytest.mark.parametrize('model', OURS)
def test_released_checkpoints(model, tool, tmp_path, repo, capsys):
    source = numbered(released(model))
    meta = {'CLASSES': ('person', 'bicycle'), 'epoch': 36}
    torch.save({'meta': meta, 'state_dict': source}, tmp_path / 'in.pth')
    config = str(repo / OURS[model])
    assert tool.main([str(tmp_path / 'in.pth'), str(tmp_path / 'out.pth'), '--config', config]) == 0
    assert f'{len(source)} tensors of a WXinlong/SOLO checkpoint' in capsys.readouterr().out
    state = load_strictly(tmp_path / 'out.pth', config, tool)
    written = torch.load(tmp_path / 'out.pth', weights_only=True)
    assert written['meta']['dataset_meta']['classes'] == ('person', 'bicycle')

    values = [value.flatten()[0].item() for value in state.values()]
    assert sorted(values) == list(range(1, len(source) + 1))  # each went somewhere, none twice
    follow(
        source,
        state,
        [
            ('backbone.layer3.5.bn2.running_var', 'backbone.layer3.5.bn2.running_var'),
            ('neck.fpn_convs.3.conv.bias', 'neck.fpn_convs.3.conv.bias'),
            ('bbox_head.cate_convs.1.conv.weight', 'mask_head.cls_convs.1.conv.weight'),
            ('bbox_head.cate_convs.1.gn.bias', 'mask_head.cls_convs.1.gn.bias'),
        ],
    )
    if model.startswith('solov2'):
        pairs = [
            ('solo_cate.weight', 'conv_cls.weight'),
            ('solo_kernel.bias', 'conv_kernel.bias'),
            ('kernel_convs.0.conv.weight', 'kernel_convs.0.conv.weight'),
        ]
        features = 'mask_head.mask_feature_head'
        follow(
            source,
            state,
            [
                ('mask_feat_head.conv_pred.0.gn.weight', f'{features}.conv_pred.gn.weight'),
                (
                    'mask_feat_head.convs_all_levels.3.conv2.conv.weight',
                    f'{features}.convs_all_levels.3.conv2.conv.weight',
                ),
            ],
        )
    elif model == 'solo':
        pairs = [
            ('solo_cate.bias', 'conv_cls.bias'),
            ('solo_ins_list.2.weight', 'conv_mask_list.2.weight'),
            ('ins_convs.6.gn.weight', 'mask_convs.6.gn.weight'),
        ]
    else:
        pairs = [
            ('dsolo_cate.bias', 'conv_cls.bias'),
            ('dsolo_ins_list_x.4.weight', 'conv_mask_list_x.4.weight'),
            ('dsolo_ins_list_y.4.weight', 'conv_mask_list_y.4.weight'),
        ]
        axis = '' if 'light' in model else '_y'
        pairs.append((f'ins_convs{axis}.0.conv.weight', f'mask_convs{axis}.0.conv.weight'))
    follow(source, state, [(f'bbox_head.{a}', f'mask_head.{b}') for a, b in pairs])
    if model.endswith('dcn'):
        old, new = 'backbone.layer2.3.conv2_offset', 'backbone.layer2.3.conv2.conv_offset'
        for part, modulation in (('weight', 0), ('bias', 20)):
            value = state[f'{new}.{part}']
            assert (value[:18] == source[f'{old}.{part}'].flatten()[0]).all()
            assert (value[18:] == modulation).all() and len(value) == 27


def test_classes_keep_their_order(tool, tmp_path, repo):
    source = numbered(released('solov2-light'))
    source['bbox_head.solo_cate.bias'] = torch.randn(80)
    source['bbox_head.solo_cate.weight'] = torch.randn(80, 256, 3, 3)
    torch.save({'state_dict': source}, tmp_path / 'in.pth')
    config = str(repo / OURS['solov2-light'])
    assert tool.main([str(tmp_path / 'in.pth'), str(tmp_path / 'out.pth'), '--config', config]) == 0
    state = torch.load(tmp_path / 'out.pth', weights_only=True)['state_dict']
    for part in ('weight', 'bias'):
        expected = source[f'bbox_head.solo_cate.{part}']
        assert torch.equal(state[f'mask_head.conv_cls.{part}'], expected)


def test_deformable_convolutions_keep_their_values(tool):
    """A plain deformable layer of mmcv, and the modulated one that its tensors become."""
    from mmcv.ops import DeformConv2dPack, ModulatedDeformConv2dPack

    torch.manual_seed(0)
    plain = DeformConv2dPack(4, 6, 3, padding=1)
    torch.nn.init.normal_(plain.conv_offset.weight, std=0.5)
    torch.nn.init.normal_(plain.conv_offset.bias)
    modulated = ModulatedDeformConv2dPack(4, 6, 3, padding=1, bias=False)
    target = {f'conv.{name}': value for name, value in modulated.state_dict().items()}
    source = {f'conv.{name}': value for name, value in plain.state_dict().items()}
    converted, problems = tool.convert(source, (), target)
    assert not problems
    modulated.load_state_dict({name[5:]: value for name, value in converted.items()})
    x = torch.randn(2, 4, 9, 13)
    assert torch.allclose(modulated(x), plain(x), rtol=1e-5, atol=1e-6)
    assert torch.equal(torch.sigmoid(modulated.conv_offset.bias[18:]), torch.ones(9))


def test_adelaidet(tool, tmp_path, repo, capsys):
    source = numbered(adelaidet())
    torch.save({'model': source, '__author__': 'x', 'iteration': 1}, tmp_path / 'in.pth')
    config = str(repo / OURS['solov2'])
    arguments = [str(tmp_path / 'in.pth'), str(tmp_path / 'out.pth'), '--config', config]
    assert tool.main(arguments) == 0
    said = capsys.readouterr().out
    state = load_strictly(tmp_path / 'out.pth', config, tool)
    counted = [value for name, value in state.items() if name.endswith('num_batches_tracked')]
    values = [v.flatten()[0].item() for n, v in state.items() if not n.endswith('tracked')]
    assert len(counted) == 53 and not any(counted)
    assert sorted(values) == list(range(1, len(source) + 1))
    features = 'mask_head.mask_feature_head'
    follow(
        source,
        state,
        [
            ('backbone.bottom_up.stem.conv1.weight', 'backbone.conv1.weight'),
            ('backbone.bottom_up.stem.conv1.norm.running_mean', 'backbone.bn1.running_mean'),
            ('backbone.bottom_up.res2.0.conv3.weight', 'backbone.layer1.0.conv3.weight'),
            ('backbone.bottom_up.res5.2.conv2.norm.bias', 'backbone.layer4.2.bn2.bias'),
            ('backbone.bottom_up.res3.0.shortcut.weight', 'backbone.layer2.0.downsample.0.weight'),
            (
                'backbone.bottom_up.res3.0.shortcut.norm.bias',
                'backbone.layer2.0.downsample.1.bias',
            ),
            ('backbone.fpn_lateral2.bias', 'neck.lateral_convs.0.conv.bias'),
            ('backbone.fpn_output5.weight', 'neck.fpn_convs.3.conv.weight'),
            ('ins_head.cate_tower.9.weight', 'mask_head.cls_convs.3.conv.weight'),
            ('ins_head.kernel_tower.1.weight', 'mask_head.kernel_convs.0.gn.weight'),
            ('ins_head.cate_pred.bias', 'mask_head.conv_cls.bias'),
            ('ins_head.kernel_pred.weight', 'mask_head.conv_kernel.weight'),
            (
                'mask_head.convs_all_levels.2.conv1.0.weight',
                f'{features}.convs_all_levels.2.conv1.conv.weight',
            ),
            ('mask_head.conv_pred.1.weight', f'{features}.conv_pred.gn.weight'),
        ],
    )

    # with the options that it prints there is nothing left to say
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    words = shlex.split(said[said.index('--cfg-options') :])
    cfg = tool.load_config(config, parser.parse_args(words).cfg_options)
    assert cfg.model.backbone.style == 'caffe'
    preprocessor = cfg.model.data_preprocessor
    assert preprocessor.mean == [103.53, 116.28, 123.675] and preprocessor.std == [1, 1, 1]
    assert preprocessor.bgr_to_rgb is False
    assert tool.main(arguments + words) == 0
    assert 'cfg-options' not in capsys.readouterr().out


def test_freesolo(tool, tmp_path, repo, capsys):
    """AdelaiDet's names, two classes of which one was trained, embeddings and a step."""
    shapes = adelaidet() | with_bias('ins_head.emb_pred', (128, 512, 3, 3)) | {'_iter': (1,)}
    source = numbered(shapes | with_bias('ins_head.cate_pred', (2, 512, 3, 3)))
    source['ins_head.cate_pred.bias'] = torch.tensor([0.25, 0.75])
    torch.save({'model': source, 'iteration': 30000}, tmp_path / 'in.pth')
    config = str(repo / 'configs/freesolo/freesolo_r50_fpn_8xb2-30k_coco241k.py')
    arguments = [str(tmp_path / 'in.pth'), str(tmp_path / 'out.pth'), '--config', config]
    assert tool.main(arguments) == 1
    assert 'mask_head.conv_embed.weight has (2048, 512, 3, 3)' in capsys.readouterr().err
    options = ['--cfg-options', 'model.mask_head.embed_dims=128']
    assert tool.main(arguments + options) == 0
    said = capsys.readouterr().out
    assert 'of a FreeSOLO checkpoint' in said and 'cfg-options' not in said
    state = torch.load(tmp_path / 'out.pth', weights_only=True)['state_dict']
    follow(
        source,
        state,
        [
            ('ins_head.emb_pred.weight', 'mask_head.conv_embed.weight'),
            ('ins_head.cate_pred.weight', 'mask_head.conv_cls.weight'),
            ('ins_head.kernel_pred.bias', 'mask_head.conv_kernel.bias'),
            ('backbone.bottom_up.res4.5.conv2.weight', 'backbone.layer3.5.conv2.weight'),
        ],
    )
    assert state['mask_head.conv_cls.bias'].tolist() == [0.25]
    assert state['mask_head.loss_mask.steps'] == source['_iter'].item()
    assert state['mask_head.loss_mask.steps'].dtype == torch.long
    source['ins_head.odd'] = torch.zeros(1)
    torch.save({'model': source}, tmp_path / 'in.pth')
    assert tool.main(arguments + options) == 1
    assert 'no place for ins_head.odd (1,)' in capsys.readouterr().err


STOCK = {
    'solo': 'mmdet::solo/solo_r50_fpn_3x_coco.py',
    'decoupled': 'mmdet::solo/decoupled-solo_r50_fpn_3x_coco.py',
    'solov2': 'mmdet::solov2/solov2_r50_fpn_ms-3x_coco.py',
    'solov2-light': 'mmdet::solov2/solov2-light_r50_fpn_ms-3x_coco.py',
}


@pytest.mark.parametrize('model', STOCK)
def test_stock_mmdet_both_ways(model, tool, tmp_path, repo):
    config = str(repo / OURS[model])
    stock, ours = (tool.build_model(tool.load_config(c, None)) for c in (STOCK[model], config))
    for start, goal, goal_config in ((stock, ours, config), (ours, stock, STOCK[model])):
        shapes = {name: value.shape for name, value in start.state_dict().items()}
        source = numbered(shapes)
        meta = {'dataset_meta': {'classes': ('a',)}}
        torch.save({'meta': meta, 'state_dict': source}, tmp_path / 'in.pth')
        paths = [str(tmp_path / name) for name in ('in.pth', 'out.pth')]
        assert tool.main([*paths, '--config', goal_config]) == 0
        written = torch.load(paths[1], weights_only=True)
        goal.load_state_dict(written['state_dict'], strict=True, assign=True)
        assert written['meta'] == meta
        assert all(written['state_dict'][name].equal(value) for name, value in source.items())


def test_what_does_not_fit_is_named(tool, tmp_path, repo, capsys):
    source = numbered(released('solov2-light'))
    del source['bbox_head.solo_kernel.bias']
    source['bbox_head.kernel_convs.2.gn.weight'] = torch.zeros(256)
    source['bbox_head.solo_cate.bias'] = torch.zeros(81)
    source['optimizer_of_ours'] = torch.zeros(1)
    torch.save({'state_dict': source}, tmp_path / 'in.pth')
    config = str(repo / OURS['solov2-light'])
    assert tool.main([str(tmp_path / 'in.pth'), str(tmp_path / 'out.pth'), '--config', config]) == 1
    said = capsys.readouterr().err.splitlines()[-5:]
    assert 'no place for bbox_head.kernel_convs.2.gn.weight (256,)' in said
    assert 'no place for optimizer_of_ours (1,)' in said
    assert 'nothing for mask_head.conv_kernel.bias (128,)' in said
    assert 'bbox_head.solo_cate.bias has the shape (81,), mask_head.conv_cls.bias has (80,)' in said
    assert said[-1].startswith('4 of these, so')
    assert not (tmp_path / 'out.pth').exists()


def test_another_number_of_classes(tool, tmp_path, repo):
    source = numbered(released('solov2-light'))
    source |= numbered(with_bias('bbox_head.solo_cate', (3, 256, 3, 3)))
    torch.save(source, tmp_path / 'in.pth')  # a bare state dict
    arguments = [str(tmp_path / 'in.pth'), str(tmp_path / 'out.pth')]
    arguments += ['--config', str(repo / OURS['solov2-light'])]
    assert tool.main(arguments) == 1
    assert tool.main([*arguments, '--cfg-options', 'model.mask_head.num_classes=3']) == 0


def test_bad_input_ends_in_one_sentence(tool, tmp_path, repo, capsys):
    config = str(repo / OURS['solov2-light'])
    out = str(tmp_path / 'out.pth')
    (tmp_path / 'text.pth').write_text('hello')
    torch.save({'state_dict': {'head.weight': torch.zeros(1)}}, tmp_path / 'other.pth')
    torch.save({'model': np.zeros(2)}, tmp_path / 'empty.pth')
    torch.save([1, 2], tmp_path / 'list.pth')
    for name, words in (
        ('none.pth', 'is not a file'),
        ('text.pth', 'cannot be read as a checkpoint'),
        ('other.pth', 'this is no checkpoint of SOLO: among its modules, head,'),
        ('empty.pth', 'no checkpoint of SOLO'),
        ('list.pth', 'list.pth: a checkpoint holds tensors by name, not a list'),
    ):
        with pytest.raises(SystemExit):
            tool.main([str(tmp_path / name), out, '--config', config])
        assert words in capsys.readouterr().err.splitlines()[-1]
    torch.save({'state_dict': numbered(released('solov2-light'))}, tmp_path / 'in.pth')
    with pytest.raises(SystemExit):
        tool.main([str(tmp_path / 'in.pth'), out, '--config', 'none.py'])
    assert 'none.py' in capsys.readouterr().err.splitlines()[-1]
