import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from mmdet.models.dense_heads import SOLOHead, SOLOV2Head
from mmdet.structures.mask import mask2bbox
from mmengine.config import ConfigDict

from mmdet_plugins.ops import instance_masks as ops
from mmdet_plugins.ops import matrix_nms
from mmdet_plugins.ops.rle import encode_masks

GRIDS, STRIDES = [12, 8], [8, 16]
CELLS = sum(g * g for g in GRIDS)
LEAST = torch.tensor([float(s) for s, g in zip(STRIDES, GRIDS, strict=True) for _ in range(g * g)])
FRAMES = {
    'smaller': ops.Frame((26, 38), (104, 152), (97, 150), (61, 83)),
    'larger': ops.Frame((26, 38), (104, 152), (104, 131), (133, 171)),
    'same': ops.Frame((26, 38), (26, 38), (26, 38), (26, 38)),
    'thumbnail': ops.Frame((26, 38), (104, 152), (100, 152), (9, 7)),
}
NEAR = 1e-5  # of the threshold, within which the last bit may decide


@pytest.fixture(params=['host', 'device'])
def way(request, monkeypatch):
    """The steps taken on a device, too, where they run on the CPU."""
    if request.param == 'device':
        monkeypatch.setattr(ops, 'on_cpu', lambda tensor: False)
        monkeypatch.setattr(matrix_nms, 'on_cpu', lambda tensor: False)


def scene(num_classes=5, seed=0, hw=(26, 38), crowded=3.0):
    """Logits ``[CELLS, h, w]`` of ellipses, and scores ``[CELLS, K]``, most of them low."""
    rng = torch.Generator().manual_seed(seed)
    axes = [torch.linspace(0, 1, n) for n in hw]
    objects = torch.rand(20, 4, generator=rng)
    drawn = objects[torch.randint(20, (CELLS,), generator=rng)]
    drawn = drawn + 0.03 * torch.randn(CELLS, 4, generator=rng)
    offsets = [
        (axis - drawn[:, side, None]) / (0.02 + 0.4 * drawn[:, side + 2, None].abs())
        for side, axis in enumerate(axes)
    ]
    logits = 3 * (1 - offsets[0][:, :, None] ** 2 - offsets[1][:, None] ** 2)
    logits += 0.3 * torch.randn(logits.shape, generator=rng)
    scores = torch.rand(CELLS, num_classes, generator=rng) ** crowded
    return logits, scores


def config(**changes):
    base = dict(nms_pre=500, score_thr=0.1, mask_thr=0.5, filter_thr=0.05)
    return ConfigDict(base | dict(kernel='gaussian', sigma=2.0, max_per_img=100) | changes)


def stock(logits, scores, frame, cfg, *, solo=False):
    """What mmdet's head makes of these maps; SOLOv2's convolution just picks them."""
    kind = SOLOHead if solo else SOLOV2Head
    head = kind.__new__(kind)
    torch.nn.Module.__init__(head)
    head.num_grids, head.strides, head.num_levels = GRIDS, STRIDES, 2
    head.dynamic_conv_size, head.mask_stride = 1, frame.padded_hw[0] // frame.map_hw[0]
    meta = dict(img_shape=frame.image_hw, ori_shape=frame.original_hw)
    if solo:
        return head._predict_by_feat_single(scores, logits.sigmoid(), meta, cfg)
    return head._predict_by_feat_single(torch.eye(CELLS), scores, logits[None], meta, cfg)


def ours(maps, scores, frame, cfg, *, probabilities=False, made=None, rle=False, **options):
    cells, labels = (scores > cfg.score_thr).nonzero().T

    def maps_of(index):
        if made is not None:
            made.append(len(index))
        return maps[cells[index]]

    selection = ops.select_instances(
        scores[cells, labels],
        labels,
        maps_of,
        maps.shape[1:],
        min_area=LEAST[cells],
        mask_thr=cfg.mask_thr,
        logits=not probabilities,
        nms_pre=cfg.nms_pre,
        max_num=cfg.max_per_img,
        filter_thr=cfg.filter_thr,
        kernel=cfg.kernel,
        sigma=cfg.sigma,
        **options,
    )
    found = ops.resize_instances(
        selection,
        maps_of,
        frame,
        mask_thr=cfg.mask_thr,
        logits=not probabilities,
        rle=rle,
        **options,
    )
    return selection, found, cells


def stock_probs(probs, frame):
    height, width = frame.image_hw
    probs = F.interpolate(probs[None], frame.padded_hw, mode='bilinear', align_corners=False)
    probs = probs[:, :, :height, :width]
    return F.interpolate(probs, frame.original_hw, mode='bilinear', align_corners=False)[0]


def assert_equal(result, expected, logits, frame, cfg):
    selection, found, cells = result
    assert torch.equal(selection.labels, expected.labels)
    torch.testing.assert_close(selection.scores, expected.scores, rtol=1e-6, atol=0)
    probs = stock_probs(logits[cells[selection.index]].sigmoid(), frame)
    clear = (probs - cfg.mask_thr).abs() > NEAR
    assert clear.float().mean() > 0.999
    assert torch.equal(found.masks & clear, expected.masks & clear)
    assert torch.equal(found.boxes_xyxy, mask2bbox(found.masks))
    assert torch.equal(found.areas, found.masks.sum((1, 2)))


@pytest.mark.parametrize('frame', FRAMES.values(), ids=FRAMES)
@pytest.mark.parametrize('num_classes', [1, 5])
def test_equals_stock_solov2(frame, num_classes, way):
    for seed, changes in enumerate([
        {}, dict(nms_pre=40), dict(max_per_img=7), dict(kernel='linear', filter_thr=0.3),
        dict(nms_pre=-1, max_per_img=-1, filter_thr=-1), dict(mask_thr=0.3, sigma=0.5),
    ]):  # fmt: skip
        logits, scores = scene(num_classes, seed)
        cfg = config(**changes)
        expected = stock(logits, scores, frame, cfg)
        assert len(expected.scores) > 3
        result = ours(logits, scores, frame, cfg)
        assert_equal(result, expected, logits, frame, cfg)


def test_equals_stock_solo_whose_maps_are_probabilities(way):
    logits, scores = scene(3, seed=9)
    expected = stock(logits, scores, FRAMES['smaller'], config(), solo=True)
    result = ours(logits.sigmoid(), scores, FRAMES['smaller'], config(), probabilities=True)
    assert_equal(result, expected, logits, FRAMES['smaller'], config())


def test_the_axis_is_the_interpolation_torch_composes():
    axis = ops._axis(26, 104, 97, 61)
    line = torch.rand(26, generator=torch.Generator().manual_seed(0))
    probs = stock_probs(line[None, :, None], ops.Frame((26, 1), (104, 1), (97, 1), (61, 1)))
    torch.testing.assert_close(axis.weights @ line, probs[0, :, 0], rtol=0, atol=3e-7)
    assert (axis.last - axis.first).max() == 2
    # By hand: half of a line of 4 samples between the 2nd and the 3rd, and again at the other end.
    assert ops._axis(4, 4, 4, 2).weights.tolist() == [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]


@pytest.mark.parametrize('frame', FRAMES.values(), ids=FRAMES)
@pytest.mark.parametrize('budget', [ops.BYTE_BUDGET, 40_000])
def test_encodings_are_those_of_the_masks(frame, budget, way):
    logits, scores = scene(seed=4)
    selection, dense, _ = ours(logits, scores, frame, config())
    again, encoded, _ = ours(logits, scores, frame, config(), rle=True, byte_budget=budget)
    assert torch.equal(again.index, selection.index)
    assert torch.equal(again.scores, selection.scores)
    assert encoded.masks == encode_masks(dense.masks)
    assert torch.equal(encoded.boxes_xyxy, dense.boxes_xyxy)
    assert torch.equal(encoded.areas, dense.areas)


def eager(probs, scores, cfg):
    """All maps at once, all sorts stable: cells, labels and scores of what remains."""
    cells, labels = (scores > cfg.score_thr).nonzero().T
    masks = probs[cells] > 0.5
    area = masks.sum((1, 2))
    maskness = (probs[cells] * masks).sum((1, 2)) / area.clamp(min=1)
    rescored = scores[cells, labels] * maskness
    rescored[area <= LEAST[cells]] = -1
    rank = rescored.argsort(descending=True, stable=True)[: cfg.nms_pre]
    rank = rank[rescored[rank] >= 0]
    found = matrix_nms.mask_nms(masks[rank], rescored[rank], labels[rank])
    keep = found.keep_inds[found.scores >= cfg.filter_thr][: cfg.max_per_img]
    return cells[rank][keep], labels[rank][keep], found.scores[: len(keep)]


@pytest.mark.parametrize('nms_pre, max_num', [(500, 100), (30, 100), (500, 10), (1, 1)])
def test_laziness_changes_nothing_even_among_ties(nms_pre, max_num, way):
    for seed in range(4):
        logits, scores = scene(seed=seed)
        logits = logits[torch.arange(CELLS) // 3 * 3]  # three cells share a mask
        # Maskness 3/4 or 1, and scores whose products with these coincide, all of them exact.
        level = 1 - 0.25 * (torch.arange(CELLS) % 2)
        probs = (logits > 0) * level[:, None, None]
        scores = torch.tensor([0, 0.28125, 0.375, 0.5, 0.75, 1])[(5.99 * scores).long()]
        cfg = config(nms_pre=nms_pre, max_per_img=max_num)
        selection, _, cells = ours(
            probs, scores, FRAMES['same'], cfg, probabilities=True, byte_budget=100_000
        )
        expected = eager(probs, scores, cfg)
        assert torch.equal(cells[selection.index], expected[0])
        assert torch.equal(selection.labels, expected[1])
        torch.testing.assert_close(selection.scores, expected[2], rtol=1e-6, atol=0)


def test_no_more_maps_are_made_than_needed():
    logits, scores = scene(seed=2, crowded=2.0)
    for cfg, most in ((config(max_per_img=5), 0.25), (config(nms_pre=20), 0.25)):
        made = []
        selection, _, cells = ours(
            logits, scores, FRAMES['same'], cfg, made=made, byte_budget=16 * 8 * 26 * 38
        )
        assert 0 < len(selection.index) and sum(made) < most * len(cells)
    made = []  # what cannot reach the threshold is not looked at
    ours(logits, scores, FRAMES['same'], config(filter_thr=2), made=made)
    assert made == []


def test_one_pixel_and_borders(way):
    frame = FRAMES['larger']._replace(image_hw=(104, 152))
    logits = torch.full((CELLS, 26, 38), -4.0)
    for i, (y, x) in enumerate([(0, 0), (25, 37), (0, 37), (12, 20)]):
        logits[i, y, x] = 9.0
    logits[4, :, 0] = logits[5, 25] = logits[6] = 9.0
    scores = torch.zeros(CELLS, 1)
    scores[:8, 0] = torch.linspace(0.9, 0.8, 8)
    cells = torch.arange(8)
    selection = ops.select_instances(
        scores[:8, 0], torch.arange(8), lambda i: logits[cells[i]], (26, 38), filter_thr=0
    )
    assert selection.index.tolist() == list(range(7))  # the eighth is empty
    found = ops.resize_instances(selection, lambda i: logits[cells[i]], frame)
    probs = stock_probs(logits[:7].sigmoid(), frame)
    clear = (probs - 0.5).abs() > NEAR
    assert torch.equal(found.masks & clear, (probs > 0.5) & clear)
    assert found.areas.min() > 0 and found.areas[6] == 133 * 171
    # A pixel more than one of area: the single pixels go.
    few = ops.select_instances(
        scores[:8, 0], torch.arange(8), lambda i: logits[cells[i]], (26, 38), min_area=1
    )
    assert few.index.tolist() == [4, 5, 6]


@pytest.mark.parametrize('rle', [False, True])
def test_nothing_to_find(rle, way):
    frame = FRAMES['smaller']
    logits, scores = scene()
    for maps, some in ((logits, scores * 0), (logits * 0 - 1, scores)):
        selection, found, _ = ours(maps, some, frame, config(), rle=rle)
        assert len(selection.index) == len(selection.scores) == len(selection.labels) == 0
        assert len(found.masks) == 0 and found.boxes_xyxy.shape == (0, 4)
        assert rle or found.masks.shape == (0, *frame.original_hw)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype, way):
    logits, scores = scene(seed=6)
    frame, cfg = FRAMES['larger'], config()
    with torch.autocast('cpu', torch.bfloat16):
        half = ours(logits.to(dtype), scores.to(dtype), frame, cfg)
    full = ours(logits.to(dtype).float(), scores.to(dtype).float(), frame, cfg)
    # A threshold is compared in the type of the scores.
    assert torch.equal(half[2][half[0].index], full[2][full[0].index])
    assert torch.equal(half[0].scores, full[0].scores)
    assert torch.equal(half[1].masks, full[1].masks)


def test_chunks_shrink_until_they_fit(way):
    logits, scores = scene(seed=1)
    cells, labels = (scores > 0.1).nonzero().T
    calls = []

    def maps_of(index):
        calls.append(len(index))
        if len(index) > fits:
            raise torch.cuda.OutOfMemoryError('no room')
        return logits[cells[index]]

    results = []
    for most in (10**6, 5):
        fits = most
        selection = ops.select_instances(
            scores[cells, labels], labels, maps_of, (26, 38), min_area=LEAST[cells]
        )
        found = ops.resize_instances(selection, maps_of, FRAMES['larger'])
        results.append((*selection, found.masks))
    assert len(results[0][0]) > 20
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    fits = 0
    with pytest.raises(torch.cuda.OutOfMemoryError):
        ops.select_instances(scores[cells, labels], labels, maps_of, (26, 38))
    assert calls[-1] == 1
    calls.clear()
    with pytest.raises(torch.cuda.OutOfMemoryError):  # not an endless loop over nothing
        ops.select_instances(scores[cells, labels][:1], labels[:1], maps_of, (26, 38))
    assert set(calls) == {1}


def test_a_map_is_not_shrunk():
    logits, scores = scene()
    with pytest.raises(ValueError, match='not interpolated down'):
        ours(logits, scores, FRAMES['same']._replace(padded_hw=(20, 38)), config())


PEAK = """
import ctypes, gc, sys
from pathlib import Path
import torch
from mmdet_plugins.ops.instance_masks import Frame, resize_instances, select_instances

def status(key):
    lines = Path('/proc/self/status').read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])

# Nothing stops early: equal class scores, and each mask half of the map, with edges everywhere.
num, hw = int(sys.argv[1]), (100, 152)
torch.set_num_threads(1)
rng = torch.Generator().manual_seed(0)
features, kernels = torch.randn(4, hw[0] * hw[1], generator=rng), torch.randn(num, 4, generator=rng)
labels = torch.randint(80, (num,), generator=rng)
maps_of = lambda index: (kernels[index] @ features).view(-1, *hw)

def predict():
    scores = torch.full((num,), 0.5)
    selection = select_instances(scores, labels, maps_of, hw)
    assert len(selection.index) == 100
    return resize_instances(selection, maps_of, Frame(hw, (400, 608), (400, 533), (240, 320)))

predict()
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
Path('/proc/self/clear_refs').write_text('5')
before = status('VmRSS')
result = predict()
print(status('VmHWM') - before)
"""


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='reads /proc')
def test_memory_does_not_grow_with_the_candidates(repo):
    blocks = {'MALLOC_MMAP_THRESHOLD_': '65536', 'MALLOC_TRIM_THRESHOLD_': '65536'}
    environment = os.environ | blocks | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(repo)}
    few, many = (
        int(subprocess.check_output([sys.executable, '-c', PEAK, str(num)], env=environment))
        for num in (300, 3000)
    )
    assert many <= 1.2 * few, f'{few} and {many} KiB'


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('frame', FRAMES.values(), ids=FRAMES)
def test_cuda_agrees(frame):
    logits, scores = scene(seed=3)
    selection, found, cells = ours(logits, scores, frame, config())
    there, masks, _ = ours(logits.cuda(), scores.cuda(), frame, config())
    assert torch.equal(there.index.cpu(), selection.index)
    torch.testing.assert_close(there.scores.cpu(), selection.scores, rtol=1e-6, atol=0)
    probs = stock_probs(logits[cells[selection.index]].sigmoid(), frame)
    clear = (probs - 0.5).abs() > NEAR
    assert torch.equal(masks.masks.cpu() & clear, found.masks & clear)
    assert ours(logits.cuda(), scores.cuda(), frame, config(), rle=True)[1].masks == encode_masks(
        masks.masks
    )
