"""Coarse masks of the made-up scenes with a narrow ResNet-18, at twice their size."""

_base_ = [
    '../_base_/free-mask_r50.py',
    '../_base_/unlabeled_folder.py',
    'mmdet::_base_/default_runtime.py',
]

# The backbone of ``densecl-c3_tiny_demo.py``. Smooth grounds make masks of the whole width, which
# the released code drops too.
model = dict(
    backbone=dict(
        depth=18,
        base_channels=32,
        stem_channels=32,
        num_stages=2,
        strides=(1, 2),
        dilations=(1, 1),
        out_indices=(1,),
        conv_cfg=dict(type='Conv2d', padding_mode='replicate'),
    ),
    free_mask=dict(max_width=0.95),
)

test_dataloader = dict(
    batch_size=8,
    num_workers=0,
    dataset=dict(
        data_root='work_dirs/demo/data/',
        sources=[dict(ann_file='instances_train.json', img='images/')],
        pipeline=[
            dict(type='FreeSOLOLoadImage'),
            dict(type='Resize', scale=(320, 256), keep_ratio=True),
            dict(type='FreeSOLOPackImage'),
        ],
    ),
)

custom_hooks = [dict(type='FreeSOLOStoreHook', folder='work_dirs/demo/free_mask/')]
