"""The two views: what they show lies where their frames say."""

import numpy as np
import pytest
import torch
from mmdet.registry import TRANSFORMS

import mmdet_plugins.densecl  # noqa: F401

HW = (90, 140)


def views(**options) -> dict:
    transform = TRANSFORMS.build(dict(type='DenseCLTwoViews', size=32) | options)
    y, x = np.mgrid[: HW[0], : HW[1]]
    image = np.stack([x, y, np.full(HW, 200)], axis=2).astype(np.uint8)  # as BGR
    return transform(dict(img=image))


def test_frames_are_where_the_pixels_come_from():
    flips = []
    for seed in range(12):
        torch.manual_seed(seed)
        sample = views(jitter_prob=0, grey_prob=0, blur_prob=0)
        for view, (x1, y1, x2, y2) in zip(
            sample['inputs'].float(), sample['frames_xyxy'].tolist(), strict=True
        ):
            assert (view[0] == 200).all(), 'channels are RGB'
            centre = (torch.arange(32) + 0.5) / 32
            x, y = x1 + centre * (x2 - x1) - 0.5, y1 + centre * (y2 - y1) - 0.5
            inner = slice(2, -2)  # interpolation stops at the border
            torch.testing.assert_close(view[2, 16, inner], x[inner], rtol=0, atol=0.6)
            torch.testing.assert_close(view[1, inner, 16], y[inner], rtol=0, atol=0.6)
            area = abs(x2 - x1) * (y2 - y1) / (HW[0] * HW[1])
            assert 0.19 < area <= 1 and 0 <= min(x1, x2) and max(x1, x2) <= HW[1]
            flips.append(x1 > x2)
    assert 4 < sum(flips) < 20


def test_the_appearance_changes_as_often_as_asked():
    torch.manual_seed(0)
    grey = views(jitter_prob=0, grey_prob=1, blur_prob=0, flip_prob=0)['inputs']
    assert (grey[:, 0] == grey[:, 1]).all() and (grey[:, 1] == grey[:, 2]).all()
    torch.manual_seed(0)
    plain = views(jitter_prob=0, grey_prob=0, blur_prob=0, flip_prob=0)['inputs']
    torch.manual_seed(0)
    jittered = views(jitter_prob=1, grey_prob=0, blur_prob=0, flip_prob=0)['inputs']
    assert not torch.equal(plain[0], jittered[0])


@pytest.mark.parametrize('hw', [(1, 1), (7, 300)])
def test_tiny_and_narrow_images(hw):
    transform = TRANSFORMS.build(dict(type='DenseCLTwoViews', size=32))
    sample = transform(dict(img=np.zeros((*hw, 3), np.uint8)))
    assert sample['inputs'].shape == (2, 3, 32, 32)
    sides = sample['frames_xyxy'][:, 2:] - sample['frames_xyxy'][:, :2]
    assert (sides.abs() >= 1).all()


def test_seeded_views_depend_on_the_image_alone():
    transform = TRANSFORMS.build(dict(type='DenseCLTwoViews', size=32, pairs=2, seed=0))
    image = np.random.default_rng(0).integers(0, 256, (*HW, 3), np.uint8)
    state = torch.get_rng_state()
    first, other = (transform(dict(img=image, img_id=img_id)) for img_id in (3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    again = transform(dict(img=image, img_id=3))
    assert first['inputs'].shape == (4, 3, 32, 32) and first['frames_xyxy'].shape == (4, 4)
    for key, value in first.items():
        assert torch.equal(value, again[key]) and not torch.equal(value, other[key])
