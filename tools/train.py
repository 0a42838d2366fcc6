"""Trains a detector or a segmenter: ``python tools/train.py CONFIG``."""

import sys

import torch
from _launch import build_runner, load_config, make_parser


def main() -> None:
    parser = make_parser('Train a detector or a segmenter')
    parser.add_argument('--amp', action='store_true', help='mixed precision, on a GPU')
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help="scale the learning rate by the batch size over the config's auto_scale_lr",
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='go on from this checkpoint, or without a value from the latest one in the work dir',
    )
    args = parser.parse_args()
    cfg = load_config(args)
    if args.amp:
        if not torch.cuda.is_available():
            sys.exit('--amp needs a GPU, and none is visible: leave the option out to train on CPU')
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.loss_scale = 'dynamic'
    if args.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            sys.exit(
                f'{args.config} has no auto_scale_lr.base_batch_size, so --auto-scale-lr '
                'cannot work: add auto_scale_lr = dict(base_batch_size=...) to it'
            )
        cfg.auto_scale_lr.enable = True
    if args.resume is not None:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    build_runner(cfg).train()


if __name__ == '__main__':
    main()
