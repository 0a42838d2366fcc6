import json

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from mmdet_plugins.common.synthetic import CATEGORIES, KNOWN, NOVEL, make_demo_data


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp('data')
    make_demo_data(path, num_train=16, num_val=16, size_hw=(96, 128), seed=3)
    return path


def _bytes(path):
    return {p.name: p.read_bytes() for p in path.rglob('*') if p.is_file()}


def test_same_arguments_give_the_same_bytes_and_a_prefix_is_a_prefix(folder, tmp_path):
    make_demo_data(tmp_path / 'short', num_train=3, num_val=2, size_hw=(96, 128), seed=3)
    make_demo_data(tmp_path / 'again', num_train=3, num_val=2, size_hw=(96, 128), seed=3)
    make_demo_data(tmp_path / 'other', num_train=3, num_val=2, size_hw=(96, 128), seed=4)
    short, whole = _bytes(tmp_path / 'short'), _bytes(folder)
    assert short == _bytes(tmp_path / 'again')
    assert short != _bytes(tmp_path / 'other')
    images = [name for name in short if name.endswith('.jpg')]
    assert len(images) == 5
    assert all(short[name] == whole[name] for name in images)


def test_annotations_decode_to_their_box_and_area_and_do_not_overlap(folder):
    forms = set()
    for split in ('train', 'val'):
        coco = COCO(folder / f'instances_{split}.json')
        for image_id, image in coco.imgs.items():
            pixels = cv2.imread(str(folder / 'images' / image['file_name']))
            assert pixels.shape[:2] == (image['height'], image['width'])
            total = np.zeros(pixels.shape[:2], int)
            for annotation in coco.loadAnns(coco.getAnnIds(image_id)):
                segmentation = annotation['segmentation']
                polygon = isinstance(segmentation, list)
                forms.add('polygon' if polygon else type(segmentation['counts']).__name__)
                mask = coco.annToMask(annotation).astype(bool)
                ys, xs = np.nonzero(mask)
                x, y, w, h = annotation['bbox']
                assert mask.sum() == annotation['area'] >= 8
                assert (x, y) == (xs.min(), ys.min())
                assert (x + w, y + h) == (xs.max() + 1, ys.max() + 1)
                total += mask
            # Polygons are rounded to the pixel, so neighbours may share a few border pixels.
            assert (total > 1).sum() <= 0.01 * total.size
    assert forms == {'polygon', 'str', 'list'}


def test_sets_have_crowds_empty_images_truncated_objects_and_novel_kinds_in_val_only(folder):
    names = {category['id']: category['name'] for category in CATEGORIES}
    for split, kinds in (('train', set(KNOWN)), ('val', {*KNOWN, *NOVEL})):
        data = json.loads((folder / f'instances_{split}.json').read_text())
        assert {category['name'] for category in data['categories']} == kinds
        assert {names[a['category_id']] for a in data['annotations']} == kinds
        annotated = {a['image_id'] for a in data['annotations']}
        assert {image['id'] for image in data['images']} - annotated == {16}
        assert {a['image_id'] for a in data['annotations'] if a['iscrowd']} == {4, 12}
        assert any(a['bbox'][0] == 0 for a in data['annotations'])
        assert len({(image['height'], image['width']) for image in data['images']}) > 2


def test_large_objects_are_few_and_all_large(tmp_path):
    make_demo_data(tmp_path, num_train=16, num_val=0, size_hw=(128, 160), large=True)
    data = json.loads((tmp_path / 'instances_train.json').read_text())
    count = np.bincount([a['image_id'] for a in data['annotations']], minlength=17)[1:]
    assert 1 <= count[:15].min() < count.max() == 3 and count[15] == 0
    assert not any(a['iscrowd'] for a in data['annotations'])
    assert np.median([a['area'] for a in data['annotations']]) > 32**2


def test_a_size_without_room_is_refused(tmp_path):
    with pytest.raises(ValueError, match='64 px'):
        make_demo_data(tmp_path, size_hw=(32, 128))
