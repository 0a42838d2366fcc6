"""What stock mmdet reads by way of packages that cannot be installed: panoptic PNGs and LVIS.

Shapes: G thing instances of one image, ``H W`` its original size.
"""

from typing import Any

import numpy as np
from mmdet.datasets.transforms import LoadAnnotations
from mmdet.registry import DATASETS, TRANSFORMS
from mmdet.structures.mask import BitmapMasks
from mmengine.fileio import get

from ..common.datasets import OpenWorldCocoDataset
from ..ops.coco_json import check_coco
from ..ops.panoptic import decode_id_png


def read_ids(path: str, backend_args: dict | None = None) -> np.ndarray:
    """Read the id map of a panoptic annotation, int32 ``[H, W]``; errors name the file."""
    try:
        return decode_id_png(get(path, backend_args=backend_args))
    except FileNotFoundError:
        raise FileNotFoundError(
            f'{path}: the panoptic annotation is missing; supply it, or correct the folder of PNGs.'
        ) from None
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from None


@TRANSFORMS.register_module()
class SOLOLoadPanopticAnnotations(LoadAnnotations):
    """Load boxes, labels, masks and the semantic map that ``CocoPanopticDataset`` lists.

    In place of ``LoadPanopticAnnotations``, which needs ``panopticapi``. The semantic map,
    ``gt_seg_map`` uint8 ``[H, W]``, has the labels of things (crowds included) and stuff, and 255
    where nothing is annotated.

    Args:
        backend_args: Of mmengine's file backend.

    Raises:
        FileNotFoundError, ValueError: The PNG is missing, is none of segment ids, differs in size
            from the image, or lacks a segment.
    """

    def __init__(self, backend_args: dict | None = None) -> None:
        super().__init__(backend_args=backend_args)

    def transform(self, results: dict) -> dict:
        self._load_bboxes(results)
        self._load_labels(results)
        path, segments = results['seg_map_path'], results['segments_info']
        ids = read_ids(path, self.backend_args)
        size = (results['height'], results['width'])
        if ids.shape != size:
            raise ValueError(f'{path}: {ids.shape} pixels (h, w), but the image has {size}.')
        semantic = np.full(ids.shape, 255, np.uint8)
        things = [segment for segment in segments if segment['is_thing']]
        masks = np.empty((len(things), *ids.shape), np.uint8)
        for segment in segments:
            mask = ids == segment['id']
            if not mask.any():
                raise ValueError(f'{path}: the segment {segment["id"]} of the JSON is not in it.')
            semantic[mask] = segment['category']
        for mask, segment in zip(masks, things, strict=True):
            np.equal(ids, segment['id'], out=mask, casting='unsafe')
        results['gt_masks'] = BitmapMasks(masks, *ids.shape)
        results['gt_seg_map'] = semantic
        return results


@DATASETS.register_module()
class SOLOLVISDataset(OpenWorldCocoDataset):
    """LVIS v0.5 and v1 from their own JSON files, with all classes these list.

    In place of ``LVISV05Dataset`` and ``LVISV1Dataset``, which need ``lvis`` (broken on NumPy 2).
    Labels follow the file's order of classes. As there, ``data_prefix['img']`` holds the folders
    ``train2017`` and ``val2017`` for v1, whose files name images by URL, and for v0.5, whose
    ``COCO_val2014_`` goes, is one of these folders. Rare classes are repeated by mmengine's
    ``ClassBalancedDataset`` around it (``oversample_thr=1e-3``).

    Args:
        **kwargs: As for :class:`.OpenWorldCocoDataset`.
    """

    def __init__(self, *, class_agnostic: bool = False, **kwargs: Any) -> None:
        super().__init__(class_agnostic=class_agnostic, **kwargs)

    def _to_coco(self, data: Any) -> dict:
        data = check_coco(data, self.ann_file)
        images = [{**image, 'file_name': _file_name(image)} for image in data['images']]
        return {**data, 'images': images}


def _file_name(image: dict) -> str:
    if 'file_name' not in image:
        return '/'.join(image['coco_url'].split('/')[-2:])
    name = image['file_name']
    return name[-16:] if name.startswith('COCO_') else name
