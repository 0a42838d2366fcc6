"""What strings the stages of a recipe together."""

import json

import pytest
from mmengine.config import Config

from mmdet_plugins.common import stages
from mmdet_plugins.common.stages import (
    Training,
    commit,
    config_digest,
    data_options,
    iteration_seconds,
    keep_settings,
    make_stage,
    prepare_data,
    spread,
)


def test_only_what_a_config_reads_is_redirected(tmp_path):
    dataset = dict(data_root='old/', ann_file='a.json')
    cfg = Config(
        dict(
            train_dataloader=dict(dataset=dict(dataset=dict(dataset))),  # a wrapped set
            val_dataloader=dict(dataset=dict(dataset)),
            test_dataloader=None,
            val_evaluator=dict(type='OpenWorldMetric', ann_file='old/instances_val.json'),
            test_evaluator=dict(type='StoreMetric'),
        )
    )
    assert data_options(cfg, tmp_path) == {
        'val_dataloader.dataset.data_root': f'{tmp_path}/',
        'val_evaluator.ann_file': f'{tmp_path}/instances_val.json',
    }


def test_a_folder_keeps_its_settings(tmp_path):
    keep_settings(tmp_path, {'config': 'a', 'length': 3})
    keep_settings(tmp_path, {'length': 3})
    with pytest.raises(SystemExit, match='made with another length'):
        keep_settings(tmp_path, {'config': 'a', 'length': 4})
    assert json.loads((tmp_path / 'settings.json').read_text()) == {'config': 'a', 'length': 3}


def test_a_stage_is_its_config_written_out_and_kept(tmp_path):
    cfg = Config(dict(train_cfg=dict(max_iters=7), a=1))
    stage = make_stage('toy', cfg, tmp_path)
    assert stage.checkpoint == tmp_path / 'toy/iter_7.pth'
    assert Config.fromfile(stage.config).a == 1
    assert make_stage('toy', cfg, tmp_path) == stage
    with pytest.raises(SystemExit, match='made with another length'):
        make_stage('toy', cfg, tmp_path, iters=8)
    cfg.a = 2
    with pytest.raises(SystemExit, match='made with another config'):
        make_stage('toy', cfg, tmp_path)
    assert Config.fromfile(stage.config).a == 1


def test_iterations_are_timed_over_every_start(tmp_path):
    stage = make_stage('toy', Config(dict(train_cfg=dict(max_iters=3))), tmp_path)
    for start, entries in dict(
        first=[dict(time=0.5, loss=1.0), dict(time=0.1, loss=1.0)],
        second=[dict(time=0.6, loss=1.0), dict(time=9.0, accuracy=0.5)],  # a test
    ).items():
        log = stage.work_dir / start / 'vis_data/scalars.json'
        log.parent.mkdir(parents=True)
        log.write_text(''.join(f'{json.dumps(entry)}\n' for entry in entries))
    assert iteration_seconds(stage) == pytest.approx(0.4)


def test_a_digest_is_of_what_a_config_says(tmp_path):
    for name, text in dict(
        one='a = dict(b=1, c=2)', base='a = dict(b=1)', two="_base_ = 'base.py'\na = dict(c=2)"
    ).items():
        (tmp_path / f'{name}.py').write_text(text)
    one, base, two = (config_digest(tmp_path / f'{n}.py') for n in ('one', 'base', 'two'))
    assert one == two != base


def test_a_missing_part_of_the_data_is_named(tmp_path):
    (tmp_path / 'images').mkdir()
    with pytest.raises(SystemExit, match='instances_train.json is missing'):
        prepare_data(tmp_path, synthetic=False)


def test_made_up_data_is_made_once_as_asked_for(tmp_path):
    prepare_data(tmp_path, synthetic=True, num_train=1, num_val=2, size_hw=(64, 80))
    prepare_data(tmp_path, synthetic=True, num_train=3)
    assert {p.name for p in (tmp_path / 'images').iterdir()} == {
        'train_00000.jpg',
        'val_00000.jpg',
        'val_00001.jpg',
    }


def test_values_of_seeds_are_summed_up():
    assert spread([0.1, 0.2, 0.6], 2) == '0.30 ± 0.26'  # the deviation of a sample: n - 1
    assert spread([0.5], 3) == '0.500'


def test_a_commit_is_that_of_the_code_which_a_training_began_with(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, 'mim', lambda *arguments: ['true'])
    stage = make_stage('toy', Config(dict(train_cfg=dict(max_iters=7))), tmp_path)

    def start(checked_out: str) -> str:
        monkeypatch.setattr(stages, '_checked_out', lambda: checked_out)
        Training(stage, tmp_path, {}).process.wait()
        return commit(stage.work_dir)

    assert start('abc') == 'abc'
    assert start('def') == 'def'  # it had not come to a checkpoint
    (stage.work_dir / 'last_checkpoint').touch()
    assert start('123') == 'def'
    later = tmp_path / 'later'
    later.mkdir()
    assert commit() == commit(later) == ''
    (later / 'commit.txt').write_text('456\n')
    assert commit(later, stage.work_dir, later, tmp_path / 'none') == '456, def'
