import cv2
import numpy as np
import pytest
import torch

from mmdet_plugins.ops.crops import (
    _grid_crops,
    crop_masks,
    crop_resize,
    crop_threads,
    expand_boxes,
    run_in_turn,
)
from mmdet_plugins.ops.rle import decode_rle, encode_columns

BOXES = np.array(
    [
        (0, 0, 50, 31),  # the frame
        (3, 5, 20, 12),
        (40, 0, 50, 31),
        (7, 30, 8, 31),  # one pixel
        (10, 2, 11, 30),  # one column
        (2, 9, 49, 10),  # one row
    ]
)


def frame(height=31, width=50, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, size=(height, width, 3))
    return torch.from_numpy(values.astype(np.uint8))


def test_expand_boxes_adds_the_margin_and_stays_inside():
    boxes = [(10.2, 5.5, 20.7, 9.0), (0, 0, 50, 31), (45, 25, 60, 40), (-5, -5, 3, 2)]
    expected = [(7, 2, 24, 12), (0, 0, 50, 31), (42, 22, 50, 31), (0, 0, 6, 5)]
    assert expand_boxes(boxes, 3, (31, 50)).tolist() == [list(box) for box in expected]
    assert expand_boxes([], 3, (31, 50)).shape == (0, 4)


@pytest.mark.parametrize(
    'box', [(60, 5, 70, 9), (-9, -9, -1, -1), (51, 0, 52, 9), (4, 4, 4, 9), (4, 4, 9, 4)]
)
def test_boxes_without_area_inside_become_nothing(box):
    assert expand_boxes([(1, 1, 2, 2), box], 20, (31, 50))[1].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    'box', [(5, 5, 4, 9), (5, 5, 9, 4), (float('nan'), 0, 1, 1), (0, 0, 1, float('nan'))]
)
def test_broken_boxes_are_named(box):
    with pytest.raises(ValueError, match='box 1 is'):
        expand_boxes([(1, 1, 2, 2), box], 20, (31, 50))


def test_infinite_boxes_are_the_whole_image():
    inf = float('inf')
    assert expand_boxes([(-inf, -inf, inf, inf)], 20, (31, 50)).tolist() == [[0, 0, 50, 31]]


@pytest.mark.parametrize('size_hw', [(24, 40), (64, 48), (7, 9)])
@pytest.mark.parametrize('sampler', ['cpu', 'threads', 'device'])
def test_crops_are_those_of_opencv(size_hw, sampler):
    image = frame()
    if sampler == 'device':
        crops = _grid_crops(image, BOXES, size_hw)
    elif sampler == 'threads':
        with crop_threads(2) as run:
            crops = crop_resize(image, BOXES, size_hw, run=run)
    else:
        crops = crop_resize(image, BOXES, size_hw)
    pixels = image.numpy()
    for crop, (x1, y1, x2, y2) in zip(crops, BOXES, strict=True):
        part = np.ascontiguousarray(pixels[y1:y2, x1:x2])
        expected = cv2.resize(part, size_hw[::-1], interpolation=cv2.INTER_LINEAR).astype(int)
        grey_levels = np.abs(crop.numpy().transpose(1, 2, 0).astype(int) - expected)
        assert grey_levels.max() <= (sampler == 'device')
        assert grey_levels.mean() < 0.2


def test_mirrored_crops_follow_and_the_given_room_is_used():
    image = frame()
    room = torch.zeros((2 * len(BOXES), 24, 40, 3), dtype=torch.uint8)
    crops = crop_resize(image, BOXES, (24, 40), flip=True, out=room)
    assert crops.data_ptr() == room.data_ptr()
    assert torch.equal(crops[: len(BOXES)], crop_resize(image, BOXES, (24, 40)))
    assert torch.equal(crops[len(BOXES) :], crops[: len(BOXES)].flip(3))


def test_masks_are_thresholded_bilinear_logits():
    logits = torch.randn(len(BOXES), 9, 12, generator=torch.Generator().manual_seed(0))
    shapes = [(y2 - y1, x2 - x1) for x1, y1, x2, y2 in BOXES.tolist()]
    with crop_threads(2) as run:
        for runner in (run, run_in_turn):
            buffer, columns = crop_masks(logits, BOXES, runner)
            masks = decode_rle(encode_columns(buffer, shapes, BOXES[:, :2], (31, 50)))
            for logit, column, mask, shape, (x1, y1, x2, y2) in zip(
                logits, columns, masks, shapes, BOXES, strict=True
            ):
                resized = torch.nn.functional.interpolate(
                    logit[None, None].double(), shape, mode='bilinear'
                )[0, 0]
                certain = resized.abs() > 1e-5
                assert torch.equal((column.T > 0)[certain], (resized > 0)[certain])
                assert np.array_equal(mask[y1:y2, x1:x2], column.T.numpy() > 0)
                assert mask.sum() == column.sum()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_device_and_cpu_agree():
    image, logits = frame(720, 1280), torch.randn(40, 128, 128)
    rng = np.random.default_rng(0)
    wh = rng.integers(1, 300, size=(40, 2))
    xy = rng.integers(0, np.array([1280, 720]) - wh)
    boxes = np.concatenate((xy, xy + wh), axis=1)
    crops = crop_resize(image.cuda(), boxes, (512, 512), flip=True)
    expected = crop_resize(image, boxes, (512, 512), flip=True)
    assert (crops.cpu().int() - expected.int()).abs().max() <= 1
    (buffer, _), (expected, _) = crop_masks(logits.cuda(), boxes), crop_masks(logits, boxes)
    assert (buffer.cpu() != expected).float().mean() < 1e-4
    shapes = (boxes[:, 2:] - boxes[:, :2])[:, ::-1]
    assert encode_columns(buffer, shapes, boxes[:, :2], (720, 1280)) == encode_columns(
        buffer.cpu(), shapes, boxes[:, :2], (720, 1280)
    )
