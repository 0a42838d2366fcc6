from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner

NAMES = [
    'box-crop_upernet_swin-l_8xb4-300k_mixed.py',
    'box-crop_upernet_swin-l_8xb4-100k_uvo-finetune.py',
    'box-crop_upernet_swin-t_8xb4-300k_mixed.py',
]


@pytest.mark.parametrize('name', NAMES)
def test_hyper_parameters_are_those_of_the_paper(repo, name):
    config = Config.fromfile(repo / 'configs/uvo' / name)
    finetune = 'finetune' in name
    assert config.train_cfg.max_iters == config.param_scheduler[-1].end
    assert config.train_cfg.max_iters == (100_000 if finetune else 300_000)
    assert config.optim_wrapper.optimizer.lr == (6e-6 if finetune else 6e-5)
    assert config.train_dataloader.batch_size * 8 == config.auto_scale_lr.base_batch_size == 32
    crops = [part.pipeline[1] for part in config.train_dataloader.dataset.datasets]
    crops.append(config.test_dataloader.dataset.pipeline[1])
    assert {crop.type for crop in crops} == {'BoxCropFromMask'}
    assert {crop.margin_px for crop in crops} == {20}
    assert 'jitter_ratio' not in crops[-1]


def test_two_iterations_validation_and_resume(tiny, tmp_path):
    tiny.train_dataloader.batch_size = 2
    tiny.train_cfg.update(max_iters=2, val_interval=2)
    tiny.default_hooks.checkpoint.update(interval=2)
    tiny.param_scheduler = []
    tiny.optim_wrapper.optimizer.lr = 1e-3
    runner = Runner.from_cfg(Config({**tiny, 'experiment_name': 'first'}))
    before = {k: v.clone() for k, v in runner.model.state_dict().items()}
    runner.train()
    moved = [k for k, v in runner.model.named_parameters() if not torch.equal(v, before[k])]
    assert len(moved) == len(list(runner.model.parameters()))
    checkpoints = sorted(Path(tiny.work_dir).glob('iter_*.pth'))
    assert [path.name for path in checkpoints] == ['iter_2.pth']

    tiny.update(resume=True, load_from=str(checkpoints[0]))
    tiny.train_cfg.update(max_iters=3, val_interval=3)
    runner = Runner.from_cfg(Config({**tiny, 'experiment_name': 'second'}))
    runner.train()
    assert runner.iter == 3
