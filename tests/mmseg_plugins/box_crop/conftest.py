"""A folder of two small images with instances of every form COCO allows."""

import json

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from pycocotools import mask as coco_mask

SIZES_HW = {1: (48, 80), 2: (60, 44)}


def mask_of(image_id, x1, y1, x2, y2):
    mask = np.zeros(SIZES_HW[image_id], dtype=np.uint8)
    mask[y1:y2, x1:x2] = 1
    return mask


def compressed(mask):
    rle = coco_mask.encode(np.asfortranarray(mask))
    return dict(size=rle['size'], counts=rle['counts'].decode())


def uncompressed(mask):
    flat = mask.ravel(order='F')
    ends = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *ends, flat.size]).tolist()
    return dict(size=list(mask.shape), counts=[0, *counts] if flat[0] else counts)


@pytest.fixture
def coco(tmp_path):
    """Writes the folder; returns (root, annotations by id)."""
    (tmp_path / 'images').mkdir()
    rng = np.random.default_rng(0)
    images = []
    for image_id, (height, width) in SIZES_HW.items():
        pixels = rng.integers(0, 256, size=(height, width, 3), dtype=np.uint8)
        cv2.imwrite(str(tmp_path / 'images' / f'{image_id}.png'), pixels)
        images.append(dict(id=image_id, file_name=f'{image_id}.png', height=height, width=width))
    segmentations = {
        10: (1, [[20, 10, 50, 10, 50, 30, 20, 30]]),
        11: (1, compressed(mask_of(1, 60, 5, 79, 40))),
        12: (2, uncompressed(mask_of(2, 0, 0, 9, 7))),
        20: (1, compressed(mask_of(1, 0, 0, 0, 0))),  # empty
        21: (1, [[1, 2, 3]]),  # broken
        22: (7, [[20, 10, 50, 10, 50, 30]]),  # on no image
        23: (2, compressed(mask_of(2, 1, 1, 30, 30))),  # a crowd
    }
    annotations = [
        dict(
            id=key,
            image_id=image_id,
            category_id=1 + key % 3,
            segmentation=segmentation,
            iscrowd=int(key == 23),
        )
        for key, (image_id, segmentation) in segmentations.items()
    ]
    content = dict(images=images, annotations=annotations, categories=[])
    (tmp_path / 'instances.json').write_text(json.dumps(content))
    return tmp_path


@pytest.fixture
def tiny(repo, coco):
    """The Swin-T leaf at toy size: ResNet-18 with 8 channels, 64x64 crops, the folder above."""
    config = Config.fromfile(repo / 'configs/uvo/box-crop_upernet_swin-t_8xb4-300k_mixed.py')
    norm = dict(type='BN')
    config.model.data_preprocessor.size = (64, 64)
    config.model.backbone = dict(
        type='ResNetV1c',
        depth=18,
        base_channels=8,
        stem_channels=8,
        num_stages=4,
        out_indices=(0, 1, 2, 3),
        norm_cfg=norm,
    )
    config.model.decode_head.update(in_channels=[8, 16, 32, 64], channels=16, norm_cfg=norm)
    config.model.auxiliary_head.update(in_channels=32, channels=8, norm_cfg=norm)
    train, val = config.train_dataloader, config.val_dataloader
    data = dict(data_root=str(coco), ann_file='instances.json', data_prefix=dict(img_path='images'))
    train.dataset.datasets = [{**part, **data} for part in train.dataset.datasets[:2]]
    val.dataset.update(data)
    for loader in (train, val):
        loader.update(num_workers=0, persistent_workers=False)
    pipelines = [part.pipeline for part in train.dataset.datasets] + [val.dataset.pipeline]
    for pipeline in pipelines:
        for transform in pipeline:
            if transform.type == 'Resize':
                transform.scale = (64, 64)
    config.test_dataloader = config.val_dataloader
    config.work_dir = str(coco / 'work')
    return config
