"""A folder of images as a data set, for methods that need no labels."""

import logging
from typing import Any

import cv2
import numpy as np
from mmdet.datasets import BaseDetDataset
from mmdet.registry import DATASETS
from mmengine.fileio import exists, get, join_path, list_dir_or_file
from mmengine.logging import print_log

from .pseudo_store import SUFFIXES

EXTENSIONS = tuple(sorted(SUFFIXES))


@DATASETS.register_module()
class ImageFolderDataset(BaseDetDataset):
    """Every image below ``data_root/data_prefix['img']``, sorted by path; hidden files are not.

    Each sample has ``img_path``, ``file_name`` (relative to the folder) and ``img_id`` (its place
    in the order). An image that cannot be decoded is named in the log, once a worker, and another
    one takes its place in training; in test mode it is an error.

    Args:
        data_prefix, **kwargs: As for mmdet's data sets; ``ann_file`` stays empty.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It holds no image.
    """

    METAINFO = {'classes': ('object',)}

    def __init__(self, *, data_prefix: dict | None = None, **kwargs: Any) -> None:
        self._named: set[str] = set()
        super().__init__(data_prefix=data_prefix or {'img': ''}, **kwargs)

    def load_data_list(self) -> list[dict]:
        folder = self.data_prefix['img']
        if not exists(folder, backend_args=self.backend_args):
            raise FileNotFoundError(
                f'{folder or "The folder of images"} does not exist: set data_root and data_prefix.'
            )
        listed = list_dir_or_file(
            folder, list_dir=False, recursive=True, backend_args=self.backend_args
        )
        names = sorted(
            name for name in listed if name.lower().endswith(EXTENSIONS) and '/.' not in f'/{name}'
        )
        if not names:
            raise ValueError(
                f'{folder} holds no image: none of its files ends in {", ".join(EXTENSIONS)}.'
            )
        return [
            dict(
                img_path=join_path(folder, name, backend_args=self.backend_args),
                file_name=name,
                img_id=img_id,
                instances=[],
            )
            for img_id, name in enumerate(names)
        ]

    def filter_data(self) -> list[dict]:
        """All of them: no image has a label to be judged by."""
        return self.data_list

    def prepare_data(self, idx: int) -> Any:
        """A sample through the pipeline; None in training for an image that cannot be read.

        Raises:
            ValueError: It cannot be read, in test mode.
        """
        path = self.get_data_info(idx)['img_path']
        try:
            return super().prepare_data(idx)
        except Exception as error:
            if self._is_readable(path):
                raise
            sentence = f'{path} cannot be read as an image: repair or remove it.'
            if self.test_mode:
                raise ValueError(sentence) from error
        if path not in self._named:
            self._named.add(path)
            print_log(f'{sentence} Others are taken in its place.', 'current', logging.WARNING)
        return None

    def _is_readable(self, path: str) -> bool:
        try:
            content = np.frombuffer(get(path, backend_args=self.backend_args), np.uint8)
            return cv2.imdecode(content, cv2.IMREAD_COLOR) is not None
        except (OSError, cv2.error):
            return False
