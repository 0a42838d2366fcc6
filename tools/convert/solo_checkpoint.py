#!/usr/bin/env python
"""Convert a checkpoint of SOLO, Decoupled SOLO, SOLOv2 or FreeSOLO to the model of a config.

    python tools/convert/solo_checkpoint.py SOLOv2_R50_3x.pth solov2_r50.pth \\
        --config configs/solov2/solov2_r50_fpn_8xb2-3x_coco.py

Sources, told apart by their names: WXinlong/SOLO (mmdet 1.x; SOLO, Decoupled SOLO, SOLOv2 and the
light forms), AdelaiDet's SOLOv2 (detectron2), NVlabs/FreeSOLO (the same with embeddings), stock
mmdet 3.x, and this project. Targets: a config of this project, or a stock one,
mmdet::solov2/solov2_r50_fpn_1x_coco.py. The released FreeSOLO wants --cfg-options
model.backbone.depth=101 model.mask_head.embed_dims=128; its second class was never trained, and is
left out.

Deformable convolutions without modulation become modulated ones of the same values; their
modulation is saturated, so further training leaves it at 1. Classes keep their order: these heads
are sigmoid, and no source has a background channel. AdelaiDet's backbone is caffe's, its images are
BGR: the options that a config needs for it are printed unless it has them.

Every tensor must find its place: names that do not, places that stay empty and shapes that differ
are printed, nothing is written, and the exit status is 1.
"""

import argparse
import re
import sys
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config, DictAction
from mmengine.hub import get_config
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import mmdet_plugins.common.runtime  # noqa: E402, F401
from mmdet_plugins.common.checkpoint import load_from_local  # noqa: E402
from mmdet_plugins.common.files import atomic_write  # noqa: E402

TOWERS = {
    'cate_convs': 'cls_convs',
    'kernel_convs': 'kernel_convs',
    'ins_convs': 'mask_convs',
    'ins_convs_x': 'mask_convs_x',
    'ins_convs_y': 'mask_convs_y',
    'solo_cate': 'conv_cls',
    'dsolo_cate': 'conv_cls',
    'solo_kernel': 'conv_kernel',
    'solo_ins_list': 'conv_mask_list',
    'dsolo_ins_list_x': 'conv_mask_list_x',
    'dsolo_ins_list_y': 'conv_mask_list_y',
    'cate_tower': 'cls_convs',
    'kernel_tower': 'kernel_convs',
    'cate_pred': 'conv_cls',
    'kernel_pred': 'conv_kernel',
    'emb_pred': 'conv_embed',
}
_MASKS = 'mask_head.mask_feature_head'
_PART = {'0': 'conv', '1': 'gn'}
# Patterns of whole names, and what they become. A name that matches none stays as it is.
WXINLONG = (
    (r'bbox_head\.(\w+)\.(.+)', lambda m: f'mask_head.{TOWERS.get(m[1], m[1])}.{m[2]}'),
    (r'mask_feat_head\.conv_pred\.0\.(.+)', lambda m: f'{_MASKS}.conv_pred.{m[1]}'),
    (r'mask_feat_head\.(.+)', lambda m: f'{_MASKS}.{m[1]}'),
    (r'(.+\.conv2)_offset\.(\w+)', lambda m: f'{m[1]}.conv_offset.{m[2]}'),  # of early versions
)
ADELAIDET = (
    (r'backbone\.bottom_up\.stem\.conv1\.norm\.(\w+)', lambda m: f'backbone.bn1.{m[1]}'),
    (r'backbone\.bottom_up\.stem\.(conv1\.\w+)', lambda m: f'backbone.{m[1]}'),
    (
        r'backbone\.bottom_up\.res(\d)\.(\d+)\.shortcut\.(norm\.)?(\w+)',
        lambda m: f'backbone.layer{int(m[1]) - 1}.{m[2]}.downsample.{1 if m[3] else 0}.{m[4]}',
    ),
    (
        r'backbone\.bottom_up\.res(\d)\.(\d+)\.conv(\d)\.norm\.(\w+)',
        lambda m: f'backbone.layer{int(m[1]) - 1}.{m[2]}.bn{m[3]}.{m[4]}',
    ),
    (
        r'backbone\.bottom_up\.res(\d)\.(.+)',
        lambda m: f'backbone.layer{int(m[1]) - 1}.{m[2]}',
    ),
    (
        r'backbone\.fpn_(lateral|output)(\d)\.(\w+)',
        lambda m: f'neck.{m[1].replace("output", "fpn")}_convs.{int(m[2]) - 2}.conv.{m[3]}',
    ),
    (
        r'ins_head\.(\w+_tower)\.(\d+)\.(\w+)',  # convolution, norm, ReLU, convolution, ...
        lambda m: (
            f'mask_head.{TOWERS.get(m[1], m[1])}.{int(m[2]) // 3}.'
            f'{_PART.get(str(int(m[2]) % 3), "relu")}.{m[3]}'
        ),
    ),
    (r'ins_head\.(\w+_pred)\.(\w+)', lambda m: f'mask_head.{TOWERS.get(m[1], m[1])}.{m[2]}'),
    (
        r'mask_head\.(conv_pred|convs_all_levels\.\d\.conv\d)\.([01])\.(\w+)',
        lambda m: f'{_MASKS}.{m[1]}.{_PART[m[2]]}.{m[3]}',
    ),
)
FREESOLO = (*ADELAIDET, (r'_iter', lambda m: 'mask_head.loss_mask.steps'))
ADELAIDET_OPTIONS = {
    'model.backbone.style': 'caffe',
    'model.data_preprocessor.mean': [103.53, 116.28, 123.675],
    'model.data_preprocessor.std': [1.0, 1.0, 1.0],
    'model.data_preprocessor.bgr_to_rgb': False,
}
SATURATED = 20.0  # its sigmoid is 1 in float32


def read_state(path: str) -> tuple[dict[str, Tensor], dict]:
    """Tensors and ``dataset_meta`` of a checkpoint of any source."""
    checkpoint = load_from_local(path, map_location='cpu')
    state = checkpoint
    for key in ('state_dict', 'model'):  # mmengine's and mmcv's, detectron2's
        if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get(key), Mapping):
            state = checkpoint[key]
    if not isinstance(state, Mapping):
        raise ValueError(
            f'{path}: a checkpoint holds tensors by name, not a {type(state).__name__}.'
        )
    state = {
        name: torch.as_tensor(value)
        for name, value in state.items()
        if isinstance(value, Tensor | np.ndarray)
    }
    meta = checkpoint.get('meta') or {}
    dataset_meta = meta.get('dataset_meta')
    if dataset_meta is None and 'CLASSES' in meta:
        dataset_meta = {'classes': tuple(meta['CLASSES'])}
    return state, dataset_meta


def source_of(state: Mapping[str, Any]) -> tuple[str, tuple]:
    """What a state dict comes from, and the rules for its names."""
    parts = {name.split('.')[0] for name in state}
    if 'ins_head.emb_pred.weight' in state:
        return 'FreeSOLO', FREESOLO
    if 'ins_head' in parts:
        return 'AdelaiDet', ADELAIDET
    if 'bbox_head' in parts:
        return 'WXinlong/SOLO', WXINLONG
    if 'mask_head' in parts:
        return 'mmdet 3.x', ()
    raise ValueError(
        'this is no checkpoint of SOLO: among its modules, '
        f'{", ".join(sorted(parts)[:8]) or "none at all"}, is no ins_head, bbox_head or mask_head.'
    )


def foreground(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of FreeSOLO's with the one class of its labels, and its step as a number."""
    found = {
        name: value[:1] if name.startswith('ins_head.cate_pred.') else value
        for name, value in state.items()
    }
    if '_iter' in found:
        found['_iter'] = found['_iter'].reshape(()).long()
    return found


def rename(name: str, rules: tuple) -> str:
    for pattern, replacement in rules:
        if match := re.fullmatch(pattern, name):
            return replacement(match)
    return name


def fit(value: Tensor, target: Tensor, name: str) -> Tensor | None:
    """The tensor as the target has it, or None where the two do not agree."""
    if value.shape == target.shape:
        return value
    offsets = name.endswith(('.conv_offset.weight', '.conv_offset.bias'))
    if offsets and value.shape[1:] == target.shape[1:] and 3 * len(value) == 2 * len(target):
        modulation = value.new_zeros(len(target) - len(value), *target.shape[1:])
        return torch.cat((value, modulation + SATURATED * name.endswith('bias')))
    return None


def convert(
    state: Mapping[str, Tensor], rules: tuple, target: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors under the target's names, and a line for each that is wrong."""
    converted, problems = {}, []
    for name, value in state.items():
        new_name = rename(name, rules)
        if new_name not in target or new_name in converted:
            problems.append(f'no place for {name} {tuple(value.shape)}')
            continue
        converted[new_name] = fit(value, target[new_name], new_name)
        if converted[new_name] is None:
            problems.append(
                f'{name} has the shape {tuple(value.shape)}, '
                f'{new_name} has {tuple(target[new_name].shape)}'
            )
    for name, value in target.items():
        if name not in converted:
            # frozen normalisation does not count its batches
            if name.endswith('num_batches_tracked'):
                converted[name] = torch.zeros(value.shape, dtype=value.dtype)
            else:
                problems.append(f'nothing for {name} {tuple(value.shape)}')
    return converted, problems


def load_config(path: str, options: dict | None) -> Config:
    cfg = get_config(path) if '::' in path else Config.fromfile(path)
    cfg.merge_from_dict(options or {})
    return cfg


def build_model(cfg: Config) -> torch.nn.Module:
    """The model of a config, without memory for its tensors."""
    register_all_modules(init_default_scope=True)
    with torch.device('meta'):
        return MODELS.build(cfg.model)


def missing_options(cfg: Config) -> str:
    """What an AdelaiDet checkpoint needs of a config that the config lacks, for a launcher."""
    wanted = []
    for key, value in ADELAIDET_OPTIONS.items():
        part, name = key.rsplit('.', 1)
        found = reduce(lambda node, step: node.get(step) or {}, part.split('.'), cfg).get(name)
        if found != value:
            wanted.append(f'{key}="{value}"'.replace(' ', ''))
    return ' '.join(['--cfg-options', *wanted]) if wanted else ''


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('checkpoint', help='what is converted')
    parser.add_argument('out', help='where to write it')
    parser.add_argument('--config', required=True, help='of the model that it is for')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, help='changes to the config, key=value'
    )
    args = parser.parse_args(argv)
    try:
        state, dataset_meta = read_state(args.checkpoint)
        source, rules = source_of(state)
        if source == 'FreeSOLO':
            state = foreground(state)
        cfg = load_config(args.config, args.cfg_options)
    except (OSError, ValueError, RuntimeError) as error:
        parser.error(str(error))
    converted, problems = convert(state, rules, build_model(cfg).state_dict())
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        print(
            f'{len(problems)} of these, so {args.out} is not written: the {source} checkpoint and '
            'the config describe different models.',
            file=sys.stderr,
        )
        return 1
    meta = {} if dataset_meta is None else {'dataset_meta': dataset_meta}
    with atomic_write(args.out, 'wb') as file:
        torch.save({'meta': meta, 'state_dict': converted}, file)
    print(f'{len(converted)} tensors of a {source} checkpoint are in {args.out}')
    if source == 'AdelaiDet' and (options := missing_options(cfg)):
        print(f'It was made for other images and strides than the config; run it with\n{options}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
