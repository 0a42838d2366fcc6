"""The intervals of DenseCL's comparison; its trainings are among the slow recipes."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest

from mmdet_plugins.common.synthetic import make_demo_data


@pytest.fixture
def tool(load_script):
    return load_script('projects/densecl/compare.py')


def test_intervals_of_known_spreads(tool):
    """Images of 100 cells each right with p = 0.5: a spread of 0.05 an image, over 400 images."""
    rng = np.random.default_rng(0)
    moved = np.full((3, 400), 100)
    good, bad = (rng.binomial(100, p, (1, 400)).repeat(3, 0) for p in (0.5, 0.3))
    rows = tool.rows_of({'DenseCL': (good, moved), 'MoCo-v2': (bad, moved)}, 10)
    assert rows[0]['accuracy'] == pytest.approx(0.5, abs=0.01) and rows[0]['× chance'] == '5.0'
    low, high = map(float, rows[0]['95 %'].split('–'))
    assert high - low == pytest.approx(2 * 1.96 * 0.05 / 20, rel=0.15)
    low, high = map(float, rows[0]['above MoCo-v2, 95 %'].split(' to '))
    assert 0.18 < low < 0.2 < high < 0.22
    assert 'above MoCo-v2, 95 %' not in rows[1]
    # Seeds that differ widen the interval: those of 0.4, 0.5 and 0.6 to the extremes.
    seeds = np.stack([np.full(400, right) for right in (40, 50, 60)])
    low, high = tool.interval(tool.bootstrap(seeds, moved))
    assert low == pytest.approx(0.4, abs=0.04) and high == pytest.approx(0.6, abs=0.04)


def test_the_plot_is_to_scale(tool):
    rows = [{'features': 'DenseCL', 'accuracy': 0.5, '95 %': '0.400–0.600'}]
    svg = tool.plot(rows, 0.1)
    low, high = map(float, re.search(r'M([\d.]+) 24H([\d.]+)"', svg).groups())
    middle = float(re.search(r'cx="([\d.]+)"', svg)[1])
    chance = float(re.search(r'M([\d.]+) 4V', svg)[1])
    assert middle == pytest.approx((low + high) / 2, abs=0.1)
    assert (middle - chance) / (high - low) == pytest.approx(2, abs=0.01)


@pytest.mark.slow
def test_methods_are_compared_and_the_comparison_goes_on(repo, tmp_path):
    make_demo_data(tmp_path / 'demo', num_train=32, num_val=4, size_hw=(96, 128))
    command = [sys.executable, repo / 'projects/densecl/compare.py', '--device', 'cpu']
    command += ['--data', tmp_path / 'demo', '--seeds', '1', '--iters', '2']
    command += ['--out', tmp_path / 'out', '--json', tmp_path / 'table.json']
    command += ['--plot', tmp_path / 'plot.svg']
    tables = []
    for _ in range(2):  # the second call finds everything done
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        tables.append(json.loads((tmp_path / 'table.json').read_text()))
    assert tables[0] == tables[1] and '/iter_2.pth' not in done.stdout
    methods = ['DenseCL', 'MoCo-v2', 'untrained']
    assert [(row['points'], row['features']) for row in tables[0]] == [
        *(('moved', method) for method in methods),
        *(('all', method) for method in methods),
    ]
    columns = {'s an iteration', "of MoCo-v2's"}
    assert [len(columns & row.keys()) for row in tables[0]] == 2 * [2, 1, 0]
    assert (tmp_path / 'plot.svg').read_text().count('<circle') == 3
