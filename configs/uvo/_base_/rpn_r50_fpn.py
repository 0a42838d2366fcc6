"""mmdet's RPN, row 0 of Table 1, with this project's data sets and metric."""

_base_ = 'mmdet::_base_/models/rpn_r50_fpn.py'

custom_imports = dict(
    imports=[
        'mmdet_plugins.common.runtime',
        'mmdet_plugins.common.hooks',
        'mmdet_plugins.common.loops',
        'mmdet_plugins.common.datasets',
        'mmdet_plugins.common.open_world_metric',
    ],
    allow_failed_imports=False,
)
