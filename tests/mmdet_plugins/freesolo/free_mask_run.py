"""One test run of the tiny Free Mask, alone or as a rank; for test_free_mask_run.

free_mask_run.py IMAGES STORE WEIGHTS [KILL_AT]
"""

import os
import signal
import sys
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.runner import Runner

CONFIG = Path(__file__).parents[3] / 'configs/freesolo/tiny/free-mask_tiny_demo.py'


def config(images: str, store: str, weights: str | None, **options) -> Config:
    """The tiny config on a folder; ``options`` by dotted name, with two underscores for dots."""
    cfg = Config.fromfile(CONFIG)
    cfg.work_dir = f'{store}-logs'
    cfg.load_from = weights
    cfg.test_dataloader.batch_size = 3
    cfg.test_dataloader.dataset.data_root = str(images)
    cfg.test_dataloader.dataset.sources = [dict(img='')]
    cfg.test_dataloader.dataset.pipeline[1] = dict(type='Resize', scale_factor=2.0, keep_ratio=True)
    cfg.custom_hooks = [dict(type='FreeSOLOStoreHook', folder=str(store))]
    cfg.merge_from_dict({key.replace('__', '.'): value for key, value in options.items()})
    if 'RANK' in os.environ:
        cfg.launcher = 'pytorch'
        cfg.model_wrapper_cfg = dict(
            type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False
        )
    return cfg


def run(*args, **options) -> dict:
    """The figures of the run."""
    return Runner.from_cfg(config(*args, **options)).test()


if __name__ == '__main__':
    torch.set_num_threads(1)
    if len(sys.argv) > 4:
        from mmdet_plugins.common import pseudo_store

        flush, left = pseudo_store._flush, int(sys.argv[4])

        def deadly(file) -> None:
            global left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            flush(file)

        pseudo_store._flush = deadly
    run(*sys.argv[1:4])
