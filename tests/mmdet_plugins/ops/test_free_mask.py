import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmdet.models.layers import mask_matrix_nms
from pycocotools import mask as coco_mask
from scipy import ndimage

from mmdet_plugins.ops import free_mask as ops
from mmdet_plugins.ops.free_mask import free_masks

SCALES = (1.0, 0.5, 0.25)


def blobs(hw=(13, 22), channels=32, num=5, seed=0, noise=0.3):
    """Features [C, h, w]: objects of one direction each, smeared, on noise; non-negative."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: hw[0], : hw[1]]
    features = noise * rng.random((channels, *hw)) + rng.random((channels, 1, 1))
    for _ in range(num):
        cy, cx = rng.uniform(0, hw[0]), rng.uniform(0, hw[1])
        weight = np.exp(-(((y - cy) / 2.5) ** 2 + ((x - cx) / 3.5) ** 2))
        features += 2 * rng.random((channels, 1, 1)) ** 3 * weight
    return torch.from_numpy(features).float()


def literal(features, image_hw, min_score=0.7, max_num=20, connected=False):
    """The released algorithm in float64, one mask after the other where it can be.

    Masks with score, query, box, and whether the priors refuse them. With ``connected`` only the
    piece of a mask in which its query lies.
    """
    keys = features.double()
    channels, height, width = keys.shape
    queries, cells = [], []
    for scale in SCALES:
        grid = F.interpolate(keys[None], scale_factor=scale, mode='bilinear')[0]
        queries += list(grid.reshape(channels, -1).T)
        centres = (np.indices(grid.shape[1:]).reshape(2, -1).T + 0.5) / scale
        cells += list(centres.astype(int))
    columns = [column / column.norm() for column in keys.reshape(channels, -1).T]
    columns = torch.stack(columns, 1)
    soft, found = [], []
    for query, cell in zip(queries, cells, strict=True):
        query = query / query.norm()
        cosines = query @ columns
        cosines = (cosines - cosines.min()) / (cosines.max() - cosines.min())
        mask = cosines >= 0.5
        if connected:
            pieces, _ = ndimage.label(mask.reshape(height, width))
            if pieces[tuple(cell)] == 0:
                continue
            piece = torch.from_numpy(pieces == pieces[tuple(cell)]).flatten()
            cosines[mask & ~piece] = 0
            mask = piece
        if mask.sum() > 1:
            soft.append(cosines.reshape(height, width))
            found.append((query, mask, cosines[mask].mean()))
    if not found:
        return []
    scores = torch.stack([score for _, _, score in found])
    masks = torch.stack([mask.reshape(height, width) for _, mask, _ in found])
    decayed, _, _, kept = mask_matrix_nms(masks, torch.zeros(len(masks)).long(), scores)
    results = []
    for score, i in list(zip(decayed.tolist(), kept.tolist(), strict=True))[:max_num]:
        full = F.interpolate(soft[i][None, None], image_hw, mode='bilinear')[0, 0]
        mask = (full >= 0.5).numpy()
        if not mask.any():  # the image is smaller than the map
            continue
        rows, columns_hit = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        refused = rows.mean() <= 0.2 * image_hw[0] or len(columns_hit) >= 0.95 * image_hw[1]
        if score >= min_score:
            box = columns_hit[0], rows[0], columns_hit[-1] + 1, rows[-1] + 1
            results.append((mask, score, found[i][0], box, refused))
    return results


def compare(found, expected, image_hw):
    """Equal but for the order of equal scores and pixels on the threshold."""
    assert len(found.rles) == len(expected) == len(found.scores)
    masks = [coco_mask.decode(rle).astype(bool) for rle in found.rles]
    unmatched = list(range(len(expected)))
    for mask, score, embedding, box, area in zip(
        masks, found.scores, found.embeddings, found.boxes_xyxy, found.areas, strict=True
    ):
        match = next(
            i
            for i in unmatched
            if abs(expected[i][1] - score) < 1e-5 and (expected[i][0] != mask).mean() < 1e-4
        )
        unmatched.remove(match)
        torch.testing.assert_close(embedding, expected[match][2].float(), rtol=1e-4, atol=1e-5)
        if np.array_equal(expected[match][0], mask):
            assert tuple(box.tolist()) == expected[match][3]
        assert int(area) == mask.sum() and mask.shape == image_hw
    assert (found.scores.diff() <= 0).all()


@pytest.fixture(params=['host', 'device'])
def way(request, monkeypatch):
    """The steps taken on a device, too, where they run on the CPU."""
    if request.param == 'device':
        monkeypatch.setattr(ops, 'on_cpu', lambda tensor: False)


def test_by_hand():
    """A strip of six cells in two directions, 30 degrees apart: two masks of score 1."""
    angle = math.radians(30)
    left, right = torch.tensor([1.0, 0.0]), torch.tensor([math.cos(angle), math.sin(angle)])
    features = torch.stack([left] * 2 + [right] * 4, 1)[:, None]
    (found,) = free_masks(features[None], (10, 60), scales=(1.0,))
    # A cosine is 1 or cos 30, which the normalisation makes 1 and 0. Of the copies, IoU 1 and
    # compensation 0, exp(-2) is left; the first of either stays as it is.
    assert found.scores.tolist() == pytest.approx([1, 1])
    areas = sorted(int(area) for area in found.areas)
    assert areas == [200, 400]  # half a cell more or less: bilinear, and the threshold is half way
    assert found.dropped == dict(cells=0, score=4, number=0)
    embeddings = found.embeddings[found.areas.argsort()]
    torch.testing.assert_close(embeddings, torch.stack([left, right]))
    (single,) = free_masks(features[None], (10, 60), scales=(1.0,), max_num=1)
    assert len(single.rles) == 1 and single.dropped['number'] == 1


@pytest.mark.parametrize('hw, image_hw', [((13, 22), (97, 160)), ((18, 9), (150, 71))])
@pytest.mark.parametrize('seed, min_score', [(0, 0.3), (1, 0.3), (0, 0.7)])
def test_equals_the_released_algorithm(hw, image_hw, seed, min_score, way):
    features = blobs(hw, seed=seed)
    expected = literal(features, image_hw, min_score)
    assert len(expected) >= (10 if min_score < 0.5 else 1)
    (found,) = free_masks(features[None], image_hw, min_score=min_score)
    compare(found, expected, image_hw)
    (found,) = free_masks(
        features[None], image_hw, min_score=min_score, min_centre=0.2, max_width=0.95
    )
    compare(found, [result for result in expected if not result[4]], image_hw)


@pytest.mark.parametrize('hw, image_hw', [((13, 22), (97, 160)), ((18, 9), (150, 71))])
def test_pieces_are_those_of_their_queries(hw, image_hw, way):
    features = torch.stack([blobs(hw, seed=seed) for seed in (0, 1)])
    results = free_masks(features, image_hw, min_score=0.3, connected=True)
    for one, found in zip(features, results, strict=True):
        expected = literal(one, image_hw, min_score=0.3, connected=True)
        assert len(expected) == 20
        compare(found, expected, image_hw)


def test_two_alike_are_told_apart():
    """A strip: two cells, a gap, two like the first."""
    object_, ground = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    features = torch.stack([object_] * 2 + [ground] * 3 + [object_] * 2, 1)[None, :, None]
    (whole,) = free_masks(features, (10, 70), scales=(1.0,))
    assert sorted(whole.areas.tolist()) == [300, 400]
    (pieces,) = free_masks(features, (10, 70), scales=(1.0,), connected=True)
    assert sorted(pieces.areas.tolist()) == [200, 200, 300]
    assert sorted(pieces.boxes_xyxy[:, 0].tolist()) == [0, 20, 50]


def test_counts_of_the_rules_add_up(way):
    features, image_hw = blobs(num=9, noise=0.8, seed=4), (100, 120)
    options = dict(min_score=0.6, max_num=3, min_centre=0.2, max_width=0.3)
    (found,) = free_masks(features[None], image_hw, **options)
    num_queries = 13 * 22 + 6 * 11 + 3 * 5
    assert len(found.rles) + sum(found.dropped.values()) == num_queries
    assert list(found.dropped) == ['cells', 'score', 'number', 'centre', 'width']
    expected = literal(features, image_hw, min_score=0.6, max_num=1000)
    assert found.dropped['number'] == len(expected) - 3


def test_masks_of_one_cell():
    """Every cell is like itself alone; a coarse query is like the four that it is the mean of."""
    features = torch.eye(72).view(1, 72, 8, 9)
    (found,) = free_masks(features, (64, 72), scales=(1.0, 0.5))
    assert found.dropped == dict(cells=72, score=0, number=0) and len(found.rles) == 16
    (found,) = free_masks(features, (64, 72), scales=(1.0,), min_cells=1, max_num=70)
    assert found.dropped == dict(cells=0, score=0, number=2)
    torch.testing.assert_close(found.scores, torch.ones(70))


def test_batch_is_its_images(way):
    images = [blobs(seed=seed, num=seed) for seed in range(4)] + [torch.ones(32, 13, 22)]
    together = free_masks(torch.stack(images), (97, 160))
    for image, found in zip(images, together, strict=True):
        (alone,) = free_masks(image[None], (97, 160))
        assert alone.rles == found.rles and alone.dropped == found.dropped
        torch.testing.assert_close(alone.scores, found.scores)
        torch.testing.assert_close(alone.embeddings, found.embeddings)
    assert free_masks(torch.zeros(0, 32, 13, 22), (97, 160)) == []


@pytest.mark.parametrize('fill', [0.0, 1.0, math.nan, math.inf])
def test_nothing_to_see_is_no_mask(fill, way):
    (found,) = free_masks(torch.full((1, 7, 8, 9), fill), (64, 80))
    assert found.rles == [] and found.embeddings.shape == (0, 7)
    assert found.boxes_xyxy.shape == (0, 4) and len(found.scores) == 0


def test_noise_of_a_constant_map_is_no_mask():
    features = torch.rand(1, 64, 1, 1).expand(-1, -1, 8, 9) * (1 + torch.rand(1, 1, 8, 9))
    assert free_masks(features, (64, 80))[0].rles == []


def test_a_dead_cell_costs_itself_only():
    features = blobs()
    features[:, 3, 4] = 0
    assert free_masks(features[None], (97, 160))[0].rles


def test_image_smaller_than_its_map():
    features, image_hw = blobs(), (5, 6)
    (found,) = free_masks(features[None], image_hw)
    compare(found, literal(features, image_hw), image_hw)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_features(dtype):
    features = blobs().to(dtype)
    (found,) = free_masks(features[None], (97, 160))
    compare(found, literal(features.float(), (97, 160)), (97, 160))


def test_embedding_dim():
    features = blobs()
    (whole,) = free_masks(features[None], (97, 160))
    (short,) = free_masks(features[None], (97, 160), embedding_dim=8)
    # Linear, centres aligned: 32 to 8 takes the middle two of four.
    expected = whole.embeddings.unflatten(1, (8, 4))[:, :, 1:3].mean(2)
    torch.testing.assert_close(short.embeddings, expected)


@pytest.mark.parametrize('hw', [(1, 1), (1, 9), (3, 2)])
def test_maps_that_have_no_coarse_grid(hw, way):
    features = torch.rand(2, 4, *hw, generator=torch.Generator().manual_seed(0))
    together = free_masks(features, (64, 64))
    fine = free_masks(features, (64, 64), scales=[1.0, 0.5] if min(hw) > 1 else [1.0])
    assert [found.rles for found in together] == [found.rles for found in fine]


def test_refusals():
    with pytest.raises(ValueError, match='min_score must be positive'):
        free_masks(torch.rand(1, 4, 8, 9), (64, 64), min_score=0)
