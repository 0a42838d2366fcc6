import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / 'tools' / 'benchmark.py'
KEYS = set(
    'path case device parity ratio ratio_low ratio_high ours_ms peer_ms ours_peak_bytes '
    'peer_peak_bytes ours_syncs peer_syncs commit versions'.split()
)
PATHS = {
    'sleepy': '''"""Two sleeps, 4 and 20 ms."""
import time
from _case import Case, Floor, Sides

def build(device):
    def parity(ours, peer):
        return 'both return None'
    return Sides(lambda: time.sleep(0.004), lambda: time.sleep(0.020), parity)

CASES = [Case('short', build, floors={'cpu': Floor(ratio=3)})]
''',
    'memory': '''"""64 MiB beside 16 MiB, 32 MiB of inputs."""
import numpy as np
from _case import Case, Sides

def build(device):
    inputs = np.ones(32 << 20, np.uint8)
    print('a library that talks')
    def parity(ours, peer):
        assert ours == peer
        return 'sums equal'
    return Sides(lambda: int(np.ones(16 << 20, np.uint8)[0]),
                 lambda: int(np.ones(64 << 20, np.uint8)[0]), parity)

CASES = [Case('numpy', build)]
''',
    'unequal': '''"""Sides that differ; the timing would leave a trace."""
from pathlib import Path
from _case import Case, Sides

calls = Path(__file__).with_name('calls')

def build(device):
    def ours():
        with calls.open('a') as file:
            file.write('o')
        return 1
    def parity(ours, peer):
        assert ours == peer, f'{ours} is not {peer}'
        return 'equal'
    return Sides(ours, lambda: 2, parity)

CASES = [Case('one', build)]
''',
    'lonely': '''"""The peer is not installed."""
from _case import Case, Sides

def build(device):
    import a_peer_nobody_has

CASES = [Case('one', build)]
''',
    'raising': '''"""Our side raises."""
from _case import Case, Sides

CASES = [Case('one', lambda device: Sides(lambda: 1 / 0, lambda: 1, lambda a, b: ''))]
''',
}


@pytest.fixture
def folder(tmp_path):
    for name, text in PATHS.items():
        (tmp_path / f'{name}.py').write_text(text)
    (tmp_path / '_helper.py').write_text('raise RuntimeError("a helper is not a path")')
    return tmp_path


@pytest.fixture(scope='module')
def benchmark():
    path = list(sys.path)  # the script adds to it
    spec = importlib.util.spec_from_file_location('benchmark_tool', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = path


def run(folder, *arguments):
    command = [sys.executable, SCRIPT, '--folder', folder, '--max-seconds', '0.3', *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


def test_lists_paths_without_importing_them(folder):
    (folder / 'broken.py').write_text('"""Fails to import."""\nimport a_peer_nobody_has')
    done = run(folder, '--list')
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert names == ['broken', 'lonely', 'memory', 'raising', 'sleepy', 'unequal']
    assert 'Two sleeps, 4 and 20 ms.' in done.stdout


def test_record_of_a_case_with_known_times(folder):
    file = folder / 'out' / 'records.json'
    done = run(folder, '--path', 'sleepy', '--json', file)
    assert done.returncode == 0, done.stderr
    (record,) = json.loads(file.read_text())
    assert set(record) >= KEYS
    assert (record['path'], record['case'], record['device']) == ('sleepy', 'short', 'cpu')
    assert record['parity'] == 'both return None'
    assert record['workload'] == 'Two sleeps, 4 and 20 ms.'
    assert record['rounds'] >= 3
    assert record['ratio_low'] <= record['ratio'] <= record['ratio_high']
    assert 4 <= record['ours_ms'] < record['peer_ms'] and record['peer_ms'] >= 20
    assert 1.5 < record['ratio'] < 5.5  # 20 / 4, less what a sleep oversleeps
    assert record['ours_syncs'] is None
    assert record['floor'] == {'ratio': 3, 'memory': None, 'syncs': None}
    assert record['versions']['numpy']


def test_peak_memory_counts_the_call_and_not_the_inputs(folder):
    file = folder / 'records.json'
    assert run(folder, '--path', 'memory', '--json', file).returncode == 0
    (record,) = json.loads(file.read_text())
    assert record['ours_peak_bytes'] == pytest.approx(16 << 20, rel=0.05)
    assert record['peer_peak_bytes'] == pytest.approx(64 << 20, rel=0.05)


def test_refuses_to_time_sides_that_differ(folder):
    file = folder / 'records.json'
    done = run(folder, '--path', 'unequal', '--json', file)
    assert done.returncode == 1
    assert 'parity failed, nothing was timed: 1 is not 2' in done.stdout
    assert (folder / 'calls').read_text() == 'o'
    assert not file.exists()


def test_a_case_that_fails_costs_no_other(folder):
    file = folder / 'records.json'
    old = {'path': 'sleepy', 'case': 'gone', 'device': 'cpu'}
    stale = {'path': 'sleepy', 'case': 'short', 'device': 'cpu', 'ratio': -1}
    file.write_text(json.dumps([old, stale]))
    paths = [f'--path={name}' for name in ('lonely', 'raising', 'sleepy')]
    done = run(folder, *paths, '--json', file)
    assert done.returncode == 1
    assert "a package is missing: No module named 'a_peer_nobody_has'" in done.stdout
    assert 'ZeroDivisionError' in done.stdout
    first, second = json.loads(file.read_text())
    assert first == old
    assert second['case'] == 'short' and second['ratio'] > 0


@pytest.mark.parametrize(
    'arguments, sentence',
    [
        (['--path', 'nothing'], 'No path nothing; there are: lonely, memory,'),
        (['--rounds', '2'], '--rounds must be at least 3'),
    ],
)
def test_bad_arguments_give_one_sentence(folder, arguments, sentence):
    done = run(folder, *arguments)
    assert done.returncode != 0
    assert sentence in done.stderr
    assert 'Traceback' not in done.stderr


def test_does_not_overwrite_a_file_that_holds_something_else(folder):
    file = folder / 'notes.json'
    file.write_text('{"mine": 1}')
    done = run(folder, '--path', 'sleepy', '--json', file)
    assert done.returncode == 1
    assert 'is not a list of benchmark records' in done.stderr
    assert file.read_text() == '{"mine": 1}'


def test_a_missing_device_gives_one_sentence(benchmark, folder, monkeypatch, capsys):
    import torch

    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    for variable in benchmark.THREAD_VARIABLES:
        monkeypatch.setenv(variable, '1')
    assert benchmark.main(['--folder', str(folder), '--device', 'cuda']) == 1
    assert capsys.readouterr().err.startswith('No CUDA device is visible to torch')


def test_sides_alternate_and_rounds_are_at_least_the_least(benchmark):
    order = []
    sides = {name: lambda name=name: order.append(name) for name in ('ours', 'peer')}
    times = benchmark.time_rounds(sides, lambda: None, least=4, seconds=0)
    assert order == ['ours', 'peer', 'peer', 'ours'] * 2
    assert len(times['ours']) == len(times['peer']) == 4


def test_bootstrap_interval(benchmark):
    assert benchmark.median_with_interval([2.0, 2.0, 2.0]) == (2.0, 2.0, 2.0)
    median, low, high = benchmark.median_with_interval([1.0, 2.0, 9.0])
    assert (median, low, high) == (2.0, 1.0, 9.0)
    # Median of n = 101 draws from 1..101: the order-statistic interval is 51 -+ 0.98 sqrt(101).
    median, low, high = benchmark.median_with_interval(list(range(1, 102)))
    assert median == 51
    assert low == pytest.approx(41, abs=2) and high == pytest.approx(61, abs=2)


@pytest.mark.gpu
def test_cuda_counts(benchmark):
    import torch

    if not torch.cuda.is_available():
        pytest.skip('needs a CUDA device')
    numbers = torch.arange(1 << 20, device='cuda', dtype=torch.float32)
    counts = benchmark.cuda_counts(lambda: (numbers + 1).mul_(2).max().item())
    assert counts['syncs'] == 1
    assert counts['launches'] >= 3
    assert counts['peak_bytes'] == pytest.approx(4 << 20, rel=0.01)
