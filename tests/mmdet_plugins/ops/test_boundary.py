"""Boundary IoU against figures derived by hand and against the erosion that defines it."""

import cv2
import numpy as np
import pytest
from pycocotools import mask as mask_utils

from mmdet_plugins.ops.boundary import boundary_iou, boundary_width, mask_boundary, rle_boundary
from mmdet_plugins.ops.open_world import evaluate_json


def _rle(mask):
    rle = mask_utils.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {'size': rle['size'], 'counts': rle['counts'].decode()}


def _box_mask(height, width, top, left, h, w):
    mask = np.zeros((height, width), bool)
    mask[top : top + h, left : left + w] = True
    return mask


@pytest.mark.parametrize(
    'height, width, expected',
    [(480, 640, 16), (100, 100, 3), (720, 1280, 29), (10, 12, 1), (1, 1, 1)],
)
def test_width_is_two_percent_of_the_diagonal(height, width, expected):
    assert boundary_width(height, width) == expected


def test_ring_of_a_rectangle():
    mask = _box_mask(30, 50, 5, 8, 10, 20)
    ring = mask_boundary(mask, 2)
    assert ring.sum() == 10 * 20 - 6 * 16
    assert not ring[7:13, 10:26].any()


def test_the_edge_of_the_image_is_outside():
    ring = mask_boundary(np.ones((12, 20), bool), 3)
    assert ring.sum() == 12 * 20 - 6 * 14


def test_a_hole_has_a_boundary_too():
    mask = np.ones((21, 31), bool)
    mask[10, 15] = False
    ring = mask_boundary(mask, 1)
    assert ring[9:12, 14:17].sum() == 8 and ring.sum() == 8 + 2 * (21 + 31) - 4


@pytest.mark.parametrize('width', [1, 3, 8])
def test_equals_repeated_erosion(width):
    """The definition: what is left out by ``width`` erosions with a 3x3 square."""
    mask = cv2.blur(np.random.default_rng(width).random((61, 83)).astype(np.float32), (9, 9)) > 0.5
    padded = np.pad(mask.astype(np.uint8), 1)
    eroded = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=width)[1:-1, 1:-1]
    assert np.array_equal(mask_boundary(mask, width), mask & ~eroded.astype(bool))
    height, breadth = mask.shape
    ring = mask_utils.decode(rle_boundary(_rle(mask), width / np.hypot(height, breadth)))
    assert np.array_equal(ring.astype(bool), mask & ~eroded.astype(bool))


def test_shifted_square():
    """40x40 squares, 4 px apart, in 100x100 (a band of 3 px): all by counting pixels."""
    truth, found = _box_mask(100, 100, 20, 20, 40, 40), _box_mask(100, 100, 20, 24, 40, 40)
    ring = 40 * 40 - 34 * 34
    common = 2 * 3 * 36  # upper and lower band; the upright ones pass each other
    expected = common / (2 * ring - common)
    assert expected < 1440 / 1760  # the IoU of the masks
    iou = boundary_iou([_rle(found)], [_rle(truth)], [False])
    assert iou[0, 0] == pytest.approx(expected, abs=1e-12)
    crowd = boundary_iou([_rle(found)], [_rle(truth)], [True])
    assert crowd[0, 0] == pytest.approx(36 / 40, abs=1e-12)  # of the detection's area
    skipped = boundary_iou([_rle(found)], [_rle(truth)], [False], min_iou=0.9)
    assert skipped[0, 0] == pytest.approx(1440 / 1760, abs=1e-12)


def test_thin_masks_are_all_boundary():
    truth, found = _box_mask(200, 100, 50, 10, 6, 60), _box_mask(200, 100, 52, 10, 6, 60)
    assert boundary_width(200, 100) == 4
    assert boundary_iou([_rle(found)], [_rle(truth)], [False])[0, 0] == pytest.approx(4 / 8)


def test_the_mask_iou_bounds_it():
    """Where the insides differ and the outlines do not: a hole as wide as the inside."""
    truth = _box_mask(100, 100, 10, 10, 80, 80)
    found = truth.copy()
    found[16:84, 16:84] = False  # leaves the band of 3 px and 3 px more
    iou = boundary_iou([_rle(found)], [_rle(truth)], [False])[0, 0]
    assert iou == pytest.approx((6400 - 68 * 68) / 6400)


def test_degenerate_masks():
    empty, pixel = np.zeros((40, 30), bool), _box_mask(40, 30, 39, 29, 1, 1)
    assert rle_boundary(_rle(empty)) == mask_utils.encode(np.asfortranarray(empty, np.uint8))
    ious = boundary_iou([_rle(pixel), _rle(empty)], [_rle(pixel), _rle(empty)], [False, False])
    assert np.array_equal(ious, [[1, 0], [0, 0]])
    assert boundary_iou([], [_rle(pixel)], [False]).shape == (0, 1)
    assert boundary_iou([_rle(pixel)], [], []).shape == (1, 0)


def test_boundary_ap_by_hand():
    """The shifted square: mask IoU 0.82 passes seven thresholds, boundary IoU 0.32 none."""
    truth, found = _box_mask(100, 100, 20, 20, 40, 40), _box_mask(100, 100, 20, 24, 40, 40)
    annotations = {
        'images': [{'id': 1, 'height': 100, 'width': 100}],
        'categories': [{'id': 1, 'name': 'x'}],
        'annotations': [
            {
                'id': 1,
                'image_id': 1,
                'category_id': 1,
                'bbox': [20, 20, 40, 40],
                'area': 1600,
                'iscrowd': 0,
                'segmentation': _rle(truth),
            }
        ],
    }

    def evaluate(mask):
        result = {'image_id': 1, 'category_id': 1, 'score': 0.5, 'segmentation': _rle(mask)}
        return evaluate_json(annotations, [result], ('segm', 'boundary'), (1,))

    shifted = evaluate(found)
    assert shifted['segm_AR@1'] == pytest.approx(0.7) and shifted['boundary_AR@1'] == 0
    exact = evaluate(truth)
    assert exact['boundary_AP'] == pytest.approx(1) and exact['boundary_AR@1'] == 1
    # One pixel less all round: rings of 444 and 420 pixels share 38 * 38 - 34 * 34 = 288, and
    # 288 / (444 + 420 - 288) is one half, which reaches the first threshold and no other.
    smaller = evaluate(_box_mask(100, 100, 21, 21, 38, 38))
    assert smaller['boundary_AR@1'] == pytest.approx(0.1)
