"""Linear SVMs on frozen features, on a made-up VOC folder."""

import sys

import cv2
import numpy as np
import pytest
import torch

COLOURS = dict(red=(0, 0, 255), green=(0, 255, 0), blue=(255, 0, 0))  # BGR


@pytest.fixture
def tool(load_script):
    return load_script('projects/densecl/linear_svm.py')


@pytest.fixture
def voc(tmp_path):
    """Images with a square of one or two colours on grey; what they have are their classes."""
    folder = tmp_path / 'VOC2007'
    for part in ('JPEGImages', 'ImageSets/Main'):
        (folder / part).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, count in dict(trainval=36, test=18).items():
        has = {name: [] for name in COLOURS}
        for i in range(count):
            image = rng.integers(100, 140, (80, 120, 3)).astype(np.uint8)
            shown = rng.choice(list(COLOURS), 1 + i % 2, replace=False)
            for at, name in zip(rng.permutation(2), shown, strict=False):
                image[10:70, 5 + 60 * at : 55 + 60 * at] = COLOURS[name]
            cv2.imwrite(str(folder / f'JPEGImages/{split}{i}.jpg'), image)
            for name in COLOURS:
                has[name].append(f'{split}{i} {1 if name in shown else -1:2d}')
        for name, lines in has.items():
            (folder / f'ImageSets/Main/{name}_{split}.txt').write_text('\n'.join(lines))
    return folder


@pytest.fixture
def config(repo, tmp_path):
    path = tmp_path / 'config.py'
    path.write_text(
        f"_base_ = '{repo}/configs/densecl/tiny/densecl_tiny_demo.py'\n"
        'model = dict(backbone=dict(base_channels=16, stem_channels=16))\n'
    )
    return path


@pytest.fixture
def checkpoint(config, tmp_path):
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    from mmengine.config import Config

    register_all_modules(init_default_scope=True)
    torch.manual_seed(0)
    backbone = MODELS.build(Config.fromfile(config).model.backbone)
    backbone.init_weights()
    state = {f'backbone.{name}': value for name, value in backbone.state_dict().items()}
    torch.save(dict(state_dict=state | {'head.weight': torch.ones(1)}), tmp_path / 'model.pth')
    torch.save(backbone.state_dict(), tmp_path / 'backbone.pth')
    return tmp_path / 'model.pth'


def test_separable_classes_are_separated(tool, voc, config, checkpoint, capsys):
    found = [
        tool.main([str(config), str(path), '--voc', str(voc), '--device', 'cpu', '--jobs', '1'])
        for path in (checkpoint, checkpoint.with_name('backbone.pth'))
    ]
    assert found == [1.0, 1.0]
    assert 'red: AP 1.000, of 11 points 1.000' in capsys.readouterr().out


def test_average_precision_by_hand(tool):
    """Hits at the first and third place: precision 1 to a recall of 0.5, then 2/3."""
    scores, positive = np.array([0.1, 0.9, 0.5, 0.3]), np.array([False, True, False, True])
    area, points = tool.average_precision(positive, scores)
    assert area == pytest.approx((1 + 2 / 3) / 2)
    assert points == pytest.approx((6 + 5 * 2 / 3) / 11)
    assert tool.average_precision(np.zeros(3, bool), np.arange(3)) == (0, 0)


def test_features_are_averaged_over_four_windows(tool):
    feat = torch.arange(9.0).view(1, 1, 3, 3)
    means = torch.tensor([[2.0, 3.0, 5.0, 6.0]])
    torch.testing.assert_close(tool.pooled(feat), means / means.norm())


def test_difficult_images_have_the_label_0(tool, voc):
    file = voc / 'ImageSets/Main/red_test.txt'
    lines = file.read_text().splitlines()
    file.write_text('\n'.join([lines[0].split()[0] + '  0', *lines[1:]]))
    names, labels = tool.read_labels(voc, 'test')
    assert names[0] == 'test0' and labels['red'][0] == 0 and set(labels) == set(COLOURS)


def test_errors_are_sentences(tool, voc, config, checkpoint, repo, monkeypatch):
    with pytest.raises(SystemExit, match='has no file CLASS_train.txt'):
        tool.read_labels(voc, 'train')
    other = repo / 'configs/densecl/tiny/densecl_tiny_demo.py'
    monkeypatch.setitem(sys.modules, 'sklearn', None)
    arguments = [str(other), str(checkpoint), '--voc', str(voc), '--device', 'cpu']
    with pytest.raises(SystemExit, match='need scikit-learn: pip install'):
        tool.main(arguments)
    monkeypatch.setitem(sys.modules, 'sklearn', sys)
    with pytest.raises(SystemExit, match='of the backbone, and not conv1.weight'):
        tool.main(arguments)
