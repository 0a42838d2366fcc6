"""The leaves that only evaluate, on data of their layout."""

import json

import cv2
import numpy as np
import pytest
import torch
from mmdet.registry import DATASETS, METRICS
from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmdet_plugins.cli import find_config

OBJECT = """<object><name>{name}</name><difficult>{difficult}</difficult>
<bndbox><xmin>{0}</xmin><ymin>{1}</ymin><xmax>{2}</xmax><ymax>{3}</ymax></bndbox></object>"""
BOXES = dict(a=[(11, 6, 40, 30, 0), (50, 10, 90, 55, 1)], b=[(1, 1, 60, 40, 0)])  # last: difficult


def scored(cfg, predictions):
    """The figures of predictions, by image id, with data set and metric of the config."""
    init_default_scope('mmdet')
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    metric = METRICS.build(cfg.test_evaluator)
    metric.dataset_meta = dataset.metainfo
    for i in range(len(dataset)):
        sample = dataset[i]['data_samples']
        boxes = torch.tensor(predictions[sample.img_id], dtype=torch.float32)
        found = dict(bboxes=boxes, scores=torch.linspace(0.9, 0.1, len(boxes)))
        metric.process(None, [dict(sample.to_dict(), pred_instances=found)])
    return metric.evaluate(len(dataset))


@pytest.fixture
def leaf(repo):
    return lambda name: Config.fromfile(
        find_config(f'freesolo_r50_fpn_8xb1-eval_{name}', repo / 'configs')
    )


def test_voc(leaf, load_script, repo, monkeypatch, tmp_path, capsys):
    """Boxes from its XML files: a difficult object is neither missed, nor is finding it wrong."""
    monkeypatch.syspath_prepend(str(repo / 'tools/convert'))
    root = tmp_path / 'VOC2007'
    for folder in ('JPEGImages', 'Annotations', 'ImageSets/Main'):
        (root / folder).mkdir(parents=True)
    ids = dict(a='000005', b='000012')
    for name, boxes in BOXES.items():
        cv2.imwrite(str(root / f'JPEGImages/{ids[name]}.jpg'), np.zeros((60, 100, 3), np.uint8))
        objects = ''.join(OBJECT.format(*box, name='cat', difficult=box[4]) for box in boxes)
        size = '<size><width>100</width><height>60</height><depth>3</depth></size>'
        (root / f'Annotations/{ids[name]}.xml').write_text(
            f'<annotation>{size}{objects}</annotation>'
        )
    (root / 'ImageSets/Main/trainval.txt').write_text('\n'.join(ids.values()))
    assert load_script('tools/convert/voc_to_coco.py').main([str(root), '--boxes']) == 0
    cfg = leaf('voc07')
    cfg.test_dataloader.dataset.data_root = f'{root}/'
    cfg.test_evaluator.ann_file = f'{root}/{cfg.ann_file}'
    # VOC counts from one, and its boxes include their last pixel.
    exact = {1: [[10, 5, 40, 30]], 2: [[0, 0, 60, 40]]}
    assert scored(cfg, exact)['open_world/bbox_AP'] == pytest.approx(1.0)
    difficult = {1: [[49, 9, 90, 55], [10, 5, 40, 30]], 2: [[0, 0, 60, 40]]}
    assert scored(cfg, difficult)['open_world/bbox_AP'] == pytest.approx(1.0)
    wrong = {1: [[0, 40, 40, 60], [10, 5, 40, 30]], 2: [[0, 0, 60, 40]]}
    # By score: false, true, true, so that the precision never exceeds two thirds.
    found = scored(cfg, wrong)
    assert found['open_world/bbox_AP50'] == pytest.approx(2 / 3)
    assert 'open_world/segm_AP' not in found
    (root / 'Annotations/000012.xml').unlink()
    assert load_script('tools/convert/voc_to_coco.py').main([str(root), '--boxes']) == 0
    assert '000012.xml is missing or damaged' in capsys.readouterr().err


@pytest.mark.parametrize('name', ['coco', 'uvo', 'coco20k'])
def test_coco_files(leaf, tmp_path, name):
    """Two categories are one, and data set and metric read the same file."""
    cfg = leaf(name)
    dataset = cfg.test_dataloader.dataset
    assert cfg.test_evaluator.ann_file == dataset.data_root + dataset.ann_file
    image = dict(id=3, file_name='a.jpg', height=60, width=100)
    boxes = [[10, 5, 30, 25], [50, 10, 20, 20]]
    annotations = [
        dict(id=i + 1, image_id=3, category_id=i + 1, bbox=box, area=box[2] * box[3], iscrowd=0,
             segmentation=[[box[0], box[1], box[0] + box[2], box[1], box[0] + box[2],
                            box[1] + box[3], box[0], box[1] + box[3]]])
        for i, box in enumerate(boxes)
    ]  # fmt: skip
    categories = [dict(id=i, name=f'kind {i}') for i in (1, 2)]
    path = tmp_path / 'labels.json'
    path.write_text(
        json.dumps(dict(images=[image], annotations=annotations, categories=categories))
    )
    cv2.imwrite(str(tmp_path / 'a.jpg'), np.zeros((60, 100, 3), np.uint8))
    dataset.update(data_root='', ann_file=str(path), data_prefix=dict(img=str(tmp_path)))
    cfg.test_evaluator.update(ann_file=str(path), metric='bbox')
    found = scored(cfg, {3: [[10, 5, 40, 30], [50, 10, 70, 30]]})
    assert found['open_world/bbox_AP'] == pytest.approx(1.0)
    assert found['open_world/bbox_AR@1'] == pytest.approx(0.5)
