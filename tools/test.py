"""Tests a detector or a segmenter: ``python tools/test.py CONFIG CHECKPOINT``."""

import sys

from _launch import build_runner, load_config, make_parser
from mmengine.config import ConfigDict
from mmengine.evaluator import DumpResults


def main() -> None:
    parser = make_parser('Test a detector or a segmenter')
    parser.add_argument('checkpoint', help='checkpoint file or URL')
    parser.add_argument('--out', metavar='FILE.pkl', help='write the predictions there as well')
    parser.add_argument(
        '--tta', action='store_true', help="test-time augmentation by the config's tta_model"
    )
    args = parser.parse_args()
    cfg = load_config(args)
    cfg.load_from = args.checkpoint
    if args.tta:
        if 'tta_model' not in cfg or 'tta_pipeline' not in cfg:
            sys.exit(f'{args.config} defines no tta_model and tta_pipeline, so --tta cannot work')
        cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
        cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
    runner = build_runner(cfg)
    if args.out is not None:
        runner.test_evaluator.metrics.append(DumpResults(out_file_path=args.out))
    runner.test()


if __name__ == '__main__':
    main()
