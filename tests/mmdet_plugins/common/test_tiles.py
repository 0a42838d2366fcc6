"""Data sets cut into tiles."""

import json
from collections import Counter

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from mmdet_plugins.common.synthetic import make_demo_data
from mmdet_plugins.common.tiles import corners, cut_tiles
from mmdet_plugins.ops.coco_json import load_coco
from mmdet_plugins.ops.rle import segmentation_to_rle


@pytest.mark.parametrize(
    'length, expected', [(96, [0]), (60, [0]), (97, [0, 1]), (192, [0, 96]), (250, [0, 77, 154])]
)
def test_tiles_cover_a_side_evenly(length, expected):
    assert corners(length, 96) == expected


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp('scenes')
    make_demo_data(folder, num_train=3, num_val=2, size_hw=(96, 128))
    return folder


def test_tiles_are_windows_of_their_images(scenes, tmp_path):
    cut_tiles(scenes, tmp_path, 64, limit=100)
    for split in ('train', 'val'):
        source = load_coco(scenes / f'instances_{split}.json')
        tiles = load_coco(tmp_path / f'instances_{split}.json')
        assert tiles['categories'] == source['categories']
        assert len({x['id'] for x in tiles['annotations']}) == len(tiles['annotations']) > 0
        seen = Counter()
        for image in source['images']:
            pixels = cv2.imread(str(scenes / 'images' / image['file_name']))
            height, width = hw = pixels.shape[:2]
            objects = [x for x in source['annotations'] if x['image_id'] == image['id']]
            objects.sort(key=lambda x: x['category_id'])
            masks = [coco_mask.decode(segmentation_to_rle(x['segmentation'], hw)) for x in objects]
            stem = f'{split}_{image["id"]}_'
            own = [x for x in tiles['images'] if x['file_name'].startswith(stem)]
            covered = np.zeros(hw, bool)
            for tile in own:
                y, x = map(int, tile['file_name'].removesuffix('.png').split('_')[-2:])
                window = np.s_[y : y + 64, x : x + 64]
                covered[window] = True
                shown = cv2.imread(str(tmp_path / 'images' / tile['file_name']))
                assert np.array_equal(shown, pixels[window])
                assert shown.shape[:2] == (tile['height'], tile['width'])
                found = [a for a in tiles['annotations'] if a['image_id'] == tile['id']]
                wanted = [
                    (object_, mask[window])
                    for object_, mask in zip(objects, masks, strict=True)
                    if mask[window].any()
                ]
                for one, (object_, part) in zip(found, wanted, strict=True):
                    assert np.array_equal(coco_mask.decode(one['segmentation']), part)
                    assert one['area'] == part.sum()
                    assert one['bbox'] == coco_mask.toBbox(one['segmentation']).tolist()
                    assert one['category_id'] == object_['category_id']
                    assert one['iscrowd'] == object_['iscrowd']
                seen[image['id']] += 1
            assert covered.all()
            assert seen[image['id']] == -(-height // 64) * -(-width // 64)
        assert sum(seen.values()) == len(tiles['images'])


def test_a_large_image_gives_no_more_than_its_share_and_the_same_again(scenes, tmp_path):
    for folder in ('a', 'b'):
        cut_tiles(scenes, tmp_path / folder, 32, limit=2)
    train = json.loads((tmp_path / 'a/instances_train.json').read_text())
    assert len(train['images']) == 3 * 2 == len({x['file_name'] for x in train['images']})
    files = ['instances_train.json', 'instances_val.json']
    assert all(
        (tmp_path / 'a' / name).read_bytes() == (tmp_path / 'b' / name).read_bytes()
        for name in files
    )
