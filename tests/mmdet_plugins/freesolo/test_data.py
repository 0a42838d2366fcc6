"""Pseudo-labels from their files to the head's batch, and back from predictions to files."""

import json

import cv2
import numpy as np
import pytest
import torch
from mmdet.registry import DATASETS, MODELS, TRANSFORMS
from mmdet.structures.bbox import HorizontalBoxes
from mmdet.structures.mask import BitmapMasks
from mmengine.dataset import pseudo_collate
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

from mmdet_plugins.freesolo.datasets import embeddings_file
from mmdet_plugins.ops.rle import area, decode_rle, encode_masks, rle_to_xyxy

SIZES = ((40, 60), (52, 44), (40, 60))
COUNTS = (3, 1, 0)
DIMS = 4


@pytest.fixture(scope='module', autouse=True)
def scope():
    init_default_scope('mmdet')


@pytest.fixture
def labels(tmp_path, freesolo):
    """Three images, four objects, their pseudo-label file."""
    annotations, images = [], []
    for index, (count, hw) in enumerate(zip(COUNTS, SIZES, strict=True)):
        image = np.random.default_rng(index).integers(0, 256, (*hw, 3), np.uint8)
        cv2.imwrite(str(tmp_path / f'{index}.png'), image)
        images.append(dict(id=index + 7, file_name=f'{index}.png', height=hw[0], width=hw[1]))
        rles = encode_masks(freesolo.ellipses(count, hw, index))
        for rle, (x1, y1, x2, y2), size in zip(
            rles, rle_to_xyxy(rles).tolist(), area(rles).tolist(), strict=True
        ):
            box = [x1, y1, x2 - x1, y2 - y1]
            annotations.append(
                dict(id=len(annotations) + 1, image_id=index + 7, category_id=1, bbox=box,
                     area=size, score=0.9, iscrowd=0, segmentation=rle)
            )  # fmt: skip
    path = tmp_path / 'labels.json'
    write(path, images, annotations)
    rows = np.arange(len(annotations) * DIMS).reshape(-1, DIMS)
    np.save(embeddings_file(path), rows.astype(np.float16))
    return path


def write(path, images, annotations):
    categories = [dict(id=1, name='object')]
    path.write_text(json.dumps(dict(images=images, annotations=annotations, categories=categories)))


def edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def dataset(path, pipeline=(), **changes):
    pipeline = [dict(type='LoadImageFromFile'), dict(type='FreeSOLOLoadAnnotations'), *pipeline]
    cfg = dict(type='FreeSOLODataset', ann_file=str(path), data_prefix=dict(img=str(path.parent)))
    return DATASETS.build({**cfg, 'pipeline': pipeline, **changes})


def test_each_object_has_its_row(labels):
    found = dataset(labels)
    assert len(found) == 3
    annotations = json.loads(labels.read_text())['annotations']
    rows = []
    for index, count in enumerate(COUNTS):
        results = found[index]
        mine = [ann for ann in annotations if ann['image_id'] == index + 7]
        expected = decode_rle([ann['segmentation'] for ann in mine], SIZES[index])
        assert results['gt_masks'].masks.shape == (count, *SIZES[index])
        assert np.array_equal(results['gt_masks'].masks, expected)
        assert results['gt_embeddings'].shape == (count, DIMS)
        assert results['gt_embeddings'].dtype == np.float32
        rows += results['gt_embeddings'][:, 0].tolist()
        boxes = [[x, y, x + w, y + h] for x, y, w, h in (ann['bbox'] for ann in mine)]
        assert results['gt_bboxes'].tensor.tolist() == boxes
    assert rows == [0, 4, 8, 12]


def test_a_pipeline_packs_what_the_head_needs(labels):
    pipeline = [
        dict(type='Resize', scale=(90, 90), keep_ratio=True),
        dict(type='RandomFlip', prob=1.0),
    ]
    mixed = DATASETS.build(
        dict(
            type='MultiImageMixDataset',
            dataset=dict(
                type='FreeSOLODataset',
                ann_file=str(labels),
                data_prefix=dict(img=str(labels.parent)),
                filter_cfg=dict(filter_empty_gt=True),
                pipeline=[
                    dict(type='LoadImageFromFile'),
                    dict(type='FreeSOLOLoadAnnotations'),
                    *pipeline,
                ],
            ),
            pipeline=[
                dict(type='FreeSOLOCopyPaste', max_hidden=2.0),
                dict(type='FreeSOLOPackInputs'),
            ],
        )
    )
    np.random.seed(0)
    assert len(mixed) == 2
    sizes = set()
    for _ in range(8):
        item = mixed[0]
        gts = item['data_samples'].gt_instances
        assert item['inputs'].dtype == torch.uint8 and item['inputs'].shape == (3, 60, 90)
        assert len(gts) == len(gts.embeddings) == len(gts.masks) == len(gts.bboxes)
        assert gts.embeddings.shape[1] == DIMS and gts.masks.masks.dtype == np.uint8
        sizes.add(len(gts))
    assert len(sizes) > 1, 'pasting changes how many there are'


def test_without_embeddings(labels):
    embeddings_file(labels).unlink()
    results = dataset(labels, with_embeddings=False)[0]
    assert 'gt_embeddings' not in results and len(results['gt_masks']) == 3
    assert len(dataset(labels, test_mode=True)) == 3


def test_new_embeddings_in_place_of_old_ones_are_seen(labels):
    found = dataset(labels)
    assert found[0]['gt_embeddings'][0, 0] == 0
    path = embeddings_file(labels)
    np.save(path.with_name('new.npy'), np.full((4, DIMS), 9, np.float16))
    path.with_name('new.npy').replace(path)
    assert found[0]['gt_embeddings'][0, 0] == 9


@pytest.mark.parametrize(
    ('change', 'error', 'message'),
    [
        (
            lambda path: embeddings_file(path).unlink(),
            FileNotFoundError,
            'of .* are missing',
        ),
        (
            lambda path: embeddings_file(path).write_bytes(b'x'),
            ValueError,
            'not a whole file of',
        ),
        (
            lambda path: np.save(embeddings_file(path), np.zeros((3, DIMS), np.float16)),
            ValueError,
            r'shape \(3, 4\), but .* has 4 annotations',
        ),
        (
            lambda path: edit(path, lambda data: data['annotations'].pop(1)),
            ValueError,
            r'shape \(4, 4\), but .* has 3 annotations',
        ),
        (
            lambda path: edit(path, lambda data: data['annotations'].reverse()),
            ValueError,
            'ids of annotations do not rise',
        ),
        (
            lambda path: edit(path, lambda data: data['annotations'][2].update(area=0)),
            ValueError,
            'annotations 1, 2, 3 of image 7 some cannot be used',
        ),
        (lambda path: path.write_text('{"images": ['), ValueError, 'not valid JSON'),
    ],
)
def test_broken_files_are_named(labels, change, error, message):
    change(labels)
    with pytest.raises(error, match=message):
        dataset(labels)


def results_of(masks, seed, embeddings=True):
    rng = np.random.default_rng(seed)
    boxes = [cv2.boundingRect(mask) for mask in masks]
    boxes = np.array([[x, y, x + w, y + h] for x, y, w, h in boxes], np.float32).reshape(-1, 4)
    found = dict(
        img=rng.integers(0, 256, (*masks.shape[1:], 3), np.uint8),
        gt_masks=BitmapMasks(masks, *masks.shape[1:]),
        gt_bboxes=HorizontalBoxes(boxes),
        gt_bboxes_labels=np.full(len(masks), seed),
        gt_ignore_flags=np.zeros(len(masks), bool),
    )
    if embeddings:
        found['gt_embeddings'] = np.full((len(masks), DIMS), seed, np.float32)
    return found


def paste(monkeypatch, target, source, **options):
    transform = TRANSFORMS.build(dict(type='FreeSOLOCopyPaste', **options))
    monkeypatch.setattr(transform, '_choose', np.arange)
    return transform(dict(target, mix_results=[source]))


def test_pasted_objects_bring_everything(monkeypatch):
    """Source of twice the size: a square lands, halved, on a corner of a square and on its own."""
    below = np.zeros((2, 20, 30), np.uint8)
    below[0, 2:12, 2:12], below[1, 15:18, 20:25] = 1, 1
    above = np.zeros((1, 40, 60), np.uint8)
    above[0, 16:32, 16:40] = 1
    target, source = results_of(below, 1), results_of(above, 2)
    before = target['img'].copy()
    found = paste(monkeypatch, target, source)
    expected = np.zeros((3, 20, 30), np.uint8)
    expected[:2], expected[2, 8:16, 8:20] = below, 1
    expected[0, 8:12, 8:12] = 0
    assert np.array_equal(found['gt_masks'].masks, expected)
    assert found['gt_bboxes'].tensor.tolist() == [[2, 2, 12, 12], [20, 15, 25, 18], [8, 8, 20, 16]]
    assert found['gt_bboxes_labels'].tolist() == [1, 1, 2]
    assert found['gt_embeddings'][:, 0].tolist() == [1, 1, 2] and len(found['gt_ignore_flags']) == 3
    resized = cv2.resize(source['img'], (30, 20))
    cover = expected[2].astype(bool)
    assert found['img'].dtype == np.uint8
    assert np.array_equal(found['img'][cover], resized[cover])
    assert np.array_equal(found['img'][~cover], before[~cover])


def test_what_hides_an_object_is_not_pasted(monkeypatch):
    below, above = np.zeros((2, 20, 30), np.uint8), np.zeros((2, 20, 30), np.uint8)
    below[0, 5:10, 5:10] = below[1, 15:20, 0:20] = 1
    above[0, 4:11, 4:8], above[1, 0:2, 0:2] = 1, 1  # the first hides 3 of 5 columns
    found = paste(monkeypatch, results_of(below, 1), results_of(above, 2))
    assert found['gt_bboxes_labels'].tolist() == [1, 1, 2]
    assert np.array_equal(found['gt_masks'].masks[2], above[1])
    generous = paste(monkeypatch, results_of(below, 1), results_of(above, 2), max_hidden=0.7)
    assert generous['gt_masks'].masks.sum((1, 2)).tolist() == [10, 100, 28, 4]


def test_pasting_nothing_or_onto_nothing(monkeypatch):
    some, none = np.ones((1, 20, 30), np.uint8), np.zeros((0, 20, 30), np.uint8)
    target = results_of(some, 1, embeddings=False)
    before = target['img'].copy()
    found = paste(monkeypatch, target, results_of(none, 2, embeddings=False))
    assert np.array_equal(found['img'], before) and len(found['gt_masks']) == 1
    source = results_of(some, 2)
    found = paste(monkeypatch, results_of(none, 1), source)
    assert np.array_equal(found['img'], source['img']) and found['gt_embeddings'].shape == (1, DIMS)
    never = TRANSFORMS.build(dict(type='FreeSOLOCopyPaste', prob=0.0))
    assert len(never._choose(5)) == 0


def test_two_views_make_one_batch(monkeypatch):
    """The plain views are what came; the strong ones differ, and have the other image's objects."""
    below, above = np.zeros((1, 20, 30), np.uint8), np.zeros((1, 20, 30), np.uint8)
    below[0, 2:12, 2:12] = above[0, 14:19, 20:28] = 1
    transform = TRANSFORMS.build(dict(type='FreeSOLOTwoViews'))
    monkeypatch.setattr(transform, '_choose', np.arange)
    items, images = [], []
    for seed in range(4):
        torch.manual_seed(seed)
        results = results_of(below, seed) | dict(
            img_id=seed, img_shape=(20, 30), ori_shape=(20, 30)
        )
        images.append(results['img'].copy())
        items.append(transform(dict(results, mix_results=[results_of(above, 9)])))
    settings = dict(mean=[0, 0, 0], std=[1, 1, 1], bgr_to_rgb=False)
    model = MODELS.build(dict(type='FreeSOLODataPreprocessor', **settings))
    batch = model(pseudo_collate(items), True)
    samples, inputs = batch['data_samples'], batch['inputs'].permute(0, 2, 3, 1).numpy()
    assert [sample.img_id for sample in samples] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert [len(sample.gt_instances) for sample in samples] == [2] * 4 + [1] * 4
    assert samples[0].gt_instances.embeddings[:, 0].tolist() == [0, 9]
    assert all(
        np.array_equal(found, image) for found, image in zip(inputs[4:], images, strict=True)
    )
    pasted = results_of(above, 9)['img'][14:19, 20:28]
    assert np.array_equal(inputs[0, 14:19, 20:28], pasted)
    changed = inputs[:4] != inputs[4:]
    assert changed.mean((1, 2, 3)).max() > 0.5 and not np.array_equal(changed[0], changed[1])
    assert not torch.equal(samples[0].affinity, samples[4].affinity)
    single = model(dict(inputs=[items[0]['inputs'][1]], data_samples=[samples[4]]), True)
    assert len(single['inputs']) == 1


@pytest.mark.parametrize('limit', ['images', 'masks'])
def test_a_part_of_the_labels(tmp_path, limit):
    images = [dict(id=i, file_name=f'{i}.jpg', height=50, width=60) for i in range(40)]
    annotations = [
        dict(id=i, image_id=i, category_id=1, bbox=[1, 1, 9, 9], area=81,
             segmentation=[[1, 1, 10, 1, 10, 10]]) for i in range(40)
    ]  # fmt: skip
    write(tmp_path / 'all.json', images, annotations)

    def chosen(fraction, seed=1):
        found = DATASETS.build(
            dict(type='FreeSOLOFewShotDataset', ann_file=str(tmp_path / 'all.json'), seed=seed,
                 fraction=fraction, limit=limit, pipeline=[])
        )  # fmt: skip
        infos = [found.get_data_info(i) for i in range(len(found))]
        assert len(infos) == (40 if limit == 'masks' else sum(i['has_masks'] for i in infos))
        return {info['img_id'] for info in infos if info['has_masks']}

    five, ten = chosen(0.05), chosen(0.1)
    assert len(five) == 2 and len(ten) == 4 and five < ten
    assert chosen(0.1) == ten != chosen(0.1, seed=2)
    with pytest.raises(ValueError, match='fraction must be'):
        chosen(0.0)


def test_affinity_of_a_batch_is_boxinsts():
    """mmdet's own preprocessor on the same batch, its scikit-image or the same definition."""
    from mmdet.models.data_preprocessors import data_preprocessor as module
    from mmdet.structures import DetDataSample

    rng = np.random.default_rng(0)
    shades = rng.integers(40, 200, (12, 20, 3)).repeat(8, 0).repeat(8, 1)
    image = torch.from_numpy(
        (shades + rng.normal(0, 6, shades.shape)).clip(0, 255).astype(np.uint8)
    )
    image = image.permute(2, 0, 1).contiguous()

    def batch():
        sample = DetDataSample(
            gt_instances=InstanceData(bboxes=torch.tensor([[0.0, 0, 9, 9]])),
            metainfo=dict(img_shape=(96, 160), ori_shape=(96, 160)),
        )
        return dict(inputs=[image], data_samples=[sample])

    settings = dict(mean=[0, 0, 0], std=[1, 1, 1], bgr_to_rgb=True, pad_size_divisor=32)
    ours = MODELS.build(dict(type='FreeSOLODataPreprocessor', **settings))
    affinity = ours(batch(), True)['data_samples'][0].affinity
    assert 'affinity' not in ours(batch(), False)['data_samples'][0]
    assert affinity.shape == (24, 40) and affinity.dtype == torch.uint8
    if module.skimage is None:
        pytest.skip('mmdet needs scikit-image')
    theirs = MODELS.build(dict(type='BoxInstDataPreprocessor', **settings))
    expected = theirs(batch(), True)['data_samples'][0].gt_instances.pairwise_masks[0]
    found = torch.stack([affinity >> bit & 1 for bit in (7, 6, 5, 4, 0, 1, 2, 3)])
    assert (found != expected).float().mean() < 1e-4
