import json
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from mmengine.hub import get_config
from mmengine.registry import DefaultScope
from torch import nn

from mmdet_plugins.ops.crops import expand_boxes
from mmdet_plugins.ops.rle import decode_rle
from mmseg_plugins.box_crop import BoxSegmenter


class Brightness(nn.Module):
    """Calls bright pixels the object; notes what it was given."""

    def __init__(self, classes=2, stride=4):
        super().__init__()
        self.classes = classes
        self.stride = stride
        self.calls = []

    def forward(self, inputs):
        self.calls.append(tuple(inputs.shape))
        half = self.stride // 2
        assert inputs.dtype == torch.uint8
        logit = inputs[:, 1:2, half :: self.stride, half :: self.stride] - 128.0
        return (
            logit if self.classes == 1 else torch.cat((-logit, logit, logit)[: self.classes], dim=1)
        )


def scene(height=90, width=130):
    """A bright ellipse on dark ground."""
    image = np.full((height, width, 3), 30, dtype=np.uint8)
    return cv2.ellipse(image, (width // 2, height // 2), (30, 20), 20, 0, 360, (220,) * 3, -1)


BOXES = np.array([(30, 20, 100, 70), (60, 40, 70, 50), (0, 0, 130, 90), (110, 5, 128, 30)])


def segmenter(network=None, **kwargs):
    kwargs = dict(device='cpu', size_hw=(64, 64), margin_px=5) | kwargs
    return BoxSegmenter(network or Brightness(), **kwargs)


def box_by_box(network, image, boxes, size_hw=(64, 64), margin_px=5):
    """Stock steps, one box at a time: resize, network, logits to the input's size, to the crop."""
    masks = np.zeros((len(boxes), *image.shape[:2]), dtype=bool)
    for mask, (x1, y1, x2, y2) in zip(
        masks, expand_boxes(boxes, margin_px, image.shape[:2]), strict=True
    ):
        probability = 0
        for flip in (False, True):
            crop = cv2.resize(image[y1:y2, x1:x2], size_hw[::-1])
            crop = crop[:, ::-1].copy() if flip else crop
            logits = network(torch.from_numpy(crop).permute(2, 0, 1)[None])
            for size in (size_hw, (y2 - y1, x2 - x1)):
                logits = nn.functional.interpolate(logits, tuple(map(int, size)), mode='bilinear')
            logits = logits.softmax(1)
            probability = probability + (logits.flip(3) if flip else logits)
        mask[y1:y2, x1:x2] = probability.argmax(1)[0].numpy()
    return masks


def iou(a, b):
    return (a & b).sum((1, 2)) / np.maximum((a | b).sum((1, 2)), 1)


# Logits of the input's size go through one interpolation on both sides; coarse ones, whose edges
# are sharp here, through one on ours and two on the other.
@pytest.mark.parametrize('stride, least', [(1, 1.0), (4, 0.96)])
def test_masks_are_those_of_the_stock_steps(stride, least):
    image, network = scene(), Brightness(stride=stride)
    masks = decode_rle(segmenter(network)(image, BOXES))
    expected = box_by_box(network, image, BOXES)
    assert expected[:3].any((1, 2)).all() and not expected[3].any()
    assert iou(masks, expected)[:3].min() >= least and not masks[3].any()


@pytest.mark.parametrize('flip', [False, True])
@pytest.mark.parametrize('batch_size', [1, 3, 64])
def test_batches_dense_masks_and_one_class_change_nothing(flip, batch_size):
    boxes = np.concatenate((BOXES, BOXES[::-1] + 1))
    expected = segmenter(flip=flip)(scene(), boxes)
    other = segmenter(Brightness(classes=1), flip=flip, batch_size=batch_size)
    assert other(scene(), boxes) == expected
    assert np.array_equal(other(scene(), boxes, output='dense'), decode_rle(expected))
    assert json.loads(json.dumps(expected)) == expected


def test_equal_crops_go_through_once_and_keep_their_places():
    network = Brightness()
    boxes = BOXES[[1, 0, 1, 3, 1, 0]]
    run = segmenter(network, flip=False)
    rles = run(scene(), boxes)
    assert sum(shape[0] for shape in network.calls) == 3
    assert rles == [segmenter(flip=False)(scene(), box[None])[0] for box in boxes]
    assert np.array_equal(run(scene(), boxes, output='dense'), decode_rle(rles))
    rles[0]['size'][0] = -1
    assert rles[2]['size'] == [90, 130]


def test_boxes_without_area_are_empty_and_counted_once(capfd):
    run = segmenter()
    boxes = np.array([(200, 5, 220, 9), *BOXES[:1], (5, 5, 5, 40)])
    rles = run(scene(), boxes)
    dense = run(scene(), boxes, output='dense')
    assert dense.any((1, 2)).tolist() == [False, True, False]
    assert np.array_equal(decode_rle(rles), dense)
    assert ' '.join(capfd.readouterr()).count('2 of 3 boxes have no area') == 1
    assert run(scene(), np.zeros((0, 4))) == []
    assert run(scene(), [], output='dense').shape == (0, 90, 130)
    assert run(scene(), torch.tensor(BOXES[:1])) == rles[1:2]
    for broken in ((9, 9, 5, 12), (float('nan'), 1, 2, 3)):
        with pytest.raises(ValueError, match='box 1 is'):
            run(scene(), [BOXES[0], broken])


def test_half_precision_agrees():
    run = segmenter(amp='bf16')
    masks, expected = decode_rle(run(scene(), BOXES)), decode_rle(segmenter()(scene(), BOXES))
    assert iou(masks, expected)[:3].min() > 0.98
    for amp in ('fp16', 'fp8'):
        with pytest.raises(ValueError, match='amp'):
            segmenter(amp=amp)


def test_one_pixel():
    rles = segmenter()(np.full((1, 1, 3), 200, np.uint8), [(0, 0, 1, 1)])
    assert decode_rle(rles).tolist() == [[[True]]]


def test_what_is_no_image_is_named(tmp_path):
    whole = cv2.imencode('.jpg', scene())[1].tobytes()
    for name, data in (('text.jpg', b'hello'), ('empty.png', b''), ('cut.jpg', whole[:-200])):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=name):
            segmenter()(tmp_path / name, BOXES)
    with pytest.raises(FileNotFoundError, match='missing.jpg'):
        segmenter()(tmp_path / 'missing.jpg', BOXES)
    for array in (scene() / 255.0, scene()[None], np.zeros((0, 5, 3), np.uint8)):
        with pytest.raises(ValueError, match='image array'):
            segmenter()(array, BOXES)


def test_running_out_of_device_memory_halves_the_batch():
    class Small(Brightness):
        def forward(self, inputs):
            if len(inputs) > 6:
                raise torch.cuda.OutOfMemoryError('made up')
            return super().forward(inputs)

    boxes = np.concatenate([BOXES + shift for shift in range(9)])
    run = segmenter(Small(), batch_size=32)
    assert run(scene(), boxes) == segmenter()(scene(), boxes)
    assert run.batch_size in (2, 3)  # crops, each mirrored too: no more than 6 at once

    class Broken(Brightness):
        def forward(self, inputs):
            raise RuntimeError('a bug')

    with pytest.raises(RuntimeError, match='a bug'):
        segmenter(Broken())(scene(), boxes)


def test_the_budget_bounds_the_batches():
    class Hungry(Brightness):
        def forward(self, inputs):
            held = inputs.float().repeat(1, 100, 1, 1)  # 4.7 MB a view
            return super().forward(inputs) + 0 * held[:, :2, ::4, ::4]

    network = Hungry()
    boxes = np.concatenate([BOXES + shift for shift in range(20)])
    segmenter(network, batch_size=64, memory_budget_mb=48)(scene(), boxes)
    assert 6 <= max(shape[0] for shape in network.calls) <= 10
    with pytest.raises(ValueError, match='memory_budget_mb=8 is too small.* takes 1[0-9] MB'):
        segmenter(Hungry(), memory_budget_mb=8)(scene(), boxes)
    with pytest.raises(ValueError, match="use output='rle'"):
        segmenter(memory_budget_mb=8)(
            np.zeros((1000, 1000, 3), np.uint8), np.tile(BOXES, (3, 1)), 'dense'
        )


def test_many_cores_do_not_use_up_the_budget(monkeypatch):
    image = np.zeros((1500, 2000, 3), np.uint8)  # a mask and what it takes to encode it: 9 MB
    boxes = np.tile([0, 0, 2000, 1500], (9, 1)) + np.arange(9)[:, None] * [1, 1, 0, 0]
    expected = segmenter(memory_budget_mb=128)(image, boxes)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 64)
    assert segmenter(memory_budget_mb=128)(image, boxes) == expected
    assert segmenter(memory_budget_mb=64)(image, boxes) == expected


CHILD = """
import resource, sys
import numpy as np, torch
from mmseg_plugins.box_crop import BoxSegmenter

class Stub(torch.nn.Module):
    def forward(self, x):
        return x.float().repeat(1, 8, 1, 1)[:, :2, ::4, ::4] - 128

torch.set_num_threads(1)
rng = np.random.default_rng(0)
image = rng.integers(0, 256, size=(720, 1280, 3), dtype=np.uint8)
image = np.repeat(np.repeat(image[::24, ::24], 24, 0), 24, 1)[:720, :1280]
xy = rng.integers(0, (640, 360), size=(1000, 2))
boxes = np.concatenate((xy, xy + rng.integers(20, (640, 360), size=(1000, 2))), axis=1)
run = BoxSegmenter(
    Stub(), device='cpu', size_hw=(128, 128), batch_size=64, memory_budget_mb=float(sys.argv[1])
)
run(image, boxes[:3])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
assert len(run(image, boxes)) == 1000
print(before, peak())
"""


def test_a_thousand_boxes_stay_within_the_budget(repo):
    arguments = [sys.executable, '-W', 'ignore', '-c', CHILD, '100']
    child = subprocess.run(arguments, cwd=repo, capture_output=True, text=True, check=True)
    before, after = map(float, child.stdout.split()[-2:])
    assert after - before < 100


def test_config_and_checkpoint(tiny, tmp_path):
    from mmseg.registry import MODELS

    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(tiny.model).eval()
    with torch.no_grad():  # random weights see one class everywhere; balance them
        model.decode_head.conv_seg.weight.normal_(std=2)
        logits = model(torch.randn(4, 3, 64, 64), mode='tensor')
        model.decode_head.conv_seg.bias[1] -= (logits[:, 1] - logits[:, 0]).median()
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'weights.pth')
    run = BoxSegmenter(tiny, tmp_path / 'weights.pth', device='cpu')
    assert (run.margin_px, run.size_hw) == (20, (64, 64))
    assert not run.model.training

    image = cv2.GaussianBlur(np.random.default_rng(0).normal(size=(90, 130, 3)), (0, 0), 6)
    image = (128 + 110 * image / np.abs(image).max()).astype(np.uint8)
    masks = run(image, BOXES, output='dense')
    mean, std = (getattr(model.data_preprocessor, name) for name in ('mean', 'std'))
    expected = box_by_box(
        lambda crop: model((crop.flip(1).float() - mean) / std, mode='tensor').detach(),
        image,
        BOXES,
        margin_px=20,
    )
    share = expected.mean((1, 2))
    assert ((share > 0.001) & (share < 0.999)).any()
    assert (masks != expected).mean() < 0.01

    missing = {k: v for k, v in model.state_dict().items() if 'conv_seg' not in k}
    torch.save(dict(state_dict=missing), tmp_path / 'part.pth')
    with pytest.raises(RuntimeError, match='conv_seg'):
        BoxSegmenter(tiny, tmp_path / 'part.pth', device='cpu')


def test_margin_and_size_cannot_differ_from_training(tiny):
    with pytest.raises(ValueError, match='trained with margin_px=20, not 10'):
        BoxSegmenter(tiny, device='cpu', margin_px=10)
    with pytest.raises(ValueError, match=r'size_hw=\(64, 64\)'):
        BoxSegmenter(tiny, device='cpu', size_hw=(128, 128))
    assert BoxSegmenter(tiny, device='cpu', margin_px=20, size_hw=[64, 64]).margin_px == 20
    tiny.val_dataloader.dataset.pipeline[1].margin_px = 0
    with pytest.raises(ValueError, match='crops differently'):
        BoxSegmenter(tiny, device='cpu')


def test_heads_it_does_not_fit_are_refused(tiny):
    with pytest.raises(ValueError, match='3 classes'):
        segmenter(Brightness(classes=3))(scene(), BOXES)
    tiny.model.decode_head.align_corners = tiny.model.auxiliary_head.align_corners = True
    with pytest.raises(ValueError, match='align_corners'):
        BoxSegmenter(tiny, device='cpu')


@pytest.mark.parametrize('order', ['detector first', 'segmenter first'])
def test_a_detector_of_mmdet_takes_turns_in_one_process(tiny, order):
    from mmdet.apis import inference_detector, init_detector

    config = get_config('mmdet::rpn/rpn_r50_fpn_1x_coco.py')
    backbone = dict(depth=18, base_channels=8, stem_channels=8, init_cfg=None, frozen_stages=-1)
    config.model.backbone.update(backbone)
    config.model.neck.update(in_channels=[8, 16, 32, 64], out_channels=16)
    config.model.rpn_head.update(in_channels=16, feat_channels=16)
    config.model.test_cfg.rpn.max_per_img = 5
    config.test_dataloader.dataset.pipeline[1].scale = (160, 96)

    def detector():
        torch.manual_seed(0)
        return init_detector(config, device='cpu')

    def boxes():
        torch.manual_seed(0)
        return BoxSegmenter(tiny, device='cpu')

    alone = boxes()(scene(), BOXES)
    if order == 'detector first':
        detect, segment = detector(), boxes()
    else:
        segment, detect = boxes(), detector()
    found = None
    for _ in range(2):
        instances = inference_detector(detect, scene()).pred_instances
        assert len(instances) == 5
        assert found is None or torch.equal(found, instances.bboxes)
        found = instances.bboxes
        assert len(segment(scene(), found)) == 5
        assert segment(scene(), BOXES) == alone
