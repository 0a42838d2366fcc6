"""What `pip install .` gives to a user who then works from any other folder."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from mmengine.config import Config

from mmdet_plugins import cli

FILES = ('setup.cfg', 'pyproject.toml', 'LICENSE', 'README.md', 'model-index.yml')
FOLDERS = ('configs', 'tools', 'mmdet_plugins', 'mmseg_plugins')


@pytest.fixture(scope='module')
def wheel(repo, tmp_path_factory):
    """A wheel built from a copy, so that the build leaves nothing in the checkout."""
    folder = tmp_path_factory.mktemp('wheel')
    for part in FOLDERS:
        ignored = shutil.ignore_patterns('__pycache__')
        shutil.copytree(repo / part, folder / 'source' / part, symlinks=True, ignore=ignored)
    for part in FILES:
        shutil.copy(repo / part, folder / 'source' / part)
    command = [
        sys.executable,
        '-m',
        'pip',
        'wheel',
        '-q',
        '--no-deps',
        '--no-build-isolation',
        '-w',
    ]
    subprocess.run([*command, str(folder), str(folder / 'source')], check=True)
    return next(folder.glob('*.whl'))


@pytest.fixture(scope='module')
def installed(wheel, tmp_path_factory):
    """The wheel unpacked where pip would put it."""
    folder = tmp_path_factory.mktemp('site-packages')
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def mminstance(site: Path, cwd: Path, *args: str) -> subprocess.CompletedProcess:
    """The command as the installed entry point runs it, with nothing of the checkout in sight."""
    code = f'import sys; sys.path.insert(0, {str(site)!r}); import mmdet_plugins.cli as c; '
    return subprocess.run(
        [sys.executable, '-c', code + 'sys.exit(c.main())', *args],
        cwd=cwd,
        env={**os.environ, 'PYTHONPATH': ''},
        capture_output=True,
        text=True,
    )


def test_wheel_holds_every_module_config_and_tool(repo, wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for package in ('mmdet_plugins', 'mmseg_plugins'):
        for path in (repo / package).rglob('*.py'):
            if '.mim' not in path.parts:
                assert path.relative_to(repo).as_posix() in names
    for folder in ('configs', 'tools'):
        for path in (repo / folder).rglob('*'):
            if path.is_file() and '__pycache__' not in path.parts:
                assert f'mmdet_plugins/.mim/{path.relative_to(repo).as_posix()}' in names
    assert 'mmdet_plugins/.mim/model-index.yml' in names
    assert not [name for name in names if name.endswith('.pyc') or name.startswith('tests')]
    assert {name.split('/')[0] for name in names} - {'mmdet_plugins', 'mmseg_plugins'} == {
        wheel.name.rsplit('-py3', 1)[0] + '.dist-info'
    }


def test_installed_command_prints_a_config_that_loads(installed, tmp_path):
    listed = mminstance(installed, tmp_path, 'config', '--list')
    assert listed.returncode == 0, listed.stderr
    names = listed.stdout.split()
    assert names
    for name in (names[0], f'{names[-1]}.py', f'configs/uvo/{names[0]}.py'):
        found = mminstance(installed, tmp_path, 'config', name)
        assert found.returncode == 0, found.stderr
        path = Path(found.stdout.strip())
        assert path.is_relative_to(installed) and path.is_file()
        Config.fromfile(path, import_custom_modules=False)  # its relative bases are there too


def test_a_wrong_name_ends_with_near_matches(installed, tmp_path):
    name = mminstance(installed, tmp_path, 'config', '--list').stdout.split()[0]
    missed = mminstance(installed, tmp_path, 'config', name[:-1])
    assert missed.returncode == 2 and missed.stdout == ''
    assert name in missed.stderr and len(missed.stderr.strip().splitlines()) == 1
    stranger = mminstance(installed, tmp_path, 'config', 'qqqq')
    assert stranger.returncode == 2 and 'mminstance config --list' in stranger.stderr


def test_fragments_are_no_configs(tmp_path):
    for path in ('a/_base_/fragment.py', '_base_/data.py', 'a/leaf.py', 'a/tiny/small.py'):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    assert list(cli.shipped_configs(tmp_path)) == ['leaf', 'small']
    with pytest.raises(LookupError, match="no config called 'fragment'"):
        cli.find_config('fragment', tmp_path)


def test_command_in_the_checkout_names_the_real_file(repo, capsys):
    name = next(iter(cli.shipped_configs()))
    assert cli.main(['config', name]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path.is_relative_to(repo / 'configs') and path.is_file()
