import math

import numpy as np
import pytest
import torch
from mmdet.models.layers import mask_matrix_nms
from pycocotools import mask as coco_mask

from mmdet_plugins.ops import matrix_nms as ops
from mmdet_plugins.ops.rle import encode_masks

FORMS = {'dense': lambda m: m, 'packed': ops.pack_masks, 'rle': encode_masks}
HW = (37, 53)


def blobs(num, seed=0, hw=HW):
    """Ellipses, several a place, none of them empty."""
    rng = np.random.default_rng(seed)
    places = rng.random((num // 6 + 1, 4))[rng.integers(num // 6 + 1, size=num)]
    places += 0.02 * rng.normal(size=places.shape)
    y, x = (np.arange(n)[None, :] / n for n in hw)
    cy, cx, ry, rx = places.T[..., None]
    ry, rx = 0.1 + 0.3 * abs(ry), 0.1 + 0.3 * abs(rx)
    masks = (((y - cy) / ry) ** 2)[:, :, None] + (((x - cx) / rx) ** 2)[:, None] < 1
    masks[~masks.any((1, 2)), 0, 0] = True
    return torch.from_numpy(masks)


def scene(num, num_classes=1, seed=0):
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (num,), generator=rng)
    return blobs(num, seed), torch.rand(num, generator=rng), labels


def literal_iou(masks):
    rles = [coco_mask.encode(np.asfortranarray(m, dtype=np.uint8)) for m in masks.numpy()]
    return torch.from_numpy(coco_mask.iou(rles, rles, [0] * len(rles))).float()


@pytest.fixture(params=['host', 'device'])
def way(request, monkeypatch):
    """The steps taken on a device, too, where they run on the CPU."""
    if request.param == 'device':
        monkeypatch.setattr(ops, 'on_cpu', lambda tensor: False)


def test_decay_by_hand():
    # On a strip: 0-3, 2-5, 4-7. IoU 2/6 of neighbours, nothing of the outer two.
    masks = torch.zeros(3, 1, 8, dtype=torch.bool)
    for i in range(3):
        masks[i, 0, 2 * i : 2 * i + 4] = True
    scores = torch.tensor([0.9, 0.8, 0.7])
    # The second is decayed by the first; the third by the second, which is itself decayed: the
    # ratio f(1/3) / f(1/3) is 1, as is that with the first, f(0) / f(0).
    gaussian = ops.mask_nms(masks, scores, sigma=2.0)
    expected = [0.9, 0.8 * math.exp(-2 / 9), 0.7]
    by_index = dict(zip(gaussian.keep_inds.tolist(), gaussian.scores.tolist(), strict=True))
    assert [by_index[i] for i in range(3)] == pytest.approx(expected)
    assert gaussian.keep_inds.tolist() == [0, 2, 1]
    linear = ops.mask_nms(masks, scores, kernel='linear', filter_thr=0.6)
    assert linear.keep_inds.tolist() == [0, 2] and linear.scores.tolist() == pytest.approx(
        [0.9, 0.7]
    )
    thesis = ops.mask_nms(masks, scores, sigma=1 / 0.5)  # it divides by its sigma of 0.5
    assert torch.equal(thesis.scores, gaussian.scores)


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('kernel', ['gaussian', 'linear'])
@pytest.mark.parametrize(
    'num, num_classes', [(1, 1), (2, 1), (60, 1), (300, 1), (200, 5), (90, 80)]
)
def test_equals_mmdet(form, kernel, num, num_classes, way):
    masks, scores, labels = scene(num, num_classes, seed=num)
    for caps in ({}, dict(nms_pre=num // 2 + 1, max_num=20, filter_thr=0.2), dict(filter_thr=2)):
        expected = mask_matrix_nms(masks, labels, scores.clone(), kernel=kernel, **caps)
        found = ops.mask_nms(FORMS[form](masks), scores, labels, kernel=kernel, **caps)
        assert torch.equal(found.keep_inds, expected[3])
        assert torch.equal(found.labels, expected[1])
        torch.testing.assert_close(found.scores, expected[0], rtol=1e-6, atol=0)


def literal_nms(masks, scores, labels, method, kernel, sigma, thr):
    """Scores of what is not removed, pair by pair, as the papers write it."""
    iou = literal_iou(masks)
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    value = {i: float(scores[i]) for i in order}
    kept = []
    if method == 'soft':
        while order:
            best = max(order, key=value.get)
            order.remove(best)
            kept.append(best)
            for i in order:
                overlap = float(iou[best, i]) if labels[best] == labels[i] else 0.0
                if kernel == 'gaussian':
                    value[i] *= math.exp(-sigma * overlap**2)
                elif overlap >= thr:
                    value[i] *= 1 - overlap
    else:
        for rank, i in enumerate(order):
            rivals = kept if method == 'hard' else order[:rank]
            if not any(labels[j] == labels[i] and iou[i, j] > thr for j in rivals):
                kept.append(i)
    return {i: value[i] for i in kept}


@pytest.mark.parametrize('method, kernel', [
    ('hard', 'gaussian'), ('fast', 'gaussian'), ('soft', 'gaussian'), ('soft', 'linear'),
])  # fmt: skip
@pytest.mark.parametrize('num_classes', [1, 3])
def test_hard_soft_and_fast_equal_their_loops(method, kernel, num_classes, way):
    masks, scores, labels = scene(70, num_classes, seed=3)
    expected = literal_nms(masks, scores, labels, method, kernel, 3.0, 0.3)
    found = ops.mask_nms(
        masks, scores, labels, method=method, kernel=kernel, sigma=3.0, iou_thr=0.3
    )
    assert set(found.keep_inds.tolist()) == set(expected)
    assert method == 'soft' or 0 < len(expected) < 70
    values = [expected[i] for i in found.keep_inds.tolist()]
    assert found.scores.tolist() == pytest.approx(values, rel=1e-5)
    assert values == pytest.approx(sorted(values, reverse=True), rel=1e-5)


def test_iou_is_that_of_pycocotools(way):
    masks = blobs(40)
    torch.testing.assert_close(ops.mask_iou(masks), literal_iou(masks), rtol=1e-6, atol=0)
    labels = torch.arange(40) % 3
    same = labels[:, None] == labels
    for form in FORMS.values():
        found = ops.mask_iou(form(masks), labels)
        torch.testing.assert_close(found, literal_iou(masks) * same, rtol=1e-6, atol=0)


@pytest.mark.parametrize('few', [0, 10, 10**6])
@pytest.mark.parametrize('int8', [True, False])
def test_intersections_do_not_depend_on_how_they_are_counted(few, int8, way, monkeypatch):
    monkeypatch.setattr(ops, '_FEW', few)
    monkeypatch.setattr(ops, '_BLOCK', 7)
    monkeypatch.setattr(ops, '_BLOCK_DEVICE', 16)
    if not int8:
        monkeypatch.setattr(ops, '_has_int8_product', lambda device: False)
    a, b = blobs(41, 1), blobs(23, 2)
    a[5] = False
    a[6] = True
    la, lb = torch.arange(41) % 4, torch.arange(23) % 5
    flat_a, flat_b = a.flatten(1).long(), b.flatten(1).long()
    for form in FORMS.values():
        with torch.autocast('cpu', torch.bfloat16):
            whole = ops.mask_intersections(form(a))
            cross = ops.mask_intersections(form(a), la, form(b), lb)
        assert torch.equal(whole.long(), flat_a @ flat_a.T)
        assert torch.equal(cross.long(), (flat_a @ flat_b.T) * (la[:, None] == lb))


@pytest.mark.parametrize('hw', [(1, 1), (1, 7), (5, 1), (9, 16)])
def test_packing_loses_nothing(hw, way):
    masks = torch.rand(19, *hw, generator=torch.Generator().manual_seed(0)) < 0.5
    packed = ops.pack_masks(masks)
    assert packed.bits.shape == (19, -(-hw[0] * hw[1] // 8))
    # Bit b of byte k is pixel 8 k + b, whichever way it was packed.
    first = sum(2**b * int(v) for b, v in enumerate(masks[0].flatten()[:8]))
    assert packed.bits[0, 0] == first
    assert torch.equal(ops.unpack_masks(packed), masks)
    counts = masks.flatten(1).long() @ masks.flatten(1).long().T
    assert torch.equal(ops.mask_intersections(masks).long(), counts)


@pytest.mark.parametrize('method', ops.METHODS)
@pytest.mark.parametrize('form', FORMS)
def test_none_and_one(method, form, way):
    for num in (0, 1):
        masks = torch.ones(num, 3, 5, dtype=torch.bool)
        found = ops.mask_nms(
            FORMS[form](masks), torch.full((num,), 0.5), torch.zeros(num).long(), method=method
        )
        assert found.scores.tolist() == [0.5] * num
        assert found.labels.tolist() == found.keep_inds.tolist() == [0] * num
        alone = ops.mask_nms(FORMS[form](masks), torch.full((num,), 0.5), method=method)
        assert alone.keep_inds.tolist() == [0] * num


@pytest.mark.parametrize('kernel', ['gaussian', 'linear'])
def test_empty_and_equal_masks_give_no_nan(kernel, way):
    masks = torch.zeros(5, 4, 6, dtype=torch.bool)
    masks[2:] = True
    found = ops.mask_nms(masks, torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5]), kernel=kernel)
    by_index = dict(zip(found.keep_inds.tolist(), found.scores.tolist(), strict=True))
    gone = math.exp(-2) if kernel == 'gaussian' else 0
    expected = [0.9, 0.8, 0.7, 0.6 * gone, 0.5 * gone]
    assert [by_index[i] for i in range(5)] == pytest.approx(expected)


def test_ties_keep_their_order(way):
    masks, _, labels = scene(60, 4)
    found = ops.mask_nms(masks, torch.full((60,), 0.5), labels, sigma=0.0)
    assert found.keep_inds.tolist() == list(range(60))
    # mmdet's sort leaves ties to chance: there, the earlier mask scores a little more.
    scores = torch.arange(60).div(8, rounding_mode='floor') / 8
    expected = mask_matrix_nms(masks, labels, scores - 1e-5 * torch.arange(60))
    found = ops.mask_nms(masks, scores, labels)
    by_index = [torch.zeros(60).index_put_((i,), s) for s, i in (found[::2], expected[::3])]
    torch.testing.assert_close(*by_index, rtol=0, atol=1e-3)


@pytest.mark.parametrize('method', ops.METHODS)
def test_order_and_names_of_labels_do_not_matter(method):
    masks, scores, labels = scene(80, 4, seed=5)
    order = torch.randperm(80, generator=torch.Generator().manual_seed(1))
    one = ops.mask_nms(masks, scores, labels, method=method)
    other = ops.mask_nms(masks[order], scores[order], 70 - 3 * labels[order], method=method)
    assert torch.equal(one.keep_inds, order[other.keep_inds])
    assert torch.equal(one.labels, (70 - other.labels) // 3)
    assert torch.equal(one.scores, other.scores)
    agnostic = ops.mask_nms(masks, scores, method=method)
    same = ops.mask_nms(masks, scores, torch.full_like(labels, 9), method=method)
    assert agnostic.labels is None and torch.equal(agnostic.scores, same.scores)
    assert not torch.equal(agnostic.scores, one.scores)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('method', ops.METHODS)
def test_half_precision_scores(dtype, method):
    masks, scores, labels = scene(50, 2)
    half = ops.mask_nms(masks, scores.to(dtype), labels, method=method)
    full = ops.mask_nms(masks, scores.to(dtype).float(), labels, method=method)
    assert torch.equal(half.keep_inds, full.keep_inds)
    assert torch.equal(half.scores, full.scores)


@pytest.mark.parametrize('change, words', [
    (dict(method='greedy'), 'greedy'),
    (dict(kernel='cubic'), 'cubic'),
    (dict(scores=torch.ones(3)), '4 masks, but 3 scores'),
    (dict(labels=torch.ones(5)), '5 labels'),
])  # fmt: skip
def test_bad_arguments_are_named(change, words):
    arguments = dict(masks=blobs(4), scores=torch.ones(4)) | change
    with pytest.raises(ValueError, match=words):
        ops.mask_nms(**arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('method', ops.METHODS)
def test_cuda_agrees(form, method):
    masks, scores, labels = scene(2100 if form == 'dense' else 100, 4)
    expected = ops.mask_nms(masks, scores, labels, method=method)
    moved = masks if form == 'rle' else masks.cuda()
    found = ops.mask_nms(FORMS[form](moved), scores.cuda(), labels.cuda(), method=method)
    assert torch.equal(found.keep_inds.cpu(), expected.keep_inds)
    torch.testing.assert_close(found.scores.cpu(), expected.scores, rtol=1e-6, atol=0)
    none = ops.mask_nms(FORMS[form](moved[:0]), scores[:0].cuda(), labels[:0].cuda(), method=method)
    assert len(none.keep_inds) == 0
