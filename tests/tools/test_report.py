import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
MASK = {'size': [40, 60], 'counts': [410, 20, 20, 20, 1930]}  # 20 × 2 pixels at x = 10, y = 10


@pytest.fixture
def folder(tmp_path):
    cv2.imwrite(str(tmp_path / 'a.png'), np.full((40, 60, 3), 90, np.uint8))
    thing = {'id': 1, 'image_id': 7, 'category_id': 1, 'iscrowd': 0, 'area': 40}
    truth = {
        'images': [{'id': 7, 'file_name': 'a.png', 'height': 40, 'width': 60}],
        'annotations': [thing | {'bbox': [10, 10, 2, 20], 'segmentation': MASK}],
        'categories': [{'id': 1, 'name': 'thing'}],
    }
    box = {'image_id': 7, 'category_id': 1, 'bbox': [10, 10, 2, 20], 'score': 0.5}
    (tmp_path / 'truth.json').write_text(json.dumps(truth))
    (tmp_path / 'boxes.json').write_text(json.dumps([box]))
    return tmp_path


def run(*arguments):
    command = [sys.executable, ROOT / 'tools' / 'report.py', *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


def test_names_of_results_and_strip(folder):
    boxes = folder / 'boxes.json'
    done = run(folder / 'truth.json', folder, folder / 'out.html', f'my run={boxes}', boxes,
               '--title', 'A title', '--strip', folder / 'strip.png', 7)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(folder / 'out.html')
    page = (folder / 'out.html').read_text()
    assert '<h1>A title</h1>' in page
    assert '<th scope="col">my run</th><th scope="col">boxes</th>' in page
    assert 'AR 1.000' in page
    assert cv2.imread(str(folder / 'strip.png')).shape[1] == 1440


def test_a_missing_file_is_named(folder):
    done = run(folder / 'truth.json', folder, folder / 'out.html', folder / 'gone.json')
    assert done.returncode == 1
    assert 'gone.json: there is no such file.' in done.stderr
    assert 'Traceback' not in done.stderr
    assert not (folder / 'out.html').exists()


def test_the_report_needs_no_package_of_the_mm_family():
    code = (
        'import sys, mmdet_plugins.common.report\n'
        'print({n.partition(".")[0] for n in sys.modules} & {"mmengine", "mmcv", "mmdet", "mmseg"})'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == 'set()', done.stderr
