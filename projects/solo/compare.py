"""Mask AP and training time of the toy detectors beside mmdet's own, trained equally.

    python projects/solo/compare.py                       # SOLO, Decoupled SOLO, SOLOv2
    python projects/solo/compare.py --data data/nuclei    # SOLOv2 on a set of one's own

Each detector and its peer see the same data, schedule and seeds, nothing is frozen, and both start
from random weights. Two trainings run at a time, ours and its peer, so that time is comparable
whatever the machine does besides. The scores go to ``results/``, from where
``tools/build_tables.py`` takes them to the README. The command goes on where it was stopped.
"""

import argparse
from pathlib import Path

from mmengine.config import Config
from mmengine.device import get_device

from mmdet_plugins.common.stages import (
    commit,
    evaluate,
    iteration_seconds,
    make_stage,
    prepare_data,
    spread,
    train,
    write_rows,
)

REPO = Path(__file__).resolve().parents[2]
METHODS = {
    'SOLO': 'solo/tiny/solo{}_tiny_demo.py',
    'Decoupled SOLO': 'decoupled_solo/tiny/decoupled-solo{}_tiny_demo.py',
    'SOLOv2': 'solov2/tiny/solov2{}_tiny_demo.py',
}
METHODS_NUCLEI = {'SOLOv2': 'solov2/tiny/solov2{}_tiny_nuclei.py'}
SIDES = {'ours': '', 'mmdet': '-mmdet'}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--data', type=Path, help='images/, instances_train.json, instances_val.json'
    )
    parser.add_argument('--method', choices=METHODS, action='append', help='may be repeated')
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--iters', type=int, help="default: the config's")
    parser.add_argument('--out', type=Path, help='default: work_dirs/solo[-NAME OF THE DATA]')
    parser.add_argument('--device', choices=['cpu', 'cuda'], default=get_device())
    parser.add_argument('--json', type=Path, help='default: results/solo_learning[-NAME].json')
    args = parser.parse_args()
    suffix = f'-{args.data.name}' if args.data else ''
    out = args.out or Path(f'work_dirs/solo{suffix}')
    data = args.data or out / 'data'
    prepare_data(data, synthetic=args.data is None)
    methods = METHODS_NUCLEI if args.data else METHODS
    runs = {}
    for method in args.method or methods:
        for seed in range(args.seeds):
            pair = []
            for side, infix in SIDES.items():
                cfg = Config.fromfile(REPO / 'configs' / methods[method].format(infix))
                cfg.merge_from_dict({'randomness.seed': seed})
                name = f'{method.lower().replace(" ", "-")}-{side}-{seed}'
                pair.append(make_stage(name, cfg, out, args.iters))
            train(pair, data, args.device)
            for side, stage in zip(SIDES, pair, strict=True):
                scores = evaluate(stage, data, args.device)
                runs.setdefault((method, side), []).append((stage, scores))
                print(f'{stage.name}: mask AP {scores["open_world/segm_AP"]:.3f}', flush=True)
    table = []
    for (method, side), trained in runs.items():
        stages, scores = zip(*trained, strict=True)
        table.append(
            {
                'method': method,
                'head': side,
                'mask AP': spread([s['open_world/segm_AP'] for s in scores], 3),
                'mask AP50': spread([s['open_world/segm_AP50'] for s in scores], 3),
                'mask AR@100': spread([s['open_world/segm_AR@100'] for s in scores], 3),
                # mmdet's heads give no boxes.
                'box AP': None
                if side == 'mmdet'
                else spread([s['open_world/bbox_AP'] for s in scores], 3),
                'training, s': spread([s.iters * iteration_seconds(s) for s in stages], 0),
                'iterations': stages[0].iters,
                'seeds': len(stages),
                'commit': commit(*(stage.work_dir for stage in stages)),
            }
        )
    target = args.json or REPO / f'results/solo_learning{suffix}.json'
    write_rows(table, target)


if __name__ == '__main__':
    main()
