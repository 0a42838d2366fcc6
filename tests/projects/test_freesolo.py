"""The recipe and the comparison over seeds, without their trainings."""

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from mmdet_plugins.common.synthetic import make_demo_data


def test_scores_of_the_stages_are_averaged_over_seeds(load_script, tmp_path, monkeypatch):
    compare = load_script('projects/freesolo/compare.py')

    def scores(recall: float) -> dict[str, float]:
        return dict.fromkeys(compare.COLUMNS.values(), 0.0) | {'segm_AR@100': recall}

    def freesolo(command: list[str], check: bool) -> None:
        options = dict(zip(command[2::2], command[3::2], strict=True))
        out = Path(options['--out'])
        (out / 'iteration-1').mkdir(parents=True)
        (out / 'iteration-1/iter_7.pth').touch()
        metrics = {'coarse masks': scores(0.1), 'iteration 0': scores(int(options['--seed']) / 10)}
        (out / 'metrics.json').write_text(json.dumps(metrics))

    def few_labels(out: Path, segmenter: Path, seed: int, args) -> dict[str, dict]:
        assert segmenter == out / 'iteration-1/iter_7.pth' and out.name == f'seed-{seed}'
        return {'fine-tuned': scores(0.5)}

    monkeypatch.setattr(subprocess, 'run', freesolo)
    monkeypatch.setattr(compare, 'few_labels', few_labels)
    monkeypatch.setattr(compare, 'commit', lambda *_: 'abc')
    options = ['--out', str(tmp_path / 'out'), '--json', str(tmp_path / 'table.json')]
    options += ['--plot', str(tmp_path / 'plot.svg'), '--device', 'cpu']
    monkeypatch.setattr(sys, 'argv', ['compare.py', *options])
    compare.main()
    rows = json.loads((tmp_path / 'table.json').read_text())
    assert {row['stage']: row['mask AR@100'] for row in rows} == {
        'coarse masks': '0.100 ± 0.000',
        'iteration 0': '0.100 ± 0.100',
        'fine-tuned': '0.500 ± 0.000',
    }
    assert all(row['seeds'] == 3 and row['commit'] == 'abc' for row in rows)
    assert (tmp_path / 'plot.svg').read_text().count('<circle') == 3


@pytest.mark.parametrize('seed, data', [(0, None), (5, Path('nuclei'))])
def test_both_trainings_with_few_labels_are_equal_but_for_their_start(
    load_script, tmp_path, monkeypatch, seed, data
):
    compare = load_script('projects/freesolo/compare.py')
    trained = []
    monkeypatch.setattr(compare, 'train', lambda stages, data, device: trained.extend(stages))
    monkeypatch.setattr(compare, 'evaluate', lambda *args: {'open_world/segm_AP': 0.1, 'time': 1})
    args = Namespace(iters=None, device='cpu', data=data)
    found = compare.few_labels(tmp_path, tmp_path / 'iter_7.pth', seed, args)
    assert list(found.values()) == [{'segm_AP': 0.1, 'time': 1}] * 2
    tuned, scratch = (compare.Config.fromfile(stage.config) for stage in trained)
    assert tuned.randomness.seed == seed
    assert tuned.custom_hooks[0].checkpoint == str(tmp_path / 'iter_7.pth')
    assert scratch.custom_hooks == [] and trained[0].iters == trained[1].iters
    for part in ('train', 'val', 'test'):
        steps = [step.type for step in tuned[f'{part}_dataloader'].dataset.pipeline]
        assert ('Resize' in steps) == (part != 'train' or data is not None)
    tuned.custom_hooks = []
    assert tuned.to_dict() == scratch.to_dict()


def test_tiles_are_shown_at_twice_their_size(load_script, tmp_path):
    freesolo = load_script('projects/freesolo/freesolo.py')
    data, out = tmp_path / 'demo', tmp_path / 'out'
    make_demo_data(data, num_train=2, num_val=1, size_hw=(96, 128))
    given = dict(out=out, iters=None, seed=0, device='cpu', fresh=False)
    recipe = freesolo.Recipe(Namespace(data=data, tiles=64, **given))
    assert recipe.data == out / 'data' and recipe.truth.exists()
    name = 'freesolo/tiny/freesolo_tiny_demo'
    _, cfg = recipe.config('iteration-0', name, {})
    for part in ('train', 'val', 'test'):
        dataset = cfg[f'{part}_dataloader'].dataset
        steps = dataset.get('dataset', dataset).pipeline
        assert [step.scale for step in steps if step.type == 'Resize'] == [(128, 128)]
    _, cfg = recipe.config('labels-0', recipe.free_mask, {})
    assert cfg.model.free_mask.connected
    with pytest.raises(SystemExit, match='made with another tiles'):
        freesolo.Recipe(Namespace(data=data, tiles=32, **given))
    with pytest.raises(SystemExit, match='--tiles needs'):
        freesolo.Recipe(Namespace(data=data / 'images', tiles=64, **given))
    # Photographs as before: whole, and made smaller.
    recipe = freesolo.Recipe(Namespace(data=data, tiles=None, **given | dict(out=tmp_path / 'b')))
    assert recipe.data == data and not (tmp_path / 'b/data').exists()
    assert recipe.config('iteration-0', name, {})[1].val_dataloader.dataset.pipeline[1].scale == (
        256,
        192,
    )
    assert 'connected' not in recipe.config('x', recipe.free_mask, {})[1].model.free_mask
