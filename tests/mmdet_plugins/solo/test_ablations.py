"""The list of ablations in the README: each row builds, trains a step and predicts."""

import argparse
import copy
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from mmdet.registry import METRICS, MODELS
from mmengine.config import Config, DictAction

from mmdet_plugins.cli import find_config

README = Path(__file__).parents[3] / 'configs' / 'solo' / 'README.md'
CONFIGS = README.parents[1]
IMAGE_HW = (64, 96)


def listed_rows() -> list:
    """Parameters (table, config, options) of each row."""
    _, ablations = README.read_text(encoding='utf-8').split('## Ablations')
    cells = [
        [cell.strip() for cell in line.strip('|').split('|')] for line in ablations.splitlines()
    ]
    return [
        pytest.param(row[0], row[2].strip('`'), row[3].strip('`').split(), id=f'{row[0]} {row[1]}')
        for row in cells
        if len(row) == 5 and re.match(r'§|\d', row[0])
    ]


ROWS = listed_rows()


@cache
def read(name: str) -> Config:
    return Config.fromfile(find_config(name, CONFIGS), import_custom_modules=False)


def change(cfg: Config, options: list[str]) -> Config:
    """A copy of a config, changed as the runners do it."""
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='*', action=DictAction)
    cfg = copy.deepcopy(cfg)
    cfg.merge_from_dict(parser.parse_args(['--cfg-options', *options]).cfg_options or {})
    return cfg


@pytest.mark.parametrize(('table', 'name', 'options'), ROWS)
def test_row(solo, table, name, options):
    """The head of each row, thin: no row is about the channels of pyramid and towers."""
    cfg = change(read(name), options)
    assert bool(options) == (cfg.to_dict() != read(name).to_dict())
    model = cfg.model
    assert cfg.get('val_evaluator', {}).get('type', 'CocoMetric') in METRICS
    head_cfg = model.mask_head
    head_cfg.update(in_channels=32, feat_channels=32, test_cfg=model.test_cfg)
    if 'mask_features' in head_cfg and head_cfg.mask_features.type == 'UnifiedMaskFeatures':
        head_cfg.mask_features.feat_channels = 32
    torch.manual_seed(0)
    head = MODELS.build(head_cfg)
    head.init_weights()
    features = [
        torch.randn(1, head_cfg.in_channels, *(side // stride for side in IMAGE_HW))
        for stride in head_cfg.in_strides
    ]
    samples = [solo.sample(solo.ellipses(IMAGE_HW, 3), IMAGE_HW)]
    losses = head.loss(features, samples)
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in head.parameters())
    if 'test_cfg' in ' '.join(options):
        with torch.no_grad():
            head.conv_cls.bias[0] = -1.0
    (found,) = head.eval().predict(features, samples)
    assert len(found.masks) == len(found) <= 100


def test_every_table_is_listed():
    tables = {row.values[0] for row in ROWS}
    assert tables >= {*(f'3.{i}' for i in range(2, 8)), *(f'4.{i}' for i in range(3, 9))}
    assert len(ROWS) > 40
