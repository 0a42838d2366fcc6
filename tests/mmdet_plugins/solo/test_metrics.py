"""Panoptic quality, LVIS AP and the mask oracle, from data samples and files to numbers."""

import json
from collections import defaultdict

import cv2
import numpy as np
import pytest
import torch
from mmdet.datasets import CocoPanopticDataset
from mmdet.registry import DATASETS, METRICS, TRANSFORMS
from mmdet.structures import DetDataSample
from mmengine.dataset import ClassBalancedDataset
from mmengine.evaluator import Evaluator
from mmengine.structures import InstanceData, PixelData
from PIL import Image
from pycocotools import mask as mask_utils

from mmdet_plugins.ops.panoptic import encode_id_png
from mmdet_plugins.ops.rle import decode_rle, encode_masks
from mmdet_plugins.solo.datasets import SOLOLVISDataset
from mmdet_plugins.solo.metrics import SOLOCocoMetric, SOLOLVISMetric, SOLOPanopticMetric

HEIGHT, WIDTH = 30, 44


def evaluate(metric, samples, classes, shares=1):
    """What the evaluation loop does with one metric, or with those of several ranks."""
    metric.dataset_meta = {'classes': classes}
    parts = []
    for share in range(shares):
        evaluator = Evaluator(metric)
        for sample in samples[share::shares]:
            evaluator.process([sample])
        parts.append(metric._state)
        metric._state = metric._new_state()
    return metric.compute_metrics(parts)


def rectangle(x1, y1, x2, y2):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[y1:y2, x1:x2] = True
    return mask


def instances_sample(image_id, masks, labels, scores, as_rle=False):
    masks = np.array(masks, bool).reshape(-1, HEIGHT, WIDTH)
    boxes = np.array([[*np.argwhere(m).min(0)[::-1], *(np.argwhere(m).max(0) + 1)[::-1]]
                      for m in masks], np.float32)  # fmt: skip
    found = InstanceData(
        bboxes=torch.from_numpy(boxes.reshape(-1, 4)),
        labels=torch.tensor(labels, dtype=torch.long),
        scores=torch.tensor(scores, dtype=torch.float32),
    )
    found.masks = encode_masks(masks) if as_rle else torch.from_numpy(masks)
    return DetDataSample(
        pred_instances=found, metainfo={'img_id': image_id, 'ori_shape': (HEIGHT, WIDTH)}
    )


def annotation(number, image_id, category_id, mask, **more):
    rle = mask_utils.encode(np.asfortranarray(mask, np.uint8))
    return {
        'id': number,
        'image_id': image_id,
        'category_id': category_id,
        'segmentation': {'size': rle['size'], 'counts': rle['counts'].decode()},
        'bbox': mask_utils.toBbox(rle).tolist(),
        'area': int(mask.sum()),
        'iscrowd': 0,
        **more,
    }


# --- panoptic ---------------------------------------------------------------------------------

PANOPTIC_CLASSES = ('sky', 'cat', 'dog', 'wall')  # ids 1, 2, 4, 9; cats and dogs are things


def write_panoptic(folder):
    """Two images: a cat, a dog, a crowd of dogs, sky and wall, and void between them."""
    categories = [
        {'id': i, 'name': name, 'isthing': int(name in ('cat', 'dog'))}
        for i, name in zip((1, 2, 4, 9), PANOPTIC_CLASSES, strict=True)
    ]
    images = [
        {'id': i, 'file_name': f'{i:03}.jpg', 'height': HEIGHT, 'width': WIDTH} for i in (7, 8)
    ]
    first = np.full((HEIGHT, WIDTH), 70000)
    first[10:20, 5:15], first[10:20, 20:30], first[25:] = 300, 301, 0
    second = np.full((HEIGHT, WIDTH), 5)
    second[:15, 20:40] = 6
    segments = [
        {70000: (1, 0), 300: (2, 0), 301: (4, 0)},
        {5: (9, 0), 6: (4, 1)},
    ]
    annotations = []
    for image, ids, listing in zip(images, (first, second), segments, strict=True):
        name = f'{image["id"]:03}.png'
        (folder / name).write_bytes(encode_id_png(ids))
        infos = []
        for segment, (category_id, iscrowd) in listing.items():
            box = cv2.boundingRect((ids == segment).astype(np.uint8))
            area = int((ids == segment).sum())
            infos.append({'id': segment, 'category_id': category_id, 'iscrowd': iscrowd,
                          'bbox': list(box), 'area': area})  # fmt: skip
        annotations.append({'image_id': image['id'], 'file_name': name, 'segments_info': infos})
    data = {'images': images, 'annotations': annotations, 'categories': categories}
    (folder / 'panoptic.json').write_text(json.dumps(data))
    return first, second


def panoptic_sample(image_id, panoptic):
    return DetDataSample(
        pred_panoptic_seg=PixelData(sem_seg=torch.from_numpy(panoptic)[None]),
        metainfo={'img_id': image_id, 'ori_shape': panoptic.shape},
    )


def panoptic_samples():
    first = np.full((HEIGHT, WIDTH), 0)  # sky: label 0, and over the void below as well
    first[10:20, 5:13] = 1001  # 80 of the cat's 100 pixels
    first[10:20, 20:30] = 2001  # the dog, taken for a cat
    second = np.full((HEIGHT, WIDTH), 3)
    second[:10, 20:40] = 1002  # inside the crowd
    second[20:, 40:] = 4  # void
    return [panoptic_sample(7, first), panoptic_sample(8, second)]


def panoptic_metric(folder, **kwargs):
    return METRICS.build(
        dict(
            type='SOLOPanopticMetric',
            ann_file=str(folder / 'panoptic.json'),
            seg_prefix=str(folder),
            **kwargs,
        )
    )


@pytest.mark.parametrize('shares', [1, 2])
def test_panoptic_quality(tmp_path, shares):
    write_panoptic(tmp_path)
    metric = panoptic_metric(tmp_path, classwise=True)
    metrics = evaluate(metric, panoptic_samples(), PANOPTIC_CLASSES, shares)
    # sky: all of its pixels and 20 more of the cat; what lies on void does not count
    sky = 44 * 25 - 200
    sky = sky / (sky + 20)
    # cat: IoU 0.8, and the dog as a false positive; dog: missed; the one on the crowd is ignored
    wall = (44 * 30 - 300 - 10 * 4) / (44 * 30 - 300 + 100)  # 100 px of the crowd's 300 are its
    assert metrics == pytest.approx(
        dict(
            PQ=(sky + 0.8 / 1.5 + 0 + wall) / 4,
            SQ=(sky + 0.8 + 0 + wall) / 4,
            RQ=(1 + 1 / 1.5 + 0 + 1) / 4,
            PQ_th=0.8 / 1.5 / 2,
            SQ_th=0.4,
            RQ_th=1 / 3,
            PQ_st=(sky + wall) / 2,
            SQ_st=(sky + wall) / 2,
            RQ_st=1,
        )
    )


def test_panoptic_in_the_evaluator(tmp_path):
    write_panoptic(tmp_path)
    expected = evaluate(panoptic_metric(tmp_path), panoptic_samples(), PANOPTIC_CLASSES)
    evaluator = Evaluator(panoptic_metric(tmp_path))
    evaluator.dataset_meta = {'classes': PANOPTIC_CLASSES}
    for _ in range(2):  # two epochs
        for sample in panoptic_samples():
            evaluator.process([sample])
        found = evaluator.evaluate(2)
        assert found == {f'coco_panoptic/{key}': value for key, value in expected.items()}


def test_panoptic_files(tmp_path):
    """What is written is COCO's format: read back by Pillow, and scored as an annotation."""
    write_panoptic(tmp_path)
    out = tmp_path / 'out/results'
    metric = panoptic_metric(tmp_path, outfile_prefix=str(out), format_only=True)
    assert evaluate(metric, panoptic_samples(), PANOPTIC_CLASSES, 2) == {}
    data = json.loads((tmp_path / 'out/results.panoptic.json').read_text())
    assert [entry['image_id'] for entry in data['annotations']] == [7, 8]
    for entry, sample in zip(data['annotations'], panoptic_samples(), strict=True):
        rgb = np.asarray(Image.open(tmp_path / 'out/results.panoptic' / entry['file_name']))
        ids = rgb.astype(int) @ (1, 256, 65536)
        labels = np.full(ids.shape, 4)
        for segment in entry['segments_info']:
            labels[ids == segment['id']] = (1, 2, 4, 9).index(segment['category_id'])
        assert np.array_equal(labels, sample.pred_panoptic_seg.sem_seg[0] % 1000)


def test_panoptic_refuses_in_one_sentence(tmp_path):
    write_panoptic(tmp_path)
    metric = panoptic_metric(tmp_path)
    sample = panoptic_samples()[0].to_dict()
    metric.dataset_meta = {'classes': PANOPTIC_CLASSES}
    with pytest.raises(ValueError, match='Image 3 is not in .*panoptic.json'):
        metric.process(None, [{**sample, 'img_id': 3}])
    (tmp_path / '007.png').unlink()
    with pytest.raises(FileNotFoundError, match='007.png: the panoptic annotation is missing'):
        metric.process(None, [sample])
    (tmp_path / '007.png').write_bytes(b'GIF')
    with pytest.raises(ValueError, match='007.png: this is no image'):
        metric.process(None, [sample])
    metric.dataset_meta = {'classes': ('person',)}
    with pytest.raises(ValueError, match="lacks the classes 'person'"):
        metric.process(None, [sample])
    with pytest.raises(ValueError, match='outfile_prefix'):
        panoptic_metric(tmp_path, format_only=True)
    data = json.loads((tmp_path / 'panoptic.json').read_text())
    data['categories'] = [{'id': 1, 'name': 'sky'}]
    (tmp_path / 'panoptic.json').write_text(json.dumps(data))
    with pytest.raises(ValueError, match='isthing'):
        panoptic_metric(tmp_path)


def test_panoptic_annotations_load(tmp_path):
    first, second = write_panoptic(tmp_path)
    data_set = CocoPanopticDataset(
        ann_file=str(tmp_path / 'panoptic.json'),
        data_prefix=dict(img=str(tmp_path), seg=str(tmp_path)),
        metainfo=dict(classes=PANOPTIC_CLASSES),
    )
    load = TRANSFORMS.build(dict(type='SOLOLoadPanopticAnnotations'))
    results = load(data_set.get_data_info(0))
    assert results['gt_bboxes_labels'].tolist() == [1, 2]
    assert results['gt_bboxes'].tensor.tolist() == [[5, 10, 15, 20], [20, 10, 30, 20]]
    assert results['gt_ignore_flags'].tolist() == [False, False]
    masks = results['gt_masks'].to_ndarray()
    assert np.array_equal(masks, np.stack((first == 300, first == 301)))
    expected = np.select([first == 70000, first == 300, first == 301], [0, 1, 2], 255)
    assert np.array_equal(results['gt_seg_map'], expected)
    assert results['gt_seg_map'].dtype == np.uint8

    results = load(data_set.get_data_info(1))  # a crowd is no instance, and still dogs
    assert len(results['gt_masks']) == len(results['gt_bboxes']) == 0
    assert np.array_equal(results['gt_seg_map'], np.where(second == 6, 2, 3))

    info = data_set.get_data_info(0)
    with pytest.raises(ValueError, match=r'007.png: \(30, 44\) pixels'):
        load({**info, 'height': 31})
    info['segments_info'][0]['id'] = 12
    with pytest.raises(ValueError, match='the segment 12 of the JSON is not in it'):
        load(info)


# --- LVIS -------------------------------------------------------------------------------------

LVIS_CLASSES = ('aerosol_can', 'zebra', 'cat')  # ids 1, 2, 3
LEFT, RIGHT = rectangle(0, 10, 20, 30), rectangle(24, 10, 44, 30)


def lvis_file(path, version='v1'):
    """Three images: class 1 is known to be absent on the second; 2 is not exhaustive on the
    third, and nothing is known of it on the first."""
    frequencies = 'rcf'
    categories = [
        {'id': i, 'name': name, 'frequency': f, 'image_count': 1}
        for i, (name, f) in enumerate(zip(LVIS_CLASSES, frequencies, strict=True), start=1)
    ]
    images = [
        {'id': i, 'height': HEIGHT, 'width': WIDTH, 'neg_category_ids': negative,
         'not_exhaustive_category_ids': partly,
         'coco_url': f'http://images.cocodataset.org/val2017/{i:012}.jpg'}
        for i, negative, partly in ((1, [], []), (2, [1], []), (3, [], [2]))
    ]  # fmt: skip
    if version == 'v0.5':
        for image in images:
            image['file_name'] = f'COCO_val2014_{image["id"]:012}.jpg'
    annotations = [
        annotation(1, 1, 1, LEFT),
        annotation(2, 1, 3, RIGHT),
        annotation(3, 2, 2, LEFT),
        annotation(4, 3, 2, LEFT),
    ]
    for a in annotations:
        a.pop('iscrowd')
    data = {'images': images, 'annotations': annotations, 'categories': categories}
    path.write_text(json.dumps(data))
    return str(path)


def lvis_samples(as_rle=False):
    return [
        instances_sample(1, [LEFT, RIGHT], [0, 1], [0.9, 0.8], as_rle),
        instances_sample(2, [LEFT, LEFT], [0, 1], [0.95, 0.6], as_rle),
        instances_sample(3, [RIGHT, LEFT], [1, 1], [0.7, 0.5], as_rle),
    ]


@pytest.mark.parametrize('as_rle', [False, True], ids=['dense', 'rle'])
@pytest.mark.parametrize('shares', [1, 2])
def test_lvis_by_hand(tmp_path, shares, as_rle):
    file = lvis_file(tmp_path / 'lvis.json')
    metric = METRICS.build(dict(type='SOLOLVISMetric', ann_file=file, metric=['segm', 'bbox']))
    metrics = evaluate(metric, lvis_samples(as_rle), LVIS_CLASSES, shares)
    for kind in ('segm', 'bbox'):
        # class 1 is found after a false positive on the second image, class 2 twice; what else
        # is said to be class 2 is not known to be wrong; class 3 is missed
        assert metrics[f'{kind}_APr'] == pytest.approx(0.5)
        assert metrics[f'{kind}_APc'] == pytest.approx(1)
        assert metrics[f'{kind}_APf'] == 0
        assert metrics[f'{kind}_AP'] == pytest.approx(0.5)
        assert metrics[f'{kind}_AR@300'] == pytest.approx(2 / 3)
        assert metrics[f'{kind}_APl'] == -1


def average_precision(matches, count):
    """101-point interpolated AP of ranked true (1) and false (0) positives."""
    precision = np.cumsum(matches) / np.arange(1, len(matches) + 1)
    recall = np.cumsum(matches) / count
    return np.mean([precision[recall >= r].max(initial=0) for r in np.linspace(0, 1, 101)])


def lvis_literally(data, samples, max_dets):
    """AP by class, masks as pixels, in the words of the LVIS paper's section 2.3."""
    truth = defaultdict(list)
    for entry in data['annotations']:
        truth[entry['image_id'], entry['category_id']].append(
            decode_rle([entry['segmentation']])[0]
        )
    images = {image['id']: image for image in data['images']}
    scores = {}
    for category in (c['id'] for c in data['categories']):
        count = sum(len(masks) for (_, c), masks in truth.items() if c == category)
        by_threshold = []
        for threshold in np.linspace(0.5, 0.95, 10):
            ranked = []
            for sample in samples:
                image, found = images[sample.img_id], sample.pred_instances
                true = truth[image['id'], category]
                if not true and category not in image['neg_category_ids']:
                    continue
                best = np.argsort(-found.scores.numpy(), kind='stable')[:max_dets]
                free = list(range(len(true)))
                for i in (i for i in best if found.labels[i] + 1 == category):
                    mask = found.masks[i].numpy()
                    ious = {g: (mask & true[g]).sum() / (mask | true[g]).sum() for g in free}
                    hit = max(ious, key=ious.get, default=None)
                    if hit is not None and ious[hit] >= threshold:
                        free.remove(hit)
                        ranked.append((found.scores[i].item(), 1))
                    elif category not in image['not_exhaustive_category_ids']:
                        ranked.append((found.scores[i].item(), 0))
            ranked.sort(reverse=True)
            by_threshold.append(average_precision([hit for _, hit in ranked], max(count, 1)))
        if count:
            scores[category] = np.mean(by_threshold)
    return scores


@pytest.mark.parametrize('max_dets', [300, 6])
def test_lvis_equals_a_literal_one(tmp_path, max_dets):
    rng = np.random.default_rng(0)
    data = json.loads(open(lvis_file(tmp_path / 'lvis.json')).read())
    annotations, samples = [], []
    data['images'] = []
    for image_id in range(1, 13):
        negative, partly = [(rng.random(3) < 0.4).nonzero()[0] + 1 for _ in range(2)]
        masks = []
        for _ in range(10):
            x, y = rng.integers(0, WIDTH - 12), rng.integers(0, HEIGHT - 12)
            masks.append(rectangle(x, y, x + rng.integers(6, 12), y + rng.integers(6, 12)))
        labels = rng.integers(0, 3, 10)
        for mask, label in list(zip(masks, labels, strict=True))[:5]:
            found = annotation(len(annotations) + 1, image_id, int(label) + 1, mask)
            annotations.append(found)
        data['images'].append(
            {'id': image_id, 'height': HEIGHT, 'width': WIDTH,
             'neg_category_ids': [int(c) for c in negative if c - 1 not in labels[:5]],
             'not_exhaustive_category_ids': partly.tolist()}
        )  # fmt: skip
        moved = [np.roll(mask, rng.integers(0, 3), 1) for mask in masks]
        samples.append(instances_sample(image_id, moved, labels, rng.random(10)))
    data['annotations'] = annotations
    file = tmp_path / 'many.json'
    file.write_text(json.dumps(data))
    expected = lvis_literally(data, samples, max_dets)
    metric = SOLOLVISMetric(str(file), max_dets=max_dets)
    for sample in samples:  # a data set may number the classes otherwise
        sample.pred_instances.labels = 2 - sample.pred_instances.labels
    metrics = evaluate(metric, samples, LVIS_CLASSES[::-1], shares=3)
    assert metrics['segm_AP'] == pytest.approx(np.mean([*expected.values()]))
    for category, group in ((1, 'r'), (2, 'c'), (3, 'f')):
        assert metrics[f'segm_AP{group}'] == pytest.approx(expected[category])
        assert 0.05 < expected[category] < 0.95


def test_lvis_refuses_in_one_sentence(tmp_path):
    file = lvis_file(tmp_path / 'lvis.json')
    with pytest.raises(ValueError, match="'segm' or 'bbox'"):
        SOLOLVISMetric(file, metric='proposal')
    data = json.loads(open(file).read())
    data['categories'][0].pop('frequency')
    (tmp_path / 'coco.json').write_text(json.dumps(data))
    with pytest.raises(ValueError, match='not an LVIS annotation file: it lacks "frequency"'):
        SOLOLVISMetric(str(tmp_path / 'coco.json'))
    metric = SOLOLVISMetric(file)
    metric.dataset_meta = {'classes': LVIS_CLASSES}
    sample = lvis_samples()[0]
    del sample.pred_instances.masks
    with pytest.raises(ValueError, match="Image 1: predictions without masks; evaluate 'bbox'"):
        metric.process(None, [sample.to_dict()])


@pytest.mark.parametrize('version', ['v0.5', 'v1'])
def test_lvis_data_set(tmp_path, version):
    file = lvis_file(tmp_path / 'lvis.json', version)
    data_set = DATASETS.build(
        dict(type='SOLOLVISDataset', ann_file=file, data_prefix=dict(img='coco'), pipeline=[])
    )
    folder = 'coco/val2017' if version == 'v1' else 'coco'
    assert data_set.get_data_info(1)['img_path'] == f'{folder}/000000000002.jpg'
    assert data_set.metainfo['classes'] == LVIS_CLASSES
    assert [i['bbox_label'] for i in data_set.get_data_info(0)['instances']] == [0, 2]
    # frequencies 1/3, 2/3, 1/3 at a threshold of 4/3: factors 2, sqrt(2), 2; rounded up
    balanced = ClassBalancedDataset(data_set, oversample_thr=4 / 3)
    assert balanced.repeat_indices == [0, 0, 1, 1, 2, 2]
    balanced = ClassBalancedDataset(data_set, oversample_thr=2 / 3)
    assert balanced.repeat_indices == [0, 0, 1, 2]
    assert isinstance(data_set, SOLOLVISDataset)


# --- the mask oracle --------------------------------------------------------------------------


def coco_file(path):
    """One image with a square, one half of it as an object of another class, and a crowd."""
    data = {
        'images': [{'id': i, 'file_name': f'{i}.jpg', 'height': HEIGHT, 'width': WIDTH}
                   for i in (1, 2)],
        'categories': [{'id': 1, 'name': 'cat'}, {'id': 2, 'name': 'dog'}],
        'annotations': [
            annotation(1, 1, 1, rectangle(0, 0, 20, 20)),
            annotation(2, 1, 2, rectangle(24, 0, 44, 20)),
            annotation(3, 1, 2, rectangle(0, 22, 44, 30), iscrowd=1),
        ],
    }  # fmt: skip
    path.write_text(json.dumps(data))
    return str(path)


def run_coco(metric, samples):
    evaluator = Evaluator(metric)
    evaluator.dataset_meta = {'classes': ('cat', 'dog')}
    for sample in samples:
        evaluator.process([sample])
    return evaluator.evaluate(len(samples))


@pytest.mark.parametrize('as_rle', [False, True], ids=['dense', 'rle'])
def test_mask_oracle_by_hand(tmp_path, as_rle):
    file = coco_file(tmp_path / 'coco.json')
    found = [
        rectangle(0, 0, 13, 20),  # the cat, at IoU 0.65: found at 4 of the 10 thresholds
        rectangle(24, 16, 44, 30),  # the dog, at IoU 8 / 60, and more of the crowd
        rectangle(20, 24, 30, 28),  # on the crowd alone: stays
        rectangle(40, 20, 44, 22),  # on nothing: stays, a false positive after the hit
    ]
    samples = [
        instances_sample(1, found, [0, 1, 1, 0], [0.9, 0.8, 0.7, 0.6], as_rle),
        instances_sample(2, found[:1], [0], [0.1], as_rle),  # no objects: stays
    ]
    metric = METRICS.build(
        dict(type='SOLOCocoMetric', ann_file=file, metric=['bbox', 'segm'], mask_oracle=True)
    )
    metrics = run_coco(metric, samples)
    assert metrics['coco/segm_mAP'] == pytest.approx(0.4 / 2)
    assert metrics['coco/oracle_segm_mAP'] == 1
    assert not any(key.startswith('coco/oracle_bbox') for key in metrics)
    assert metric.metrics == ['bbox', 'segm']

    stock = run_coco(METRICS.build(dict(type='CocoMetric', ann_file=file, metric=['bbox', 'segm'])),
                     samples)  # fmt: skip
    assert stock == {k: v for k, v in metrics.items() if 'oracle' not in k}


def test_the_most_overlapping_mask_is_taken_whatever_its_class(tmp_path):
    file = coco_file(tmp_path / 'coco.json')
    metric = SOLOCocoMetric(ann_file=file, metric='segm', mask_oracle=True)
    # 30 px on the cat and 40 px on the dog, said to be a cat: it gets the dog's mask
    samples = [instances_sample(1, [rectangle(17, 0, 28, 10)], [0], [0.9])]
    assert run_coco(metric, samples)['coco/oracle_segm_mAP'] == 0
    samples = [instances_sample(1, [rectangle(17, 0, 28, 10)], [1], [0.9])]
    samples.append(instances_sample(2, [], [], []))
    metrics = run_coco(SOLOCocoMetric(ann_file=file, metric='segm', mask_oracle=True), samples)
    assert metrics['coco/segm_mAP'] == 0
    assert metrics['coco/oracle_segm_mAP'] == pytest.approx(0.5)


def test_oracle_leaves_what_was_written_alone(tmp_path):
    file = coco_file(tmp_path / 'coco.json')
    samples = [instances_sample(1, [rectangle(0, 0, 13, 20)], [0], [0.9])]
    metric = SOLOCocoMetric(
        ann_file=file, metric='segm', mask_oracle=True, outfile_prefix=str(tmp_path / 'out')
    )
    assert run_coco(metric, samples)['coco/oracle_segm_mAP'] == 0.5
    (written,) = json.loads((tmp_path / 'out.segm.json').read_text())
    assert mask_utils.area(written['segmentation']) == 260
    with pytest.raises(ValueError, match="add 'segm'"):
        SOLOCocoMetric(ann_file=file, metric='bbox', mask_oracle=True)


def test_metrics_are_registered():
    for metric in (SOLOPanopticMetric, SOLOLVISMetric, SOLOCocoMetric):
        assert METRICS.get(metric.__name__) is metric
