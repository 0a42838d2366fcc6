"""The exportable detector against the ordinary one, in torch."""

import copy

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmdet_plugins.solo.export import ExportableSOLOv2

SIZES_HW = [(64, 96), (70, 131)]


@pytest.fixture
def build(repo):
    """Builds the tiny SOLOv2 with random weights, lively enough for dozens of instances."""

    def build(test_cfg: dict | None = None, **head) -> torch.nn.Module:
        init_default_scope('mmdet')
        cfg = Config.fromfile(repo / 'configs/solov2/tiny/solov2_tiny_demo.py').model
        for key, value in {'num_classes': 3, **head}.items():
            cfg.mask_head[key] = value
        cfg.test_cfg.update(dict(max_per_img=20, mask_format='dense'), **(test_cfg or {}))
        torch.manual_seed(0)
        detector = MODELS.build(cfg).eval()
        with torch.no_grad():
            head = detector.mask_head
            head.conv_cls.weight.normal_(0, 0.15)
            head.conv_cls.bias.fill_(-1)
            head.conv_kernel.weight.normal_(0, 0.1)
        return detector

    return build


def predict(detector, images: torch.Tensor) -> list:
    """What the detector finds by itself in a batch of images of one size."""
    metainfo = dict(img_shape=images.shape[-2:], ori_shape=images.shape[-2:], scale_factor=(1, 1))
    samples = [DetDataSample(metainfo=metainfo) for _ in images]
    with torch.no_grad():
        results = detector.test_step(dict(inputs=list(images), data_samples=samples))
    return [result.pred_instances for result in results]


def random_images(count: int, size_hw: tuple[int, int], seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.randint(0, 256, (count, 3, *size_hw), dtype=torch.uint8)


def assert_same(detector, images: torch.Tensor, **options) -> int:
    """Compare, and return the number of instances that have pixels."""
    expected = predict(detector, images)
    with torch.no_grad():
        found = ExportableSOLOv2(copy.deepcopy(detector), **options)(images)
    assert found.num_instances.tolist() == [len(instances) for instances in expected]
    for image, instances in enumerate(expected):
        count = len(instances)
        boxes, scores, labels, masks = (values[image] for values in found[:4])
        torch.testing.assert_close(scores[:count], instances.scores, rtol=1e-5, atol=1e-6)
        assert labels[:count].tolist() == instances.labels.tolist()
        assert (masks[:count] != instances.masks).sum() <= 1e-4 * masks[:count].numel()
        torch.testing.assert_close(boxes[:count], instances.bboxes, rtol=0, atol=1)
        assert not (boxes[count:].any() or scores[count:].any() or masks[count:].any())
        assert (labels[count:] == -1).all()
    return sum(int(instances.masks.flatten(1).any(1).sum()) for instances in expected)


@pytest.mark.parametrize(
    'head',
    [{}, dict(kernel_size=3), dict(dcn='last', stacked_convs=1), dict(num_classes=1)],
    ids=str,
)
def test_equals_the_detector(build, head):
    detector = build(**head)
    for seed, size in enumerate(SIZES_HW):
        assert assert_same(detector, random_images(2, size, seed)) >= 10


@pytest.mark.parametrize(
    'test_cfg',
    [
        dict(maskness=False, kernel='linear'),
        dict(nms_pre=30),
        dict(nms_pre=15),
        dict(max_per_img=5, filter_thr=0.3),
        dict(max_per_img=-1, nms_pre=-1),
        dict(mask_thr=0.3, sigma=0.5),
    ],
    ids=str,
)
def test_equals_the_detector_under_each_option(build, test_cfg):
    assert assert_same(build(test_cfg), random_images(2, (64, 96))) >= 10


def test_images_with_none_few_and_many(build):
    """A threshold between the best scores of two images leaves the first one empty."""
    detector, images = build(), random_images(2, (64, 96))
    images[0] = 114
    post = detector.mask_head.postprocess
    found = [instances.scores for instances in predict(detector, images)]
    assert min(map(len, found)) > 0
    counts = set()
    for post.score_thr in (1.0, 0.9, 0.7):
        counts |= {len(instances) for instances in predict(detector, images)}
        assert_same(detector, images)
    assert 0 in counts and len(counts) > 2


def test_a_bound_on_candidates_is_the_only_approximation(build):
    """With fewer candidates than scores above the threshold, results differ; else they do not."""
    detector, images = build(dict(max_per_img=10)), random_images(1, (64, 96))
    assert_same(detector, images, max_candidates=10**6)
    with pytest.raises(AssertionError):
        assert_same(detector, images, max_candidates=10)


@pytest.mark.parametrize(
    'changes, sentence',
    [
        (dict(test_cfg=dict(nms='hard')), 'only Matrix NMS is exported, not hard'),
        (
            dict(mask_features=dict(type='SOLOSeparateMaskFeatures', out_channels=32)),
            'only SOLOv2 with unified mask features',
        ),
    ],
    ids=str,
)
def test_what_is_not_exported_is_said(build, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        ExportableSOLOv2(build(**changes))


def test_a_deformable_convolution_with_groups_is_named(build):
    detector = build(dcn='last')
    detector.mask_head.cls_convs[-1].conv.groups = 2
    with pytest.raises(ValueError, match='but mask_head.cls_convs.1.conv is AnyDeviceDCNv2 with 2'):
        ExportableSOLOv2(detector)
