"""Table 1 of the paper at toy size: train and score each row's config from one command.

    python projects/uvo/ladder.py

Every row keeps its own differences (cascade, assigner, towers, CARAFE, deformable convolution,
transformer) and shares the rest: narrow layers, a small ResNet or Swin with random weights, AdamW,
the demo's synthetic set, one seed. The scores go to ``results/uvo_ladder_tiny.json``, from where
``tools/build_tables.py`` takes them to the README. The command goes on where it was stopped.
"""

import argparse
from pathlib import Path

from mmengine.config import Config
from mmengine.device import get_device

from mmdet_plugins.common.files import atomic_write
from mmdet_plugins.common.stages import (
    Stage,
    commit,
    config_digest,
    data_options,
    evaluate,
    keep_settings,
    prepare_data,
    train,
    write_rows,
)

REPO = Path(__file__).resolve().parents[2]

ROWS = {
    'Baseline (RPN)': 'rpn_r50_fpn_8xb2-1x_coco',
    '+ Cascade RPN': 'cascade-rpn_r50_fpn_8xb2-1x_coco',
    '+ SimOTA + IoU branch': 'cascade-rpn-simota_r50_fpn_8xb2-1x_coco',
    '+ Decoupled head': 'cascade-rpn-decoupled_r50_fpn_8xb2-1x_coco',
    '+ Two samplers': 'cascade-rpn-two-samplers_r50_fpn_8xb2-1x_coco',
    '+ CARAFE': 'cascade-rpn-carafe_r50_fpn_8xb2-1x_coco',
    '+ DCNv2': 'cascade-rpn-dcn_r50_fpn_8xb2-1x_coco',
    '+ Swin': 'cascade_rpn_swinl',
}
PAPER = {
    'Baseline (RPN)': (44.6, 52.9, 58.3),
    '+ Cascade RPN': (61.1, 67.6, 71.7),
    '+ SimOTA + IoU branch': (62.6, 68.1, 71.7),
    '+ Decoupled head': (64.5, 69.8, 73.1),
    '+ Two samplers': (64.8, 70.1, 73.6),
    '+ CARAFE': (65.2, 70.4, 73.9),
    '+ DCNv2': (65.6, 70.8, 74.2),
    '+ Swin': (70.7, 74.9, 77.4),
}
BUDGETS = (100, 300, 1000)
WIDTH, STRIDES = 32, [4, 8, 16, 32]


def tiny(row: Config, common: Config, seed: int) -> Config:
    """The row's model at toy size, on the data and schedule that all rows share."""
    model = row.model
    if model.backbone.type == 'SwinTransformer':
        model.backbone.update(embed_dims=WIDTH, depths=[1, 1, 2, 1], num_heads=[1, 2, 4, 8])
        model.backbone.update(window_size=7, pretrain_img_size=224, drop_path_rate=0.0)
    else:
        model.backbone.update(depth=18, base_channels=WIDTH, stem_channels=WIDTH)
        model.backbone.update(frozen_stages=-1, norm_eval=False)
    model.backbone.init_cfg = None
    model.neck.update(in_channels=[WIDTH * 2**i for i in range(4)], out_channels=WIDTH, num_outs=4)
    if 'upsample_cfg' in model.neck:
        model.neck.upsample_cfg.compressed_channels = 16
    head = model.rpn_head
    head.update(in_channels=WIDTH, feat_channels=WIDTH)
    if head.type == 'RPNHead':
        head.anchor_generator.update(scales=[4], strides=STRIDES)
    else:
        head.update(strides=STRIDES, anchor_scale=4, norm_cfg=dict(type='GN', num_groups=8))
        head.num_tower_convs = min(2, head.num_tower_convs)
    model.test_cfg.rpn.update(nms_pre=1000, max_per_img=max(BUDGETS))
    shared = {key: value for key, value in common.items() if key not in ('model', 'custom_imports')}
    for evaluator in ('val_evaluator', 'test_evaluator'):
        shared[evaluator].max_dets = list(BUDGETS)
    return Config(
        dict(shared, model=model, custom_imports=row.custom_imports, randomness=dict(seed=seed))
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--iters', type=int, default=300, help='of each row')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--out', type=Path, default=Path('work_dirs/ladder'))
    parser.add_argument('--jobs', type=int, default=2, help='rows trained at a time')
    parser.add_argument('--device', choices=['cpu', 'cuda'], default=get_device())
    parser.add_argument('--json', type=Path, default=REPO / 'results/uvo_ladder_tiny.json')
    args = parser.parse_args()
    data = args.out / 'data'
    prepare_data(data, synthetic=True)
    common = Config.fromfile(REPO / 'configs/uvo/tiny/cascade-rpn_tiny_demo.py')
    common.merge_from_dict(data_options(common, data))
    stages = []
    for row, name in ROWS.items():
        config = args.out / f'{name}.py'
        with atomic_write(config) as file:
            row_config = Config.fromfile(REPO / f'configs/uvo/{name}.py')
            file.write(tiny(row_config, common, args.seed).pretty_text)
        stages.append(Stage(row, 'mmdet', config, args.iters, args.out / name))
    settings = {f'{stage.name} config': config_digest(stage.config) for stage in stages}
    keep_settings(args.out, settings | {'length': args.iters})
    for i in range(0, len(stages), args.jobs):
        train(stages[i : i + args.jobs], data, args.device)
    scores = {stage: evaluate(stage, data, args.device) for stage in stages}
    table = [
        {'row': stage.name}
        | {f'AR@{k}': 100 * scores[stage][f'open_world/bbox_AR@{k}'] for k in BUDGETS}
        | {f'paper {k}': value for k, value in zip(BUDGETS, PAPER[stage.name], strict=True)}
        | {'iterations': args.iters, 'seed': args.seed, 'commit': commit(stage.work_dir)}
        for stage in stages
    ]
    for line in table:
        print(line['row'].ljust(24), *(f'{line[f"AR@{k}"]:6.1f}' for k in BUDGETS))
    write_rows(table, args.json)


if __name__ == '__main__':
    main()
