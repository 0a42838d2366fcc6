"""The list of ablations in the README: each row builds and takes a step."""

import argparse
import re
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config, DictAction

from mmdet_plugins.cli import find_config

README = Path(__file__).parents[3] / 'configs' / 'freesolo' / 'README.md'
CONFIGS = README.parents[1]


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


@pytest.mark.parametrize(('name', 'options'), ROWS)
def test_row(freesolo, name, options):
    """Thin: no row is about the channels of pyramid and towers."""
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='*', action=DictAction)
    cfg = Config.fromfile(find_config(name, CONFIGS), import_custom_modules=False)
    stock = cfg.pretty_text
    cfg.merge_from_dict(parser.parse_args(['--cfg-options', *options]).cfg_options or {})
    assert bool(options) == (cfg.pretty_text != stock)
    head_cfg = cfg.model.mask_head
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


def test_every_table_is_listed():
    tables = {row.id.split()[0] for row in ROWS}
    assert tables == {'6.7(c)', '6.7(d)', '6.7(e)', '6.7(f)'}
