"""The list of ablations in the README: each row builds and takes a step."""

import argparse
import re
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config, DictAction

from mmdet_plugins.cli import find_config
from mmdet_plugins.ops.free_mask import free_masks

README = Path(__file__).parents[3] / 'configs' / 'freesolo' / 'README.md'
CONFIGS = README.parents[1]
OF_FREE_MASK = {'6.7(a)': 6, '6.7(b)': 3, '6.7(c)': 1}  # rows of a table without a training


def listed_rows() -> list:
    """Parameters (config, options) of each row."""
    _, ablations = README.read_text(encoding='utf-8').split('## Ablations')
    cells = [
        [cell.strip() for cell in line.strip('|').split('|')] for line in ablations.splitlines()
    ]
    return [
        pytest.param(row[2].strip('`'), row[3].strip('`').split(), id=f'{row[0]} {row[1]}')
        for row in cells
        if len(row) == 5 and re.match(r'\d', row[0])
    ]


ROWS = listed_rows()
UNTRAINED = [row for row in ROWS if row.values[0].startswith('free-mask')]


def read(name: str, options: list[str]) -> Config:
    """A config as the runners change it; other weights leave it as it is."""
    parser = argparse.ArgumentParser()
    parser.add_argument('--checkpoint')
    parser.add_argument('--cfg-options', nargs='*', action=DictAction, default={})
    weights = options[:1] == ['--checkpoint']
    args = parser.parse_args(options if weights or not options else ['--cfg-options', *options])
    cfg = Config.fromfile(find_config(name, CONFIGS), import_custom_modules=False)
    stock = cfg.pretty_text
    cfg.merge_from_dict(args.cfg_options)
    assert (bool(options) and not weights) == (cfg.pretty_text != stock)
    return cfg


@pytest.mark.parametrize(('name', 'options'), [row for row in ROWS if row not in UNTRAINED])
def test_row(freesolo, name, options):
    """Thin: no row is about the channels of pyramid and towers."""
    head_cfg = read(name, options).model.mask_head
    head_cfg.update(in_channels=8, feat_channels=32, num_grids=[10, 8, 6, 4])
    head_cfg.update(in_strides=[4, 8, 16, 32], strides=[8, 8, 16, 16])
    head_cfg.update(scale_ranges=[(1, 32), (16, 64), (32, 128), (64, 512)])
    head_cfg.mask_features.feat_channels = 32
    if head_cfg.embed_dims:
        head_cfg.embed_dims = freesolo.embed_dims
    torch.manual_seed(0)
    head = MODELS.build(head_cfg)
    head.init_weights()
    losses = head.loss(freesolo.pyramid(), [freesolo.sample(4), freesolo.sample(2, seed=3)])
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in head.parameters())
    for weight, loss in (('avg', 'avg_proj'), ('max', 'max_proj'), ('pairwise', 'pairwise')):
        if any(weight in option for option in options):
            assert losses[f'loss_{loss}'] == 0
    assert ('loss_embed' in losses) != any('embed_dims' in option for option in options)
    assert ('loss_mask' in losses) == any('Dice' in option for option in options)


@pytest.mark.parametrize(('title', 'name', 'options'), [(row.id, *row.values) for row in UNTRAINED])
def test_row_of_free_mask(title, name, options):
    """It differs from the reference in what it is called by, and in nothing else."""
    table, row = title.split(' ', 1)
    if table == '6.7(a)':
        weights = dict(supervised='torchvision://resnet50')
        expected = weights.get(row, f'work_dirs/{row.lower()}_r50.pth')
        assert options == ['--checkpoint', expected]
    cfg, reference = read(name, options), read('free-mask_r50_c5_8xb1-eval_coco', [])
    scales = [float(row.split()[1])] if row.startswith('scale') else [1.0, 0.5, 0.25]
    reference.model.free_mask.scales = cfg.model.free_mask.scales
    assert list(cfg.model.free_mask.scales) == scales and cfg.to_dict() == reference.to_dict()
    assert cfg.test_evaluator.metric == ['segm', 'bbox'] and 100 in cfg.test_evaluator.max_dets
    # Each query of the grids that are left is found or dropped.
    torch.manual_seed(0)
    (found,) = free_masks(torch.randn(1, 16, 12, 16), (96, 128), **cfg.model.free_mask)
    queries = sum(int(12 * scale) * int(16 * scale) for scale in scales)
    assert len(found.rles) + sum(found.dropped.values()) == queries


def test_every_table_is_listed():
    tables = [row.id.split()[0] for row in ROWS]
    assert set(tables) == {f'6.7({letter})' for letter in 'abcdef'}
    untrained = [row.id.split()[0] for row in UNTRAINED]
    assert {table: untrained.count(table) for table in set(untrained)} == OF_FREE_MASK
    assert tables.count('6.7(c)') == 4
