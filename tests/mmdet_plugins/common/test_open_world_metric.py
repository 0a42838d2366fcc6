"""The metric in mmengine's evaluator: from data samples to numbers, files and several ranks."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from mmdet.evaluation.metrics import CocoMetric
from mmdet.registry import METRICS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.evaluator import Evaluator
from mmengine.structures import InstanceData
from pycocotools import mask as mask_utils

from mmdet_plugins.common.open_world_metric import OpenWorldMetric
from mmdet_plugins.ops.open_world import evaluate_json

HEIGHT, WIDTH, NUM_IMAGES = 60, 90, 7


def _boxes(rng, count):
    """Boxes of all parts of the image, x1 y1 x2 y2, at least 4 px wide and high."""
    xy = rng.random((count, 2)) * (WIDTH - 30, HEIGHT - 20)
    return np.concatenate((xy, xy + 4 + rng.random((count, 2)) * (26, 16)), 1).astype(np.float32)


def _masks(boxes):
    masks = np.zeros((len(boxes), HEIGHT, WIDTH), np.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.round().astype(int), strict=True):
        mask[y1:y2, x1:x2] = 1
    return masks


def _rle(mask):
    rle = mask_utils.encode(np.asfortranarray(mask))
    return {'size': rle['size'], 'counts': rle['counts'].decode()}


def make_data(path):
    """An annotation file and the samples of a detector that finds part of it.

    The third image has no objects, the fifth no predictions; one object is a crowd.
    """
    rng = np.random.default_rng(0)
    images, annotations, samples = [], [], []
    for image_id in range(11, 11 + NUM_IMAGES):
        images.append(
            {'id': image_id, 'file_name': f'{image_id}.jpg', 'height': HEIGHT, 'width': WIDTH}
        )
        truth = _boxes(rng, 0 if image_id == 13 else 5)
        crowd = np.arange(len(truth)) == (0 if image_id == 11 else 9)
        for box, mask, iscrowd in zip(truth, _masks(truth), crowd, strict=True):
            x1, y1, x2, y2 = box.astype(np.float64).tolist()
            annotations.append(
                {
                    'id': len(annotations) + 1,
                    'image_id': image_id,
                    'iscrowd': int(iscrowd),
                    'category_id': len(annotations) % 2 + 1,
                    'bbox': [x1, y1, x2 - x1, y2 - y1],
                    'area': float(mask.sum()),
                    'segmentation': _rle(mask),
                }
            )
        found = np.concatenate((truth[:4] + rng.normal(size=truth[:4].shape), _boxes(rng, 6)))
        found = found[: 0 if image_id == 15 else None].clip(0, HEIGHT).astype(np.float32)
        found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
        sample = DetDataSample(metainfo={'img_id': image_id, 'ori_shape': (HEIGHT, WIDTH)})
        sample.pred_instances = InstanceData(
            bboxes=torch.from_numpy(found),
            labels=torch.zeros(len(found), dtype=torch.long),
            scores=torch.from_numpy(rng.random(len(found), np.float32)),
            masks=torch.from_numpy(_masks(found)).bool(),
        )
        for name, part in (('gt_instances', ~crowd), ('ignored_instances', crowd)):
            setattr(
                sample,
                name,
                InstanceData(
                    bboxes=torch.from_numpy(truth[part]),
                    labels=torch.zeros(part.sum().item()),
                    masks=BitmapMasks(_masks(truth[part]), HEIGHT, WIDTH),
                ),
            )
        samples.append(sample)
    path.write_text(
        json.dumps(
            {
                'images': images,
                'annotations': annotations,
                'categories': [{'id': 1, 'name': 'seen'}, {'id': 2, 'name': 'unseen'}],
            }
        )
    )
    return str(path), samples


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp('metric') / 'annotations.json')


def _evaluate(samples, batch=2, **options):
    evaluator = Evaluator([{'type': 'mmdet.OpenWorldMetric', **options}])
    for i in range(0, len(samples), batch):
        evaluator.process(samples[i : i + batch], {})
    return evaluator.evaluate(len(samples))


def test_equals_the_evaluation_of_its_files(data, tmp_path):
    path, samples = data
    out = tmp_path / 'made' / 'results'
    options = {
        'metric': ('bbox', 'segm', 'boundary'),
        'max_dets': (1, 4, 100),
        'tide': True,
        'base_categories': ['seen'],
        'outfile_prefix': str(out),
    }
    metrics = _evaluate(samples, ann_file=path, **options)
    assert os.listdir(out.parent) == ['results.segm.json']
    expected = evaluate_json(
        path,
        f'{out}.segm.json',
        ('bbox', 'segm', 'boundary'),
        (1, 4, 100),
        base_categories=['seen'],
        tide=True,
    )
    assert metrics == pytest.approx({f'open_world/{k}': v for k, v in expected.items()}, abs=1e-12)
    assert 0.2 < metrics['open_world/segm_AR@100'] < 0.9
    results = json.loads((tmp_path / 'made/results.segm.json').read_text())
    assert len(results) == 10 * (NUM_IMAGES - 1) - 4  # one image without, one with 6 predictions
    first = samples[0].pred_instances
    x1, y1, x2, y2 = first.bboxes[0].double().tolist()
    assert results[0] == {
        'image_id': 11,
        'category_id': 1,
        'bbox': [x1, y1, x2 - x1, y2 - y1],
        'score': first.scores[0].item(),
        'segmentation': _rle(first.masks[0].numpy()),
    }


def test_equals_stock_proposal_recall(data):
    path, samples = data
    stock = CocoMetric(path, metric='proposal', proposal_nums=(1, 4, 100))
    stock.dataset_meta = {'classes': ('seen', 'unseen')}
    stock.process({}, [sample.to_dict() for sample in samples])
    theirs = stock.evaluate(len(samples))
    ours = _evaluate(samples, ann_file=path, metric='bbox', max_dets=(1, 4, 100))
    for k, misnamed in ((1, 'AR@100'), (4, 'AR@300'), (100, 'AR@1000')):
        assert ours[f'open_world/bbox_AR@{k}'] == pytest.approx(
            theirs[f'coco/{misnamed}'], abs=5.1e-4
        )


def test_truth_from_data_samples(data):
    path, samples = data
    from_file = _evaluate(samples, ann_file=path, metric=['bbox', 'segm'])
    from_samples = _evaluate(samples, metric=['bbox', 'segm'])
    assert from_samples == pytest.approx(from_file, abs=1e-12)
    assert -1 < _evaluate(samples, metric='bbox')['open_world/bbox_AP'] < 1


def _with_predictions(samples, **fields):
    """The samples with predictions of these fields only, each a function of the old ones."""
    changed = []
    for sample in samples:
        copy = DetDataSample(metainfo=sample.metainfo)
        copy.pred_instances = InstanceData(
            **{name: change(sample.pred_instances) for name, change in fields.items()}
        )
        changed.append(copy)
    return changed


def test_proposals_without_masks_in_half_precision(data):
    path, samples = data
    halves = _with_predictions(
        samples, bboxes=lambda pred: pred.bboxes.half(), scores=lambda pred: pred.scores.half()
    )
    ours = _evaluate(halves, ann_file=path, metric='bbox')
    assert ours['open_world/bbox_AR@100'] == pytest.approx(
        _evaluate(samples, ann_file=path, metric='bbox')['open_world/bbox_AR@100'], abs=0.02
    )
    with pytest.raises(ValueError, match='Image 11: masks are evaluated, but the predictions lack'):
        _evaluate(halves, ann_file=path)


def test_rle_predictions(data):
    path, samples = data
    encoded = _with_predictions(
        samples,
        bboxes=lambda pred: pred.bboxes,
        scores=lambda pred: pred.scores,
        masks=lambda pred: [  # counts are bytes, as mmdet's own encoder leaves them
            mask_utils.encode(np.asfortranarray(mask, np.uint8)) for mask in pred.masks
        ],
    )
    assert _evaluate(encoded, ann_file=path) == _evaluate(samples, ann_file=path)


def test_a_second_epoch_starts_afresh(data):
    path, samples = data
    metric = METRICS.build({'type': 'OpenWorldMetric', 'ann_file': path})
    for epoch in (samples, samples[:3]):
        metric.process({}, [sample.to_dict() for sample in epoch])
        assert metric.evaluate(len(epoch)) == _evaluate(epoch, ann_file=path)


def test_format_only(data, tmp_path):
    _, samples = data
    prefix = str(tmp_path / 'challenge')
    assert _evaluate(samples, outfile_prefix=prefix, format_only=True) == {}
    assert len(json.loads((tmp_path / 'challenge.segm.json').read_text())) == 56
    assert (
        _evaluate(
            [s for s in samples if not len(s.pred_instances)],
            outfile_prefix=prefix,
            format_only=True,
        )
        == {}
    )
    with pytest.raises(ValueError, match='outfile_prefix'):
        OpenWorldMetric(format_only=True)


def test_base_categories_from_a_file(data, tmp_path):
    path, samples = data
    (tmp_path / 'base.txt').write_text('seen\n')
    options = {'ann_file': path, 'metric': 'bbox'}
    assert _evaluate(samples, base_categories=str(tmp_path / 'base.txt'), **options) == _evaluate(
        samples, base_categories=['seen'], **options
    )
    with pytest.raises(ValueError, match='base_categories needs ann_file'):
        OpenWorldMetric(base_categories=['seen'])


def test_uvo_videos_as_annotation_file(data, tmp_path):
    path, samples = data
    truth = json.loads(open(path).read())
    frames = [image['id'] for image in truth['images']]
    (tmp_path / 'uvo.json').write_text(
        json.dumps(
            {
                'videos': [
                    {
                        'id': 1,
                        'height': HEIGHT,
                        'width': WIDTH,
                        'file_names': [f'v/{i}.png' for i in frames],
                    }
                ],
                'categories': truth['categories'],
                'annotations': [
                    {
                        'id': ann['id'],
                        'video_id': 1,
                        'category_id': ann['category_id'],
                        'iscrowd': ann['iscrowd'],
                        **{
                            f'{key}{plural}': [
                                ann[key] if i == ann['image_id'] else None for i in frames
                            ]
                            for key, plural in (
                                ('segmentation', 's'),
                                ('bbox', 'es'),
                                ('area', 's'),
                            )
                        },
                    }
                    for ann in truth['annotations']
                ],
            }
        )
    )
    numbered = []
    for number, sample in enumerate(samples, start=1):  # images are numbered as frames come
        numbered.append(DetDataSample(metainfo={**sample.metainfo, 'img_id': number}))
        numbered[-1].pred_instances = sample.pred_instances
    assert _evaluate(numbered, ann_file=str(tmp_path / 'uvo.json')) == pytest.approx(
        _evaluate(samples, ann_file=path), abs=1e-12
    )


def test_images_that_were_not_shown_do_not_count(data):
    path, samples = data
    part = _evaluate(samples[:2], ann_file=path)
    assert part == pytest.approx(_evaluate(samples[:2]), abs=1e-12)


def test_bad_input_is_named(data, tmp_path):
    path, samples = data
    stranger = DetDataSample(metainfo={'img_id': 99, 'ori_shape': (HEIGHT, WIDTH)})
    stranger.pred_instances = samples[0].pred_instances
    with pytest.raises(ValueError, match='Image 99 is not in .*annotations.json .which has 11, 12'):
        _evaluate([stranger], ann_file=path)
    with pytest.raises(ValueError, match='Image 99 comes without gt_instances'):
        _evaluate([stranger])
    resized = DetDataSample(metainfo={'img_id': 11, 'ori_shape': (HEIGHT, WIDTH + 1)})
    resized.pred_instances = samples[0].pred_instances
    with pytest.raises(ValueError, match=r'Image 11: masks of size \(60, 90\), but .* \(60, 91\)'):
        _evaluate([resized], ann_file=path)
    with pytest.raises(ValueError, match='no image has been seen'):
        _evaluate([], ann_file=path)
    with pytest.raises(FileNotFoundError, match='nowhere.json'):
        OpenWorldMetric(str(tmp_path / 'nowhere.json'))


def _rank(rank, folder):
    """One of two ranks: every other sample, and the first once more to fill rank 1."""
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2
    )
    path, samples = make_data(folder / f'annotations{rank}.json')
    metrics = _evaluate(
        (samples + samples[:1])[rank::2],
        ann_file=path,
        tide=True,
        metric=('bbox', 'boundary'),
        outfile_prefix=f'{folder}/results',
        collect_dir=f'{folder}/parts',
    )
    (folder / f'metrics{rank}.json').write_text(json.dumps(metrics))
    torch.distributed.destroy_process_group()


# A process that has not evaluated yet forks the ranks: hotcoco's threads do not survive a fork.
FORK_RANKS = """
import importlib.util, multiprocessing, pathlib, sys
import mmdet_plugins.common.runtime
spec = importlib.util.spec_from_file_location('module', sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
context = multiprocessing.get_context('fork')
ranks = [context.Process(target=module._rank, args=(rank, pathlib.Path(sys.argv[2])))
         for rank in range(2)]
for process in ranks:
    process.start()
for process in ranks:
    process.join()
sys.exit(sum(process.exitcode != 0 for process in ranks))
"""


def test_two_ranks_equal_one(data, tmp_path, repo):
    path, samples = data
    subprocess.run(
        [sys.executable, '-c', FORK_RANKS, __file__, str(tmp_path)],
        cwd=repo,
        check=True,
        timeout=120,
        capture_output=True,
    )
    alone = _evaluate(samples, ann_file=path, metric=('bbox', 'boundary'), tide=True)
    for rank in range(2):
        metrics = json.loads((tmp_path / f'metrics{rank}.json').read_text())
        assert metrics == pytest.approx(alone, abs=1e-12)
    results = json.loads((tmp_path / 'results.segm.json').read_text())
    ids = [result['image_id'] for result in results]
    assert len(ids) == 56 and ids == sorted(ids)
