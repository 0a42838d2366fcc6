"""The environment script and the doctor, on made-up facts and on the environment at hand."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

GOOD = {
    'torch': ('torch', '2.13.0+cpu'),
    'mmengine': ('mmengine', '0.10.7'),
    'mmcv': ('mmcv', '2.1.0'),
    'mmdet': ('mmdet', '3.3.0'),
    'mmseg': ('mmsegmentation', '1.2.2'),
    'hotcoco': ('hotcoco', '1.3.0'),
    'numpy': ('numpy', '2.4.6'),
    'cv2': ('opencv-python', '5.0.0.93'),
    'setuptools': ('setuptools', '80.10.2'),
    'torchvision': ('torchvision', '0.28.0'),
    'mminstance': ('mminstance', '0.1.0'),
}
ONEDL = {
    'mmengine': ('onedl-mmengine', '0.10.12'),
    'mmcv': ('onedl-mmcv', '2.3.6'),
    'mmdet': ('onedl-mmdetection', '3.5.1'),
    'mmseg': ('onedl-mmsegmentation', '1.4.2'),
}


@pytest.fixture(scope='module')
def doctor(load_script):
    return load_script('tools/doctor.py')


@pytest.fixture(scope='module')
def setup_env(load_script):
    return load_script('tools/setup_env.py')


@pytest.mark.parametrize(
    ('versions', 'others', 'word', 'mend'),
    [
        ({'setuptools': ('setuptools', '84.0.0')}, {}, 'pkg_resources', 'setuptools<81'),
        ({'mmcv': ('mmcv', '2.2.0')}, {}, 'mmcv < 2.2.0', 'mmcv==2.1.0'),
        ({'mmengine': ('mmengine', '0.11.0rc0')}, {}, 'mmdet::', 'mmengine==0.10.7'),
        ({'mmengine': ('mmengine', '0.10.4')}, {}, 'mmengine 0.10.4', 'mmengine==0.10.7'),
        ({'cv2': ('opencv-python', '4.9.0.80')}, {}, 'NumPy 1', 'opencv-python'),
        ({'mmdet': None}, {}, 'not installed: mmdet', 'make env'),
        ({}, {'mim_folders': {'mmdet': False}}, 'mim train mmdet', 'mmdet==3.3.0'),
        ({}, {'errors': {'mmcv._ext': 'ImportError: x'}}, 'compiled operators', 'mmcv==2.1.0'),
        (
            {},
            {'gpu': 'NVIDIA H200 sm_90', 'errors': {'cuda_ops': 'RuntimeError: x'}},
            'CUDA operators',
            'FORCE_CUDA=1',
        ),
        (
            {},
            {'errors': {'torchvision': 'RuntimeError: x', 'torchvision mended': 'RuntimeError: y'}},
            'torchvision does not import',
            'pip uninstall -y torchvision',
        ),
        ({}, {'errors': {'mmseg.models': 'ImportError: ftfy'}}, 'mmseg.models', 'make env'),
        (
            {},
            {'doubled': {'mmcv': {'mmcv': '2.1.0', 'onedl-mmcv': '2.3.6'}}},
            'mmcv 2.1.0 and onedl-mmcv 2.3.6',
            'uninstall',
        ),
    ],
)
def test_doctor_names_each_known_bad_pair_once(doctor, versions, others, word, mend):
    merged = {name: pair for name, pair in {**GOOD, **versions}.items() if pair}
    (finding,) = doctor.diagnose(doctor.Facts(versions=merged, **others))
    assert finding.level == 'broken'
    assert word in finding.what
    assert mend in finding.mend
    assert '\n' not in finding.what + finding.mend


def test_doctor_is_content_with_both_lines(doctor):
    assert doctor.diagnose(doctor.Facts(versions=GOOD)) == []
    onedl = {**GOOD, **ONEDL, 'setuptools': ('setuptools', '84.0.0')}
    assert doctor.diagnose(doctor.Facts(versions=onedl)) == []


def test_doctor_only_notes_what_the_runtime_mends(doctor):
    facts = doctor.Facts(versions=GOOD, errors={'torchvision': 'RuntimeError: no operator'})
    assert [finding.level for finding in doctor.diagnose(facts)] == ['note']
    twins = {'cv2': {'opencv-python': '5.0.0.93', 'opencv-python-headless': '5.0.0.93'}}
    assert doctor.diagnose(doctor.Facts(versions=GOOD, doubled=twins)) == []
    without_gpu = doctor.Facts(versions=GOOD, errors={'cuda_ops': 'AssertionError: no CUDA'})
    assert doctor.diagnose(without_gpu) == []


@pytest.fixture(scope='module')
def facts(doctor):
    return doctor.gather()


def test_doctor_finds_nothing_broken_here(doctor, facts):
    findings = doctor.diagnose(facts)
    assert not [finding for finding in findings if finding.level == 'broken']
    text = doctor.report(facts, findings)
    assert 'mmcv ops     present' in text and text.endswith('Nothing is broken')


def test_doctor_runs_where_nothing_is_installed(repo, tmp_path):
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', tmp_path / 'bare'], check=True)
    result = subprocess.run(
        [tmp_path / 'bare' / 'bin' / 'python', repo / 'tools' / 'doctor.py'],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 1, result.stdout + result.stderr
    assert 'BROKEN: not installed: torch, mmengine, mmcv, mmdet, mmseg' in result.stdout


def test_pins_follow_the_stack_that_runs(setup_env, facts):
    """The pins are those of the environment that the tests run in, if the script made it."""
    if not (Path(sys.prefix) / setup_env.STAMP).exists():
        pytest.skip(f'{sys.prefix} is an environment of the user')
    stack = 'onedl' if facts.versions['mmcv'][0].startswith('onedl') else 'openmmlab'
    pins = dict(
        pin.split('==') for group in setup_env.read_pins(stack).values() for pin in group
        if '==' in pin
    )  # fmt: skip
    for distribution, version in facts.versions.values():
        if distribution in pins:
            assert version.split('+')[0] == pins[distribution]
    assert {'torch', facts.versions['mmcv'][0], facts.versions['mmdet'][0]} <= set(pins)


def test_both_stacks_share_the_common_pins(setup_env):
    default, second = (setup_env.read_pins(stack) for stack in ('openmmlab', 'onedl'))
    assert default['torch'] == second['torch']
    assert default['compiled'] == ['mmcv==2.1.0']
    assert second['compiled'] == ['onedl-mmcv==2.3.6']
    assert {step.key for step in setup_env.STEPS} == set(default) == set(second)
    lines = setup_env.constraints(default).splitlines()
    assert 'setuptools<81' in lines and 'mmcv==2.1.0' in lines and 'wheel' not in lines


def test_progress_is_read_from_the_compilers_log(setup_env):
    assert setup_env.progress('Collecting mmcv\n') == ''
    log = '  [1/78] c++ -MMD a.cpp\n  warning: x\n  [12/78] c++ -MMD b.cpp -DN=[3/4]\n'
    assert setup_env.progress(log) == ', 12 of 78 files compiled'


@pytest.mark.parametrize(
    ('log', 'word'),
    [
        ('OSError: [Errno 28] No space left on device', 'disk is full'),
        ("error: command 'g++' failed with exit code 1", 'C++ compiler'),
        ('fatal error: Python.h: No such file or directory', 'python3.11-dev'),
        ('Failed to establish a new connection: NewConnectionError(...)', 'registry'),
        ('ERROR: No matching distribution found for torch==2.13.0', 'torch==2.13.0'),
        ('something else', 'last lines'),
    ],
)
def test_failures_are_explained_in_one_sentence(setup_env, log, word):
    sentence = setup_env.explain(log, Path('/somewhere/.venv'))
    assert word in sentence and '\n' not in sentence


def test_a_made_environment_is_reused(setup_env, tmp_path, monkeypatch):
    made = []

    def install(stack, env):
        made.append(stack)

    monkeypatch.setattr(setup_env, 'install', install)
    monkeypatch.setattr(sys, 'argv', ['setup_env.py', str(tmp_path / 'env')])
    assert setup_env.main() == 0 and made == ['openmmlab']
    assert setup_env.main() == 0 and made == ['openmmlab']
    monkeypatch.setattr(setup_env, 'read_pins', lambda stack: {'torch': ['torch==9.9.9']})
    assert setup_env.main() == 0 and len(made) == 2, 'changed pins make it anew'


def test_a_failed_step_leaves_no_stamp_and_says_why(setup_env, tmp_path, monkeypatch, capsys):
    def install(stack, env):
        raise setup_env.SetupError('step failed: mend it so')

    monkeypatch.setattr(setup_env, 'install', install)
    monkeypatch.setattr(sys, 'argv', ['setup_env.py', str(tmp_path / 'env')])
    assert setup_env.main() == 1
    assert capsys.readouterr().err == 'setup_env: step failed: mend it so\n'
    assert not (tmp_path / 'env' / setup_env.STAMP).exists()


def test_the_wrong_python_and_a_full_disk_are_refused(setup_env, tmp_path, monkeypatch):
    monkeypatch.setattr(setup_env, 'PYTHON', (3, 99))
    with pytest.raises(setup_env.SetupError, match=r'Python 3\.99 is needed, this is 3\.'):
        setup_env.check_machine(tmp_path)
    monkeypatch.setattr(setup_env, 'PYTHON', sys.version_info[:2])
    setup_env.check_machine(tmp_path)
    monkeypatch.setattr(setup_env, 'FREE_GIB', 1 << 20)
    with pytest.raises(setup_env.SetupError, match='GiB are free; make room'):
        setup_env.check_machine(tmp_path)


def test_pip_settings_are_added_to_and_never_replaced(setup_env, tmp_path, monkeypatch):
    monkeypatch.setenv('PIP_FIND_LINKS', '/a /b')
    monkeypatch.setenv('PIP_CONSTRAINT', '/mine.txt')
    monkeypatch.setenv('CFLAGS', '-O1')
    environ = setup_env.build_environ(tmp_path)
    assert environ['PIP_FIND_LINKS'] == '/a /b'
    assert environ['PIP_CONSTRAINT'] == f'/mine.txt {tmp_path / "constraints.txt"}'
    assert environ['CFLAGS'] == '-O1 -g0'
    assert environ['MMCV_WITH_OPS'] == '1' and int(environ['MAX_JOBS']) >= 1


def test_a_stopped_run_stops_its_compilers(setup_env, repo, tmp_path):
    code = (
        'import os, signal, sys; sys.path.insert(0, "tools")\n'
        'import setup_env; from pathlib import Path\n'
        'signal.signal(signal.SIGTERM, signal.default_int_handler)\n'
        f'setup_env.watch(["sh", "-c", "sleep 60 & echo $! > {tmp_path}/pid; wait"], '
        f'Path("{tmp_path}/log"), dict(os.environ))'
    )
    child = subprocess.Popen([sys.executable, '-c', code], cwd=repo, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / 'pid').is_file() or not (tmp_path / 'pid').read_text().strip():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    child.terminate()
    assert child.wait(30) != 0
    compiler = Path('/proc') / (tmp_path / 'pid').read_text().strip()
    while compiler.exists() and 'State:\tZ' not in (compiler / 'status').read_text():
        assert time.monotonic() < deadline, 'the compiler was left running'
        time.sleep(0.1)


def test_a_silent_step_is_watched(setup_env, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(setup_env, 'HEARTBEAT_S', 0.3)
    code = 'import time; print("[7/78] c++", flush=True); time.sleep(1); raise SystemExit(3)'
    log = setup_env.watch([sys.executable, '-c', code], tmp_path / 'log', {})
    assert log == '[7/78] c++\n'
    assert '7 of 78 files compiled' in capsys.readouterr().out
