"""Test-time augmentation of the released code: 13 scales, each with its box sizes, and a flip."""

tta_model = dict(
    type='UVODetTTAModel',
    tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.8), max_per_img=2000),
    # px in the resized image, in the order of the scales below
    scale_ranges=[
        (96, 10000),
        (96, 10000),
        (64, 10000),
        (64, 10000),
        (64, 10000),
        (0, 10000),
        (0, 10000),
        (0, 10000),
        (0, 256),
        (0, 256),
        (0, 192),
        (0, 192),
        (0, 96),
    ],
)

tta_pipeline = [
    dict(type='LoadImageFromFile', backend_args=None),
    dict(
        type='TestTimeAug',
        transforms=[
            [
                dict(type='Resize', scale=scale, keep_ratio=True)
                for scale in [
                    (667, 400),
                    (833, 500),
                    (1000, 600),
                    (1067, 640),
                    (1167, 700),
                    (1333, 800),
                    (1500, 900),
                    (1667, 1000),
                    (1833, 1100),
                    (2000, 1200),
                    (2167, 1300),
                    (2333, 1400),
                    (3000, 1800),
                ]
            ],
            [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0)],
            [
                dict(
                    type='PackDetInputs',
                    meta_keys=(
                        'img_id',
                        'img_path',
                        'ori_shape',
                        'img_shape',
                        'scale_factor',
                        'flip',
                        'flip_direction',
                    ),
                )
            ],
        ],
    ),
]
