import pytest


@pytest.fixture(autouse=True)
def scripts_beside(monkeypatch, repo):
    monkeypatch.syspath_prepend(str(repo / 'projects/uvo'))


def test_the_papers_figures_are_those_of_the_configs_readme(load_script, repo):
    ladder = load_script('projects/uvo/ladder.py')
    rows = [
        line.strip('| \n').split(' | ')
        for line in (repo / 'configs/uvo/README.md').read_text(encoding='utf-8').splitlines()
        if line[:4] in {f'| {row} ' for row in range(len(ladder.ROWS))}
    ]
    shown = {row[1].split(']')[0].strip('['): tuple(map(float, row[-3:])) for row in rows}
    assert shown == {config: ladder.PAPER[name] for name, config in ladder.ROWS.items()}
