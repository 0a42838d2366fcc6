"""Merging into panoptic maps, COCO's id PNGs, and panoptic quality."""

import io
import pickle
from collections import defaultdict

import cv2
import numpy as np
import pytest
import torch
from mmdet.evaluation.functional import INSTANCE_OFFSET as MMDET_OFFSET
from mmdet.models.seg_heads import HeuristicFusionHead
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData
from PIL import Image

from mmdet_plugins.ops import panoptic
from mmdet_plugins.ops.panoptic import PanopticQuality, Segments, merge_panoptic
from mmdet_plugins.ops.rle import decode_rle

THINGS, CLASSES = 3, 7
CATEGORIES = [{'id': 10 * i, 'name': f'c{i}', 'isthing': i <= THINGS} for i in range(1, 8)]


def random_instances(rng, count, height=40, width=56):
    masks = np.zeros((count, height, width), bool)
    for mask in masks:
        y, x = rng.integers(0, height - 4), rng.integers(0, width - 4)
        mask[y : y + rng.integers(2, 24), x : x + rng.integers(2, 24)] = True
    scores, labels = rng.random(count).astype(np.float32), rng.integers(0, THINGS, count)
    semantic = rng.integers(0, CLASSES + 1, (height // 8, width // 8)).repeat(8, 0).repeat(8, 1)
    return [torch.from_numpy(array) for array in (masks, scores, labels, semantic)]


def merge_literally(masks, scores, labels, semantic, min_score, max_overlap, min_stuff_area):
    """Pixel by pixel, in the words of Panoptic-FPN."""
    height, width = semantic.shape
    merged = {}
    for rank, i in enumerate(sorted(range(len(scores)), key=lambda i: -scores[i]), start=1):
        pixels = {(y, x) for y in range(height) for x in range(width) if masks[i, y, x]}
        taken = pixels & merged.keys()
        if scores[i] < min_score or (pixels and len(taken) / len(pixels) > max_overlap):
            continue
        merged.update(dict.fromkeys(pixels - taken, int(labels[i]) + 1000 * rank))
    for label in range(THINGS, CLASSES):
        pixels = {(y, x) for y in range(height) for x in range(width) if semantic[y, x] == label}
        pixels -= merged.keys()
        if len(pixels) >= min_stuff_area:
            merged.update(dict.fromkeys(pixels, label))
    return [[merged.get((y, x), CLASSES) for x in range(width)] for y in range(height)]


@pytest.mark.parametrize('seed', range(6))
def test_merge_equals_a_literal_one(seed):
    instances = random_instances(np.random.default_rng(seed), 12)
    options = dict(min_score=0.3, max_overlap=(0.5, 0.0, 1.0)[seed % 3], min_stuff_area=150)
    merged = merge_panoptic(*instances, num_things=THINGS, num_classes=CLASSES, **options)
    assert merged.dtype == torch.int64
    assert merged.tolist() == merge_literally(*(x.numpy() for x in instances), *options.values())


@pytest.mark.parametrize('seed', range(4))
def test_merge_equals_mmdet(seed):
    masks, scores, labels, semantic = random_instances(np.random.default_rng(seed), 15)
    head = HeuristicFusionHead(
        THINGS, CLASSES - THINGS, ConfigDict(mask_overlap=0.5, stuff_area_limit=150)
    )
    # mmdet's semantic branch knows stuff, and all things as one class more
    is_stuff = (semantic >= THINGS) & (semantic < CLASSES)
    logits = torch.where(is_stuff, semantic - THINGS, CLASSES - THINGS)
    logits = torch.nn.functional.one_hot(logits, CLASSES - THINGS + 1).permute(2, 0, 1)
    instances = InstanceData(
        bboxes=torch.zeros(len(masks), 4), scores=scores, labels=labels, masks=masks
    )
    expected = head.predict([instances], [logits])[0].sem_seg[0]
    merged = merge_panoptic(
        masks, scores, labels, semantic,
        num_things=THINGS, num_classes=CLASSES, min_score=0, min_stuff_area=150,
    )  # fmt: skip
    assert MMDET_OFFSET == panoptic.INSTANCE_OFFSET
    assert torch.equal(merged % MMDET_OFFSET, expected.long() % MMDET_OFFSET)
    pairs = torch.stack((merged, expected)).flatten(1).unique(dim=1)  # one to one
    assert pairs.shape[1] == len(merged.unique()) == len(expected.unique()) > 6


def test_merge_edges():
    semantic = torch.tensor([[0, 3, 3], [3, 7, 6]])
    settings = dict(num_things=THINGS, num_classes=CLASSES, min_stuff_area=1)
    none = torch.zeros(0, 2, 3, dtype=torch.bool)
    empty = merge_panoptic(none, torch.zeros(0), torch.zeros(0, dtype=torch.long), semantic,
                           **settings)  # fmt: skip
    assert empty.tolist() == [[7, 3, 3], [3, 7, 6]]
    masks = torch.zeros(3, 2, 3, dtype=torch.bool)
    masks[0, 0, 0] = masks[1, 0, :2] = True  # one pixel, and one that is half taken
    scores, labels = torch.tensor([0.9, 0.5, 0.7], dtype=torch.float16), torch.tensor([2, 1, 0])
    merged = merge_panoptic(masks, scores, labels, semantic, **settings)
    assert merged.tolist() == [[1002, 3001, 3], [3, 7, 6]]
    merged = merge_panoptic(masks, scores, labels, semantic, **settings, max_overlap=0.49)
    assert merged.tolist() == [[1002, 3, 3], [3, 7, 6]]
    assert merge_panoptic(masks, 0 * scores, labels, semantic, **settings).equal(empty)


def test_ids_keep_label_0_and_lose_void():
    ids, labels = panoptic.panoptic_to_ids(np.array([[0, 1000, 2001], [7, 1007, 3]]), 7)
    assert ids.tolist() == [[1, 1001, 2002], [0, 0, 4]]
    assert labels == {1: 0, 4: 3, 1001: 0, 2002: 1}


def test_id_png():
    ids = np.array([[0, 1, 255, 256], [65535, 65536, 8345037, (1 << 24) - 1]])
    data = panoptic.encode_id_png(ids)
    rgb = np.asarray(Image.open(io.BytesIO(data)), np.int64)
    assert np.array_equal(rgb[..., 0] + 256 * rgb[..., 1] + 256**2 * rgb[..., 2], ids)
    assert np.array_equal(panoptic.decode_id_png(data), ids)
    with pytest.raises(ValueError, match='24 bits'):
        panoptic.encode_id_png(ids + 1)
    labels = cv2.imencode('.png', ids.astype(np.uint8))[1].tobytes()
    with pytest.raises(ValueError, match='three 8-bit channels'):
        panoptic.decode_id_png(labels)
    for broken in (b'', b'GIF', data[:40]):
        with pytest.raises(ValueError, match='no image'):
            panoptic.decode_id_png(broken)


def random_map(rng, segments, height=30, width=41):
    ids = np.zeros((height, width), np.int32)
    for segment in segments:
        y, x = rng.integers(0, height - 3), rng.integers(0, width - 3)
        ids[y : y + rng.integers(1, 20), x : x + rng.integers(1, 20)] = segment
    return ids


@pytest.mark.parametrize('seed', range(4))
def test_segment_rles(seed):
    ids = random_map(np.random.default_rng(seed), (3, 9, 77, 1 << 20, 4, 5))
    rles = panoptic.segment_rles(ids)
    segments = np.setdiff1d(ids, 0).tolist()
    assert sorted(rles) == segments
    masks = ids == np.array(segments)[:, None, None]
    assert np.array_equal(decode_rle([rles[s] for s in segments]), masks)
    assert all(sum(rle['counts']) == ids.size for rle in rles.values())


def test_quality_by_hand():
    """A 10 x 10 image: its upper half is things, its lower half stuff and void."""
    truth, found = np.zeros((2, 10, 10), int)
    truth[:5, :4], truth[:5, 4:8] = 1, 2  # things: 20 px each; what is right of them is void
    truth[5:, :6] = 3  # stuff: 30 px
    # 15 of the 20 px, and 2 px on void: IoU 15 / (17 + 20 - 15 - 2)
    found[:3, 2:4], found[:5, :2] = 11, 11
    found[0, 8:] = 11
    found[1:5, 4:6] = 12  # 8 px of the second: IoU 0.4, so both are errors
    found[1:5, 8:] = 13  # wholly on void: not counted
    found[5:, :6] = 14
    found[5:, 6:] = 14  # stuff may spill over void
    quality = PanopticQuality(CATEGORIES)
    quality.update(
        5,
        Segments(truth, {1: 10, 2: 10, 3: 40}),
        Segments(found, {11: 10, 12: 10, 13: 10, 14: 40}),
    )
    iou = (6 + 10) / (18 + 20 - 16 - 2)
    assert quality.per_class() == {
        10: pytest.approx((iou / 2, iou, 0.5)),
        40: pytest.approx((1, 1, 1)),
    }
    metrics = quality.compute()
    expected = dict(
        PQ=(iou / 2 + 1) / 2, SQ=(iou + 1) / 2, RQ=0.75,
        PQ_th=iou / 2, SQ_th=iou, RQ_th=0.5, PQ_st=1, SQ_st=1, RQ_st=1,
    )  # fmt: skip
    assert metrics == pytest.approx(expected)


def test_crowd_by_hand():
    truth = np.repeat([[1, 1, 1, 1, 2, 2, 2, 2]], 4, 0)
    found = np.repeat([[5, 5, 0, 6, 6, 6, 0, 7]], 4, 0)
    category_of = {1: 20, 2: 20}
    quality = PanopticQuality(CATEGORIES)
    # 5 is half of object 1: no match; 6 lies by 8 of 12 px on the crowd, 7 wholly
    quality.update(
        1, Segments(truth, category_of, {2}), Segments(found, dict.fromkeys((5, 6, 7), 20))
    )
    assert quality._counts == {1: {20: (0, 1, 1, 0.0)}}
    # of another class than the crowd, they are errors
    quality.update(
        2, Segments(truth, category_of, {2}), Segments(found, dict.fromkeys((5, 6, 7), 30))
    )
    assert quality._counts[2] == {20: (0, 0, 1, 0.0), 30: (0, 3, 0, 0.0)}


def quality_literally(images):
    """PQ of each class over pixels as sets: section 4 of the paper, and its rules on void."""
    tp, fp, fn, total = (defaultdict(float) for _ in range(4))
    for truth, found in images:
        pixels = [defaultdict(set), defaultdict(set)]
        for side, group in zip((truth, found), pixels, strict=True):
            for place, segment in np.ndenumerate(side.ids):
                group[segment].add(place)
        matched = set()
        for t, category in truth.category_of.items():
            for p in [p for p, c in found.category_of.items() if c == category]:
                inside = len(pixels[0][t] & pixels[1][p])
                union = len((pixels[0][t] | pixels[1][p]) - (pixels[0][0] & pixels[1][p]))
                if t not in truth.crowd and inside / union > 0.5:
                    matched |= {('t', t), ('p', p)}
                    tp[category] += 1
                    total[category] += inside / union
        for t, category in truth.category_of.items():
            fn[category] += ('t', t) not in matched and t not in truth.crowd
        for p, category in found.category_of.items():
            ignored = set(pixels[0][0])
            for t in truth.crowd:
                ignored |= pixels[0][t] if truth.category_of[t] == category else set()
            share = len(pixels[1][p] & ignored) / len(pixels[1][p])
            fp[category] += ('p', p) not in matched and share <= 0.5
    return {
        c: total[c] / (tp[c] + fp[c] / 2 + fn[c] / 2)
        for c in tp.keys() | fp.keys() | fn.keys()
        if tp[c] + fp[c] + fn[c]
    }


def random_images(count, seed=0):
    """Predictions are disturbed annotations; each image has at most one crowd a class."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        truth = random_map(rng, rng.permutation(np.arange(1, 9)))
        found = np.where(rng.random(truth.shape) < 0.2, 0, np.roll(truth, 1, 1)) * 300
        ids = np.setdiff1d(truth, 0).tolist()
        category_of = {i: int(10 * rng.integers(2, 6)) for i in ids}
        found_of = {300 * i: category_of[i] if rng.random() < 0.8 else 20 for i in ids}
        found_of = {i: c for i, c in found_of.items() if (found == i).any()}
        yield Segments(truth, category_of, {*ids[:1]}), Segments(found, found_of)


def test_quality_equals_a_literal_one():
    images = list(random_images(25))
    quality = PanopticQuality(CATEGORIES)
    for image_id, (truth, found) in enumerate(images):
        quality.update(image_id, truth, found)
    expected = quality_literally(images)
    assert {c: pq for c, (pq, _, _) in quality.per_class().items()} == pytest.approx(expected)
    assert 0.1 < quality.compute()['PQ'] < 0.9


def test_quality_of_shares_equals_that_of_the_whole():
    images = list(random_images(6, seed=1))
    whole, *parts = (PanopticQuality(CATEGORIES) for _ in range(3))
    for image_id, (truth, found) in enumerate(images):
        whole.update(image_id, truth, found)
        whole.update(image_id, truth, truth)  # passed over
        parts[image_id % 2].update(image_id, truth, found)
    parts[1].update(0, *images[0])  # a rank that was filled up
    merged = PanopticQuality.merge(pickle.loads(pickle.dumps(parts)))
    assert merged.image_ids == set(range(6))
    assert merged.compute() == whole.compute()


def test_quality_edges():
    void = Segments(np.zeros((4, 5), int), {})
    full = Segments(np.ones((4, 5), int), {1: 40})
    quality = PanopticQuality(CATEGORIES)
    assert np.isnan(list(quality.compute().values())).all()
    quality.update(1, void, void)
    quality.update(2, void, full)
    assert quality.per_class() == {}
    quality.update(3, full, void)
    assert quality.per_class() == {40: (0, 0, 0)}
    assert np.isnan(quality.compute()['PQ_th']) and quality.compute()['PQ_st'] == 0
    quality.update(4, full, full)
    assert quality.compute()['PQ'] == pytest.approx(1 / 1.5)


def test_quality_refuses_what_does_not_fit():
    quality = PanopticQuality(CATEGORIES)
    ids = np.ones((4, 5), int)
    fine = Segments(ids, {1: 40})
    for truth, found, words in (
        (fine, Segments(ids.T, {1: 40}), r'Image 9: .*\(4, 5\).*\(5, 4\)'),
        (Segments(ids, {1: 40, 2: 40}), fine, r'Image 9, annotation: the segments \[2\]'),
        (fine, Segments(ids, {}), r'Image 9, prediction: the segments \[1\]'),
        (fine, Segments(ids, {1: 41}), r'no categories \[41\]'),
    ):
        with pytest.raises(ValueError, match=words):
            quality.update(9, truth, found)
    assert not quality.image_ids
