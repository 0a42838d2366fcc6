#!/usr/bin/env python
"""Convert a checkpoint of DenseCL or MoCo-v2, or take the backbone out of it.

    python tools/convert/densecl_checkpoint.py densecl_r50_coco_800ep.pth backbone.pth --to backbone
    python tools/convert/densecl_checkpoint.py epoch_800.pth densecl.pth --to densecl

Sources, told apart by their names: WXinlong/DenseCL (OpenSelfSup) and the backbones it has
released, mmpretrain's DenseCL, and this project. ``--to``:

backbone    the query encoder's backbone alone, conv1.weight and so on: as torchvision, mmdet and
            mmseg name it, for ``init_cfg=dict(type='Pretrained', checkpoint=...)``
densecl     all of this project's DenseCL, to train on; queues of another length than the config's
            begin anew
released    all of it as WXinlong/DenseCL names it

Every tensor must find its place in the model of ``--config``: names that do not, places that stay
empty and shapes that differ are printed, nothing is written, and the exit status is 1.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import mmdet_plugins.common.runtime  # noqa: E402, F401
from mmdet_plugins.common.checkpoint import load_from_local  # noqa: E402
from mmdet_plugins.common.files import atomic_write  # noqa: E402

CONFIG = ROOT / 'configs' / 'densecl' / 'densecl_r50_c5_8xb32-800e_coco.py'
# Pairs of beginnings, theirs and ours, of which the first that fits is exchanged.
RELEASED = (
    ('encoder_q.0.', 'backbone.'),
    ('encoder_q.1.mlp.', 'head.global_mlp.'),
    ('encoder_q.1.mlp2.', 'head.dense_mlp.'),
    ('encoder_k.0.', 'key_encoder.backbone.'),
    ('encoder_k.1.mlp.', 'key_encoder.head.global_mlp.'),
    ('encoder_k.1.mlp2.', 'key_encoder.head.dense_mlp.'),
    ('queue2_ptr', 'dense_queue.written'),
    ('queue2', 'dense_queue.keys'),
    ('queue_ptr', 'queue.written'),
    ('queue', 'queue.keys'),
)
MMPRETRAIN = (
    ('neck.mlp.', 'head.global_mlp.'),
    ('neck.mlp2.', 'head.dense_mlp.'),
    ('encoder_k.module.0.', 'key_encoder.backbone.'),
    ('encoder_k.module.1.mlp.', 'key_encoder.head.global_mlp.'),
    ('encoder_k.module.1.mlp2.', 'key_encoder.head.dense_mlp.'),
    *RELEASED[-4:],
)
BACKBONE = (('', 'backbone.'),)


def read_state(path: str) -> dict[str, Tensor]:
    checkpoint = load_from_local(path, map_location='cpu')
    state = checkpoint.get('state_dict', checkpoint) if isinstance(checkpoint, Mapping) else None
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f'{path}: this is no checkpoint, which holds tensors by name.')
    return dict(state)


def source_of(state: Mapping[str, Tensor]) -> tuple[str, tuple]:
    """What a state dict comes from, and the rules for its names."""
    if 'queue.keys' in state:
        return 'mminstance', ()
    if 'encoder_q.0.conv1.weight' in state:
        return 'WXinlong/DenseCL', RELEASED
    if any(name.startswith('encoder_k.module.') for name in state):
        return 'mmpretrain', MMPRETRAIN
    if 'conv1.weight' in state:
        return 'backbone', BACKBONE
    raise ValueError(
        'this is no checkpoint of DenseCL: it has neither encoder_q nor encoder_k, nor a '
        f"backbone's conv1.weight; its first names are {', '.join(list(state)[:5])}."
    )


def to_ours(state: Mapping[str, Tensor], rules: tuple) -> dict[str, Tensor]:
    """Our names; ``RELEASED`` queues are columns, and only their write position is stored."""
    found = {}
    for name, value in state.items():
        if rules is RELEASED and name.startswith('backbone.'):
            continue  # the query encoder's, a second time
        if rules is MMPRETRAIN and name == 'encoder_k.steps':
            continue  # of no use: the momentum is constant
        begin, ours = next((rule for rule in rules if name.startswith(rule[0])), ('', ''))
        renamed = ours + name[len(begin) :]
        if rules and renamed.endswith('queue.keys'):
            value = value.T.contiguous()
        elif rules and renamed.endswith('queue.written'):
            # a training that anyone keeps has filled its queue
            value = value.reshape(()) + state[name.removesuffix('_ptr')].shape[1]
        found[renamed] = value
    return found


def to_released(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, value in state.items():
        theirs, begin = next(rule for rule in RELEASED if name.startswith(rule[1]))
        if name.endswith('queue.keys'):
            value = value.T.contiguous()
        elif name.endswith('queue.written'):
            value = value.reshape(1) % len(state[name.replace('written', 'keys')])
        found[theirs + name[len(begin) :]] = value
        if begin == 'backbone.':
            found[name] = value
    return found


def problems_of(
    state: Mapping[str, Tensor], target: Mapping[str, Tensor], wanted: str
) -> list[str]:
    """A line for each tensor without a place, of another shape, or missing among ``wanted``."""
    lines = []
    for name, value in state.items():
        if name not in target:
            lines.append(f'no place for {name} {tuple(value.shape)}')
        elif name.startswith(wanted) and value.shape != target[name].shape:
            shapes = tuple(value.shape), tuple(target[name].shape)
            lines.append(f'{name} has the shape {shapes[0]}, the model has {shapes[1]}')
    return lines + [
        f'nothing for {name} {tuple(value.shape)}'
        for name, value in target.items()
        if name.startswith(wanted) and name not in state
    ]


def fit_queues(state: dict[str, Tensor], target: Mapping[str, Tensor]) -> None:
    """Begin queues anew, random and unwritten, that the model has of another length."""
    for name in ('queue', 'dense_queue'):
        keys, wanted = state.get(f'{name}.keys'), target[f'{name}.keys']
        if keys is None or len(keys) == len(wanted) or keys.shape[1:] != wanted.shape[1:]:
            continue
        print(f'{name} begins anew: it has {len(keys)} keys, the model wants {len(wanted)}')
        state[f'{name}.keys'] = F.normalize(torch.randn(wanted.shape), dim=1)
        state[f'{name}.written'] = torch.zeros((), dtype=torch.long)


def build_model(config: str) -> torch.nn.Module:
    """The model of a config, without memory for its tensors."""
    register_all_modules(init_default_scope=True)
    with torch.device('meta'):
        return MODELS.build(Config.fromfile(config).model)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('checkpoint', help='what is converted')
    parser.add_argument('out', help='where to write it')
    parser.add_argument('--to', required=True, choices=('backbone', 'densecl', 'released'))
    parser.add_argument('--config', default=CONFIG, help='of the model (default: ResNet-50)')
    args = parser.parse_args(argv)
    try:
        state = read_state(args.checkpoint)
        source, rules = source_of(state)
    except (OSError, ValueError, RuntimeError) as error:
        parser.error(str(error))
    converted = to_ours(state, rules)
    wanted = 'backbone.' if args.to == 'backbone' else ''
    target = build_model(args.config).state_dict()
    if args.to == 'densecl':
        fit_queues(converted, target)
    problems = problems_of(converted, target, wanted)
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        print(
            f'{len(problems)} of these, so {args.out} is not written: the {source} checkpoint and '
            'the config describe different models.',
            file=sys.stderr,
        )
        return 1
    if args.to == 'backbone':
        begin = len(wanted)
        converted = {n[begin:]: value for n, value in converted.items() if n.startswith(wanted)}
    elif args.to == 'released':
        converted = to_released(converted)
    with atomic_write(args.out, 'wb') as file:
        torch.save({'meta': {}, 'state_dict': converted}, file)
    print(f'{len(converted)} tensors of a {source} checkpoint are in {args.out}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
