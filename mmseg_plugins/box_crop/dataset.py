"""One sample per object instance, read from COCO-style instance JSON."""

import os.path as osp
from collections import defaultdict

from mmengine import fileio
from mmengine.dataset import BaseDataset
from mmengine.logging import print_log
from mmseg.registry import DATASETS

from mmdet_plugins.common.uvo import coco_or_uvo
from mmdet_plugins.ops.coco_json import entry_name, read_json
from mmdet_plugins.ops.rle import area, rle_to_xyxy, segmentation_to_rle


@DATASETS.register_module()
class BoxCropDataset(BaseDataset):
    """Instances of any class from the JSON of COCO or UVO, or converted from Open Images or VOC.

    mmseg's data sets pair an image file with a mask file; this one needs no exported masks.
    Polygons are turned into run-length encodings once, while loading, so that a sample is a few
    hundred bytes and no mask is decoded before its turn.

    Crowds, empty masks and broken ones are left out, and counted in one warning. mmengine's
    arguments apply: ``ann_file``, ``data_root``, ``data_prefix=dict(img_path=...)``, ``indices``,
    ``pipeline``, ``test_mode``.

    Args:
        min_area_px: Leave out masks of fewer pixels.

    Raises:
        ValueError: If the file is not COCO-style instance JSON, or no instance is left.
    """

    METAINFO = dict(classes=('background', 'object'), palette=[[0, 0, 0], [220, 20, 60]])

    def __init__(
        self,
        *args,
        data_prefix: dict | None = None,
        min_area_px: int = 1,
        backend_args: dict | None = None,
        **kwargs,
    ) -> None:
        self.min_area_px = min_area_px
        self.backend_args = backend_args
        super().__init__(*args, data_prefix=data_prefix or dict(img_path=''), **kwargs)

    def load_data_list(self) -> list[dict]:
        """Return ``img_path, img_id, ann_id, bbox_xyxy, rle`` of every usable instance."""
        images, annotations = self._read()
        skipped = defaultdict(list)
        data_list = []
        for i, annotation in enumerate(annotations):
            where = entry_name('annotation', i, annotation)
            if not isinstance(annotation, dict):
                skipped['not an object'].append(where)
                continue
            image = images.get(annotation.get('image_id'))
            if image is None:
                skipped['on an image that is not listed'].append(where)
                continue
            if annotation.get('iscrowd', 0):
                skipped['a crowd'].append(where)
                continue
            try:
                rle = segmentation_to_rle(
                    annotation.get('segmentation'), (image['height'], image['width'])
                )
            except ValueError as error:
                skipped[f'broken ({error})'].append(where)
                continue
            if int(area([rle])[0]) < max(self.min_area_px, 1):
                skipped['empty or too small'].append(where)
                continue
            data_list.append(
                dict(
                    img_path=image['path'],
                    img_id=annotation['image_id'],
                    ann_id=annotation.get('id'),
                    bbox_xyxy=rle_to_xyxy([rle])[0].tolist(),
                    rle=rle,
                    seg_fields=[],
                )
            )
        if skipped:
            counts = '; '.join(
                f'{len(names)} {reason}, the first {names[0]}' for reason, names in skipped.items()
            )
            print_log(f'{self.ann_file}: instances left out: {counts}', 'current', 30)
        if not data_list:
            raise ValueError(
                f'{self.ann_file} has no usable instance: {len(annotations)} annotations, '
                f'{len(images)} images; are there segmentations in it, and not boxes only?'
            )
        return data_list

    def _read(self) -> tuple[dict, list[dict]]:
        with fileio.get_local_path(self.ann_file, backend_args=self.backend_args) as path:
            content = coco_or_uvo(read_json(path), self.ann_file)
        prefix = self.data_prefix['img_path']
        try:
            images = {
                image['id']: dict(
                    path=osp.join(prefix, image['file_name']),
                    height=int(image['height']),
                    width=int(image['width']),
                )
                for image in content['images']
            }
        except (KeyError, TypeError) as error:
            raise ValueError(
                f'{self.ann_file}: an image without id, file_name, height or width '
                f'({type(error).__name__}: {error})'
            ) from error
        return images, content['annotations']
