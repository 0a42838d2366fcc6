"""Panoptic SOLOv2: the branch beside mmdet's, the map by hand, and a small set learnt by heart."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmdet.models import PanopticFPNHead
from mmdet.registry import DATASETS, METRICS, MODELS
from mmdet.structures import DetDataSample
from mmdet.visualization import DetLocalVisualizer
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmengine.structures import InstanceData, PixelData

from mmdet_plugins.ops.instance_masks import Frame
from mmdet_plugins.ops.panoptic import decode_id_png
from mmdet_plugins.solo.panoptic import SOLOSemanticHead, best_class
from mmdet_plugins.solo.synthetic import PANOPTIC_CATEGORIES, make_panoptic_data

NUM_THINGS, NUM_STUFF = 3, 2
VOID = NUM_THINGS + NUM_STUFF
HEAD = dict(
    num_things_classes=NUM_THINGS,
    num_stuff_classes=NUM_STUFF,
    in_channels=8,
    inner_channels=8,
    norm_cfg=dict(type='GN', num_groups=2),
    loss_seg=dict(type='CrossEntropyLoss', ignore_index=255, avg_non_ignore=True, loss_weight=0.5),
)


def pyramid(height, width, images=1):
    return [torch.randn(images, 8, height // s, width // s) for s in (4, 8, 16, 32)]


def truth(*maps):
    return [DetDataSample(gt_sem_seg=PixelData(sem_seg=one[None])) for one in maps]


# --- semantic branch --------------------------------------------------------------------------


def test_loss_is_that_of_the_pixel_in_the_middle():
    head = SOLOSemanticHead(**HEAD)
    torch.nn.init.zeros_(head.conv_logits.weight)
    head.conv_logits.bias.data = torch.tensor([0.0, math.log(2), math.log(5)])
    labels = torch.full((32, 64), 4, dtype=torch.uint8)  # must not be looked at
    labels[2::4, 2::4] = 255
    labels[2, 2], labels[2, 6], labels[30, 62] = 3, 1, 2  # one of stuff 0, two things
    loss = head.loss(pyramid(32, 64), truth(labels))['loss_seg']
    # Probabilities 1/8, 2/8, 5/8 of the two stuff classes and of things.
    expected = 0.5 * (math.log(8) + 2 * math.log(8 / 5)) / 3
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_loss_equals_mmdets_where_its_pixel_says_the_same():
    torch.manual_seed(0)
    ours, stock = SOLOSemanticHead(**HEAD), PanopticFPNHead(**HEAD)
    stock.load_state_dict(ours.state_dict(), strict=True)
    labels = torch.tensor([0, 2, 3, 4, 255], dtype=torch.uint8)[torch.randint(5, (2, 8, 24))]
    samples = truth(*labels.repeat_interleave(4, 1).repeat_interleave(4, 2))
    x = pyramid(32, 96, images=2)
    losses = [head.loss(x, samples)['loss_seg'] for head in (ours, stock)]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    for loss in losses:
        loss.backward()
    theirs = dict(stock.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-5, atol=1e-7)


def test_void_alone_gives_no_gradient_and_infinity_stops():
    head = SOLOSemanticHead(**HEAD)
    void = truth(torch.full((32, 32), 255, dtype=torch.uint8))
    assert head.loss(pyramid(32, 32), void)['loss_seg'] == 0
    void[0].set_metainfo(dict(img_id=17))
    head.conv_logits.bias.data[0] = math.nan
    void[0].gt_sem_seg.sem_seg[:] = 3
    with pytest.raises(FloatingPointError, match=r'loss_seg is nan.*17'):
        head.loss(pyramid(32, 32), void)


@pytest.mark.parametrize('original_hw', [(37, 90), (21, 55)])
def test_best_class_a_class_at_a_time_is_that_of_all_at_once(original_hw):
    torch.manual_seed(1)
    logits = torch.randn(6, 12, 24)
    frame = Frame((12, 24), (48, 96), (41, 93), original_hw)
    full = F.interpolate(logits[None], (48, 96), mode='bilinear')[..., :41, :93]
    full = F.interpolate(full, original_hw, mode='bilinear')[0]
    for byte_budget in (1, 100_000, 1 << 30):
        assert torch.equal(best_class(logits, frame, byte_budget), full.argmax(0))
    tied = logits[:1].expand(3, -1, -1)
    assert best_class(tied, frame, 1).eq(0).all()


def test_predicted_labels_follow_the_things():
    head = SOLOSemanticHead(**HEAD)
    torch.nn.init.zeros_(head.conv_logits.weight)
    meta = dict(img_shape=(30, 61), ori_shape=(45, 80))
    for winner, label in enumerate((NUM_THINGS, NUM_THINGS + 1, VOID)):
        head.conv_logits.bias.data = F.one_hot(torch.tensor(winner), 3).float()
        (found,) = head.predict(pyramid(32, 64), [meta], rescale=True)
        assert found.shape == (45, 80) and found.eq(label).all()
        assert head.predict(pyramid(32, 64), [meta])[0].shape == (30, 61)


# --- segmentor --------------------------------------------------------------------------------


def tiny(repo, **overrides):
    cfg = Config.fromfile(repo / 'configs/solov2/tiny/panoptic-solov2_tiny_demo.py')
    cfg.merge_from_dict(overrides)
    init_default_scope('mmdet')
    return cfg


def tiny_on(repo, data, **overrides):
    """The tiny config trained, tested and scored on the training split of ``data``."""
    cfg = tiny(repo, **overrides)
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].dataset.update(
            data_root=f'{data}/',
            ann_file='panoptic_train.json',
            data_prefix=dict(img='images/', seg='panoptic_train/'),
        )
    for split in ('val', 'test'):
        cfg[f'{split}_evaluator'].update(
            ann_file=f'{data}/panoptic_train.json', seg_prefix=f'{data}/panoptic_train/'
        )
    return cfg


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('panoptic')
    make_panoptic_data(folder, num_train=2, num_val=1, size_hw=(64, 96))
    return folder


@pytest.mark.parametrize('with_instances', [False, True])
def test_merge_by_hand(repo, monkeypatch, with_instances):
    cfg = tiny(repo)
    cfg.model.test_cfg.panoptic = dict(min_score=0.5, max_overlap=0.5, min_stuff_area=3)
    model = MODELS.build({**cfg.model, 'with_instances': with_instances})
    rows = [
        '1 1 0 0 0 0',  # the best instance, of class 4
        '1 1 2 2 0 0',  # 2: class 0, loses one pixel of three to the best
        '0 0 0 0 0 0',
    ]
    best = torch.tensor([[int(v) for v in row.split()] for row in rows]) == 1
    second = torch.tensor([[int(v) for v in row.split()] for row in rows]) == 2
    second[1, 1] = True
    weak = torch.ones_like(best)
    instances = InstanceData(
        masks=torch.stack([second, weak, best]),
        scores=torch.tensor([0.6, 0.49, 0.9]),
        labels=torch.tensor([0, 1, 4]),
        bboxes=torch.zeros(3, 4),
    )
    semantic = torch.tensor([[5, 5, 5, 5, 6, 8], [5, 5, 5, 5, 6, 8], [5, 5, 5, 5, 7, 7]])
    monkeypatch.setattr(model, 'extract_feat', lambda inputs: ())
    monkeypatch.setattr(model.mask_head, 'predict', lambda *args: [instances])
    monkeypatch.setattr(model.semantic_head, 'predict', lambda *args: [semantic])
    (sample,) = model.predict(torch.zeros(1, 3, 3, 6), [DetDataSample()])
    # Of stuff 6 and 7 there are too few pixels, and 8 is a thing without an instance: void, 8.
    expected = torch.tensor(
        [[1004, 1004, 5, 5, 8, 8], [1004, 1004, 2000, 2000, 8, 8], [5, 5, 5, 5, 8, 8]]
    )
    assert torch.equal(sample.pred_panoptic_seg.sem_seg, expected[None])
    assert ('pred_instances' in sample) == with_instances


def test_contradictions_are_told(repo):
    for key, value, message in (
        ('model.test_cfg.mask_format', 'rle', 'dense'),
        ('model.semantic_head.num_things_classes', 4, '5 classes.*4 classes of things'),
    ):
        with pytest.raises(ValueError, match=message):
            MODELS.build(tiny(repo, **{key: value}).model)


def test_from_files_to_losses_maps_scores_and_drawings(repo, data):
    """All parameters are trained; maps in original pixels please metric and visualizer."""
    cfg = tiny_on(repo, data)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    batches = {}
    for split in ('train', 'test'):
        dataset = DATASETS.build(cfg[f'{split}_dataloader'].dataset)
        items = [dataset[i] for i in range(2)]
        batches[split] = {key: [item[key] for item in items] for key in items[0]}
    meta = dataset.metainfo
    assert [m.shape[1:] for m in batches['train']['inputs']] == [(64, 96), (96, 64)]

    prepared = model.data_preprocessor(batches['train'], training=True)
    losses = model(**prepared, mode='loss')
    assert set(losses) == {'loss_mask', 'loss_cls', 'loss_seg'}
    assert losses['loss_seg'].item() == pytest.approx(0.5 * math.log(4), rel=0.05)
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.semantic_head.parameters())

    model.eval()
    model.mask_head.conv_cls.bias.data += 4  # many instances
    evaluator = Evaluator(METRICS.build(cfg.test_evaluator))
    evaluator.dataset_meta = meta
    with torch.no_grad():
        found = model.test_step(batches['test'])
    assert [s.pred_panoptic_seg.sem_seg.shape for s in found] == [(1, 64, 96), (1, 96, 64)]
    evaluator.process(found)
    assert evaluator.evaluate(2)['coco_panoptic/PQ'] >= 0

    visualizer = DetLocalVisualizer()
    visualizer.dataset_meta = meta
    image = batches['test']['inputs'][0].numpy().transpose(1, 2, 0)
    found[0].pred_panoptic_seg.sem_seg[:, :32] = 1002  # a sure one, should all else be void
    visualizer.add_datasample('panoptic', image, found[0], draw_gt=False)
    assert (visualizer.get_image()[:32] != image[:32]).any()


def test_nothing_above_the_thresholds_leaves_stuff(repo):
    model = MODELS.build(tiny(repo).model).eval()
    model.init_weights()
    sample = DetDataSample(metainfo=dict(img_shape=(64, 96), ori_shape=(50, 75)))
    with torch.no_grad():
        (found,) = model.predict(torch.zeros(1, 3, 64, 96), [sample])
    labels = found.pred_panoptic_seg.sem_seg
    assert labels.shape == (1, 50, 75) and labels.min() >= 5 and labels.max() <= 8


def test_bf16_autocast_keeps_losses_finite(repo, data):
    cfg = tiny_on(repo, data)
    model = MODELS.build(cfg.model)
    item = DATASETS.build(cfg.train_dataloader.dataset)[0]
    batch = model.data_preprocessor({key: [value] for key, value in item.items()}, training=True)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        losses = model(**batch, mode='loss')
    assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())


# --- synthetic set ----------------------------------------------------------------------------


def test_synthetic_annotations_say_what_the_pngs_show(data):
    listed = json.loads((data / 'panoptic_train.json').read_text())
    assert listed['categories'] == PANOPTIC_CATEGORIES
    for image, annotation in zip(listed['images'], listed['annotations'], strict=True):
        ids = decode_id_png((data / 'panoptic_train' / annotation['file_name']).read_bytes())
        assert ids.shape == (image['height'], image['width']) and (ids > 0).all()
        segments = annotation['segments_info']
        assert sorted(segment['id'] for segment in segments) == np.unique(ids).tolist()
        assert sum(segment['area'] for segment in segments) == ids.size
        kinds = [PANOPTIC_CATEGORIES[s['category_id'] - 1]['isthing'] for s in segments]
        assert 1 <= kinds.count(0) <= 2 and kinds.count(1) >= 1


# --- learning ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_learns_a_small_set_by_heart(repo, tmp_path):
    make_panoptic_data(tmp_path / 'data', num_train=4, num_val=1, size_hw=(128, 160))
    iters = 400
    cfg = tiny_on(repo, tmp_path / 'data')
    pipeline = cfg.train_dataloader.dataset.pipeline
    cfg.train_dataloader.dataset.pipeline = [t for t in pipeline if t.type != 'RandomFlip']
    cfg.train_dataloader.batch_size = 2
    cfg.train_cfg.update(max_iters=iters, val_interval=iters)
    cfg.work_dir, cfg.randomness = str(tmp_path), dict(seed=0)
    runner = Runner.from_cfg(cfg)
    runner.train()
    scalars = runner.message_hub.log_scalars
    assert scalars['val/coco_panoptic/PQ'].current() > 0.9
