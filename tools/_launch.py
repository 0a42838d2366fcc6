"""What ``train.py`` and ``test.py`` share: the options of OpenMMLab's launchers and the config."""

import argparse
import os
from pathlib import Path

import torch
from mmengine.config import Config, DictAction
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

import mmdet_plugins.common.runtime  # noqa: F401  mends torchvision and starts gloo before a host is imported


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options that both launchers know."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('config', help='config file, of mmdet or of mmseg')
    parser.add_argument('--work-dir', help='folder of logs and checkpoints (work_dirs/<config>)')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        help='settings to override, key=value; lists as key="[a,b]" or key=a,b',
    )
    parser.add_argument('--launcher', choices=('none', 'pytorch', 'slurm', 'mpi'), default='none')
    # torch.distributed.launch passes this one; torchrun sets the variable
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)
    return parser


def load_config(args: argparse.Namespace) -> Config:
    """The config with the options of ``args`` in it.

    A distributed run without a GPU also gets the wrapper that CPU ranks need, unless the config
    names one: no device ids, and buffers left alone as mmengine does by default.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = Config.fromfile(args.config)
    cfg.launcher = args.launcher
    if args.cfg_options is not None:
        cfg.merge_from_dict(args.cfg_options)
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = str(Path('work_dirs') / Path(args.config).stem)
    if args.launcher != 'none' and not torch.cuda.is_available():
        cfg.setdefault(
            'model_wrapper_cfg',
            dict(type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False),
        )
    return cfg


def build_runner(cfg: Config) -> Runner:
    """The runner that the config names, mmengine's by default."""
    return RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
