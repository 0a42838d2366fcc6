"""The evaluator against pycocotools, and its base/novel split against a literal reference."""

import contextlib
import copy
import io
import json
import pickle

import numpy as np
import pytest
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mmdet_plugins.ops import open_world
from mmdet_plugins.ops.coco_json import by_image, to_detections, to_objects
from mmdet_plugins.ops.open_world import (
    OpenWorldEvaluator,
    evaluate_json,
    format_table,
    greedy_match,
)

HEIGHT, WIDTH = 150, 240
MAX_DETS = (1, 10, 40, 100)
AREAS = ('all', 'small', 'medium', 'large')


def _mask(rng, box):
    """An ellipse with some salt and pepper, so that masks of equal boxes differ."""
    x, y, w, h = box
    xs, ys = np.ogrid[0.5:WIDTH, 0.5:HEIGHT]
    mask = (
        (((xs - x - w / 2) / (w / 2)) ** 2 + ((ys - y - h / 2) / (h / 2)) ** 2 <= 1)
        .view(np.uint8)
        .T
    )
    mask[rng.integers(0, HEIGHT, 40), rng.integers(0, WIDTH, 40)] ^= 1
    rle = mask_utils.encode(mask)
    return {'size': rle['size'], 'counts': rle['counts'].decode()}


def make_data(seed, num_images=8, num_dets=60):
    """Objects of all sizes in two classes, crowds, ties of score and of IoU, empty images."""
    rng = np.random.default_rng(seed)
    images, annotations, results = [], [], []
    for image_id in rng.permutation(1000)[:num_images].tolist():
        images.append(
            {'id': image_id, 'file_name': f'{image_id}.jpg', 'height': HEIGHT, 'width': WIDTH}
        )
        boxes = []
        for i in range(rng.integers(0, 9)):
            size = rng.choice([8, 30, 60, 130]) * rng.uniform(0.7, 1.3, 2)
            size = np.minimum(size, (WIDTH - 20, HEIGHT - 20))
            box = [*(rng.random(2) * (np.array([WIDTH, HEIGHT]) - size)), *size]
            if i == 1:
                box = boxes[0]  # the same object twice: a tie of IoU
            boxes.append(box)
            annotations.append(
                {
                    'id': len(annotations) + 1,
                    'image_id': image_id,
                    'category_id': int(rng.choice([3, 7])),
                    'iscrowd': int(rng.random() < 0.2),
                    'bbox': [float(v) for v in box],
                    'segmentation': _mask(rng, box),
                    'area': float(box[2] * box[3] * rng.uniform(0.6, 1)),
                }
            )
        for _ in range(rng.integers(0, num_dets)):
            if boxes and rng.random() < 0.8:
                box = np.array(boxes[rng.integers(len(boxes))])
                if rng.random() < 0.8:
                    spread = rng.choice([0.02, 0.1, 0.3])
                    box = box + rng.normal(size=4) * np.tile(box[2:], 2) * spread
            else:
                box = np.array([*(rng.random(2) * 100), *(5 + rng.random(2) * 100)])
            box[2:] = np.maximum(box[2:], 2)
            results.append(
                {
                    'image_id': image_id,
                    'category_id': int(rng.choice([3, 7])),
                    'bbox': [float(v) for v in box],
                    'segmentation': _mask(rng, box),
                    'score': float(rng.integers(1, 30) / 30),
                }
            )
    return {
        'images': images,
        'annotations': annotations,
        'categories': [{'id': 3, 'name': 'seen'}, {'id': 7, 'name': 'unseen'}],
    }, results


def pycocotools_metrics(truth, results, iou_type, max_dets=MAX_DETS):
    """The same names from pycocotools with useCats=0."""
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO()
        gt.dataset = copy.deepcopy(truth)
        gt.createIndex()
        results = copy.deepcopy(results)
        for result in results:
            if iou_type == 'segm':
                result.pop('bbox')  # as mmdet does, so that areas are those of the masks
            else:
                result.pop('segmentation')
        evaluation = COCOeval(gt, gt.loadRes(results), iou_type)
        evaluation.params.useCats = 0
        evaluation.params.maxDets = sorted({*max_dets, 100})
        evaluation.evaluate()
        evaluation.accumulate()
    return summary(
        evaluation.eval['precision'][:, :, 0],
        evaluation.eval['recall'][:, 0],
        evaluation.params.maxDets,
        iou_type,
        max_dets,
    )


def summary(precision, recall, budgets, name, max_dets=MAX_DETS):
    def mean(values):
        return values[values > -1].mean() if (values > -1).any() else -1

    precision = precision[..., budgets.index(100)]
    metrics = {
        f'{name}_AP': mean(precision[:, :, 0]),
        f'{name}_AP50': mean(precision[0, :, 0]),
        f'{name}_AP75': mean(precision[5, :, 0]),
    }
    for a, area in enumerate(AREAS):
        suffix = f'_{area}' if a else ''
        metrics[f'{name}_AP{suffix}'] = mean(precision[:, :, a])
        for k in max_dets:
            metrics[f'{name}_AR@{k}{suffix}'] = mean(recall[:, a, budgets.index(k)])
    return metrics


@pytest.mark.parametrize('iou_type', ['bbox', 'segm'])
@pytest.mark.parametrize('seed', range(3))
def test_equals_pycocotools(iou_type, seed):
    truth, results = make_data(seed)
    ours = evaluate_json(truth, results, (iou_type,), MAX_DETS)
    assert ours == pytest.approx(pycocotools_metrics(truth, results, iou_type), abs=1e-9)
    assert 0.05 < ours[f'{iou_type}_AR@10'] < 0.9  # the data leave room on both sides


@pytest.mark.parametrize('seed', range(2))
def test_greedy_engine_equals_pycocotools(seed, monkeypatch):
    """The engine of boundary AP, given the overlap of masks, which pycocotools knows."""
    truth, results = make_data(seed)
    monkeypatch.setattr(open_world, '_StreamEngine', open_world._GreedyEngine)
    ours = evaluate_json(truth, results, ('segm',), MAX_DETS)
    assert ours == pytest.approx(pycocotools_metrics(truth, results, 'segm'), abs=1e-9)


def test_greedy_match_by_hand():
    ious = np.array([[0.8, 0.8, 0.9], [0.8, 0.7, 0.9], [0.6, 0.6, 0.9], [0.6, 0.6, 0.4]])
    crowd = np.array([False, False, True])
    ignored = np.array([[False, False, True], [True, False, True]])
    matches = greedy_match(ious, ignored, crowd, np.array([0.5, 0.75]))
    # Of equals the last wins; objects that count go before ignored ones, however well these fit;
    # a crowd is never used up, an object is.
    assert matches.tolist() == [[[1, 0, 2, -1], [1, 0, 2, -1]], [[1, 2, 2, 0], [1, 2, 2, -1]]]


def test_budgets_are_those_in_the_names():
    truth, results = make_data(4)
    ours = evaluate_json(truth, results, ('bbox',), max_dets=(7, 3))
    assert [name for name in ours if '@' in name and name.count('_') == 1] == [
        'bbox_AR@3',
        'bbox_AR@7',
    ]
    theirs = pycocotools_metrics(truth, results, 'bbox', (3, 7))
    assert ours == pytest.approx(theirs, abs=1e-9)  # and AP stays that at 100


def reference_recall(truth, results, base, part_is_base, threshold, budget, area):
    """Objects of one part found and in all, by the definition: no ignored objects, no arrays."""
    found = total = 0
    for image in truth['images']:
        anns = sorted(
            (a for a in truth['annotations'] if a['image_id'] == image['id']),
            key=lambda a: a['category_id'],
        )
        dets = sorted(
            (r for r in results if r['image_id'] == image['id']), key=lambda r: r['category_id']
        )
        dets.sort(key=lambda r: -r['score'])
        crowd = [a['iscrowd'] for a in anns]
        ious = mask_utils.iou([d['bbox'] for d in dets], [a['bbox'] for a in anns], crowd)
        mine = [(a['category_id'] in base) == part_is_base for a in anns]

        # 1. Detections that hit an object of the other part go.
        kept, taken = [], set()
        for d in range(len(dets)):
            match = None
            for wanted in (True, False):  # first objects that count, then the rest
                for g in range(len(anns)):
                    if (mine[g] and not crowd[g]) != wanted or (g in taken and not crowd[g]):
                        continue
                    if ious[d][g] >= 0.5 and (match is None or ious[d][g] >= ious[d][match]):
                        match = g
                if match is not None:
                    break
            taken.add(match)
            if match is None or mine[match]:
                kept.append(d)

        # 2. The first k of the others look for objects of this part.
        low, high = {
            'all': (0, 1e10),
            'small': (0, 1024),
            'medium': (1024, 9216),
            'large': (9216, 1e10),
        }[area]
        wanted = [
            g for g, a in enumerate(anns) if mine[g] and not crowd[g] and low <= a['area'] <= high
        ]
        free = list(wanted)
        for d in kept[:budget]:
            reach = [g for g in free if ious[d][g] >= threshold]
            if reach:
                free.remove(max(reach, key=lambda g: (ious[d][g], g)))
        found += len(wanted) - len(free)
        total += len(wanted)
    return found, total


@pytest.mark.parametrize('part', ['novel', 'base'])
def test_split_equals_reference(part):
    truth, results = make_data(5, num_images=14, num_dets=40)
    ours = evaluate_json(truth, results, ('bbox',), (2, 10), base_categories=['seen'])
    for budget in (2, 10):
        for area in AREAS:
            counts = [
                reference_recall(truth, results, {3}, part == 'base', t, budget, area)
                for t in np.linspace(0.5, 0.95, 10)
            ]
            expected = np.mean([found / total for found, total in counts])
            suffix = '' if area == 'all' else f'_{area}'
            assert ours[f'{part}_bbox_AR@{budget}{suffix}'] == pytest.approx(expected, abs=1e-9)
    whole = evaluate_json(truth, results, ('bbox',), (2, 10))
    assert {name: ours[name] for name in whole} == whole


def test_detections_on_base_objects_take_no_budget():
    """By hand: the detection of a base object outranks that of the novel object."""
    box, other = [10.0, 10.0, 40.0, 40.0], [100.0, 60.0, 50.0, 40.0]
    truth = {
        'images': [{'id': 1}],
        'categories': [{'id': 1, 'name': 'cat'}, {'id': 2, 'name': 'ufo'}],
        'annotations': [_annotation(1, box, 1), _annotation(2, other, 2)],
    }
    results = [
        {'image_id': 1, 'category_id': 1, 'bbox': b, 'score': s}
        for b, s in ((box, 0.9), (other, 0.8))
    ]
    metrics = evaluate_json(truth, results, ('bbox',), (1,), base_categories=['cat'])
    assert metrics['bbox_AR@1'] == pytest.approx(0.5)
    assert metrics['novel_bbox_AR@1'] == 1
    assert metrics['novel_bbox_AP'] == pytest.approx(1)  # nor do they count as false
    assert metrics['novel_bbox_AR@1_large'] == -1  # there is no large novel object


def _annotation(ann_id, box, category_id=1, **more):
    return {
        'id': ann_id,
        'image_id': 1,
        'category_id': category_id,
        'bbox': box,
        'area': box[2] * box[3],
        'iscrowd': 0,
        **more,
    }


def test_order_shares_and_pickling_do_not_matter():
    truth, results = make_data(6)
    kinds = ('bbox', 'segm', 'boundary')
    expected = evaluate_json(truth, results, kinds, base_categories=['seen'], tide=True)
    gts, dets = by_image(truth['annotations']), by_image(results)
    shares = [OpenWorldEvaluator(kinds, split=True, tide=True) for _ in range(3)]
    for i, image in enumerate(truth['images'][::-1]):
        for share in (shares[i % 2], shares[0]):  # the first share sees every image
            share.update(
                image['id'],
                to_objects(gts[image['id']], image, True, {3}),
                to_detections(dets[image['id']], True),
            )
    assert shares[0].compute() == pytest.approx(expected, abs=1e-12)
    shares = [pickle.loads(pickle.dumps(share)) for share in shares]
    merged = OpenWorldEvaluator.merge(shares)
    assert merged.compute() == pytest.approx(expected, abs=1e-12)
    assert merged.compute() == merged.compute()  # computing consumes nothing


def test_tide_by_hand():
    """Two objects, one found: finding the other would lift AP50 from 51/101 to 1."""
    truth = {
        'images': [{'id': 1}],
        'categories': [{'id': 1, 'name': 'cat'}],
        'annotations': [_annotation(1, [0, 0, 10, 10]), _annotation(2, [50, 50, 10, 10])],
    }
    found = [{'image_id': 1, 'category_id': 1, 'bbox': [0, 0, 10, 10], 'score': 0.5}]
    metrics = evaluate_json(truth, found, ('bbox',), tide=True)
    assert metrics['bbox_TIDE_Miss'] == pytest.approx(50 / 101)
    assert metrics['bbox_TIDE_Loc'] == metrics['bbox_TIDE_Dupe'] == metrics['bbox_TIDE_Bkg'] == 0
    twice = evaluate_json(truth, [*found, {**found[0], 'score': 0.9}], ('bbox',), tide=True)
    assert twice['bbox_TIDE_Dupe'] == 0  # behind the last recall point it costs nothing
    far = {**found[0], 'bbox': [80, 80, 5, 5], 'score': 0.9}
    ahead = evaluate_json(truth, [*found, far], ('bbox',), tide=True)
    assert ahead['bbox_TIDE_Bkg'] == pytest.approx(51 / 101 - 51 / 202)


def test_object_with_id_zero_can_be_found():
    truth = {
        'images': [{'id': 1}],
        'categories': [{'id': 1, 'name': 'cat'}],
        'annotations': [_annotation(0, [0, 0, 10, 10])],
    }
    found = [{'image_id': 1, 'category_id': 1, 'bbox': [0, 0, 10, 10], 'score': 0.5}]
    assert evaluate_json(truth, found, ('bbox',))['bbox_AR@1'] == 1


def test_nothing_to_find_and_nothing_found():
    truth, _ = make_data(0)
    lost = evaluate_json(truth, [])
    assert lost['bbox_AP'] == lost['segm_AR@100'] == 0
    no_objects = evaluate_json({**truth, 'annotations': []}, [], ('bbox', 'segm', 'boundary'))
    assert set(no_objects.values()) == {-1.0}
    crowds = {**truth, 'annotations': [{**a, 'iscrowd': 1} for a in truth['annotations']]}
    assert evaluate_json(crowds, [], ('boundary',))['boundary_AP'] == -1


def test_bad_input_is_named(tmp_path):
    truth, results = make_data(0)
    image_id = results[0]['image_id']
    with pytest.raises(ValueError, match='1 of the .* with results are not in the annotations'):
        evaluate_json(truth, [*results, {**results[0], 'image_id': 5000}], ('bbox',))
    with pytest.raises(ValueError, match='no image has been seen'):
        evaluate_json({**truth, 'images': [], 'annotations': []}, [], ('bbox',))
    with pytest.raises(ValueError, match=f'Image {image_id}: a predicted box is not finite'):
        evaluate_json(truth, [{**results[0], 'bbox': [0, 0, float('nan'), 5]}], ('bbox',))
    with pytest.raises(ValueError, match=f'image {image_id} has no segmentation'):
        evaluate_json(truth, [{k: v for k, v in results[0].items() if k != 'segmentation'}])
    with pytest.raises(ValueError, match="'rabbit' not among the categories"):
        evaluate_json(truth, results, ('bbox',), base_categories=['rabbit'])
    with pytest.raises(ValueError, match='iou_types must be of bbox, segm, boundary'):
        OpenWorldEvaluator(('mask',))
    with pytest.raises(ValueError, match='at least 1'):
        OpenWorldEvaluator(max_dets=(0, 10))
    for field in ('bbox', 'area', 'image_id'):
        part = [{k: v for k, v in a.items() if k != field} for a in truth['annotations']]
        with pytest.raises(ValueError, match=f'The annotations: annotation 1 lacks {field}'):
            evaluate_json({**truth, 'annotations': part}, results)
    broken = copy.deepcopy(truth)
    broken['annotations'][0]['segmentation'] = {'size': [7, 7], 'counts': 'a1'}
    with pytest.raises(ValueError, match=r'Annotation 1 of image .* has no usable mask'):
        evaluate_json(broken, results)
    file = tmp_path / 'cut.json'
    file.write_text(json.dumps(truth)[:500])
    with pytest.raises(ValueError, match=r'cut.json: not valid JSON at line 1'):
        evaluate_json(file, results)
    file.write_text(json.dumps(results))
    with pytest.raises(ValueError, match='cut.json: this is a list, which is how'):
        evaluate_json(file, results)
    file.write_text('{"images": [], "shapes": []}')
    with pytest.raises(ValueError, match='not a COCO .* file: it has no list "annotations"'):
        evaluate_json(file, results)
    with pytest.raises(FileNotFoundError, match='nowhere.json: there is no such file'):
        evaluate_json(truth, tmp_path / 'nowhere.json')
    with pytest.raises(ValueError, match='entry 0 is not a COCO result'):
        evaluate_json(truth, [{'image_id': 1, 'bbox': [0, 0, 1, 1]}])


def test_table_shows_every_kind():
    truth, results = make_data(0)
    rows = format_table(evaluate_json(truth, results, base_categories=['seen'])).splitlines()
    assert [row.split()[0] for row in rows] == [
        'AP',
        'bbox',
        'segm',
        'novel_bbox',
        'novel_segm',
        'base_bbox',
        'base_segm',
    ]
    assert rows[0].split()[3:] == [
        'AR@1',
        'AR@10',
        'AR@100',
        'AR@100_small',
        'AR@100_medium',
        'AR@100_large',
    ]
