"""Matting of instances: literal network, losses by hand, data, metric, demo, and a learnt set."""

import copy

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmdet.registry import DATASETS, METRICS, MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmengine.structures import InstanceData

from mmdet_plugins.ops.instance_masks import Frame
from mmdet_plugins.ops.matting import absolute_error, matte_dice_loss
from mmdet_plugins.ops.rle import encode_masks
from mmdet_plugins.solo.matting import DetailsRefinement
from mmdet_plugins.solo.matting_data import (
    SOLOLoadMattes,
    SOLOMatteDataset,
    SOLOMattingMetric,
    SOLOPasteMattes,
    match_mattes,
)
from mmdet_plugins.solo.synthetic import make_matte_data

HW = (64, 96)


def frame(image_hw, original_hw):
    return Frame((HW[0] // 4, HW[1] // 4), HW, image_hw, original_hw)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('mattes')
    make_matte_data(folder, num_pairs=2, num_scenes=3, size_hw=HW)
    return folder


def tiny(repo, data=None, **overrides):
    cfg = Config.fromfile(repo / 'configs/solov2/tiny/matting-solov2_tiny_demo.py')
    cfg.merge_from_dict(overrides)
    for split in ('train', 'val', 'test') if data else ():
        cfg[f'{split}_dataloader'].dataset.data_root = f'{data}/'
    init_default_scope('mmdet')
    return cfg


def build(repo, seed=0, **overrides):
    """The tiny model with a refinement that says something."""
    torch.manual_seed(seed)
    model = MODELS.build(tiny(repo, **overrides).model)
    torch.nn.init.normal_(model.mask_head.refinement.expand.weight, std=0.3)
    torch.nn.init.normal_(model.mask_head.refinement.expand.bias, std=0.3)
    return model


# --- network ----------------------------------------------------------------------------------


def test_logits_are_those_of_the_features_that_are_never_formed():
    torch.manual_seed(0)
    module = DetailsRefinement(12, 8)
    torch.nn.init.normal_(module.expand.weight)
    torch.nn.init.normal_(module.expand.bias)
    features, image = torch.randn(2, 12, 6, 9), torch.randn(2, 3, 24, 36)
    kernels = torch.randn(5, 12)
    details = module(features, image)
    final = F.interpolate(features, scale_factor=4, mode='bilinear') + module.expand(details)
    expected = torch.cat(
        [F.conv2d(final[:1], kernels[:2, :, None, None])[0],
         F.conv2d(final[1:], kernels[2:, :, None, None])[0]]
    )  # fmt: skip
    found = module.logits(features, details, kernels, [2, 3])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert module.logits(features, details, kernels[:0], [0, 0]).shape == (0, 24, 36)


def test_refinement_sees_coarse_features_enlarged_beside_the_image():
    module = DetailsRefinement(4, 8, norm_cfg=None)
    features, image = torch.randn(1, 4, 3, 5), torch.randn(1, 3, 12, 20)
    x = torch.cat([F.interpolate(module.reduce(features), (12, 20), mode='bilinear'), image], 1)
    for layer in module.convs:
        x = F.relu(F.conv2d(x, layer.conv.weight, layer.conv.bias, padding=1))
    torch.testing.assert_close(module(features, image), x)
    assert [layer.conv.in_channels for layer in module.convs] == [11, 8, 8]


def test_starts_as_solov2(repo):
    """With its weights, the first matte is SOLOv2's probability, enlarged."""
    torch.manual_seed(0)
    model = MODELS.build(tiny(repo).model)
    model.init_weights()
    base = MODELS.build(Config.fromfile(repo / 'configs/solov2/tiny/solov2_tiny_demo.py').model)
    missing, unexpected = model.load_state_dict(base.state_dict(), strict=False)
    assert not unexpected and all('.refinement.' in key for key in missing)
    image = torch.randn(1, 3, *HW)
    with torch.no_grad():
        outputs = model.eval().mask_head(model.extract_feat(image))
        base_outputs = base.eval().mask_head(base.extract_feat(image))
        cells = torch.tensor([0, 100, 900])
        mattes = model.mask_head.mattes(outputs, 0, cells, frame(HW, HW))
        probs = base.mask_head.candidate_maps(base_outputs, 0)(cells)
    probs = F.interpolate(probs[None], HW, mode='bilinear')[0].sigmoid()
    assert (mattes - 255 * probs).abs().max() <= 0.5 + 1e-3


def test_candidates_are_chosen_by_the_mean_logit(repo):
    head = build(repo).mask_head
    features, details = torch.randn(1, 64, 8, 12), torch.randn(1, 32, 32, 48)
    # Features that do not change from place to place are enlarged to themselves.
    features = features[:, :, :1, :1].expand_as(features)
    grids = [torch.randn(1, 64, size, size) for size in head.num_grids]
    outputs = ([], grids, [features], [details])
    cells = torch.tensor([3, 700])
    maps = head.candidate_maps(outputs, 0)(cells)
    kernels = torch.cat([head.conv_kernel(grid)[0].flatten(1) for grid in grids], 1).T[cells]
    full = head.refinement.logits(features, details, kernels, [2])
    torch.testing.assert_close(maps, F.avg_pool2d(full, 4), rtol=1e-4, atol=1e-4)


def test_mattes_of_the_original_size_whatever_the_budget(repo):
    head = build(repo).mask_head
    outputs = (
        [],
        [torch.randn(1, 64, size, size) for size in head.num_grids],
        [torch.randn(1, 64, 16, 24)],
        [torch.randn(1, 32, *HW)],
    )
    cells = torch.tensor([5, 80, 400, 900, 901])
    expected = head._logits_of(outputs, 0, outputs[3][0])(cells).sigmoid()[None, :, :50, :91]
    expected = 255 * F.interpolate(expected, (73, 120), mode='bilinear')[0]
    for head.byte_budget in (1, 1 << 30):
        mattes = head.mattes(outputs, 0, cells, frame((50, 91), (73, 120)))
        assert mattes.dtype == torch.uint8 and mattes.shape == (5, 73, 120)
        assert (mattes - expected).abs().max() <= 0.5 + 1e-3
    assert head.mattes(outputs, 0, cells[:0], frame(HW, (7, 9))).shape == (0, 7, 9)


def test_what_mattes_cannot_be_made_of_is_told(repo):
    for key, value in (
        ('kernel_size', 3),
        ('mask_features', dict(_delete_=True, type='SOLOSeparateMaskFeatures', out_channels=32)),
    ):
        with pytest.raises(ValueError, match='1x1 kernels'):
            MODELS.build(tiny(repo, **{f'model.mask_head.{key}': value}).model)


# --- losses -----------------------------------------------------------------------------------


def sample(mattes, hw=HW):
    """Objects of class 0, their masks ``mattes`` uint8 [G, H, W]."""
    boxes = [cv2.boundingRect((matte >= max(1, matte.max() / 2)).astype(np.uint8))
             for matte in mattes]  # fmt: skip
    boxes = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in boxes]).reshape(-1, 4).float()
    return DetDataSample(
        gt_instances=InstanceData(
            bboxes=boxes,
            labels=torch.zeros(len(mattes), dtype=torch.long),
            masks=BitmapMasks(list(mattes), *hw),
        ),
        metainfo=dict(img_shape=hw, ori_shape=hw, img_id=3),
    )


def disc(radius, x, y, softness, hw=HW):
    distance = np.hypot(*(np.mgrid[: hw[0], : hw[1]] - np.array([y, x])[:, None, None]))
    return (255 * np.clip((radius - distance) / softness + 0.5, 0, 1)).round().astype(np.uint8)


def test_losses_by_loops(repo):
    model = build(repo, **{'model.mask_head.loss_matte_weight': 7.0}).train()
    head = model.mask_head
    small = (50, 80)
    samples = [
        sample([disc(14, 30, 30, 9), disc(10, 70, 40, 6)]),
        sample([]),
        sample([disc(9, 40, 20, 5, small)], small),
    ]
    x = model.extract_feat(torch.randn(3, 3, *HW))
    losses = head.loss(x, samples)
    assert set(losses) == {'loss_mask', 'loss_matte'}

    outputs = head(x)
    targets = head.get_targets(outputs, [s.gt_instances for s in samples])
    mattes = torch.zeros(3, *HW)
    mattes[0], mattes[1] = (torch.from_numpy(m) for m in samples[0].gt_instances.masks.masks)
    mattes[2, :50, :80] = torch.from_numpy(samples[2].gt_instances.masks.masks[0])
    mattes /= 255
    dice, absolute, image_of = 0, 0, (0, 0, 2)
    for owner, cells in enumerate(targets.cells.flatten(1)):
        for cell in cells[cells >= 0]:
            image = image_of[owner]
            details = outputs[3][0][image : image + 1]
            prob = head._logits_of(outputs, image, details)(cell[None]).sigmoid()
            dice += matte_dice_loss(prob, mattes[owner : owner + 1])[0]
            absolute += (prob[0] - mattes[owner]).abs().mean()
    assert targets.num_positives > 3
    expected = {
        'loss_mask': 3 * dice / targets.num_positives,
        'loss_matte': 7 * absolute / targets.num_positives,
    }
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-4, atol=1e-6)


def test_categories_are_left_alone_and_all_else_is_trained(repo):
    for freeze in (True, False):
        model = build(repo, **{'model.mask_head.freeze_categories': freeze}).train()
        x = model.extract_feat(torch.randn(1, 3, *HW))
        losses = model.mask_head.loss(x, [sample([disc(14, 30, 30, 9)])])
        assert ('loss_cls' in losses) is not freeze
        sum(losses.values()).backward()
        untouched = {n for n, p in model.mask_head.named_parameters() if p.grad is None}
        category = {
            n for n, _ in model.mask_head.named_parameters() if n.startswith(('cls_', 'conv_cls'))
        }
        assert untouched == (category if freeze else set()) and category
        frozen = {n for n, p in model.mask_head.named_parameters() if not p.requires_grad}
        assert frozen == untouched


def test_masks_of_zero_and_one_are_mattes_without_transitions(repo):
    model = build(repo).train()
    masks = [(disc(r, x, 30, 1) >= 128).astype(np.uint8) for r, x in ((14, 30), (9, 70))]
    x = model.extract_feat(torch.randn(1, 3, *HW))
    plain = model.mask_head.loss(x, [sample(masks)])
    soft = model.mask_head.loss(x, [sample([255 * mask for mask in masks])])
    assert plain == soft and plain['loss_matte'] > 0


def test_no_object_and_half_precision_stay_finite(repo):
    model = build(repo).train()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        x = model.extract_feat(torch.randn(1, 3, *HW))
        some = model.mask_head.loss(x, [sample([disc(14, 30, 30, 9)])])
        none = model.mask_head.loss(x, [sample([])])
    assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in some.values())
    assert sum(none.values()) == 0
    sum(none.values()).backward()


# --- data -------------------------------------------------------------------------------------


def dataset(data, kind='scenes', **kwargs):
    init_default_scope('mmdet')
    return SOLOMatteDataset(
        data_root=str(data), data_prefix=dict(img=f'{kind}/images/', matte=f'{kind}/mattes/'),
        **kwargs,
    )  # fmt: skip


def test_folders_are_read(data, tmp_path):
    found = dataset(data, pipeline=[dict(type='LoadImageFromFile'), dict(type='SOLOLoadMattes')])
    assert len(found) == 3
    for index in range(3):
        item = found[index]
        files = sorted((data / 'scenes' / 'mattes' / f'{index:05d}').glob('*.png'))
        truth = np.array([cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in files])
        assert np.array_equal(item['gt_masks'].masks, truth)
        for box, matte in zip(item['gt_bboxes'].tensor, truth, strict=True):
            ys, xs = np.nonzero(matte >= 128)
            assert box.tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        binary = SOLOLoadMattes(binary=True)(found.get_data_info(index) | dict(
            ori_shape=truth.shape[1:]))  # fmt: skip
        assert np.array_equal(binary['gt_masks'].masks, truth >= 128)

    for folder in ('images', 'mattes'):
        (tmp_path / folder).mkdir()
    with pytest.raises(FileNotFoundError, match='no images'):
        SOLOMatteDataset(data_root=str(tmp_path), data_prefix=dict(img='images', matte='mattes'))
    cv2.imwrite(str(tmp_path / 'images' / 'one.png'), np.zeros((4, 6, 3), np.uint8))
    with pytest.raises(FileNotFoundError, match='1 images have no matte.*one.png'):
        SOLOMatteDataset(data_root=str(tmp_path), data_prefix=dict(img='images', matte='mattes'))
    path = tmp_path / 'mattes' / 'one.png'
    for shape, message in (((4, 6, 3), 'one 8-bit channel'), ((6, 4), r'\(4, 6\).*\(6, 4\)')):
        cv2.imwrite(str(path), np.zeros(shape, np.uint8))
        one = SOLOMatteDataset(
            data_root=str(tmp_path),
            data_prefix=dict(img='images', matte='mattes'),
            pipeline=[dict(type='LoadImageFromFile'), dict(type='SOLOLoadMattes')],
        )
        with pytest.raises(ValueError, match=message):
            one[0]


def test_objects_that_are_hardly_there_are_dropped():
    results = dict(img_path='x.png', ori_shape=(4, 4), instances=[])
    assert SOLOLoadMattes()(dict(results))['gt_masks'].masks.shape == (0, 4, 4)


def test_pasting_keeps_what_is_there_and_adds_pairs(data):
    np.random.seed(0)
    paste = SOLOPasteMattes(
        dict(type='SOLOMatteDataset', data_root=str(data), label=4,
             data_prefix=dict(img='pairs/images/', matte='pairs/mattes/')),
        num=(2, 2), scale=(0.4, 0.6),
    )  # fmt: skip
    mask = np.zeros((2, 80, 120), np.uint8)
    mask[0, 20:60, 30:90] = 1
    mask[1] = 1  # a crowd, which goes
    image = np.full((80, 120, 3), 128, np.uint8)
    for _ in range(20):
        results = paste(
            dict(img=image.copy(), gt_masks=BitmapMasks(mask, 80, 120),
                 gt_bboxes_labels=np.array([2, 2]), gt_ignore_flags=np.array([False, True]))
        )  # fmt: skip
        mattes, labels = results['gt_masks'].masks, results['gt_bboxes_labels'].tolist()
        assert mattes.shape[1:] == (80, 120) and labels in ([2, 4, 4], [2, 4], [4, 4])
        assert len(labels) == len(mattes) == len(results['gt_bboxes'])
        cover = mattes.astype(int).sum(0)
        assert cover.max() <= 257, 'of a pixel, no more than all can be shared out'
        assert (results['img'][cover == 0] == 128).all()
        assert (results['img'] != image).any()
        pasted = mattes[-1] >= 128
        height, width = (np.ptp(np.nonzero(pasted)[axis]) + 1 for axis in (0, 1))
        assert max(height / 80, width / 120) <= 0.6 + 0.02
    bare = paste(dict(img=image.copy()))
    assert set(bare['gt_bboxes_labels'].tolist()) <= {4} and len(bare['gt_bboxes']) >= 1


# --- metric -----------------------------------------------------------------------------------


def predicted(truth_mattes, mattes, masks=None):
    found = InstanceData(mattes=torch.from_numpy(np.array(mattes, np.uint8)))
    if masks is not None:
        found.masks = masks
    return DetDataSample(
        gt_instances=InstanceData(masks=BitmapMasks(list(truth_mattes), *HW)),
        pred_instances=found,
    )


def evaluate(metric, *samples):
    evaluator = Evaluator(metric)
    evaluator.dataset_meta = {}
    for one in samples:
        evaluator.process([one])
    return evaluator.evaluate(len(samples))


def test_metric_is_the_mean_over_objects_with_misses_in_full():
    first, second = disc(14, 30, 30, 9), disc(10, 70, 40, 6)
    near = disc(13, 31, 30, 9)
    values = evaluate(SOLOMattingMetric(), predicted([first, second], [near]))
    expected = (
        absolute_error(near / 255, first / 255) + absolute_error(np.zeros(HW), second / 255)
    ) / 2000
    assert values['matting/SAD'] == pytest.approx(expected, rel=1e-5)
    assert values['matting/recall'] == 0.5
    perfect = evaluate(SOLOMattingMetric(), predicted([first, second], [second, near, first]))
    assert perfect == {f'matting/{k}': v for k, v in
                       dict(SAD=0, MSE=0, Grad=0, Conn=0, recall=1).items()}  # fmt: skip


def test_metric_of_masks_dense_or_encoded():
    truth = disc(14, 30, 30, 9)
    mask = torch.from_numpy(truth >= 128)[None]
    metric = dict(type='SOLOMattingMetric', source='masks', prefix='mask')
    dense, encoded = (
        evaluate(METRICS.build(metric), predicted([truth], [truth], masks))
        for masks in (mask, encode_masks(mask))
    )
    expected = absolute_error(mask[0].numpy(), truth / 255) / 1000
    assert dense == encoded and dense['mask/SAD'] == pytest.approx(expected, rel=1e-5)


def test_metric_edges():
    empty = np.zeros((0, *HW), np.uint8)
    assert np.isnan(evaluate(SOLOMattingMetric(), predicted(empty, empty))['matting/SAD'])
    assert evaluate(SOLOMattingMetric(), predicted([disc(9, 30, 30, 3)], empty))[
        'matting/recall'] == 0  # fmt: skip
    with pytest.raises(ValueError, match='load mattes after'):
        evaluate(SOLOMattingMetric(), predicted([disc(9, 30, 30, 3)], np.zeros((1, 5, 6))))


def test_matching_is_one_to_one_and_best_first():
    a, b = (disc(12, x, 30, 3) / 255 for x in (30, 36))
    between = disc(12, 32, 30, 3) / 255
    assert match_mattes(np.array([between, a]), np.array([a, b])) == [1, 0]
    assert match_mattes(np.array([between]), np.array([a, b])) == [0, -1]
    assert match_mattes(np.array([disc(12, 80, 30, 3) / 255]), np.array([a])) == [-1]


# --- from files to numbers --------------------------------------------------------------------


def test_from_files_to_mattes_and_scores(repo, data):
    cfg = tiny(repo, data)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    train = DATASETS.build(cfg.train_dataloader.dataset)
    test = DATASETS.build(cfg.test_dataloader.dataset)
    batch = [train[0], train[1]]
    batch = {key: [item[key] for item in batch] for key in batch[0]}
    losses = model(**model.data_preprocessor(batch, training=True), mode='loss')
    assert all(0 < loss < 100 for loss in losses.values())

    model.eval().mask_head.conv_cls.bias.data += 4  # many instances
    item = test[1]
    (found,) = model.test_step({key: [value] for key, value in item.items()})
    instances = found.pred_instances
    assert len(instances) > 0 and instances.mattes.shape == (len(instances), 96, 64)
    evaluator = Evaluator([METRICS.build(metric) for metric in cfg.test_evaluator])
    evaluator.dataset_meta = test.metainfo
    evaluator.process([found])
    values = evaluator.evaluate(1)
    assert {key.split('/')[0] for key in values} == {'matting', 'mask'}


# --- demo -------------------------------------------------------------------------------------


def test_demo_makes_pictures_of_a_matte_and_an_image(load_script, tmp_path, monkeypatch):
    make_matte_data(tmp_path, num_pairs=0, num_scenes=1, size_hw=HW)
    image = tmp_path / 'scenes' / 'images' / '00000.png'
    matte = tmp_path / 'scenes' / 'mattes' / '00000' / '0.png'
    ground = np.full((30, 40, 3), (200, 50, 0), np.uint8)
    cv2.imwrite(str(tmp_path / 'ground.png'), ground)
    demo = load_script('projects/solo/matting_demo.py')
    demo.main([str(image), str(matte), '--out-dir', str(tmp_path / 'out'),
               '--background', str(tmp_path / 'ground.png'), '--radius', '3'])  # fmt: skip
    names = sorted(path.name for path in (tmp_path / 'out').iterdir())
    assert names == ['00000_bokeh.png', '00000_composite.png', '00000_cutout.png']
    alpha = cv2.imread(str(matte), cv2.IMREAD_UNCHANGED)
    original = cv2.imread(str(image))
    bokeh, composite = (
        cv2.imread(str(tmp_path / 'out' / f'00000_{kind}.png')) for kind in ('bokeh', 'composite')
    )
    cutout = cv2.imread(str(tmp_path / 'out' / '00000_cutout.png'), cv2.IMREAD_UNCHANGED)
    assert np.array_equal(cutout[..., 3], alpha)
    for picture in (bokeh, composite, cutout[..., :3]):
        assert np.abs(picture[alpha == 255].astype(int) - original[alpha == 255]).max() <= 1
    assert (composite[alpha == 0] == (200, 50, 0)).all()
    with pytest.raises(SystemExit, match='32 x 48'):
        cv2.imwrite(str(tmp_path / 'wrong.png'), np.zeros((32, 48), np.uint8))
        demo.main([str(image), str(tmp_path / 'wrong.png'), '--out-dir', str(tmp_path / 'out')])


# --- learning ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_mattes_cost_a_fifth_of_masks(repo, tmp_path):
    """SOLOv2 learns a small set by heart, then matting from its weights, categories frozen."""
    make_matte_data(tmp_path, num_pairs=0, num_scenes=4, size_hw=(72, 96))

    def run(model, name, iters, binary, **changes):
        cfg = tiny(repo, tmp_path, **changes)
        pipeline = cfg.train_dataloader.dataset.pipeline
        pipeline = [step for step in pipeline if step.type != 'RandomFlip']
        pipeline[1].binary = binary
        cfg.train_dataloader.dataset.pipeline = pipeline
        cfg.train_cfg.update(max_iters=iters, val_interval=iters)
        cfg.optim_wrapper.optimizer.lr = 3e-3
        cfg.model, cfg.work_dir, cfg.randomness = model, str(tmp_path / name), dict(seed=0)
        if binary:
            cfg.val_evaluator = cfg.test_evaluator = [cfg.val_evaluator[1]]
        runner = Runner.from_cfg(cfg)
        runner.train()
        return {key: value.current() for key, value in runner.message_hub.log_scalars.items()}

    base = Config.fromfile(repo / 'configs/solov2/tiny/solov2_tiny_demo.py').model
    first = run(copy.deepcopy(base), 'masks', 60, True)
    (weights,) = (tmp_path / 'masks').glob('iter_*.pth')
    second = run(tiny(repo).model, 'mattes', 150, False, load_from=str(weights))
    assert first['val/mask/recall'] == second['val/matting/recall'] == 1
    masks = min(first['val/mask/SAD'], second['val/mask/SAD'])
    assert second['val/matting/SAD'] <= 0.2 * masks
