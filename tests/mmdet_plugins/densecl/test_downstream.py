"""Exported weights in the models of the downstream configs."""

from pathlib import Path

import cv2
import mmseg
import numpy as np
import pytest
import torch
from mmdet.models.roi_heads.shared_heads import ResLayer
from mmdet.registry import DATASETS, MODELS
from mmengine.config import Config
from mmengine.registry import DefaultScope, init_default_scope

from mmdet_plugins.densecl import DenseCLResLayer

FOLDER = Path(__file__).parents[3] / 'configs' / 'densecl' / 'downstream'
LEAVES = sorted(path.stem for path in FOLDER.glob('*.py'))
PATH = 'work_dirs/densecl_r50.pth'
MMSEG = Path(mmseg.__file__).parent / '.mim' / 'configs' / 'fcn'


def read(name: str) -> Config:
    return Config.fromfile(FOLDER / f'{name}.py')


@pytest.fixture(scope='module')
def exported(load_script, tmp_path_factory):
    """A released checkpoint's query encoder of random numbers, through the converter."""
    from torchvision.models import resnet50

    folder = tmp_path_factory.mktemp('weights')
    generator = torch.Generator().manual_seed(0)
    state = {
        f'encoder_q.0.{name}': torch.randint(1, 99, value.shape, generator=generator).to(
            value.dtype
        )
        for name, value in resnet50().state_dict().items()
        if not name.startswith('fc.')
    }
    torch.save(dict(state_dict=state), folder / 'released.pth')
    tool = load_script('tools/convert/densecl_checkpoint.py')
    files = [str(folder / name) for name in ('released.pth', 'backbone.pth')]
    assert tool.main([*files, '--to', 'backbone']) == 0
    return files[1]


@pytest.fixture(scope='module')
def seen() -> set[str]:
    return set()


@pytest.mark.parametrize('name', LEAVES)
def test_exported_weights_load_fully(name, exported, seen):
    cfg = read(name)
    text = str(cfg.model)
    assert text.count(PATH) == text.count("'type': 'Pretrained'") > 0
    backbone = f'{cfg.model.type} {cfg.model.backbone}'
    if backbone in seen:  # another schedule or data set
        return
    seen.add(backbone)
    cfg = Config.fromstring(cfg.pretty_text.replace(PATH, exported), '.py')
    init_default_scope(cfg.default_scope)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
        model.init_weights()
    found = model.backbone.state_dict()
    if 'shared_head' in cfg.model.get('roi_head', {}):
        stage = model.roi_head.shared_head.state_dict()
        found |= {key: value for key, value in stage.items() if key.startswith('layer4.')}
    wanted = torch.load(exported)['state_dict']
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(found[key], value), key


def test_the_last_stage_is_mmdets_with_a_norm_behind_it():
    options = dict(depth=50, style='pytorch', norm_cfg=dict(type='BN'), norm_eval=False)
    ours, theirs = DenseCLResLayer(**options), ResLayer(**options)
    ours.eval(), theirs.eval()  # mmdet's returns None
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not unexpected and all(key.startswith('norm.') for key in missing)
    with torch.no_grad():
        ours.norm.running_mean += 2
        ours.norm.weight *= 3
        x = torch.randn(2, 1024, 6, 4)
        torch.testing.assert_close(ours(x), 3 * (theirs(x) - 2) / (1 + ours.norm.eps) ** 0.5)


@pytest.mark.parametrize(
    ('ours', 'theirs', 'data'),
    [
        ('densecl_fcn_r50-d8_4xb4-20k_voc12aug-512', 'fcn_r50-d8_4xb4-20k_voc12aug-512x512', 4),
        ('densecl_fcn_r50-d8_4xb4-40k_cityscapes-769', 'fcn_r50-d8_4xb2-40k_cityscapes-769x769', 2),
    ],
)
def test_segmenters_are_mmsegs(ours, theirs, data):
    """But for stem, weights and batch, and for what we do better than the stock runner."""
    ours, theirs = read(ours), Config.fromfile(MMSEG / f'{theirs}.py')
    assert theirs.train_dataloader.batch_size == data
    theirs.merge_from_dict(
        {
            'model.backbone.type': 'ResNet',
            'model.backbone.init_cfg': dict(type='Pretrained', checkpoint=PATH),
            'train_dataloader.batch_size': 4,
            'train_dataloader.num_workers': 4,
            'train_cfg.type': 'ResumableIterBasedTrainLoop',
            'default_hooks.checkpoint.type': 'AtomicCheckpointHook',
            'default_hooks.checkpoint.max_keep_ckpts': 2,
        }
    )
    del theirs.model['pretrained'], theirs.optim_wrapper['clip_grad']
    for key in (
        'model',
        'train_dataloader',
        'val_dataloader',
        'test_dataloader',
        'val_evaluator',
        'optim_wrapper',
        'param_scheduler',
        'train_cfg',
        'default_hooks',
    ):
        assert ours[key] == theirs[key], key


def test_voc_is_read(tmp_path):
    """Both years, with objects that are difficult left to be ignored."""
    rng = np.random.default_rng(0)
    for year in ('VOC2007', 'VOC2012'):
        for part in ('JPEGImages', 'Annotations', 'ImageSets/Main'):
            (tmp_path / year / part).mkdir(parents=True)
        cv2.imwrite(
            str(tmp_path / year / 'JPEGImages/1.jpg'), rng.integers(0, 255, (60, 90, 3), np.uint8)
        )
        (tmp_path / year / 'ImageSets/Main/trainval.txt').write_text('1\n')
        objects = ''.join(
            f'<object><name>cow</name><difficult>{flag}</difficult><bndbox><xmin>1</xmin>'
            '<ymin>2</ymin><xmax>50</xmax><ymax>40</ymax></bndbox></object>'
            for flag in (0, 1)
        )
        (tmp_path / year / 'Annotations/1.xml').write_text(
            f'<annotation><size><width>90</width><height>60</height></size>{objects}</annotation>'
        )
    cfg = read('densecl-faster-rcnn_r50_c4_8xb2-24k_voc0712').train_dataloader.dataset
    for part in cfg.datasets:
        part.data_root = f'{tmp_path}/'
    init_default_scope('mmdet')
    dataset = DATASETS.build(cfg)
    assert len(dataset) == 2 and dataset.metainfo['classes'][9] == 'cow'
    sample = dataset[1]['data_samples']
    assert len(sample.gt_instances) == len(sample.ignored_instances) == 1
    assert min(sample.img_shape) in range(480, 801, 32)
