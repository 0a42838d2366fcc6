"""Folders of images through the stock test loop: the same bytes whatever happens."""

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmdet.registry import DATA_SAMPLERS, DATASETS, METRICS, MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.model import BaseModel
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from mmdet_plugins.common.mask_postprocess import EncodedMasks
from mmdet_plugins.common.pseudo_store import EMBEDDINGS, LABELS, StoreError
from mmdet_plugins.ops.free_mask import free_masks
from mmdet_plugins.ops.rle import encode_masks

SCRIPT = Path(__file__).with_name('free_mask_run.py')
SIZES = [(72, 96), (96, 72), (72, 96), (64, 64), (72, 96), (96, 72), (72, 96), (72, 96)]
MEAN = torch.tensor([123.675, 116.28, 103.53])[:, None, None]
STD = torch.tensor([58.395, 57.12, 57.375])[:, None, None]


@pytest.fixture(scope='module')
def script():
    spec = importlib.util.spec_from_file_location('free_mask_run', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def photograph(path, hw, seed):
    """A few bright ellipses on a dark, noisy ground."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 60, (*hw, 3), dtype=np.uint8)
    for _ in range(3):
        centre = [int(rng.integers(length)) for length in hw[::-1]]
        axes = [int(n) for n in rng.integers(8, 24, 2)]
        colour = [int(c) for c in rng.integers(60, 256, 3)]
        cv2.ellipse(image, centre, axes, int(rng.integers(180)), 0, 360, colour, -1)
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image)


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """Eight photographs of three sizes, one cut off and one that is no image."""
    folder = tmp_path_factory.mktemp('images')
    for i, hw in enumerate(SIZES):
        photograph(folder / f'{i}.jpg', hw, i)
    whole = (folder / '4.jpg').read_bytes()
    (folder / '4.jpg').write_bytes(whole[: len(whole) * 2 // 3])
    (folder / 'zero.png').write_bytes(b'')
    return folder


@pytest.fixture(scope='module')
def weights(script, tmp_path_factory):
    """The backbone alone, under its own names."""
    cfg = Config.fromfile(script.CONFIG)
    init_default_scope('mmdet')
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.backbone.init_weights()
    path = tmp_path_factory.mktemp('weights') / 'backbone.pth'
    torch.save(model.backbone.state_dict(), path)
    return str(path)


def content(folder):
    return {name: (Path(folder) / name).read_bytes()
            for name in ('manifest.json', LABELS, EMBEDDINGS)}  # fmt: skip


def read(store):
    return json.loads((store / LABELS).read_text()), np.load(store / EMBEDDINGS)


@pytest.fixture(scope='module')
def finished(script, images, weights, tmp_path_factory):
    """An undisturbed run of one process, its figures and its folder."""
    store = tmp_path_factory.mktemp('run') / 'store'
    torch.set_num_threads(1)
    return script.run(images, store, weights), store


def child(repo, *args, ranks=0):
    launcher = []
    if ranks:
        with socket.socket() as server:
            server.bind(('127.0.0.1', 0))
            port = server.getsockname()[1]
        launcher = ['-m', 'torch.distributed.run', f'--nproc_per_node={ranks}']
        launcher += [f'--master_port={port}']
    return subprocess.Popen(
        [sys.executable, *launcher, str(SCRIPT), *map(str, args)],
        cwd=repo,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '-1'},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_labels_are_those_of_the_algorithm(finished, images, weights, script):
    figures, store = finished
    assert figures['store/images'] == 9 and figures['store/unreadable'] == 2
    data, embeddings = read(store)
    assert figures['store/masks'] == len(data['annotations']) == len(embeddings) > 5
    model = MODELS.build(Config.fromfile(script.CONFIG).model).eval()
    model.backbone.load_state_dict(torch.load(weights))
    coco = COCO(store / 'pseudo_labels.json')
    for image in coco.dataset['images']:
        hw = image['height'], image['width']
        pixels = cv2.imread(str(images / image['file_name']))
        pixels = cv2.resize(pixels, (2 * hw[1], 2 * hw[0]), interpolation=cv2.INTER_LINEAR)
        pixels = torch.from_numpy(pixels[:, :, ::-1].copy()).permute(2, 0, 1).float()
        mean, std = torch.tensor([[123.675, 116.28, 103.53], [58.395, 57.12, 57.375]])[
            ..., None, None
        ]
        with torch.no_grad():
            features = model.backbone(((pixels - mean) / std)[None])[-1]
        (expected,) = free_masks(features, hw, max_width=0.95)
        annotations = coco.loadAnns(coco.getAnnIds(image['id']))
        assert [a['segmentation'] for a in annotations] == expected.rles
        found = torch.tensor([a['score'] for a in annotations])
        torch.testing.assert_close(found, expected.scores, rtol=0, atol=1e-4)
        rows = torch.from_numpy(embeddings[[a['id'] - 1 for a in annotations]].astype(np.float32))
        torch.testing.assert_close(rows, expected.embeddings, rtol=0, atol=1e-3)


def test_unreadable_images_are_listed(finished):
    _, store = finished
    listed = json.loads((store / 'manifest.json').read_text())['images']
    reasons = {image['file_name']: image.get('unreadable') for image in listed}
    assert reasons.pop('4.jpg') == '4.jpg is cut off'
    assert reasons.pop('zero.png') == 'its header cannot be read: not an image'
    assert set(reasons.values()) == {None}
    names = [image['file_name'] for image in
             json.loads((store / 'pseudo_labels.json').read_text())['images']]  # fmt: skip
    assert names == sorted(reasons)


def test_killed_and_on_two_ranks_the_bytes_are_the_same(
    finished, script, repo, images, weights, tmp_path
):
    _, store = finished
    killed, pair = tmp_path / 'killed', tmp_path / 'pair'
    # 9 images in 4 batches, two writes each: the third batch is lost.
    children = child(repo, images, killed, weights, 5), child(repo, images, pair, weights, ranks=2)
    outputs = [process.communicate()[0] for process in children]
    assert children[0].returncode == -signal.SIGKILL, outputs[0][-2000:]
    assert children[1].returncode == 0, outputs[1][-2000:]
    assert not (killed / 'pseudo_labels.json').exists()
    assert len(list((pair / 'shards').glob('*.jsonl'))) == 2
    script.run(images, killed, weights)
    assert content(killed) == content(store) == content(pair)


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(weights=None), 'The backbone has random weights, in whose features there are no obj'),
        (dict(model__backbone__depth=50), r'of the \d+ parameters of the backbone are'),
        (dict(model__free_mask__max_num=3), r'configuration \(model.free_mask.max_num was 20, is'),
        (
            dict(test_dataloader__dataset__pipeline__1__scale_factor=3.0),
            r'configuration \(pipeline was .*2.0.*, is .*3.0',
        ),
        (dict(test_dataloader__batch_size=2), 'begun with batches of 3, not of 2'),
    ],
)
def test_refusals(options, message, finished, script, images, weights):
    _, store = finished
    before = content(store)
    options = dict(options)
    with pytest.raises(RuntimeError, match=message):
        script.run(images, store, options.pop('weights', weights), **options)
    assert content(store) == before


def test_other_weights_are_another_configuration(finished, script, images, weights, tmp_path):
    other = {key: value + 0.01 for key, value in torch.load(weights).items()}
    torch.save(other, tmp_path / 'other.pth')
    with pytest.raises(StoreError, match='another configuration .weights was'):
        script.run(images, finished[1], str(tmp_path / 'other.pth'))


def test_images_of_the_same_names_are_another_configuration(
    finished, script, images, weights, tmp_path
):
    """Moved they are the same."""
    moved = tmp_path / 'moved'
    shutil.copytree(images, moved)
    before = content(finished[1])
    script.run(moved, finished[1], weights)
    assert content(finished[1]) == before
    photograph(moved / '3.jpg', SIZES[3], 99)
    with pytest.raises(StoreError, match='another configuration .content of the images was'):
        script.run(moved, finished[1], weights)


def test_sampler_and_metric_say_what_they_lack():
    init_default_scope('mmdet')
    sampler = DATA_SAMPLERS.build(dict(type='FreeSOLOPlannedBatches', sampler=None, batch_size=2))
    with pytest.raises(RuntimeError, match="has no plan: add dict.type='FreeSOLOStoreHook'"):
        iter(sampler)
    with pytest.raises(RuntimeError, match="has no store: add dict.type='FreeSOLOStoreHook'"):
        METRICS.build(dict(type='FreeSOLOStoreMetric')).process(None, [])


def test_duplicates_are_named(tmp_path, caplog):
    init_default_scope('mmdet')
    photograph(tmp_path / 'a.png', (72, 96), 3)
    shutil.copy(tmp_path / 'a.png', tmp_path / 'b.png')
    MMLogger.get_current_instance().addHandler(caplog.handler)
    dataset = DATASETS.build(dict(type='FreeSOLOImageDataset', data_root=str(tmp_path)))
    assert len(dataset) == 2
    assert f'Copies among the images: 1, {tmp_path}/b.png of a.png for one' in caplog.text


def test_weights_of_init_cfg_and_of_a_detector(finished, script, images, weights, tmp_path):
    """Both count, which is not the stock test loop's doing, and are the same configuration."""
    whole = {f'backbone.{key}': value for key, value in torch.load(weights).items()}
    torch.save(dict(state_dict=whole | {'mask_head.x': torch.ones(1)}), tmp_path / 'detector.pth')
    before = content(finished[1])
    script.run(images, finished[1], str(tmp_path / 'detector.pth'))
    init_cfg = dict(type='Pretrained', checkpoint=weights)
    script.run(images, finished[1], None, model__backbone__init_cfg=init_cfg)
    assert content(finished[1]) == before


def test_empty_folder_and_one_image(script, weights, tmp_path):
    images = tmp_path / 'images'
    images.mkdir()
    with pytest.raises(ValueError, match='there is no image in this folder'):
        script.run(images, tmp_path / 'store', weights)
    photograph(images / 'one.png', (72, 96), 3)
    assert script.run(images, tmp_path / 'store', weights)['store/images'] == 1


def test_no_mask_found(script, weights, tmp_path):
    photograph(tmp_path / 'images' / 'one.png', (72, 96), 3)
    options = dict(model__free_mask__min_score=2.0)
    figures = script.run(tmp_path / 'images', tmp_path / 'store', weights, **options)
    assert figures['store/without_masks'] == 1 and figures['store/masks'] == 0
    assert figures['store/dropped_score'] > 0
    data, embeddings = read(tmp_path / 'store')
    assert len(data['images']) == 1 and len(embeddings) == 0


class Stub(BaseModel):
    """One mask an image, the whole of it."""

    def __init__(self, **_):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, inputs, data_samples, mode):
        for sample in data_samples:
            height, width = sample.ori_shape
            sample.pred_instances = InstanceData(
                bboxes=torch.tensor([[0.0, 0, width, height]]),
                scores=torch.ones(1),
                masks=EncodedMasks(encode_masks(torch.ones(1, height, width))),
            )
        return data_samples


def test_thousands_of_tiny_images(script, monkeypatch, tmp_path):
    images = tmp_path / 'images'
    images.mkdir()
    encoded = [cv2.imencode('.png', np.zeros((4, 5, 3), np.uint8))[1].tobytes()]
    encoded += [cv2.imencode('.png', np.zeros((5, 4, 3), np.uint8))[1].tobytes()]
    for i in range(2000):
        (images / f'{i:04d}.png').write_bytes(encoded[i % 3 == 0])
    init_default_scope('mmdet')
    monkeypatch.setitem(MODELS.module_dict, 'Stub', Stub)
    model = dict(_delete_=True, type='Stub', data_preprocessor=None)
    options = dict(model=model, test_dataloader__batch_size=64, log_level='ERROR')
    figures = script.run(images, tmp_path / 'store', None, **options)
    assert figures['store/masks'] == figures['store/images'] == 2000
    data, _ = read(tmp_path / 'store')
    names = {image['id']: image['file_name'] for image in data['images']}
    assert [names[a['image_id']] for a in data['annotations']] == [
        f'{i:04d}.png' for i in range(2000)
    ]


def test_images_of_different_sizes_in_one_batch(script, weights, images):
    """Padding is no key: a batch that is not planned gives nearly what its images alone do."""
    init_default_scope('mmdet')
    model = MODELS.build(Config.fromfile(script.CONFIG).model).eval()
    model.load_state_dict(torch.load(weights), strict=False)
    sizes = [(128, 192), (96, 128)]
    inputs = [torch.from_numpy(cv2.imread(str(images / f'{i}.jpg'))).permute(2, 0, 1)
              for i in (0, 2)]  # fmt: skip
    inputs = [torch.nn.functional.interpolate(x[None].float(), hw)[0].byte()
              for x, hw in zip(inputs, sizes, strict=True)]  # fmt: skip

    def predict(*members):
        samples = [DetDataSample(metainfo=dict(img_shape=sizes[i], ori_shape=sizes[i]))
                   for i in members]  # fmt: skip
        data = dict(inputs=[inputs[i] for i in members], data_samples=samples)
        return [sample.pred_instances for sample in model.test_step(data)]

    together, alone = predict(0, 1), [predict(i)[0] for i in (0, 1)]
    assert len(alone[0].masks) == len(together[0].masks) > 0
    overlaps = coco_mask.iou(list(together[0].masks), list(alone[0].masks), [0] * len(alone[0]))
    assert overlaps.diagonal().min() > 0.99
    assert all(rle['size'] == [96, 128] for rle in together[1].masks)
