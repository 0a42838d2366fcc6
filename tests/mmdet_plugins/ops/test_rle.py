import json

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from mmdet_plugins.ops import rle as ops


def reference(mask):
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {'size': rle['size'], 'counts': rle['counts'].decode()}


def blobs(n, height, width, seed=0):
    rng = np.random.default_rng(seed)
    noise = torch.from_numpy(rng.normal(size=(n, 1, 9, 7)).astype(np.float32))
    smooth = torch.nn.functional.interpolate(noise, (height, width), mode='bicubic')
    return (smooth[:, 0] > 0.3).numpy()


@pytest.mark.parametrize('kind', [np.asarray, torch.from_numpy])
@pytest.mark.parametrize('dtype', [bool, np.uint8])
def test_encode_masks_gives_the_bytes_of_pycocotools(kind, dtype):
    masks = blobs(5, 37, 53)
    masks[3] = True
    masks[4] = False
    encoded = ops.encode_masks(kind(masks.astype(dtype)))
    assert encoded == [reference(m) for m in masks]
    assert json.loads(json.dumps(encoded)) == encoded
    assert ops.encode_masks(kind(masks[:0].astype(dtype))) == []


@pytest.mark.parametrize('value', [0, 1])
def test_one_pixel(value):
    mask = np.full((1, 1, 1), value, np.uint8)
    assert ops.encode_masks(mask) == [reference(mask[0])]
    assert ops.encode_crops([mask[0]], [(0, 0)], (1, 1)) == [reference(mask[0])]


@pytest.mark.parametrize('kind', [np.asarray, torch.from_numpy])
def test_encode_crops_equals_pasting_into_the_frame(kind):
    height, width = 41, 67
    rng = np.random.default_rng(1)
    boxes = [
        (0, 0, width, height),  # the frame: runs that go on from column to column
        (0, 0, 9, 12),
        (width - 7, height - 5, width, height),
        (20, 0, 33, height),  # as high as the frame, off its left side
        (5, 6, 5, 20),  # no columns
        (5, 6, 15, 6),  # no rows
        (66, 40, 67, 41),
    ]
    for _ in range(20):
        x, y = rng.integers(0, width - 1), rng.integers(0, height - 1)
        boxes.append((x, y, rng.integers(x + 1, width + 1), rng.integers(y + 1, height + 1)))
    frames, crops = [], []
    for i, (x1, y1, x2, y2) in enumerate(boxes * 3):
        crop = np.zeros((y2 - y1, x2 - x1), dtype=bool)
        if crop.size:
            crop = blobs(1, *crop.shape, seed=i)[0] if i < len(boxes) else crop
            crop |= i >= 2 * len(boxes)  # first blobs, then nothing, then everything
        frame = np.zeros((height, width), dtype=bool)
        frame[y1:y2, x1:x2] = crop
        crops.append(kind(crop))
        frames.append(frame)
    offsets = [box[:2] for box in boxes * 3]
    assert ops.encode_crops(crops, offsets, (height, width)) == [reference(f) for f in frames]
    assert ops.encode_crops([], [], (height, width)) == []


def test_encode_crops_names_the_crop_that_leaves_the_frame():
    crops = [np.ones((3, 4), bool)] * 2
    with pytest.raises(ValueError, match=r'crop 1 of \[3, 4\].*10 x 20 frame'):
        ops.encode_crops(crops, [(0, 0), (17, 0)], (10, 20))


def test_decode_boxes_and_area_agree_with_the_masks():
    masks = blobs(6, 29, 44)
    masks[2] = False
    rles = ops.encode_masks(masks)
    assert np.array_equal(ops.decode_rle(rles), masks)
    assert np.array_equal(ops.area(rles), masks.sum((1, 2)))
    for mask, box in zip(masks, ops.rle_to_xyxy(rles), strict=True):
        y, x = np.nonzero(mask)
        tight = (x.min(), y.min(), x.max() + 1, y.max() + 1) if len(x) else (0, 0, 0, 0)
        assert tuple(box) == tight
    assert ops.decode_rle([], (29, 44)).shape == (0, 29, 44)
    assert ops.rle_to_xyxy([]).shape == (0, 4)
    assert ops.area([]).shape == (0,)


def test_segmentation_to_rle_reads_the_three_forms():
    polygons = [[2.0, 3.0, 20.0, 4.0, 12.0, 18.0], [25.0, 1.0, 30.0, 1.0, 30.0, 9.0, 25.0, 9.0]]
    merged = coco_mask.merge(coco_mask.frPyObjects(polygons, 21, 33))
    expected = {'size': [21, 33], 'counts': merged['counts'].decode()}
    runs, last, flat = [], 0, coco_mask.decode(merged).ravel(order='F')
    for value in flat:
        if value != last or not runs:
            runs += [0] * (2 if not runs and value else 1)
        runs[-1] += 1
        last = value
    for form in (polygons, merged, expected, {'size': [21, 33], 'counts': runs}):
        assert ops.segmentation_to_rle(form, (21, 33)) == expected


@pytest.mark.parametrize(
    'segmentation, reason',
    [
        ([], 'neither'),
        (None, 'neither'),
        ([[1, 2, 3, 4]], 'flat list'),
        ([[1, 2, 3, 4, 5, 6, 7]], 'flat list'),
        ([1, 2, 3, 4, 5, 6], 'flat list'),
        ([[1, 2, 3, float('nan'), 5, 6]], 'finite'),
        ([[1, 2, 3, None, 5, 6]], 'finite'),
        ({'size': [6, 5], 'counts': '55'}, 'size'),
        ({'size': None, 'counts': '55'}, 'the size None'),
        ({'size': 5, 'counts': '55'}, 'the size 5'),
        ({'size': [5, 5]}, 'counts'),
        ({'size': [5, 5], 'counts': [30]}, 'exceed'),
        ({'size': [5, 5], 'counts': [1.5, 3]}, 'counts'),
        ({'size': [5, 5], 'counts': 'z!'}, 'invalid'),
    ],
)
def test_segmentation_to_rle_says_what_is_broken(segmentation, reason):
    with pytest.raises(ValueError, match=reason):
        ops.segmentation_to_rle(segmentation, (5, 5))
