"""``tools/export_onnx.py``: the file, run by ONNX Runtime, against the detector's predictions."""

import json
import re

import numpy as np
import pytest
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import init_default_scope

onnx = pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime')
pytest.importorskip('onnxscript')

CLASSES = ['ant', 'bee', 'cat']
CONFIG = """
_base_ = '{base}'
norm = dict(type='GN', num_groups=4)
model = dict(
    backbone=dict(
        base_channels=8,
        stem_channels=8,
        num_stages=2,
        strides=(1, 2),
        dilations=(1, 1),
        out_indices=(0, 1),
    ),
    neck=dict(in_channels=[8, 16], out_channels=16, num_outs=2),
    mask_head=dict(
        num_classes=3,
        in_channels=16,
        feat_channels=16,
        stacked_convs=1,
        dcn='last',
        num_grids=[12, 8],
        in_strides=[4, 8],
        strides=[8, 8],
        scale_ranges=[(1, 40), (20, 512)],
        norm_cfg=norm,
        mask_features=dict(end_level=1, feat_channels=8, out_channels=16, norm_cfg=norm),
    ),
    test_cfg=dict(max_per_img=20, mask_format='dense'),
)
"""


def enliven(
    detector: torch.nn.Module, cls_std: float = 0.15, cls_bias: float = -1, kernel_std: float = 0.3
) -> None:
    """Random weights under which dozens of cells see objects, and offsets leave their grid."""
    with torch.no_grad():
        head = detector.mask_head
        head.conv_cls.weight.normal_(0, cls_std)
        head.conv_cls.bias.fill_(cls_bias)
        head.conv_kernel.weight.normal_(0, kernel_std)
        for name, parameter in detector.named_parameters():
            if 'conv_offset' in name:
                parameter.normal_(0, 0.05)


@pytest.fixture(scope='module')
def script(load_script):
    return load_script('tools/export_onnx.py')


@pytest.fixture(scope='module')
def files(repo, tmp_path_factory) -> dict[str, str]:
    """A config, and a checkpoint of it as training leaves it."""
    folder = tmp_path_factory.mktemp('model')
    config, checkpoint = folder / 'small.py', folder / 'small.pth'
    config.write_text(CONFIG.format(base=repo / 'configs/solov2/tiny/solov2_tiny_demo.py'))
    init_default_scope('mmdet')
    torch.manual_seed(0)
    detector = MODELS.build(Config.fromfile(config).model)
    enliven(detector)
    meta = dict(dataset_meta=dict(classes=CLASSES))
    torch.save(dict(state_dict=detector.state_dict(), meta=meta), checkpoint)
    return dict(folder=folder, config=str(config), checkpoint=str(checkpoint), detector=detector)


@pytest.fixture(scope='module')
def exported(script, files):
    """The path of the file; written once, since torch takes its time."""
    out = files['folder'] / 'exported' / 'small.onnx'
    assert script.main([files['config'], files['checkpoint'], str(out)]) == 0
    return out


def test_the_graph_is_what_the_documentation_says(script, exported):
    model = onnx.load(exported)
    onnx.checker.check_model(model, full_check=True)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [('', script.OPSET)]
    assert not model.functions and {node.domain for node in model.graph.node} == {''}
    assert not {'Loop', 'Scan', 'If'} & {node.op_type for node in model.graph.node}
    shapes = {
        value.name: (
            onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type),
            *(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim),
        )
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {
        'images': (np.uint8, 'batch', 3, 'height', 'width'),
        'boxes': (np.float32, 'batch', 20, 4),
        'scores': (np.float32, 'batch', 20),
        'labels': (np.int64, 'batch', 20),
        'masks': (np.bool_, 'batch', 20, 'height', 'width'),
        'num_instances': (np.int64, 'batch'),
    }
    assert {p.key: json.loads(p.value) for p in model.metadata_props} == dict(classes=CLASSES)


@pytest.mark.parametrize('batch', [1, 3])
def test_twenty_images_equal_the_detector(script, files, exported, batch):
    """Of three sizes, none of them a multiple of 32 throughout."""
    session = onnxruntime.InferenceSession(exported)
    detector = files['detector'].eval()
    images_seen = instances_seen = 0
    for images in script.batches(None, batch):
        sizes = dict(img_shape=images.shape[-2:], ori_shape=images.shape[-2:])
        samples = [DetDataSample(metainfo=dict(scale_factor=(1, 1), **sizes)) for _ in images]
        with torch.no_grad():
            results = detector.test_step(dict(inputs=list(images), data_samples=samples))
        boxes, scores, labels, masks, counts = session.run(None, dict(images=images.numpy()))
        for i, instances in enumerate(result.pred_instances for result in results):
            count = len(instances)
            assert counts[i] == count
            np.testing.assert_allclose(scores[i, :count], instances.scores, rtol=0, atol=1e-4)
            assert labels[i, :count].tolist() == instances.labels.tolist()
            theirs = instances.masks.numpy()
            common = (masks[i, :count] & theirs).sum((1, 2))
            assert (common >= 0.99 * (masks[i, :count] | theirs).sum((1, 2))).all()
            np.testing.assert_allclose(boxes[i, :count], instances.bboxes, rtol=0, atol=1)
            assert not masks[i, count:].any() and not scores[i, count:].any()
            images_seen, instances_seen = images_seen + 1, instances_seen + count
    assert images_seen == 20 and instances_seen > 100


def test_verification_agrees_with_the_file_and_with_no_other(script, files, exported):
    detector, _ = script.load_detector(files['config'], files['checkpoint'])
    module = script.ExportableSOLOv2(detector)
    line = script.verify(exported.read_bytes(), module, None)
    assert line.startswith('ONNX Runtime agrees with torch: 20 images in batches of 1 and 3, ')
    with torch.no_grad():
        detector.mask_head.conv_kernel.weight += 0.05
    with pytest.raises(script.ExportError):
        script.verify(exported.read_bytes(), module, None)


def test_a_deformable_convolution_with_stride_in_plain_operators(tmp_path):
    """That of the backbones; as values, mmcv's."""
    init_default_scope('mmdet')
    MODELS.get('SOLOv2')
    from mmcv.ops import ModulatedDeformConv2dPack

    from mmdet_plugins.common.deform import AnyDeviceDCNv2

    torch.manual_seed(0)
    layer = AnyDeviceDCNv2(4, 5, 3, stride=2, padding=2, dilation=2).eval()
    stock = ModulatedDeformConv2dPack(4, 5, 3, stride=2, padding=2, dilation=2).eval()
    with torch.no_grad():
        layer.conv_offset.weight.normal_(0, 0.5)
    stock.load_state_dict(layer.state_dict())
    x = 3 * torch.randn(2, 4, 12, 21)
    torch.onnx.export(layer, (x,), dynamo=True, verbose=False).save(tmp_path / 'layer.onnx')
    session = onnxruntime.InferenceSession(tmp_path / 'layer.onnx')
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), stock(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    'name',
    [
        'solov2_r50_fpn_8xb2-1x_coco',
        'solov2-light-448_r50_fpn_8xb2-3x_coco',
        'solov2-light-512_r50-dcn_fpn_8xb2-3x_coco',
    ],
)
def test_the_published_models(script, repo, tmp_path, capsys, name):
    config = repo / f'configs/solov2/{name}.py'
    cfg = Config.fromfile(config).model
    cfg.backbone.init_cfg = None
    init_default_scope('mmdet')
    torch.manual_seed(0)
    detector = MODELS.build(cfg)
    detector.init_weights()
    enliven(detector, cls_std=0.03, cls_bias=-7, kernel_std=0.1)
    torch.save(detector.state_dict(), tmp_path / 'random.pth')
    out = tmp_path / 'model.onnx'
    assert script.main([str(config), str(tmp_path / 'random.pth'), str(out), '--verify']) == 0
    found = re.search(r'agrees with torch.* (\d+) instances', capsys.readouterr().out)
    assert int(found[1]) > 100
    assert out.stat().st_size > 2**26


@pytest.mark.parametrize('what', ['config', 'checkpoint', 'weights', 'method', 'nms'])
def test_one_sentence_and_no_file(script, repo, files, tmp_path, capsys, what):
    config, checkpoint, out = files['config'], files['checkpoint'], tmp_path / 'out.onnx'
    if what == 'config':
        config, sentence = 'missing.py', 'missing.py'
    elif what == 'checkpoint':
        checkpoint, sentence = 'missing.pth', "'missing.pth' is not a file"
    elif what == 'weights':
        config, sentence = repo / 'configs/solov2/tiny/solov2_tiny_demo.py', 'does not fit'
    elif what == 'method':
        config = repo / 'configs/solo/tiny/solo_tiny_demo.py'
        checkpoint, sentence = tmp_path / 'solo.pth', 'only SOLOv2'
        torch.save(MODELS.build(Config.fromfile(config).model).state_dict(), checkpoint)
    else:
        config, sentence = tmp_path / 'hard.py', 'only Matrix NMS is exported, not hard'
        config.write_text(f"_base_ = '{files['config']}'\nmodel = dict(test_cfg=dict(nms='hard'))")
    assert script.main([str(config), str(checkpoint), str(out)]) == 1
    error = capsys.readouterr().err
    assert sentence in error and len(error.strip().splitlines()) == 1
    assert not out.exists()
