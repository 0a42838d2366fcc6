import cv2
import numpy as np
import pytest
import torch
from mmdet.models.dense_heads import DecoupledSOLOHead, SOLOHead, SOLOV2Head
from mmdet.structures.mask import BitmapMasks
from mmengine.structures import InstanceData
from torch.utils._python_dispatch import TorchDispatchMode

from mmdet_plugins.ops import grid_targets as module
from mmdet_plugins.ops.grid_targets import assign_cells, grid_targets

GRIDS = (10, 8, 5)
SCALES = ((1, 24), (12, 48), (32, 200))
STRIDES = (8, 16, 32)  # of SOLO's features: its masks have half of them
HW = (96, 160)
NUM_CLASSES = 4


def make_scene(
    seed: int, num: int, hw: tuple[int, int] = HW, largest: float = 90, num_classes: int = 4
) -> dict:
    """Speckled ellipses in and across the borders; one in eight is a pixel, one in eight empty."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: hw[0], : hw[1]] + 0.5
    masks = np.zeros((num, *hw), np.uint8)
    boxes = np.zeros((num, 4), np.float32)
    for i in range(num):
        centre = rng.random(2) * hw
        reach = (largest / 2) ** rng.random(2)
        near = ((y - centre[0]) / reach[0]) ** 2 + ((x - centre[1]) / reach[1]) ** 2 < 1
        masks[i] = near & (rng.random(hw) < 0.9)
        if i % 8 == 3:  # on a corner of cells as often as not
            masks[i] = 0
            masks[i, rng.integers(hw[0] // 4) * 4, rng.integers(hw[1] // 8) * 8] = 1
        elif i % 8 == 6:
            masks[i] = 0
        boxes[i] = [*(centre - reach)[::-1], *(centre + reach)[::-1]]
        boxes[i] = boxes[i].clip(0, [hw[1], hw[0], hw[1], hw[0]])
    labels = rng.integers(0, num_classes, num)
    return dict(masks=masks, boxes=torch.from_numpy(boxes), labels=torch.from_numpy(labels))


def run(*scenes: dict, solo: bool = False, **kwargs):
    strides = [s // 2 for s in STRIDES] if solo else [4] * 3
    options = dict(
        grid_sizes=GRIDS,
        scale_ranges=SCALES,
        mask_strides=strides,
        mask_hw=[(HW[0] // s, HW[1] // s) for s in strides],
        num_classes=NUM_CLASSES,
    )
    return grid_targets(
        [s['masks'] for s in scenes],
        [s['boxes'] for s in scenes],
        [s['labels'] for s in scenes],
        **{**options, **kwargs},
    )


def stock(kind: type, scene: dict, num_classes: int = NUM_CLASSES) -> tuple:
    """The targets of one of mmdet's heads."""
    extra = {}
    if kind is SOLOV2Head:
        extra['mask_feature_head'] = dict(
            feat_channels=32, start_level=0, end_level=2, out_channels=32, mask_stride=4
        )
    head = kind(
        num_classes,
        in_channels=32,
        feat_channels=32,
        stacked_convs=1,
        strides=STRIDES,
        scale_ranges=SCALES,
        num_grids=list(GRIDS),
        **extra,
    )
    height, width = scene['masks'].shape[1:]
    sizes = [(height * 2 // s, width * 2 // s) for s in STRIDES]
    instances = InstanceData(
        bboxes=scene['boxes'],
        labels=scene['labels'],
        masks=BitmapMasks(scene['masks'], height, width),
    )
    size = (height // 4, width // 4) if kind is SOLOV2Head else sizes
    return head._get_targets_single(instances, featmap_sizes=size)


SCENES = [
    make_scene(0, 12),
    make_scene(1, 150),  # crowded: most cells are contested
    make_scene(2, 40, largest=300),
    make_scene(3, 1),
    make_scene(4, 0),
    make_scene(5, 1000, largest=20),
]
IDS = ['random', 'crowded', 'large', 'one', 'none', 'thousand']
STARTS = np.cumsum([0, *(size**2 for size in GRIDS)])


def flat(levels) -> torch.Tensor:
    return torch.cat([level.flatten() for level in levels])


@pytest.mark.parametrize('scene', SCENES, ids=IDS)
def test_equal_to_stock_solov2(scene):
    masks, labels, flags, indices = stock(SOLOV2Head, scene)
    mine = run(scene)
    assert torch.equal(mine.labels[0], flat(labels))
    assert torch.equal(mine.owner[0] >= 0, flat(flags))
    assert mine.num_positives == flat(flags).sum()
    positives, counts = mine.by_image()
    assert counts == [sum(map(len, indices))]
    for level, start in enumerate(STARTS[:-1]):
        here = (positives.cell_idx >= start) & (positives.cell_idx < STARTS[level + 1])
        assert (positives.cell_idx[here] - start).tolist() == indices[level]
        targets = mine.masks[level][positives.object_idx[here]]
        assert torch.equal(targets, masks[level].bool())


@pytest.mark.parametrize('kind', [SOLOHead, DecoupledSOLOHead])
@pytest.mark.parametrize('scene', SCENES, ids=IDS)
def test_equal_to_stock_solo(kind, scene):
    masks, labels, flags = stock(kind, scene)
    mine = run(scene, solo=True)
    assert torch.equal(mine.labels[0], flat(labels))
    positives, counts = mine.by_level()
    assert counts == [len(target) for target in masks]
    parts = zip(*(column.split(counts) for column in positives), strict=True)
    for level, (image_idx, cell_idx, object_idx) in enumerate(parts):
        cells = cell_idx - STARTS[level]
        if kind is DecoupledSOLOHead:
            size = GRIDS[level]
            assert torch.equal(torch.stack([cells // size, cells % size], 1), flags[level])
        else:
            assert torch.equal(cells, flags[level].nonzero()[:, 0])
        assert (image_idx == 0).all()
        assert torch.equal(mine.masks[level][object_idx], masks[level].bool())


def test_one_class():
    scene = make_scene(7, 30, num_classes=1)
    labels = stock(SOLOV2Head, scene, num_classes=1)[1]
    assert torch.equal(run(scene, num_classes=1).labels[0], flat(labels))


def test_cells_of_a_centre_region():
    # A grid of 4 on 80 x 40 pixels has cells of 20 x 10. The centre (50, 15) is in column 2, row 1;
    # a region of 0.2 * (60, 40) reaches from 44 to 56 and from 11 to 19: that cell alone. Of a box
    # of 120 x 60 it reaches from 38 to 62 and from 9 to 21: columns 1 to 3, rows 0 to 2.
    centres = torch.tensor([[50.0, 15.0], [50.0, 15.0], [torch.nan, torch.nan]])
    boxes = torch.tensor([[20.0, 0, 80, 40], [0, 0, 120, 60], [0, 0, 10, 10]])
    options = dict(grid_sizes=(2, 4), scale_ranges=((1, 5), (1, 100)))
    cells = assign_cells(centres, boxes, (40, 80), **options)
    offset = 4  # of the second level
    assert (cells[:, 0] == -1).all()  # out of its range
    assert (cells[0, 1].sub(offset)).tolist() == [-5] * 4 + [6] + [-5] * 4
    assert (cells[1, 1] - offset).tolist() == [1, 2, 3, 5, 6, 7, 9, 10, 11]
    assert (cells[2] == -1).all()
    # No further than one cell from the centre's, and not over the edge.
    cells = assign_cells(
        torch.tensor([[5.0, 15.0]]), torch.tensor([[0.0, 0, 900, 9]]), (40, 80), **options
    )
    assert (cells[0, 1] - offset).tolist() == [-5] * 4 + [4, 5] + [-5] * 3
    # One size for each object.
    sizes = torch.tensor([[40, 80], [80, 160], [40, 80]])
    cells = assign_cells(centres, boxes, sizes, **options)
    assert (cells[0, 1] - offset).max() == 6
    assert (cells[1, 1] - offset).max() == 5  # 50 / 160 is in column 1, 21 / 80 in row 1


@pytest.mark.parametrize(
    'device',
    [
        'cpu',
        pytest.param(
            'cuda',
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device'),
            ],
        ),
    ],
)
def test_centres_on_borders_of_cells_round_as_mmdets(device):
    x = torch.arange(0, 960, 0.5, device=device)
    centres = torch.stack([x, torch.zeros_like(x)], dim=1)
    boxes = torch.tensor([[0.0, 0, 1, 1]], device=device).expand(len(x), 4)
    grids = (40, 36, 24, 16, 12)
    cells = assign_cells(
        centres, boxes, (800, 960), grid_sizes=grids, scale_ranges=[(1, 1)] * 5, centre_ratio=0
    )
    start = 0
    for level, size in enumerate(grids):
        expected = torch.div(x / 960, 1.0 / size, rounding_mode='trunc').long()
        assert torch.equal(cells[:, level, 4] - start, expected)
        start += size**2


@pytest.mark.parametrize('stride', [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize('density', [0.1, 0.5, 0.9])
def test_masks_are_opencvs(stride, density):
    rng = np.random.default_rng(stride)
    masks = (rng.random((5, 96, 160)) < density).astype(np.uint8)
    masks[0] = 1
    size = (96 // stride, 160 // stride)
    expected = [cv2.resize(m, size[::-1], interpolation=cv2.INTER_LINEAR) for m in masks]
    scene = dict(masks=masks, boxes=torch.zeros(5, 4), labels=torch.zeros(5).long())
    mine = run(scene, mask_strides=[stride] * 3, mask_hw=[size] * 3).masks[0]
    assert np.array_equal(mine.numpy(), np.stack(expected))


@pytest.mark.parametrize('hw', [(96, 160), (96, 155), (91, 160), (90, 141)])
def test_masks_need_no_padding(hw):
    scene = make_scene(8, 30, hw)
    padded = np.pad(scene['masks'], ((0, 0), (0, HW[0] - hw[0]), (0, HW[1] - hw[1])))
    expected = run({**scene, 'masks': padded}, solo=True)
    for masks in (
        scene['masks'],
        torch.from_numpy(scene['masks']).bool(),
        torch.from_numpy(padded)[:, : hw[0], : hw[1]],  # not contiguous
        torch.from_numpy(np.pad(scene['masks'], ((1, 0), (0, 0), (0, 0))))[1:],
    ):
        mine = run({**scene, 'masks': masks}, solo=True)
        assert torch.equal(mine.cells, expected.cells)
        assert torch.equal(mine.labels, expected.labels)
        for a, b in zip(mine.masks, expected.masks, strict=True):
            assert torch.equal(a, b)


def test_masks_larger_than_the_canvas_are_cut():
    scene = make_scene(9, 10, (104, 168))
    mine = run(scene)
    expected = run({**scene, 'masks': scene['masks'][:, : HW[0], : HW[1]]})
    assert torch.equal(mine.masks[0], expected.masks[0])


@pytest.mark.parametrize('hw', [(2056, 2184), (257, 4099)])
def test_sums_do_not_overflow(hw):
    rng = np.random.default_rng(0)
    masks = np.ones((2, *hw), np.uint8)
    masks[1] = rng.random(hw) < 0.7
    words = torch.cat(list(module._words(torch.from_numpy(masks), 8)))
    y, x = np.mgrid[: hw[0], : hw[1]]
    expected = [[m.sum(), (m * x).sum(), (m * y).sum()] for m in masks.astype(np.int64)]
    assert module._moments(words).tolist() == expected


def test_a_batch_is_its_images():
    scenes = [SCENES[4], SCENES[1], SCENES[4], SCENES[0], SCENES[2]]
    batch = run(*scenes, solo=True)
    singles = [run(scene, solo=True) for scene in scenes]
    assert torch.equal(batch.labels, torch.cat([s.labels for s in singles]))
    assert torch.equal(batch.cells, torch.cat([s.cells for s in singles]))
    for level in range(3):
        masks = torch.cat([s.masks[level] for s in singles])
        assert torch.equal(batch.masks[level], masks)
    positives, counts = batch.by_image()
    parts = [s.by_image() for s in singles]
    assert counts == [part[1][0] for part in parts]
    first = np.cumsum([0, *batch.num_objects])
    for i, (column, (single, _)) in enumerate(
        zip(zip(*(c.split(counts) for c in positives), strict=True), parts, strict=True)
    ):
        assert torch.equal(column[0], torch.full_like(column[0], i))
        assert torch.equal(column[1], single.cell_idx)
        assert torch.equal(column[2], single.object_idx + first[i])
    positives, counts = batch.by_level()
    assert counts == np.sum([s.by_level()[1] for s in singles], 0).tolist()
    assert torch.equal(batch.owner[positives.image_idx, positives.cell_idx], positives.object_idx)
    order = positives.image_idx * batch.labels.shape[1] + positives.cell_idx
    assert all((level.diff() > 0).all() for level in order.split(counts))


def test_a_batch_without_objects():
    batch = run(SCENES[4], SCENES[4])
    assert (batch.labels == NUM_CLASSES).all() and (batch.owner == -1).all()
    assert batch.masks[0].shape == (0, 24, 40)
    assert batch.by_image()[1] == [0, 0]
    assert batch.by_level()[1] == [0, 0, 0]
    assert batch.num_positives == 0


def test_levels_of_one_stride_share_masks():
    masks = run(SCENES[0]).masks
    assert masks[0] is masks[1] is masks[2]


_READS = ('_local_scalar_dense', 'nonzero', 'masked_select', 'unique', 'equal', 'is_nonzero')


class _Reads(TorchDispatchMode):
    """Operations that wait for a device, by name or because they index with bools."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._overloadpacket.__name__
        bools = name.startswith('index') and any(
            i is not None and i.dtype in (torch.bool, torch.uint8)
            for i in (args[1] if isinstance(args[1], (list, tuple)) else ())
        )
        if bools or any(name.startswith(read) for read in _READS):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_no_value_is_read():
    scene = {**SCENES[1], 'masks': torch.from_numpy(SCENES[1]['masks'])}
    with _Reads() as reads:
        run(scene, scene, solo=True)
    assert not reads.found
    with _Reads() as reads:
        run(scene).labels.max().item()
    assert reads.found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('kind', [SOLOHead, SOLOV2Head])
def test_equal_to_stock_on_cuda_without_a_sync(kind):
    scene = {k: torch.as_tensor(v).cuda() for k, v in make_scene(1, 150).items()}
    solo = kind is SOLOHead
    run(scene, solo=solo)
    torch.cuda.set_sync_debug_mode('error')
    try:
        mine = run(scene, solo=solo)
    finally:
        torch.cuda.set_sync_debug_mode('default')
    labels = stock(kind, {**scene, 'masks': scene['masks'].cpu().numpy()})[1]
    assert torch.equal(mine.labels[0], flat(labels))
    expected = run(make_scene(1, 150), solo=solo)
    for a, b in zip(mine.masks, expected.masks, strict=True):
        assert torch.equal(a.cpu(), b)


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(mask_strides=[3, 3, 3]), 'even, got 3'),
        (dict(grid_sizes=(4, 4)), 'one entry for each level'),
        (dict(mask_strides=[4], mask_hw=[(24, 40)]), 'one entry for each level'),
    ],
)
def test_bad_levels_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        run(SCENES[0], **change)


def test_bad_images_are_refused():
    scene = SCENES[0]
    for change, message in (
        (dict(masks=scene['masks'][:3]), r'boxes \[G, 4\]'),
        (dict(masks=scene['masks'].astype(np.float32)), 'bool or uint8, got float32'),
        (dict(labels=scene['labels'][:, None]), r'labels \[G\]'),
    ):
        with pytest.raises(ValueError, match=message):
            run({**scene, **change})
    with pytest.raises(ValueError, match='got 0, 0 and 0'):
        run()
