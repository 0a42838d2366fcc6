"""The driver of both stages: kills, bad images, foreign boxes; mmdet's inference as truth."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from pycocotools import mask as coco_mask

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / 'projects/uvo'))
import two_stage  # noqa: E402

from mmseg_plugins.box_crop import BoxSegmenter  # noqa: E402

SEGMENTER = str(ROOT / 'configs/uvo/tiny/box-crop_tiny_demo.py')
DETECTOR = str(ROOT / 'configs/uvo/tiny/cascade-rpn_tiny_demo.py')


@pytest.fixture
def scene(tmp_path):
    """Six images of 48x80, a JSON that lists them, and a file of boxes, some of them unusable."""
    rng = np.random.default_rng(0)
    (tmp_path / 'images').mkdir()
    images, boxes = [], []
    for i in range(6):
        pixels = rng.integers(0, 256, (48, 80, 3), np.uint8)
        cv2.imwrite(str(tmp_path / 'images' / f'{i}.png'), pixels)
        images.append(dict(id=10 + i, file_name=f'{i}.png', height=48, width=80))
        for k in range(i):
            boxes.append(dict(image_id=10 + i, bbox=[5 * k, 4, 20, 30], score=0.1 * k))
    boxes.append(dict(image_id=11, bbox=[200, 4, 20, 30], score=0.9))
    boxes.append(dict(image_id=11, bbox=[float('nan'), 4, 20, 30], score=0.9))
    (tmp_path / 'set.json').write_text(json.dumps(dict(images=images)))
    (tmp_path / 'boxes.json').write_text(json.dumps(boxes))
    return tmp_path


def run(scene, out='out.json', *options, segmenter=SEGMENTER, status=0):
    arguments = [str(scene / 'set.json'), str(scene / out), '--boxes', str(scene / 'boxes.json')]
    arguments += ['--segmenter', segmenter, '--devices', 'cpu', *options]
    assert two_stage.main(arguments) == status
    return json.loads((scene / out).read_text())


def test_boxes_from_elsewhere_become_challenge_results(scene):
    results = run(scene, 'out.json', '--max-boxes', '3')
    assert [r['image_id'] for r in results] == [11, 12, 12, *[13] * 3, *[14] * 3, *[15] * 3]
    assert [r['score'] for r in results[-3:]] == [0.4, 0.3, 0.2]
    assert results[-1]['bbox'] == [10, 4, 20, 30]
    for result in results:
        assert set(result) == {'image_id', 'category_id', 'bbox', 'score', 'segmentation'}
        assert result['category_id'] == 1
        assert coco_mask.decode(result['segmentation']).shape == (48, 80)
    listed = run(scene, 'cut.json', '--score-thr', '0.35')
    assert [(r['image_id'], r['score']) for r in listed] == [(15, 0.4)]


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(scene):
    whole = run(scene, 'whole.json')
    command = [sys.executable, ROOT / 'projects/uvo/two_stage.py', scene / 'set.json']
    command += [scene / 'out.json', '--boxes', scene / 'boxes.json', '--segmenter', SEGMENTER]
    process = subprocess.Popen(
        [*map(str, command), '--devices', 'cpu'], env=os.environ | dict(PYTHONPATH=str(ROOT))
    )
    part = scene / 'out.json.parts/000.jsonl'
    while not part.exists() or part.read_bytes().count(b'\n') < 2:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (scene / 'out.json').exists()

    kept = part.read_bytes()
    kept = kept[: kept.rindex(b'\n') + 1]
    part.write_bytes(kept + b'{"file": "4.png", "resul')
    assert run(scene) == whole
    assert part.read_bytes().startswith(kept)
    assert part.read_bytes().count(b'\n') == 6
    assert (scene / 'out.json').read_bytes() == (scene / 'whole.json').read_bytes()


def test_processes_share_the_images(scene):
    alone = run(scene, 'alone.json')
    assert run(scene, 'out.json', '--devices', 'cpu,cpu') == alone
    shares = [(scene / f'out.json.parts/00{i}.jsonl').read_text().splitlines() for i in (0, 1)]
    names = [[json.loads(line)['file'] for line in share] for share in shares]
    assert names == [['0.png', '2.png', '4.png'], ['1.png', '3.png', '5.png']]


def test_bad_images_are_named_and_tried_again(scene, capsys):
    good = run(scene, 'good.json')
    kept = {i: (scene / f'images/{i}.png').read_bytes() for i in (2, 3, 4)}
    (scene / 'images/2.png').write_bytes(b'no image')
    (scene / 'images/3.png').unlink()
    cv2.imwrite(str(scene / 'images/4.png'), np.zeros((80, 64, 3), np.uint8))
    results = run(scene, status=1)
    assert results == [r for r in good if r['image_id'] not in (12, 13, 14)]
    failed = json.loads((scene / 'out.json.failed.json').read_text())
    assert [Path(line.split(': ')[0]).name for line in failed] == ['2.png', '3.png', '4.png']
    assert 'cannot be decoded' in failed[0] and 'No such file' in failed[1]
    assert 'is 64 x 80 pixels, the annotations say 80 x 48' in failed[2]
    assert '3 of 6 images failed' in capsys.readouterr().out

    for i, content in kept.items():
        (scene / f'images/{i}.png').write_bytes(content)
    assert run(scene) == good
    assert not (scene / 'out.json.failed.json').exists()


def test_errors_on_one_image_do_not_stop_the_others(scene, capsys, monkeypatch):
    good = run(scene, 'good.json')

    def fail(self, image, boxes, output):
        for number, error in ((1, ValueError('too small a budget')), (2, cv2.error('resize'))):
            if np.array_equal(image, cv2.imread(str(scene / f'images/{number}.png'))):
                raise error
        return segment(self, image, boxes, output)

    segment = BoxSegmenter.__call__
    monkeypatch.setattr(BoxSegmenter, '__call__', fail)
    assert run(scene, status=1) == [r for r in good if r['image_id'] not in (11, 12)]
    failed = json.loads((scene / 'out.json.failed.json').read_text())
    assert failed == [f'{scene}/images/1.png: too small a budget', f'{scene}/images/2.png: resize']
    assert capsys.readouterr().out.splitlines()[-1].startswith('2 of 6 images failed')
    monkeypatch.undo()
    assert run(scene) == good


def test_a_broken_line_costs_its_image_alone(scene, capsys):
    good = run(scene)
    part = scene / 'out.json.parts/000.jsonl'
    lines = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(b''.join([*lines[:3], b'\x00\xff{broken\n', b'7\n', *lines[4:]]))
    assert run(scene) == good
    said = capsys.readouterr().out
    assert f'{part}: the line at byte {sum(map(len, lines[:3]))} is broken' in said
    assert '5 of 6 images are done already' in said


def test_parts_are_not_mixed_with_other_settings(scene, tmp_path):
    run(scene)
    with pytest.raises(SystemExit, match='other settings .max_boxes differ'):
        run(scene, 'out.json', '--max-boxes', '1')
    other = tmp_path / 'other.py'
    cfg = Config.fromfile(SEGMENTER)
    cfg.model.decode_head.channels = 16
    cfg.dump(other)
    with pytest.raises(SystemExit, match='segmenter config differ'):
        run(scene, segmenter=str(other))
    assert len(run(scene, 'out.json', '--max-boxes', '1', '--fresh')) == 5


def test_inputs_that_make_no_sense_are_explained(scene):
    (scene / 'boxes.json').write_text('[{"image_id": 99, "bbox": [0, 0, 1, 1]}]')
    with pytest.raises(SystemExit, match='1 image ids are not among the images, such as 99'):
        run(scene)
    (scene / 'boxes.json').write_text('[{"image_id": 10}]')
    with pytest.raises(SystemExit, match=r'image_id, bbox \[x, y, w, h\] and score'):
        run(scene)
    content = json.loads((scene / 'set.json').read_text())
    del content['images'][2]['height']
    (scene / 'set.json').write_text(json.dumps(content))
    with pytest.raises(SystemExit, match='set.json: image 12 lacks height'):
        run(scene)
    (scene / 'set.json').write_text('[')
    with pytest.raises(SystemExit, match='set.json: not valid JSON at line 1'):
        run(scene)
    (scene / 'set.json').write_text('[]')
    with pytest.raises(SystemExit, match='no list "images"'):
        run(scene)
    (scene / 'empty').mkdir()
    with pytest.raises(SystemExit, match='no image found'):
        two_stage.list_images(scene / 'empty', None)


def test_detector_gives_what_mmdet_gives(scene):
    from mmdet.apis import inference_detector, init_detector

    cfg = Config.fromfile(DETECTOR)
    cfg.model.test_cfg.rpn.nms_pre = 20
    cfg.dump(scene / 'detector.py')
    model = init_detector(str(scene / 'detector.py'), palette='random', device='cpu')
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    torch.save(dict(state_dict=model.state_dict(), meta={}), scene / 'detector.pth')
    model.eval()
    expected = inference_detector(model, str(scene / 'images/3.png')).pred_instances
    assert len(expected) > 10

    two_stage.main(
        [str(scene / 'images'), str(scene / 'out.json'), '--segmenter', SEGMENTER]
        + ['--detector', str(scene / 'detector.py'), str(scene / 'detector.pth')]
        + ['--devices', 'cpu', '--max-boxes', '1000', '--batch-size', '64']
    )
    results = [r for r in json.loads((scene / 'out.json').read_text()) if r['image_id'] == 4]
    sizes = (expected.bboxes[:, 2:] - expected.bboxes[:, :2]).min(1).values
    expected = expected[sizes > 0]
    xyxy = expected.bboxes.clamp(min=0).numpy()
    np.testing.assert_allclose([r['score'] for r in results], expected.scores, atol=1e-6)
    np.testing.assert_allclose([r['bbox'][:2] for r in results], xyxy[:, :2], atol=0.01)
    listing = json.loads((scene / 'out.json.images.json').read_text())['images']
    assert listing[3] == dict(id=4, file_name='3.png')
