"""The advisor on grids: what it counts, what it proposes, and what it says."""

import argparse
import json
import shlex

import numpy as np
import pytest
import torch
from mmengine.config import Config, DictAction

from mmdet_plugins.ops.grid_advice import GridSetting, fit, propose, read_objects
from mmdet_plugins.ops.grid_targets import grid_targets
from mmdet_plugins.ops.rle import encode_masks


@pytest.fixture
def advisor(load_script):
    return load_script('tools/solo_advisor.py')


def coco(objects_of, size_hw=(320, 640)):
    """Annotations by image of ``(x, y, w, h)`` boxes whose masks fill them."""
    images, annotations = [], []
    for image_id, boxes in enumerate(objects_of, start=1):
        images.append(dict(id=image_id, file_name='a.jpg', height=size_hw[0], width=size_hw[1]))
        for x, y, w, h in boxes:
            annotations.append(
                dict(id=len(annotations) + 1, image_id=image_id, category_id=1, bbox=[x, y, w, h],
                     area=w * h, segmentation=[[x, y, x + w, y, x + w, y + h, x, y + h]])
            )  # fmt: skip
    return dict(images=images, annotations=annotations, categories=[dict(id=1, name='a')])


SETTING = GridSetting((640, 320), (10, 4), ((1, 64), (48, 2048)))  # cells of 64x32 and 160x80 px


def test_fit_by_hand():
    objects = read_objects(
        coco(
            [
                # small ones in one cell of level 0: the later one gets it, the other is lost
                [(10, 10, 20, 8), (20, 12, 20, 8), (400, 200, 20, 20)],
                # the same place on another image
                [(10, 10, 20, 8)],
                # one of 60 px on both levels, one of 100 px in the same cell of level 1 only
                [(20, 10, 60, 60), (25, 0, 100, 100)],
            ]
        )
    )
    (first, second), overall = fit(objects, SETTING)
    assert first.wanted.tolist() == [1, 1, 1, 1, 1, 0]
    assert first.contested.tolist() == [1, 1, 0, 0, 0, 0]
    assert first.lost.tolist() == [1, 0, 0, 0, 0, 0]
    assert second.wanted.tolist() == [0, 0, 0, 0, 1, 1]
    assert second.contested.tolist() == [0, 0, 0, 0, 1, 1]
    assert second.lost.tolist() == [0, 0, 0, 0, 1, 0]
    assert overall.wanted.all()
    assert overall.contested.tolist() == [1, 1, 0, 0, 0, 1]  # the one of 60 px is alone on level 0
    assert overall.lost.tolist() == [1, 0, 0, 0, 0, 0]
    assert overall.shares() == (1, 0.5, 1 / 6)


def test_an_object_outside_all_ranges_is_not_wanted():
    setting = GridSetting((640, 320), (10, 4), ((16, 64), (48, 128)))
    objects = read_objects(coco([[(10, 10, 9, 9), (100, 100, 20, 20), (0, 0, 300, 300)]]))
    _, overall = fit(objects, setting)
    assert overall.wanted.tolist() == [False, True, False]
    assert overall.shares() == (pytest.approx(1 / 3), 0, 0)


def test_fit_equals_the_targets_of_training():
    rng = np.random.default_rng(0)
    masks = np.zeros((40, 320, 640), bool)
    for mask in masks:
        y, x, h, w = rng.integers((0, 0, 6, 6), (240, 520, 80, 120))
        mask[y : y + h, x : x + w] = True
        mask[y : y + h // 2, x : x + w // 2] = rng.random() < 0.5  # off-centre mass
    boxes = [np.argwhere(mask) for mask in masks]
    boxes = [(*b.min(0)[::-1].tolist(), *(b.max(0) + 1)[::-1].tolist()) for b in boxes]
    data = coco([[(x1, y1, x2 - x1, y2 - y1) for x1, y1, x2, y2 in boxes]])
    for annotation, rle in zip(data['annotations'], encode_masks(masks), strict=True):
        annotation['segmentation'] = rle
    setting = GridSetting((640, 320), (12, 8, 4), ((1, 60), (30, 90), (60, 2048)))
    levels, overall = fit(read_objects(data), setting)

    targets = grid_targets(
        [masks], [torch.tensor(boxes, dtype=torch.float32)], [torch.arange(40)],
        grid_sizes=setting.num_grids, scale_ranges=setting.scale_ranges,
        mask_strides=(4, 4, 4), mask_hw=[(80, 160)] * 3, num_classes=40,
    )  # fmt: skip
    cells = torch.arange(12**2 + 8**2 + 4**2).split([12**2, 8**2, 4**2])
    for level, places in zip(levels, cells, strict=True):
        owners = set(targets.owner[0, places].tolist())
        claims = [
            set(c[(c >= places[0]) & (c <= places[-1])].tolist()) for c in targets.cells.flatten(1)
        ]
        expected = [
            (bool(mine), any(mine & other for j, other in enumerate(claims) if j != i),
             bool(mine) and i not in owners)
            for i, mine in enumerate(claims)
        ]  # fmt: skip
        assert expected == list(zip(level.wanted, level.contested, level.lost, strict=True))
    owners = set(targets.owner.flatten().tolist())
    assert overall.lost.tolist() == [i not in owners for i in range(40)]
    assert 0 < overall.lost.sum() < overall.contested.sum() < 40


def test_images_are_resized_as_the_pipeline_does():
    objects = read_objects(coco([[(10, 20, 30, 40)]], size_hw=(100, 150)))
    assert objects.scale((1333, 800)).tolist() == [8]
    assert objects.scale((300, 800)).tolist() == [300 / 100]  # (longer, shorter) in any order
    assert objects.scale((300, 290)).tolist() == [2]
    assert objects.sides((300, 290)) == pytest.approx([2 * 1200**0.5])
    assert objects.centres_xy == pytest.approx(np.array([[24.5, 39.5]]))


def crowded(spacing_px, size_px, count=2):
    """Images of equal squares in rows and columns."""
    return coco(
        [
            [
                (x, y, size_px, size_px)
                for x in range(2, 600 - size_px, spacing_px)
                for y in range(2, 300 - size_px, spacing_px)
            ]
        ]
        * count
    )


def test_the_proposal_keeps_its_promises():
    objects = read_objects(crowded(spacing_px=24, size_px=20))
    default, proposal = GridSetting((640, 320)), propose(objects)
    assert fit(objects, default)[1].shares()[2] == 0  # stock grids serve here, at a higher price
    levels, overall = fit(objects, proposal)
    assert overall.shares()[0] == 1 and overall.shares()[2] <= 0.01
    assert all(level.shares()[2] <= 0.01 for level in levels)
    assert sum(s**2 for s in proposal.num_grids) < sum(s**2 for s in default.num_grids)
    assert np.quantile(objects.sides(proposal.input_size), 0.05) >= 16
    lows, highs = zip(*proposal.scale_ranges, strict=True)
    assert lows[2:] == highs[:-2]
    assert lows[0] == 1 and highs[-1] >= 2048
    assert list(lows) == sorted(lows) and list(highs) == sorted(highs)


def test_denser_objects_get_finer_grids():
    loose = propose(read_objects(crowded(spacing_px=80, size_px=40)))
    dense = propose(read_objects(crowded(spacing_px=10, size_px=40)))
    assert max(dense.num_grids) > max(loose.num_grids)
    smaller = propose(read_objects(crowded(spacing_px=80, size_px=12)))
    assert smaller.input_size > loose.input_size


@pytest.mark.parametrize('count', [1, 2])
def test_few_objects_are_enough(count):
    objects = read_objects(coco([[(10, 10, 3, 200)] * count]))
    proposal = propose(objects)
    assert all(low < high for low, high in proposal.scale_ranges)
    _, overall = fit(objects, proposal)
    assert overall.wanted.all() and overall.lost.sum() == count - 1  # two in one place: hopeless


def test_what_it_prints(advisor, tmp_path, capsys, repo):
    data = crowded(spacing_px=24, size_px=20, count=3)
    data['annotations'][0]['bbox'][2] = 0
    data['annotations'][1]['segmentation'] = [[1, 2]]
    data['annotations'][2]['iscrowd'] = 1
    file = tmp_path / 'instances.json'
    file.write_text(json.dumps(data))
    assert advisor.main([str(file)]) == 0
    said = capsys.readouterr().out
    assert f'{len(data["annotations"]) - 3} objects on 3 images' in said
    assert '2 annotations without a usable box or mask' in said
    assert 'P6' in said and 'input 1333x800' in said

    # the last lines go to a launcher as they are
    words = shlex.split(said[said.index('--cfg-options') :].replace('\\\n', ' '))
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    options = parser.parse_args(words).cfg_options
    cfg = Config.fromfile(repo / 'configs/solov2/solov2_r50_fpn_8xb2-3x_coco.py')
    cfg.merge_from_dict(options)
    proposal = propose(read_objects(data))
    head, long = cfg.model.mask_head, proposal.input_size[0]
    assert tuple(head.num_grids) == proposal.num_grids
    assert tuple(map(tuple, head.scale_ranges)) == proposal.scale_ranges
    (resize,) = (t for t in cfg.train_dataloader.dataset.pipeline if t.type == 'RandomChoiceResize')
    assert len(resize.scales) == 6 and resize.scales[-1] == proposal.input_size
    assert {scale[0] for scale in resize.scales} == {long}
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        (resize,) = (t for t in loader.dataset.pipeline if t.type == 'Resize')
        assert resize.scale == proposal.input_size


def test_a_sample_of_images(advisor, tmp_path, capsys):
    file = tmp_path / 'instances.json'
    file.write_text(json.dumps(crowded(spacing_px=100, size_px=40, count=9)))
    assert advisor.main([str(file), '--max-images', '4']) == 0
    assert 'on 4 images' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        (lambda d: d.update(annotations=[]), 'no object to measure among 0 annotations'),
        (lambda d: d['images'][0].pop('height'), 'lacks height'),
        (lambda d: d['annotations'][0].pop('bbox'), 'lacks bbox'),
        (lambda d: d.pop('images'), 'it has no list "images"'),
    ],
)
def test_bad_files_end_in_one_sentence(advisor, tmp_path, capsys, change, words):
    data = coco([[(10, 10, 20, 20)]])
    change(data)
    file = tmp_path / 'instances.json'
    file.write_text(json.dumps(data))
    with pytest.raises(SystemExit):
        advisor.main([str(file)])
    last = capsys.readouterr().err.splitlines()[-1]
    assert words in last and last.count(str(file)) == 1


def test_bad_arguments_end_in_one_sentence(advisor, tmp_path, capsys):
    with pytest.raises(SystemExit):
        advisor.main([str(tmp_path / 'none.json')])
    assert 'none.json: there is no such file.' in capsys.readouterr().err
    for arguments, words in (
        (['a', '--max-lost', '100'], '--max-lost is a percentage'),
        (['a', '--max-images', '0'], '--max-images must be at least 1'),
    ):
        with pytest.raises(SystemExit):
            advisor.main(arguments)
        assert words in capsys.readouterr().err
