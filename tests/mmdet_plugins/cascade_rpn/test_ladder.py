"""Table 1 as configs: a row differs from the one above it in what it is named after alone."""

from functools import cache
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.utils import get_installed_path

CONFIGS = Path(__file__).resolve().parents[3] / 'configs' / 'uvo'

FPN = {'model.neck.type', 'model.neck.upsample_cfg'}
LADDER = [
    ('cascade-rpn_r50_fpn_8xb2-1x_coco', None),
    # SimOTA in place of two assigners, and the IoU branch
    ('cascade-rpn-simota_r50_fpn_8xb2-1x_coco', {'model.rpn_head.loss_iou', 'model.train_cfg.rpn'}),
    ('cascade-rpn-decoupled_r50_fpn_8xb2-1x_coco', {'model.rpn_head.num_tower_convs'}),
    ('cascade-rpn-two-samplers_r50_fpn_8xb2-1x_coco', {'model.train_cfg.rpn.reg_assigner'}),
    ('cascade-rpn-carafe_r50_fpn_8xb2-1x_coco', FPN),
    ('cascade-rpn-dcn_r50_fpn_8xb2-1x_coco', {'model.rpn_head.dcn_tower'}),
]
REFERENCE = LADDER[-1][0]
SCHEDULE = {'max_epochs', 'train_cfg', 'param_scheduler', 'optim_wrapper'}


@cache
def load(name: str) -> dict:
    config = Config.fromfile(CONFIGS / f'{name}.py', import_custom_modules=False)
    return config.to_dict()


def differences(left, right, path: str = '') -> set[str]:
    """Where two configs differ, as deep as both are dicts; not which package a base came from."""
    if isinstance(left, dict) and isinstance(right, dict):
        return {
            found
            for key in (left.keys() | right.keys()) - {'_scope_'}
            for found in differences(left.get(key), right.get(key), f'{path}.{key}'.lstrip('.'))
        }
    return set() if left == right else {path}


@pytest.mark.parametrize('row', range(1, len(LADDER)))
def test_each_row_adds_one_thing(row):
    (above, _), (name, added) = LADDER[row - 1 : row + 1]
    assert differences(load(above), load(name)) == added


def test_row_0_is_mmdets_rpn():
    ours, reference = load('rpn_r50_fpn_8xb2-1x_coco'), load(REFERENCE)
    folder = Path(get_installed_path('mmdet')) / '.mim' / 'configs'
    stock = Config.fromfile(folder / 'rpn' / 'rpn_r50_fpn_1x_coco.py').to_dict()
    assert differences(ours['model'], stock['model']) == set()
    assert differences(ours['optim_wrapper'], stock['optim_wrapper']) == set()
    found = differences(ours, reference)
    assert {path.split('.')[0] for path in found} == {
        'model',
        'custom_imports',
        'tta_model',
        'tta_pipeline',
        'optim_wrapper',
    }
    assert not [path for path in found if path.startswith(('model.backbone', 'model.data'))]


def test_row_1_is_mmdets_cascade_rpn_with_focal_and_giou_loss():
    config = load('cascade-rpn_r50_fpn_8xb2-1x_coco')
    head, (first, second) = config['model']['rpn_head'], config['model']['train_cfg']['rpn']
    assert head['loss_iou'] is None
    assert head['num_tower_convs'] == 0
    assert [head[f'loss_{name}']['type'] for name in ('cls', 'bbox')] == ['FocalLoss', 'GIoULoss']
    assert first == dict(assigner=dict(type='RegionAssigner', center_ratio=0.2, ignore_ratio=0.5))
    assert second == dict(
        assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.7, neg_iou_thr=0.7, min_pos_iou=0.3)
    )


def test_reference_has_the_papers_numbers():
    model = load(REFERENCE)['model']
    head, train = model['rpn_head'], model['train_cfg']['rpn']
    assert [train[slot]['topk'] for slot in ('assigner', 'reg_assigner')] == [10, 20]
    for slot in ('assigner', 'reg_assigner'):
        assert (train[slot]['center_rule'], train[slot]['center_radius']) == ('ratio', 0.25)
    assert head['num_tower_convs'] == 4
    assert head['dcn_tower'] == 'first'
    assert head['loss_bbox'] == dict(type='GIoULoss', loss_weight=2.0)
    assert head['anchor_scale'] == 8
    assert len(head['stages']) == 2
    assert model['test_cfg']['rpn']['nms']['iou_threshold'] == 0.8
    assert load(REFERENCE)['optim_wrapper']['optimizer'] == dict(
        type='SGD', lr=0.02, momentum=0.9, weight_decay=0.0001
    )


def test_row_7_changes_backbone_and_optimiser_only():
    reference, swin = load(REFERENCE), load('cascade_rpn_swinl')
    found = differences(reference, swin)
    assert {path for path in found if not path.startswith(('model.backbone', *SCHEDULE))} == {
        'model.neck.in_channels'
    }
    assert swin['optim_wrapper']['optimizer'] == dict(
        type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05
    )
    assert swin['train_cfg']['max_epochs'] == 12
    assert swin['param_scheduler'][1]['milestones'] == [8, 11]
    assert swin['train_dataloader']['batch_size'] * 8 == 16
    backbone = swin['model']['backbone']
    assert (backbone['embed_dims'], backbone['window_size']) == (192, 12)
    assert backbone['init_cfg']['checkpoint'].endswith('patch4_window12_384_22k.pth')


def test_fine_tuning_changes_data_and_schedule_only():
    swin, tuned = load('cascade_rpn_swinl'), load('cascade_rpn_swinl_uvo-finetune')
    changed = {path.split('.')[0] for path in differences(swin, tuned)}
    data = {
        f'{split}_{part}'
        for split in ('train', 'val', 'test')
        for part in ('dataloader', 'evaluator')
    } - {'train_evaluator'}
    assert differences(swin['model'], tuned['model']) == {'backbone.init_cfg'}  # load_from instead
    assert changed == SCHEDULE | data | {
        'model',
        'load_from',
        'data_root',
        'dataset_type',
        'train_sparse',
        'train_dense',
    }
    assert tuned['train_cfg']['max_epochs'] == 6
    assert differences(swin['optim_wrapper'], tuned['optim_wrapper']) == {'optimizer.lr'}
    assert tuned['optim_wrapper']['optimizer']['lr'] == 1e-5
    sparse, dense = tuned['train_dataloader']['dataset']['datasets']
    assert sparse['times'] == 3
    assert 'Dense' in dense['ann_file']


@pytest.mark.parametrize(
    ('name', 'changed'),
    [
        ('cascade-rpn-dcn-last_r50_fpn_8xb2-1x_coco', {'model.rpn_head.dcn_tower'}),
        ('cascade-rpn-atss_r50_fpn_8xb2-1x_coco', {'model.train_cfg.rpn'}),
        ('cascade-rpn-maxiou_r50_fpn_8xb2-1x_coco', {'model.train_cfg.rpn'}),
        ('cascade-rpn-dcn_timm-resnet50_fpn_8xb2-1x_coco', {'model.backbone'}),
    ],
)
def test_variants_change_what_they_are_named_after(name, changed):
    found = differences(load(REFERENCE), load(name))
    assert found
    assert all(path.startswith(tuple(changed)) for path in found)


def test_each_scale_of_the_augmentation_has_a_range():
    config = load(REFERENCE)
    resizes, flips, _ = config['tta_pipeline'][1]['transforms']
    ranges = config['tta_model']['scale_ranges']
    assert len(resizes) == len(ranges) == 13
    assert [flip['prob'] for flip in flips] == [0.0, 1.0]
    heights = [resize['scale'][1] for resize in resizes]
    assert heights == sorted(heights)
    assert ranges[heights.index(800)] == (0, 10000)
    assert ranges[0] == (96, 10000)
    assert ranges[-1] == (0, 96)
