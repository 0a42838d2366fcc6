"""What the configs of SOLOv2 register."""

custom_imports = dict(
    imports=[
        'mmdet_plugins.common.runtime',
        'mmdet_plugins.common.hooks',
        'mmdet_plugins.common.loops',
        'mmdet_plugins.common.datasets',
        'mmdet_plugins.common.open_world_metric',
        'mmdet_plugins.solo',
    ],
    allow_failed_imports=False,
)
