"""COCO-style data sets for open-world work: one class "object", or the classes the file has."""

import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from mmdet.datasets import CocoDataset
from mmdet.registry import DATASETS
from mmengine.fileio import get_local_path

from ..ops.coco_json import (
    base_category_ids,
    by_image,
    check_coco,
    check_entries,
    listed,
    read_json,
)
from .uvo import coco_or_uvo


@DATASETS.register_module()
class OpenWorldCocoDataset(CocoDataset):
    """A COCO-style data set seen without its classes, or with those its JSON file lists.

    Beyond ``CocoDataset`` it reads the categories from the file, where the stock class needs
    ``metainfo`` to repeat them and dies of "need at least one array to concatenate" if a name
    differs; and it takes novel objects out of the training data.

    Args:
        class_agnostic: Every category becomes class 0, "object". Else the classes are those of
            ``metainfo``, in its order, or all that the file lists if it gives none.
        base_categories: Names of the categories to train on; the others are novel. ``None`` for
            all. A data set in test mode keeps them all: the metric tells them apart.
        novel: What becomes of novel objects: ``'drop'`` leaves them out, so that they count as
            background; ``'ignore'`` marks them as crowds, which neither reward nor punish.
        check_images: Look for every image file at the start, and name those that are missing.
        data_prefix, metainfo, **kwargs: As for ``CocoDataset``, by name.
    """

    METAINFO = {'classes': ('object',), 'palette': [(220, 20, 60)]}

    def __init__(
        self,
        *,
        class_agnostic: bool = True,
        base_categories: Sequence[str] | None = None,
        novel: str = 'drop',
        check_images: bool = False,
        data_prefix: dict | None = None,
        metainfo: dict | None = None,
        **kwargs: Any,
    ) -> None:
        if novel not in ('drop', 'ignore'):
            raise ValueError(f"novel must be 'drop' or 'ignore', not {novel!r}.")
        self.class_agnostic = class_agnostic
        self.base_categories = base_categories
        self.novel = novel
        self.check_images = check_images
        self._given_classes = (metainfo or {}).get('classes')
        super().__init__(
            data_prefix={'img': ''} if data_prefix is None else data_prefix,
            metainfo=metainfo,
            **kwargs,
        )

    def load_data_list(self) -> list[dict]:
        """Read ``self.ann_file``.

        Raises:
            FileNotFoundError, ValueError: The file or an image is missing, the file is not COCO's,
                classes are asked for that it lacks, or an entry cannot be used.
        """
        data = self._read()
        for key in ('images', 'annotations'):
            counts = Counter(entry['id'] for entry in data[key])
            shared = [i for i, count in counts.items() if count > 1]
            if shared:
                raise ValueError(
                    f'{self.ann_file}: ids of {key} must differ; '
                    f'these are shared: {listed(shared, 5)}.'
                )
        self._set_classes(data)
        annotations = self._without_novel(data)
        annotations_of = by_image(annotations)
        self.cat_img_map = defaultdict(list)
        for annotation in annotations:
            self.cat_img_map[annotation['category_id']].append(annotation['image_id'])
        data_list = [
            self.parse_data_info(
                {
                    'raw_img_info': {**image, 'img_id': image['id']},
                    'raw_ann_info': annotations_of[image['id']],
                }
            )
            for image in data['images']
        ]
        if self.check_images:
            self._check_images(data_list)
        return data_list

    def prepare_data(self, idx: int) -> Any:
        """A sample through the pipeline.

        Raises:
            ValueError: The image, as decoded, is not of the size that its boxes were drawn on.
        """
        info = self.get_data_info(idx)
        stated = info['height'], info['width']
        data = self.pipeline(info)
        found = info.get('ori_shape', stated)  # the loading transform has written it
        if found != stated:
            raise ValueError(
                f'{info["img_path"]} is {found[1]} x {found[0]} pixels, {self.ann_file} says '
                f'{stated[1]} x {stated[0]}: correct it, or load the image with color_type='
                "'color_ignore_orientation' if its EXIF data turns it. "
                'tools/check_data.py lists all such images.'
            )
        return data

    def filter_data(self) -> list[dict]:
        """Filter as ``CocoDataset`` does; explain it if nothing is left."""
        kept = super().filter_data()
        if not kept:
            empty = sum(not info['instances'] for info in self.data_list)
            raise ValueError(
                f'{self.ann_file}: none of its {len(self.data_list)} images can be used: {empty} '
                f'have no valid object, and filter_cfg={self.filter_cfg} took out the others.'
            )
        return kept

    def _read(self) -> dict:
        with get_local_path(self.ann_file, backend_args=self.backend_args) as path:
            try:
                data = read_json(path)
            except (OSError, ValueError) as error:  # the local copy's name tells nothing
                raise type(error)(str(error).replace(str(path), self.ann_file)) from None
        return check_entries(self._to_coco(data), self.ann_file)

    def _to_coco(self, data: Any) -> dict:
        return check_coco(data, self.ann_file)

    def _set_classes(self, data: dict) -> None:
        ids = {category['id'] for category in data['categories']}
        used = {annotation['category_id'] for annotation in data['annotations']}
        given = self._given_classes
        if self.class_agnostic:
            if given is not None and len(given) != 1:
                raise ValueError(
                    f'{self.ann_file}: metainfo gives {len(given)} classes, but a class-agnostic '
                    'data set has one. Set class_agnostic=False, or leave the classes out.'
                )
            self.cat_ids = sorted(ids | used)
            self.cat2label = dict.fromkeys(self.cat_ids, 0)
            return
        if used - ids:
            raise ValueError(
                f'{self.ann_file}: annotations have the category ids {listed(sorted(used - ids))}, '
                'which it does not list: add the categories, or set class_agnostic=True.'
            )
        names = dict.fromkeys(category['name'] for category in data['categories'])
        classes = tuple(names if given is None else given)
        missing = [name for name in classes if name not in names]
        if missing:
            raise ValueError(
                f'{self.ann_file}: metainfo asks for the classes {listed(missing)}, which the file '
                f'does not have; it has {listed(names)}. Leave the classes out to take those of '
                'the file, or correct their spelling.'
            )
        self._metainfo['classes'] = classes
        if given is None:
            self._metainfo.pop('palette', None)
        self.cat2label = {
            category['id']: classes.index(category['name'])
            for category in data['categories']
            if category['name'] in classes
        }
        self.cat_ids = list(self.cat2label)

    def _without_novel(self, data: dict) -> list[dict]:
        if self.base_categories is None or self.test_mode:
            return data['annotations']
        base = base_category_ids(data['categories'], self.base_categories)
        if self.novel == 'drop':
            return [ann for ann in data['annotations'] if ann['category_id'] in base]
        return [
            ann if ann['category_id'] in base else {**ann, 'iscrowd': 1}
            for ann in data['annotations']
        ]

    def _check_images(self, data_list: list[dict]) -> None:
        missing = [info['img_path'] for info in data_list if not os.path.isfile(info['img_path'])]
        if missing:
            raise FileNotFoundError(
                f'{len(missing)} of the {len(data_list)} images that {self.ann_file} lists are '
                f'missing, among them {listed(missing, 3)}. '
                'Supply them, or correct data_root and data_prefix.'
            )


@DATASETS.register_module()
class UVODataset(OpenWorldCocoDataset):
    """UVO from its own JSON files, frames (UVO-Sparse) or videos (UVO-Dense).

    The frames of a video are found as ``file_names`` lists them, below ``data_prefix['img']``.
    Frames have to be cut from the videos by the user, so they are looked for at the start.

    Args:
        check_images: See :class:`OpenWorldCocoDataset`.
        **kwargs: As for :class:`OpenWorldCocoDataset`.
    """

    def __init__(self, *, check_images: bool = True, **kwargs: Any) -> None:
        super().__init__(check_images=check_images, **kwargs)

    def _to_coco(self, data: Any) -> dict:
        return coco_or_uvo(data, self.ann_file)
