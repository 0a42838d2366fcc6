_base_ = './box-crop_upernet_swin-l_8xb4-300k_mixed.py'

model = dict(
    backbone=dict(
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://download.openmmlab.com/mmsegmentation/v0.5/pretrain/swin/'
            'swin_tiny_patch4_window7_224_20220317-1cdeb081.pth',
        ),
        pretrain_img_size=224,
        embed_dims=96,
        depths=[2, 2, 6, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768], channels=256),
    auxiliary_head=dict(in_channels=384),
)
