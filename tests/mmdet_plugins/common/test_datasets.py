"""Class-agnostic COCO and UVO data sets, against the stock class and hand-made files."""

import json

import numpy as np
import pytest
from mmdet.datasets import CocoDataset
from mmdet.registry import DATASETS
from mmengine.dataset import Compose
from mmengine.registry import DefaultScope
from PIL import Image
from pycocotools import mask as mask_utils

from mmdet_plugins.common.datasets import OpenWorldCocoDataset, UVODataset
from mmdet_plugins.common.open_world_metric import OpenWorldMetric
from mmdet_plugins.common.uvo import uvo_to_coco

NAMES = ['cat', 'traffic light', 'ufo']


def _coco():
    """Three 90x120 images: objects of all classes and a crowd; one novel object; none."""
    boxes = [
        (1, 1, [10, 20, 30, 15], 0),
        (2, 1, [50.5, 5, 20, 60], 0),
        (3, 1, [0, 0, 90, 80], 1),
        (4, 1, [60, 40, 10, 12], 0),
        (5, 2, [20, 20, 44, 33], 0),
        (6, 1, [5, 5, 0.5, 9], 0),
    ]
    category_ids = [11, 4, 11, 30, 30, 4]
    return {
        'images': [
            {'id': i, 'file_name': f'{i}.jpg', 'height': 90, 'width': 120} for i in (1, 2, 3)
        ],
        'annotations': [
            {
                'id': i,
                'image_id': image_id,
                'category_id': category_id,
                'bbox': box,
                'area': box[2] * box[3],
                'iscrowd': crowd,
                'segmentation': [
                    [box[0], box[1], box[0] + box[2], box[1], box[0], box[1] + box[3]]
                ],
            }
            for (i, image_id, box, crowd), category_id in zip(boxes, category_ids, strict=True)
        ],
        # neither in the order of ids nor of labels
        'categories': [{'id': i, 'name': n} for i, n in zip((11, 4, 30), NAMES, strict=True)],
    }


def _build(tmp_path, data, cls=OpenWorldCocoDataset, **options):
    path = tmp_path / 'annotations.json'
    path.write_text(json.dumps(data))
    return cls(ann_file=str(path), pipeline=[], **options)


def _instances(dataset, index=0):
    return sorted(
        (i['bbox'], i['bbox_label'], i['ignore_flag'])
        for i in dataset.get_data_info(index)['instances']
    )


def test_classes_come_from_the_file(tmp_path):
    ours = _build(tmp_path, _coco(), class_agnostic=False)
    stock = _build(
        tmp_path, _coco(), CocoDataset, metainfo={'classes': NAMES}, data_prefix={'img': ''}
    )
    assert ours.metainfo['classes'] == tuple(NAMES) and len(ours) == len(stock) == 3
    for i in range(3):
        assert _instances(ours, i) == _instances(stock, i)
        assert {k: v for k, v in ours.get_data_info(i).items() if k != 'instances'} == {
            k: v for k, v in stock.get_data_info(i).items() if k != 'instances'
        }
    assert len(_instances(ours)) == 4  # the sliver is dropped, as stock does


def test_labels_follow_the_order_asked_for(tmp_path):
    dataset = _build(tmp_path, _coco(), class_agnostic=False, metainfo={'classes': ['ufo', 'cat']})
    assert dataset.metainfo['classes'] == ('ufo', 'cat')
    assert [label for _, label, _ in _instances(dataset)] == [1, 1, 0]


def test_class_agnostic_is_the_same_without_classes(tmp_path):
    dataset = _build(tmp_path, _coco())
    known = _build(tmp_path, _coco(), class_agnostic=False)
    assert dataset.metainfo['classes'] == ('object',)
    assert _instances(dataset) == [(box, 0, ignore) for box, _, ignore in _instances(known)]
    named = _build(tmp_path, _coco(), metainfo={'classes': ('thing',)})
    assert named.metainfo['classes'] == ('thing',)


def test_empty_images_are_filtered_as_stock_does(tmp_path):
    options = {'filter_cfg': {'filter_empty_gt': True, 'min_size': 32}}
    assert len(_build(tmp_path, _coco(), **options)) == 2
    assert len(_build(tmp_path, _coco(), test_mode=True, **options)) == 3
    base = _build(tmp_path, _coco(), base_categories=['cat'], **options)
    assert [base.get_data_info(i)['img_id'] for i in range(len(base))] == [1]


def test_novel_objects(tmp_path):
    base = ['cat', 'traffic light']
    every = _instances(_build(tmp_path, _coco()))
    novel = ([60, 40, 70, 52], 0, 0)
    assert novel in every
    dropped = _build(tmp_path, _coco(), base_categories=base)
    assert _instances(dropped) == [i for i in every if i != novel] and not _instances(dropped, 1)
    ignored = _build(tmp_path, _coco(), base_categories=base, novel='ignore')
    assert _instances(ignored) == sorted([*_instances(dropped), (novel[0], 0, 1)])
    assert _instances(_build(tmp_path, _coco(), base_categories=base, test_mode=True)) == every
    with pytest.raises(ValueError, match="'dog' not among the categories.*'cat', 'traffic light'"):
        _build(tmp_path, _coco(), base_categories=['dog'])
    with pytest.raises(ValueError, match="'drop' or 'ignore'"):
        _build(tmp_path, _coco(), base_categories=base, novel='forget')


def test_a_mismatch_of_classes_is_explained(tmp_path):
    with pytest.raises(
        ValueError,
        match="asks for the classes 'traffic_light', which the file "
        "does not have; it has 'cat', 'traffic light', 'ufo'",
    ):
        _build(
            tmp_path, _coco(), class_agnostic=False, metainfo={'classes': ('cat', 'traffic_light')}
        )
    with pytest.raises(ValueError, match='gives 2 classes, but a class-agnostic data set has one'):
        _build(tmp_path, _coco(), metainfo={'classes': ('cat', 'ufo')})


def _spoil(change):
    data = _coco()
    change(data)
    return data


@pytest.mark.parametrize(
    'change, message',
    [
        (lambda d: d['annotations'][1].update(id=1), 'ids of annotations must differ.*: 1'),
        (lambda d: d['images'][1].pop('id'), 'image number 1 lacks id'),
        (lambda d: d['images'][2].pop('height'), 'image 3 lacks height'),
        (lambda d: d['images'][2].update(height='100'), "image 3 has the height '100', which"),
        (lambda d: d['images'][2].update(file_name=None), 'image 3 has the file_name None'),
        (lambda d: d['categories'][0].pop('name'), 'category 11 lacks name'),
        (lambda d: d['annotations'].insert(1, None), 'annotation number 1 is a NoneType, not an'),
        (lambda d: d['annotations'][1].pop('image_id'), 'annotation 2 lacks image_id'),
        (lambda d: d['annotations'][1].pop('category_id'), 'annotation 2 lacks category_id'),
        (lambda d: d['annotations'][1].pop('area'), 'annotation 2 lacks area'),
        (lambda d: d['annotations'][1].update(area=None), 'annotation 2 has the area None, which'),
        (lambda d: d['annotations'][1].update(category_id=None), 'annotation 2 has the category_'),
        (lambda d: d['annotations'][1].update(category_id='4'), 'annotation 2 has the category_'),
        (lambda d: d['annotations'][1].update(image_id=[1]), 'annotation 2 has the image_id'),
        (
            lambda d: d['annotations'][1].update(bbox=[0, 0, float('nan'), 4]),
            r'annotation 2 has the bbox \[0, 0, nan, 4\], which should be four finite numbers',
        ),
        (lambda d: d['annotations'][1].update(bbox=[0, 0, '3', 4]), 'annotation 2 has the bbox'),
        (lambda d: d['images'].pop(0), '5 annotations are on images .* ids 1, 2, 3, 4, 6: add'),
        (lambda d: d.pop('categories'), 'annotations.json: not a COCO annotation file'),
        (lambda d: d.update(annotations=[]), 'none of its 3 images can be used: 3 have no valid'),
    ],
)
def test_bad_entries_are_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        _build(tmp_path, _spoil(change), filter_cfg={'filter_empty_gt': True})
    if 'image_id' in message or 'bbox' in message:  # what the metric would stumble over as well
        with pytest.raises(ValueError, match=message):
            OpenWorldMetric(str(tmp_path / 'annotations.json'))


def test_class_agnostic_objects_need_no_category(tmp_path):
    every = _instances(_build(tmp_path, _coco()))
    assert len(every) == 4
    for categories in ([], _coco()['categories'][:1], [{'id': 4, 'name': 'cat'}]):
        data = {**_coco(), 'categories': categories}
        assert _instances(_build(tmp_path, data)) == every
        with pytest.raises(ValueError, match='have the category ids .*30, which it does not list'):
            _build(tmp_path, data, class_agnostic=False)


def test_two_categories_of_one_name_are_one_class(tmp_path):
    data = _coco()
    data['categories'][2]['name'] = 'cat'  # 11 and 30
    assert len(_instances(_build(tmp_path, data))) == 4
    dataset = _build(tmp_path, data, class_agnostic=False)
    assert dataset.metainfo['classes'] == ('cat', 'traffic light')
    assert [label for _, label, _ in _instances(dataset)] == [0, 0, 1, 0]
    base = _build(tmp_path, data, base_categories=['cat'])
    assert [box for box, _, _ in _instances(base)] == [
        box for box, label, _ in _instances(dataset) if label == 0
    ]


def test_bad_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere.json'):
        OpenWorldCocoDataset(ann_file=str(tmp_path / 'nowhere.json'), pipeline=[])
    with pytest.raises(ValueError, match='annotations.json: this is a list'):
        _build(tmp_path, [])
    with pytest.raises(ValueError, match='lists videos, not images. Use UVODataset'):
        _build(tmp_path, _uvo())
    (tmp_path / '1.jpg').touch()
    with pytest.raises(FileNotFoundError, match='2 of the 3 images .* missing, among .*2.jpg'):
        _build(tmp_path, _coco(), check_images=True, data_prefix={'img': str(tmp_path)})


@pytest.mark.parametrize('tta', [False, True])
def test_an_image_of_another_size_is_named(tmp_path, tta):
    picture = Image.fromarray(np.zeros((120, 90, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn, as 90 x 120
    picture.save(tmp_path / '1.jpg', exif=exif)
    picture.transpose(Image.Transpose.ROTATE_90).save(tmp_path / '2.jpg')
    picture.save(tmp_path / '3.jpg')
    dataset = _build(tmp_path, _coco(), data_prefix={'img': str(tmp_path)})

    def samples(**loading):
        steps = [
            {'type': 'Resize', 'scale': (60, 60), 'keep_ratio': True},
            {'type': 'PackDetInputs'},
        ]
        if tta:
            steps = [{'type': 'TestTimeAug', 'transforms': [[step] for step in steps]}]
        loading = {'type': 'LoadImageFromFile', **loading}
        dataset.pipeline = Compose([{**step} for step in (loading, *steps)])
        return dataset

    with DefaultScope.overwrite_default_scope('mmdet'):
        assert samples()[0] and samples()[1]
        message = '3.jpg is 90 x 120 pixels, .*annotations.json says 120 x 90: .*ignore_orientation'
        with pytest.raises(ValueError, match=message):
            samples()[2]
        with pytest.raises(ValueError, match='1.jpg is 90 x 120 pixels'):
            samples(color_type='color_ignore_orientation')[0]


def _uvo():
    """Two videos of three and two frames of 40x60; an object out of sight in one frame."""

    def rle(x):
        mask = np.zeros((40, 60), np.uint8, order='F')
        mask[5:15, x : x + 20] = 1
        encoded = mask_utils.encode(mask)
        return {'size': encoded['size'], 'counts': encoded['counts'].decode()}

    return {
        'videos': [
            {
                'id': 7,
                'height': 40,
                'width': 60,
                'ytid': 'abc',
                'start_idx': 0,
                'file_names': ['abc/0.png', 'abc/1.png', 'abc/2.png'],
            },
            {'id': 3, 'height': 40, 'width': 60, 'file_names': ['xyz/0.png', 'xyz/1.png']},
        ],
        'categories': [{'id': 1, 'name': 'person'}, {'id': 99, 'name': 'other'}],
        'annotations': [
            {
                'id': 5,
                'video_id': 7,
                'category_id': 99,
                'iscrowd': 0,
                'segmentations': [rle(0), None, rle(30)],
                'bboxes': [[0, 5, 20, 10], None, [30, 5, 20, 10]],
                'areas': [200, None, 200],
            },
            {'id': 6, 'video_id': 3, 'category_id': 1, 'segmentations': [None, rle(10)]},
        ],
    }


def test_uvo_dense_frames_by_video(tmp_path):
    for name in ('abc/0.png', 'abc/1.png', 'abc/2.png', 'xyz/0.png', 'xyz/1.png'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    dataset = _build(tmp_path, _uvo(), UVODataset, data_prefix={'img': str(tmp_path)})
    infos = [dataset.get_data_info(i) for i in range(5)]
    assert [info['img_path'].removeprefix(f'{tmp_path}/') for info in infos] == [
        'abc/0.png',
        'abc/1.png',
        'abc/2.png',
        'xyz/0.png',
        'xyz/1.png',
    ]
    assert [_instances(dataset, i) for i in range(5)] == [
        [([0, 5, 20, 15], 0, 0)],
        [],
        [([30, 5, 50, 15], 0, 0)],
        [],
        [([10, 5, 30, 15], 0, 0)],
    ]  # the last box is its mask's
    masks = [mask_utils.decode(infos[i]['instances'][0]['mask']) for i in (0, 2, 4)]
    assert [int(mask.sum()) for mask in masks] == [200, 200, 200] and masks[1][5:15, 30:50].all()
    (tmp_path / 'xyz/0.png').unlink()
    with pytest.raises(FileNotFoundError, match='1 of the 5 images .* missing, .*xyz/0.png'):
        _build(tmp_path, _uvo(), UVODataset, data_prefix={'img': str(tmp_path)})


def test_uvo_sparse_is_coco(tmp_path):
    assert uvo_to_coco(_coco()) == _coco()
    dataset = _build(tmp_path, _coco(), UVODataset, check_images=False)
    assert _instances(dataset) == _instances(_build(tmp_path, _coco()))


@pytest.mark.parametrize(
    'change, message',
    [
        (lambda d: d['annotations'][1].update(video_id=8), 'object 6: there is no video 8'),
        (
            lambda d: d['annotations'][0]['segmentations'].pop(),
            'object 5: 2 masks for the 3 frames of video 7',
        ),
        (lambda d: d['videos'][1].pop('file_names'), "video 3 lacks 'file_names'"),
        (lambda d: d['videos'][1].pop('height'), "video 3 lacks 'height'"),
        (lambda d: d['videos'][1].pop('id'), "video number 1 lacks 'id'"),
        (lambda d: d['videos'].append(7), 'video number 2 is not laid out as UVO does'),
        (lambda d: d['videos'][1].update(file_names=None), 'video 3 is not laid out as UVO does'),
        (lambda d: d['annotations'][1].pop('segmentations'), "object 6 lacks 'segmentations'"),
        (lambda d: d['annotations'][0]['areas'].pop(), 'object 5 is not laid out as UVO does'),
        (
            lambda d: d['annotations'][1]['segmentations'][1].update(size=None),
            'object 6: an RLE of the size None',
        ),
        (lambda d: d.pop('annotations'), 'not a UVO file'),
    ],
)
def test_bad_uvo_is_named(tmp_path, change, message):
    data = _uvo()
    change(data)
    with pytest.raises(ValueError, match=f'annotations.json: {message}'):
        _build(tmp_path, data, UVODataset)


def test_built_by_name(tmp_path):
    path = tmp_path / 'annotations.json'
    path.write_text(json.dumps(_coco()))
    dataset = DATASETS.build(
        {
            'type': 'OpenWorldCocoDataset',
            'data_root': str(tmp_path),
            'ann_file': 'annotations.json',
            'data_prefix': {'img': 'images/'},
            'pipeline': [],
        }
    )
    assert dataset.get_data_info(0)['img_path'] == str(tmp_path / 'images' / '1.jpg')
