"""The recipes of projects/solo and projects/freesolo from end to end, as short as they can be."""

import json
import subprocess
import sys

import pytest

from mmdet_plugins.common.synthetic import make_demo_data


@pytest.mark.slow
def test_heads_are_compared_and_the_comparison_goes_on(repo, tmp_path):
    make_demo_data(tmp_path / 'demo', num_train=8, num_val=4, size_hw=(96, 128))
    command = [sys.executable, repo / 'projects/solo/compare.py', '--device', 'cpu']
    command += ['--data', tmp_path / 'demo', '--seeds', '1', '--iters', '2']
    command += ['--out', tmp_path / 'out', '--json', tmp_path / 'table.json']
    tables = []
    for _ in range(2):  # the second call finds everything done
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        tables.append(json.loads((tmp_path / 'table.json').read_text()))
    assert tables[0] == tables[1] and '/iter_2.pth' not in done.stdout
    assert [(row['head'], row['iterations'], row['seeds']) for row in tables[0]] == [
        ('ours', 2, 1),
        ('mmdet', 2, 1),
    ]


@pytest.mark.slow
def test_photographs_become_coarse_masks_and_a_segmenter(repo, tmp_path):
    make_demo_data(tmp_path / 'demo', num_train=32, num_val=4, size_hw=(96, 128))
    command = [sys.executable, repo / 'projects/freesolo/freesolo.py', '--device', 'cpu']
    command += ['--data', tmp_path / 'demo', '--iters', '2', '--iterations', '1']
    command += ['--out', tmp_path / 'out']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = json.loads((tmp_path / 'out/metrics.json').read_text())
    assert list(metrics) == ['coarse masks', 'iteration 0']
    labels = json.loads((tmp_path / 'out/labels-0/store/pseudo_labels.json').read_text())
    assert len(labels['images']) == 32 and labels['annotations']
    assert (tmp_path / 'out/report.html').stat().st_size > 10_000
    # Without a label in sight the same stages run, and nothing is scored.
    command[command.index('--data') + 1] = tmp_path / 'demo/images'
    command[command.index('--out') + 1] = tmp_path / 'bare'
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'the segmenter: ' in done.stdout and not (tmp_path / 'bare/metrics.json').exists()


@pytest.mark.slow
def test_small_objects_are_learnt_from_tiles(repo, tmp_path):
    make_demo_data(tmp_path / 'demo', num_train=8, num_val=2, size_hw=(96, 192))
    command = [sys.executable, repo / 'projects/freesolo/freesolo.py', '--device', 'cpu']
    # After so few iterations nothing is sure enough to train a second one.
    command += ['--data', tmp_path / 'demo', '--tiles', '64', '--iters', '2', '--iterations', '1']
    command += ['--out', tmp_path / 'out']
    metrics = []
    for _ in range(2):  # the second call finds everything done
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        metrics.append(json.loads((tmp_path / 'out/metrics.json').read_text()))
    assert metrics[0] == metrics[1] and '--resume' not in done.stdout
    assert list(metrics[0]) == ['coarse masks', 'iteration 0']
    tiles = json.loads((tmp_path / 'out/data/instances_train.json').read_text())
    assert {(x['height'], x['width']) for x in tiles['images']} <= {(64, 64)}
