"""COCO train2017 and unlabeled2017, 241k images (section 6.3.1)."""

_base_ = './unlabeled_folder.py'

test_dataloader = dict(
    dataset=dict(
        data_root='data/coco/',
        sources=[
            dict(ann_file='annotations/instances_train2017.json', img='train2017/'),
            dict(ann_file='annotations/image_info_unlabeled2017.json', img='unlabeled2017/'),
        ],
    )
)

custom_hooks = [dict(type='FreeSOLOStoreHook', folder='work_dirs/free_mask_coco/')]
