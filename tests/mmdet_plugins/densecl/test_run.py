"""Runs under the stock runner: a folder of images, the hooks, and a resume."""

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner

from mmdet_plugins.cli import find_config


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Nine images, one of which cannot be read."""
    folder = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    for i in range(8):
        image = cv2.resize(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8), (64, 48))
        cv2.imwrite(str(folder / f'{i}.png'), image)
    (folder / 'broken.jpg').write_bytes(b'broken')
    return folder


def config(repo, folder, work_dir, iters: int, batch: int = 3) -> Config:
    cfg = Config.fromfile(find_config('densecl_r50_c5_1xb64-40k_folder', repo / 'configs'))
    cfg.merge_from_dict(
        {
            'model.backbone.depth': 18,
            'model.backbone.base_channels': 8,
            'model.backbone.stem_channels': 8,
            'model.head.in_channels': 64,
            'model.head.hidden_channels': 16,
            'train_dataloader.batch_size': batch,
            'train_dataloader.num_workers': 0,
            'train_dataloader.persistent_workers': False,
            'train_dataloader.pin_memory': False,
            'train_dataloader.dataset.data_root': str(folder),
            'train_cfg.max_iters': iters,
            'default_hooks.checkpoint.interval': 2,
            'work_dir': str(work_dir),
            'log_level': 'WARNING',
            'randomness': dict(seed=0),
        }
    )
    cfg.train_dataloader.dataset.pipeline[-1].size = 64
    return cfg


def test_a_folder_is_trained_on_and_resumed(repo, folder, tmp_path):
    runner = Runner.from_cfg(config(repo, folder, tmp_path, 2))
    runner.train()
    model = runner.model
    assert len(model.queue.keys) == len(model.dense_queue.keys) == 4
    assert model.queue.written == 6
    scalars = runner.message_hub.log_scalars
    assert {
        'train/loss_global',
        'train/loss_dense',
        'train/queue_fill_global',
        'train/queue_fill_dense',
        'train/similarity_global',
        'train/similarity_dense',
        'train/agreement',
    } <= scalars.keys()

    cfg = config(repo, folder, tmp_path, 3)
    cfg.resume = True
    cfg.experiment_name = 'resumed'
    resumed = Runner.from_cfg(cfg)
    seen = {}
    resumed.register_hook(_Look(seen))
    resumed.train()
    assert seen.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, seen[name]), name
    assert resumed.model.queue.written == 9


class _Look:
    """Copies the state that the first iteration starts from."""

    priority = 'LOW'

    def __new__(cls, seen):
        from mmengine.hooks import Hook

        class Look(Hook):
            def before_train_iter(self, runner, batch_idx, data_batch=None):
                if not seen:
                    seen.update({k: v.clone() for k, v in runner.model.state_dict().items()})

        return Look()


def test_a_single_image_is_enough(repo, folder, tmp_path):
    (tmp_path / 'one').mkdir()
    (tmp_path / 'one' / 'only.png').write_bytes((folder / '0.png').read_bytes())
    runner = Runner.from_cfg(config(repo, tmp_path / 'one', tmp_path / 'run', 1))
    runner.train()
    assert len(runner.model.queue.keys) == 3


def test_the_dense_term_takes_over_after_the_warm_up(repo, folder, tmp_path):
    cfg = config(repo, folder, tmp_path, 3)
    cfg.custom_hooks = [dict(type='DenseCLWarmupHook', iters=2)]
    cfg.model.dense_weight = 1.0
    cfg.model.queue_size = 32
    runner = Runner.from_cfg(cfg)
    runner.train()
    dense, alone = (
        runner.message_hub.log_scalars[f'train/loss_{term}'].data[0] for term in ('dense', 'global')
    )
    assert alone[:2].min() > 0 and alone[2] == 0
    assert (dense[:2] == 0).all() and dense[2] > 0
    assert runner.model.dense_queue.written == 9  # of the warm-up too, as released
