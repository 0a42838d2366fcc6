"""The converter of DenseCL's checkpoints, on state dicts with the names of the originals.

The tensors are numbers spread over a shape: one per name, so that each can be followed.
"""

import pytest
import torch

BLOCKS = (3, 4, 6, 3)
QUEUE = 65536


@pytest.fixture
def tool(load_script):
    return load_script('tools/convert/densecl_checkpoint.py')


def norm(name, channels):
    parts = ('weight', 'bias', 'running_mean', 'running_var')
    return {f'{name}.{part}': (channels,) for part in parts} | {f'{name}.num_batches_tracked': ()}


def resnet50(prefix=''):
    """torchvision's names."""
    shapes = {f'{prefix}conv1.weight': (64, 3, 7, 7), **norm(f'{prefix}bn1', 64)}
    inputs = 64
    for stage, count in enumerate(BLOCKS, start=1):
        width = 32 * 2**stage
        for block in range(count):
            name = f'{prefix}layer{stage}.{block}'
            shapes[f'{name}.conv1.weight'] = (width, inputs, 1, 1)
            shapes[f'{name}.conv2.weight'] = (width, width, 3, 3)
            shapes[f'{name}.conv3.weight'] = (4 * width, width, 1, 1)
            for i, channels in enumerate((width, width, 4 * width), start=1):
                shapes |= norm(f'{name}.bn{i}', channels)
            if block == 0:
                shapes[f'{name}.downsample.0.weight'] = (4 * width, inputs, 1, 1)
                shapes |= norm(f'{name}.downsample.1', 4 * width)
            inputs = 4 * width
    return shapes


def neck(prefix):
    shapes = {}
    for name, kernel in (('mlp', ()), ('mlp2', (1, 1))):
        for layer, channels in ((0, 2048), (2, 128)):
            shapes[f'{prefix}{name}.{layer}.weight'] = (channels, 2048, *kernel)
            shapes[f'{prefix}{name}.{layer}.bias'] = (channels,)
    return shapes


QUEUES = {'queue': (128, QUEUE), 'queue_ptr': (1,), 'queue2': (128, QUEUE), 'queue2_ptr': (1,)}
RELEASED = {
    **QUEUES,
    **resnet50('encoder_q.0.'),
    **neck('encoder_q.1.'),
    **resnet50('encoder_k.0.'),
    **neck('encoder_k.1.'),
    **resnet50('backbone.'),
}
MMPRETRAIN = {
    **QUEUES,
    **resnet50('backbone.'),
    **neck('neck.'),
    'encoder_k.steps': (),
    **resnet50('encoder_k.module.0.'),
    **neck('encoder_k.module.1.'),
}


def numbered(shapes):
    """A state dict with the value 1 in its first tensor, 2 in the next, ...; positions are 512."""
    state = {
        name: torch.tensor(float(i)).expand(shape)
        for i, (name, shape) in enumerate(shapes.items(), start=1)
    }
    for name in state:
        if name.startswith('backbone.') and f'encoder_q.0.{name[9:]}' in state:
            state[name] = state[f'encoder_q.0.{name[9:]}']  # the same module
        if name.endswith('_ptr'):
            state[name] = torch.tensor([512])
    return state


def run(tool, tmp_path, state, to, *options):
    torch.save({'state_dict': state, 'author': 'DenseCL'}, tmp_path / 'in.pth')
    files = [str(tmp_path / name) for name in ('in.pth', 'out.pth')]
    status = tool.main([*files, '--to', to, *options])
    out = tmp_path / 'out.pth'
    return status, torch.load(out)['state_dict'] if out.exists() else None


def value(tensor):
    assert (tensor == tensor.flatten()[0]).all()
    return tensor.flatten()[0].item()


@pytest.mark.parametrize(
    ('shapes', 'places'),
    [
        (
            RELEASED,
            {
                'backbone.layer3.5.bn2.running_var': 'encoder_q.0.layer3.5.bn2.running_var',
                'head.global_mlp.2.weight': 'encoder_q.1.mlp.2.weight',
                'head.dense_mlp.0.bias': 'encoder_q.1.mlp2.0.bias',
                'key_encoder.backbone.conv1.weight': 'encoder_k.0.conv1.weight',
                'key_encoder.head.dense_mlp.2.weight': 'encoder_k.1.mlp2.2.weight',
            },
        ),
        (
            MMPRETRAIN,
            {
                'backbone.bn1.weight': 'backbone.bn1.weight',
                'head.dense_mlp.2.bias': 'neck.mlp2.2.bias',
                'key_encoder.backbone.layer1.0.downsample.1.bias': (
                    'encoder_k.module.0.layer1.0.downsample.1.bias'
                ),
                'key_encoder.head.global_mlp.0.weight': 'encoder_k.module.1.mlp.0.weight',
            },
        ),
    ],
    ids=['released', 'mmpretrain'],
)
def test_whole_models_come_in(tool, tmp_path, shapes, places):
    state = numbered(shapes)
    status, ours = run(tool, tmp_path, state, 'densecl')
    assert status == 0
    for name, theirs in places.items():
        assert value(ours[name]) == value(state[theirs]), name
    assert ours['queue.keys'].shape == (QUEUE, 128)
    assert value(ours['dense_queue.keys']) == value(state['queue2'])
    assert ours['queue.written'] == QUEUE + 512 and ours['queue.written'].shape == ()


def test_there_and_back(tool, tmp_path):
    state = numbered(RELEASED)
    _, ours = run(tool, tmp_path, state, 'densecl')
    status, back = run(tool, tmp_path, ours, 'released')
    assert status == 0 and back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize('shapes', [RELEASED, MMPRETRAIN, resnet50()], ids=len)
def test_the_backbone_loads_everywhere(tool, tmp_path, shapes):
    import mmdet.models.backbones
    import mmseg.models.backbones
    import torchvision

    state = numbered(shapes)
    status, backbone = run(tool, tmp_path, state, 'backbone')
    assert status == 0 and backbone.keys() == resnet50().keys()
    with torch.device('meta'):
        theirs = torchvision.models.resnet50()
        theirs.fc = torch.nn.Identity()
        stages = dict(depth=50, out_indices=(0, 1, 2, 3))
        detector = mmdet.models.backbones.ResNet(**stages)
        segmenter = mmseg.models.backbones.ResNet(**stages)
    for model in (theirs, detector, segmenter):
        model.load_state_dict(backbone, assign=True)
    prefix = next(p for p in ('encoder_q.0.', 'backbone.', '') if f'{p}conv1.weight' in state)
    name = 'layer4.2.conv3.weight'
    assert value(backbone[name]) == value(state[prefix + name])


def test_nothing_is_written_unless_all_fits(tool, tmp_path, capsys):
    state = numbered(RELEASED)
    del state['encoder_k.0.bn1.bias']
    state['encoder_q.1.mlp3.weight'] = torch.zeros(3)
    state['queue'] = torch.zeros(64, QUEUE)
    status, out = run(tool, tmp_path, state, 'densecl')
    assert status == 1 and out is None
    lines = capsys.readouterr().err.splitlines()
    assert 'no place for encoder_q.1.mlp3.weight (3,)' in lines
    assert 'nothing for key_encoder.backbone.bn1.bias (64,)' in lines
    assert f'queue.keys has the shape ({QUEUE}, 64), the model has ({QUEUE}, 128)' in lines
    assert lines[-1].startswith('3 of these, so ')


@pytest.mark.parametrize('state', [{}, {'fc.weight': torch.zeros(2)}, {'conv1.weight': 'text'}])
def test_other_files_are_refused(tool, tmp_path, state, capsys):
    with pytest.raises(SystemExit):
        run(tool, tmp_path, state, 'backbone')
    assert 'this is no checkpoint' in capsys.readouterr().err


def test_a_backbone_alone_is_no_whole_model(tool, tmp_path, capsys):
    status, out = run(tool, tmp_path, numbered(resnet50()), 'densecl')
    assert status == 1 and out is None
    assert 'nothing for queue.keys' in capsys.readouterr().err


def test_queues_of_another_length_begin_anew(tool, tmp_path, repo, capsys):
    (tmp_path / 'short.py').write_text(
        f"_base_ = '{repo}/configs/densecl/densecl_r50_c5_8xb32-800e_coco.py'\n"
        'model = dict(queue_size=512)\n'
    )
    options = '--config', str(tmp_path / 'short.py')
    status, ours = run(tool, tmp_path, numbered(RELEASED), 'densecl', *options)
    assert status == 0 and ours['queue.written'] == ours['dense_queue.written'] == 0
    assert ours['queue.keys'].shape == (512, 128)
    torch.testing.assert_close(ours['queue.keys'].norm(dim=1), torch.ones(512))
    assert (
        'dense_queue begins anew: it has 65536 keys, the model wants 512' in capsys.readouterr().out
    )
