"""The comparison over seeds, without its trainings."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


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
    monkeypatch.setattr(compare, 'commit', lambda: 'abc')
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
    args = compare.argparse.Namespace(iters=None, device='cpu', data=data)
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
