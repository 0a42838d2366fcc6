import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / 'tools' / 'build_tables.py'
RECORD = {
    'path': 'carafe',
    'case': 'forward',
    'device': 'cpu',
    'ratio': 4.126,
    'ratio_low': 3.9,
    'ratio_high': 12.34,
    'ours_ms': 12.4,
    'peer_ms': 51234.0,
    'ours_peak_bytes': 10 << 20,
    'peer_peak_bytes': 2 << 30,
    'ours_syncs': None,
    'peer_syncs': None,
    'floor': {'ratio': 2, 'memory': 0.2, 'syncs': None},
    'machine': 'A Processor',
    'threads': 2,
    'commit': 'abc123',
    'versions': {'torch': '2.13.0'},
}
PAGE = 'Before.\n\n<!-- table:{} -->\n{}<!-- /table -->\nAfter.\n'


def run(root, *arguments):
    command = [sys.executable, str(SCRIPT), '--root', str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def root(tmp_path):
    (tmp_path / 'results').mkdir()
    (tmp_path / 'projects' / 'uvo').mkdir(parents=True)
    rows = [
        {'row': 'baseline', 'AR@100': 0.41251, 'images': 1234, 'minutes': 12.0},
        {'row': 'a|b', 'AR@100': None, 'images': 5, 'minutes': 3.5, 'note': 'x'},
    ]
    (tmp_path / 'results' / 'ladder.json').write_text(json.dumps(rows))
    (tmp_path / 'projects' / 'uvo' / 'README.md').write_text(PAGE.format('ladder', 'stale\n'))
    return tmp_path


def test_rows_are_filled_in_and_then_fresh(root):
    page = root / 'projects' / 'uvo' / 'README.md'
    done = run(root, '--check')
    assert done.returncode == 1
    assert 'projects/uvo/README.md' in done.stdout
    assert 'stale' in page.read_text()

    assert run(root).returncode == 0
    assert page.read_text() == (
        'Before.\n\n<!-- table:ladder -->\n\n'
        '| row | AR@100 | images | minutes | note |\n'
        '| --- | ---: | ---: | ---: | --- |\n'
        '| baseline | 0.413 | 1,234 | 12.0 |  |\n'
        '| a\\|b | – | 5 | 3.500 | x |\n'
        '\n<!-- /table -->\nAfter.\n'
    )
    assert run(root, '--check').returncode == 0


def test_floors_stand_beside_the_benchmark_figures(root):
    missed = RECORD | {
        'case': 'backward',
        'device': 'cuda',
        'ours_syncs': 3,
        'peer_syncs': 40,
        'floor': {'ratio': 5, 'memory': 0.001, 'syncs': 0},
        'machine': 'A Card',
    }
    (root / 'results' / 'bench.json').write_text(json.dumps([missed, RECORD]))
    (root / 'README.md').write_text(PAGE.format('bench', ''))
    assert run(root).returncode == 0
    cpu, cuda = (root / 'README.md').read_text().split('CUDA: ')
    assert 'CPU: A Processor, 2 threads; torch 2.13.0; commit abc123.' in cpu
    cells = [cell.strip() for cell in cpu.splitlines()[-2].split('|')[1:-1]]
    assert cells == [
        '`carafe`', 'forward', '12 ms', '51.2 s', '**4.13×** (3.90–12.3)', '≥ 2×',
        '10.0 MiB', '2.0 GiB', '1/205', '≤ 1/5',
    ]  # fmt: skip
    assert '≥ 5× **missed**' in cuda
    assert '≤ 1/1000 **missed**' in cuda
    assert '3 (40), ≤ 0 **missed**' in cuda


@pytest.mark.parametrize(
    'text, sentence',
    [
        (PAGE.format('gone', ''), 'README.md wants the table gone'),
        ('<!-- table:ladder -->\n', 'no <!-- /table --> closes'),
    ],
)
def test_a_page_that_cannot_be_filled_is_named(root, text, sentence):
    (root / 'README.md').write_text(text)
    done = run(root)
    assert done.returncode == 1
    assert sentence in done.stderr and 'Traceback' not in done.stderr


def test_the_tables_of_this_repository_are_fresh():
    done = run(ROOT, '--check')
    assert done.returncode == 0, done.stdout + done.stderr
