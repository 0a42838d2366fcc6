"""The whole job at its smallest, by its command: a kill on the way, and the last lines."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmdet_plugins.common.synthetic import make_demo_data

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / 'projects/uvo'))
import demo  # noqa: E402


@pytest.mark.parametrize('split', ['train', 'val'])
def test_a_folder_goes_on_with_the_same_data_only(split, tmp_path, monkeypatch):
    def stop(*args):
        raise InterruptedError

    make_demo_data(tmp_path / 'data', num_train=1, num_val=1, size_hw=(96, 128))
    command = ['demo.py', '--data', str(tmp_path / 'data'), '--out', str(tmp_path / 'out')]
    monkeypatch.setattr(sys, 'argv', command)
    monkeypatch.setattr(demo, 'train', stop)
    for _ in range(2):
        with pytest.raises(InterruptedError):
            demo.main()
    annotations = tmp_path / f'data/instances_{split}.json'
    annotations.write_text(annotations.read_text() + ' ')
    with pytest.raises(SystemExit, match=f'was made with another {split} data: give another'):
        demo.main()


@pytest.mark.slow
def test_the_job_survives_a_kill_and_ends_with_score_and_report(tmp_path):
    make_demo_data(tmp_path / 'data', num_train=8, num_val=4, size_hw=(96, 128))
    out = tmp_path / 'out'
    command = [sys.executable, str(ROOT / 'projects/uvo/demo.py'), '--device', 'cpu']
    command += ['--data', str(tmp_path / 'data'), '--out', str(out)]
    command += ['--detector-iters', '20', '--segmenter-iters', '20']

    first = subprocess.Popen(command, cwd=tmp_path, start_new_session=True)
    log = out / 'detector/console.log'
    while not log.exists() or 'Iter(train)' not in log.read_text():
        assert first.poll() is None
        time.sleep(0.2)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()

    last = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert last.returncode == 0, last.stdout + last.stderr
    *_, score, report = last.stdout.splitlines()
    assert Path(report).read_text().lstrip().lower().startswith('<!doctype html>')
    metrics = json.loads((out / 'metrics.json').read_text())
    assert set(metrics) == {'trained', 'untrained', 'whole-image boxes'}
    assert score == f'mask AR@100: {metrics["trained"]["segm_AR@100"]:.3f}'
    for name in ('bbox_AP', 'segm_AP', 'bbox_AR@1', 'segm_AR@10', 'novel_segm_AR@100'):
        assert 0 <= metrics['trained'][name] <= 1
    assert len(re.findall(r'^\| (trained|untrained|whole-image boxes) ', last.stdout, re.M)) == 3

    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert again.stdout.splitlines()[-2:] == [score, report]
    assert 'mim train' not in again.stdout

    refused = subprocess.run([*command[:-1], '21'], cwd=tmp_path, capture_output=True, text=True)
    assert refused.returncode == 1 and 'another segmenter length' in refused.stderr
