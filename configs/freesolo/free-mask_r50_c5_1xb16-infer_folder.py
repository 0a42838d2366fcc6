"""Coarse masks of a folder of images.

mim test mmdet CONFIG --checkpoint FILE --cfg-options test_dataloader.dataset.data_root=FOLDER \
    custom_hooks.0.folder=STORE
"""

_base_ = [
    './_base_/free-mask_r50.py',
    './_base_/unlabeled_folder.py',
    'mmdet::_base_/default_runtime.py',
]
