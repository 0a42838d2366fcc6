"""The ablations that the README lists: each row builds and takes a step."""

import argparse
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config, DictAction
from mmengine.optim import OptimWrapper
from mmengine.registry import init_default_scope

import mmdet_plugins.densecl  # noqa: F401
from mmdet_plugins.cli import find_config

README = Path(__file__).parents[3] / 'configs' / 'densecl' / 'README.md'
ROWS = [
    [cell.strip(' `') for cell in line.strip('|').split('|')]
    for line in README.read_text(encoding='utf-8').split('## Ablations')[1].splitlines()
    if re.match(r'\| (§|\d)', line)
]


@cache
def read(name: str) -> Config:
    return Config.fromfile(find_config(name, README.parents[1]), import_custom_modules=False)


@pytest.mark.parametrize(
    ('name', 'options'), [row[2:4] for row in ROWS], ids=[' '.join(row[:2]) for row in ROWS]
)
def test_row(name, options):
    """Of a thin network; no row is about its width."""
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='*', action=DictAction)
    changes = parser.parse_args(['--cfg-options', *options.split()]).cfg_options
    model = read(name).model.copy()
    model = Config(dict(model=model))
    model.merge_from_dict(changes or {})
    assert bool(options) == (model.model != read(name).model)
    model.merge_from_dict(
        {
            'model.backbone.depth': 18,
            'model.backbone.base_channels': 8,
            'model.backbone.stem_channels': 8,
            'model.head.in_channels': 64,
            'model.head.hidden_channels': 16,
            'model.queue_size': 64,
        }
    )
    init_default_scope('mmdet')
    built = MODELS.build(model.model)
    logged = built.train_step(
        dict(inputs=torch.randint(0, 256, (2, 2, 3, 96, 96), dtype=torch.uint8)),
        OptimWrapper(torch.optim.SGD(built.parameters(), lr=0.1)),
    )
    assert torch.isfinite(logged['loss'])
    assert ('loss_dense' in logged) == (built.dense_weight > 0)


def test_every_row_of_the_tables_is_listed():
    assert [row[0] for row in ROWS].count('5.6') == 7
    assert [row[0] for row in ROWS].count('5.7') == 3
    assert [row[0] for row in ROWS].count('5.8') == 5
