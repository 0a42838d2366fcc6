import itertools
import json

import cv2
import numpy as np
import pytest
import torch
from mmengine.dataset import BaseDataset, ConcatDataset

from mmseg_plugins.box_crop import (
    BoxCropDataset,
    BoxCropFromMask,
    BoxCropLoadMask,
    BoxCropMixSampler,
)


def dataset(root, **kwargs):
    return BoxCropDataset(
        ann_file='instances.json',
        data_root=str(root),
        data_prefix=dict(img_path='images'),
        **kwargs,
    )


def expected_mask(shape, x1, y1, x2, y2):
    mask = np.zeros(shape, dtype=np.uint8)
    mask[y1:y2, x1:x2] = 1
    return mask


def test_one_sample_for_each_usable_instance(coco, capfd):
    data = dataset(coco)
    assert [data[i]['ann_id'] for i in range(len(data))] == [10, 11, 12]
    assert data.metainfo['classes'] == ('background', 'object')
    assert data[0]['bbox_xyxy'] == [20, 10, 50, 30]
    assert data[2]['img_path'] == str(coco / 'images/2.png')
    said = ' '.join(capfd.readouterr())
    for part in ('1 a crowd', '1 empty', '1 broken', 'annotation 21', '1 on an image that is not'):
        assert part in said


def test_what_is_not_instance_json_is_explained(coco):
    path = coco / 'instances.json'
    content = json.loads(path.read_text())
    for text, reason in (
        ('{', 'not valid JSON'),
        ('[1, 2]', 'this is a list'),
        (json.dumps({**content, 'images': [dict(id=1)]}), 'an image without'),
        (json.dumps({**content, 'annotations': []}), 'no usable instance'),
        (json.dumps({**content, 'annotations': [None]}), 'no usable instance'),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=f'instances.json.*{reason}'):
            dataset(coco)


@pytest.mark.parametrize('margin_px', [0, 3, 20])
def test_image_and_mask_are_cut_alike(coco, margin_px):
    results = dataset(coco)[1]  # 60, 5, 79, 40 on 48 x 80
    image = results['img'] = cv2.imread(results['img_path'])
    results = BoxCropLoadMask()(BoxCropFromMask(margin_px)(results))
    x1, y1 = max(60 - margin_px, 0), max(5 - margin_px, 0)
    x2, y2 = min(79 + margin_px, 80), min(40 + margin_px, 48)
    assert results['crop_xyxy'] == (x1, y1, x2, y2)
    assert np.array_equal(results['img'], image[y1:y2, x1:x2])
    mask = expected_mask((48, 80), 60, 5, 79, 40)[y1:y2, x1:x2]
    assert np.array_equal(results['gt_seg_map'], mask)
    assert results['img_shape'] == results['ori_shape'] == mask.shape
    assert results['seg_fields'] == ['gt_seg_map']


def test_jitter_moves_each_side_within_its_share(coco):
    crop = BoxCropFromMask(margin_px=0, jitter_ratio=0.1)
    data, sides = dataset(coco), []
    for _ in range(200):
        results = data[0]  # 20, 10, 50, 30: 30 wide, 20 high
        results['img'] = np.zeros((48, 80, 3), np.uint8)
        sides.append(crop(results)['crop_xyxy'])
    low, high = np.min(sides, axis=0), np.max(sides, axis=0)
    assert low.tolist() == [17, 8, 48, 29] and high.tolist() == [22, 11, 53, 32]
    left, top = np.array(sides)[:, 0], np.array(sides)[:, 1]
    assert abs(np.corrcoef(left, top)[0, 1]) < 0.3
    with pytest.raises(ValueError, match='jitter_ratio'):
        BoxCropFromMask(jitter_ratio=0.5)


def test_an_image_of_another_size_than_annotated_is_refused(coco):
    results = dataset(coco)[0]
    results['img'] = np.zeros((80, 48, 3), np.uint8)
    with pytest.raises(ValueError, match=r'1.png has \[80, 48\].*10 says \[48, 80\].*EXIF'):
        BoxCropFromMask()(results)


class Sized(BaseDataset):
    def __init__(self, size):
        self.size = size
        super().__init__()

    def load_data_list(self):
        return [{}] * self.size


def take(sampler, number):
    return list(itertools.islice(iter(sampler), number))


def test_sampler_mixes_by_weight_and_uses_every_instance():
    parts = ConcatDataset([Sized(1000), Sized(10), Sized(100)])
    indices = np.array(take(BoxCropMixSampler(parts, weights=(1, 2, 1), seed=3), 8000))
    shares = [((indices >= a) & (indices < b)).mean() for a, b in ((0, 1000), (1000, 1010))]
    assert shares == pytest.approx([0.25, 0.5], abs=0.02)
    counts = np.bincount(indices, minlength=1110)
    assert counts[:1000].min() >= 1 and counts[:1000].max() <= 3  # 2000 draws: two rounds
    assert counts[1000:1010].max() - counts[1000:1010].min() <= 1
    by_size = np.array(take(BoxCropMixSampler(parts, seed=3), 8000))
    assert (by_size < 1000).mean() == pytest.approx(1000 / 1110, abs=0.02)
    with pytest.raises(ValueError, match='3 data sets need as many'):
        BoxCropMixSampler(parts, weights=(1, 2))


def test_sampler_repeats_itself_and_splits_over_ranks(monkeypatch):
    parts = ConcatDataset([Sized(7), Sized(5)])
    whole = take(BoxCropMixSampler(parts, seed=5), 60)
    assert whole == take(BoxCropMixSampler(parts, seed=5), 60)
    assert whole != take(BoxCropMixSampler(parts, seed=6), 60)
    for rank in (0, 1):
        monkeypatch.setattr('mmseg_plugins.box_crop.sampler.get_dist_info', lambda r=rank: (r, 2))
        assert take(BoxCropMixSampler(parts, seed=5), 30) == whole[rank::2]


def test_the_configured_pipelines_give_what_mmseg_expects(tiny):
    from mmseg.registry import DATASETS

    train = DATASETS.build({**tiny.train_dataloader.dataset, '_scope_': 'mmseg'})
    assert len(train) == 6
    packed = train[4]
    assert packed['inputs'].shape == (3, 64, 64) and packed['inputs'].dtype == torch.uint8
    truth = packed['data_samples'].gt_sem_seg.data
    assert truth.shape == (1, 64, 64) and set(truth.unique().tolist()) == {0, 1}
    val = DATASETS.build({**tiny.val_dataloader.dataset, '_scope_': 'mmseg'})
    packed = val[0]
    assert packed['inputs'].shape == (3, 64, 64)
    assert packed['data_samples'].ori_shape == (48, 70)  # 20 px around 20, 10, 50, 30 on 48 x 80
    truth = packed['data_samples'].gt_sem_seg.data[0].numpy()
    assert np.array_equal(truth, expected_mask((48, 80), 20, 10, 50, 30)[:, :70])
