_base_ = './box-crop_upernet_swin-l_8xb4-300k_mixed.py'

# Put the checkpoint of the 300k iterations here, or pass --cfg-options load_from=...
load_from = 'work_dirs/box-crop_upernet_swin-l_8xb4-300k_mixed/iter_300000.pth'
model = dict(backbone=dict(init_cfg=None))

# The challenge entry also trained on both validation parts; here they stay what they are.
train_dataloader = dict(
    dataset=dict(
        datasets=[
            dict(
                type='BoxCropDataset',
                data_root='data/uvo/',
                ann_file='FrameSet/UVO_frame_train.json',
                data_prefix=dict(img_path='uvo_videos_sparse_frames/'),
                pipeline={{_base_.train_pipeline}},
            ),
            dict(
                type='BoxCropDataset',
                data_root='data/uvo/',
                ann_file='VideoDenseSet/UVO_video_train_dense.json',
                data_prefix=dict(img_path='uvo_videos_dense_frames/'),
                pipeline={{_base_.train_pipeline}},
            ),
        ]
    )
)
val_dataloader = dict(
    dataset=dict(
        data_root='data/uvo/',
        ann_file='FrameSet/UVO_frame_val.json',
        data_prefix=dict(img_path='uvo_videos_sparse_frames/'),
    )
)
test_dataloader = val_dataloader

train_cfg = dict(max_iters=100000)
optim_wrapper = dict(optimizer=dict(lr=6e-6))
param_scheduler = [
    dict(type='LinearLR', start_factor=5e-7, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', eta_min=0.0, power=1.0, by_epoch=False, begin=1500, end=100000),
]
