"""Makes the virtual environment of one stack from the pins in ``setup.cfg``, or reuses it.

    python3.11 tools/setup_env.py                      # .venv: mmengine, mmcv, mmdet, mmseg
    python3.11 tools/setup_env.py --stack onedl        # .venv-onedl: the OneDL forks

Standard library only. Each step is safe to repeat, so a killed run is taken up by the next one. The
index and find-links settings of pip are used as they are found.
"""

import argparse
import configparser
import fcntl
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STACKS = {'openmmlab': '.venv', 'onedl': '.venv-onedl'}
PYTHON = (3, 11)
FREE_GIB = 6
HEARTBEAT_S = 20
BYTES_PER_COMPILER = 3 << 30  # one g++ on PyTorch's headers, with room to spare
STAMP = 'mminstance.stamp'


class SetupError(Exception):
    """One sentence for the user: what failed, where, and how to mend it."""


@dataclass(frozen=True)
class Step:
    """One pip call: the key of its requirements in ``setup.cfg``, its options, its price."""

    key: str
    options: tuple[str, ...]
    cost: str


STEPS = (
    Step('build', (), 'seconds'),
    Step('torch', (), 'a download of 200 MB, several GB where only CUDA wheels are on offer'),
    Step(
        'compiled',
        ('-v', '--no-build-isolation'),
        'about 9 minutes on 2 cores, or seconds where a wheel is at hand',
    ),
    Step('bare', ('--no-deps', '--no-build-isolation'), 'seconds'),
    Step('packages', ('--no-build-isolation',), 'one or two minutes'),
)


def read_pins(stack: str, path: Path = ROOT / 'setup.cfg') -> dict[str, list[str]]:
    """Step key -> requirements of ``stack``: those common to both lines, then its own."""
    parser = configparser.RawConfigParser()
    with path.open(encoding='utf-8') as file:
        parser.read_file(file)
    pins: dict[str, list[str]] = {}
    for section in ('mminstance:common', f'mminstance:{stack}'):
        for key, value in parser.items(section):
            pins.setdefault(key, []).extend(value.split())
    return pins


def constraints(pins: dict[str, list[str]]) -> str:
    """Text of a pip constraints file: no dependency of a dependency may move a pinned package."""
    versioned = {pin for group in pins.values() for pin in group if re.search('[=<>]', pin)}
    return '\n'.join(sorted(versioned)) + '\n'


def fingerprint(pins: dict[str, list[str]], env: Path) -> str:
    """Changes when an existing environment no longer is what this script would make."""
    facts = (sorted(pins.items()), sys.version_info[:2], str(env.resolve()), str(ROOT))
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def progress(log: str) -> str:
    """What a running compile has done, from ninja's last ``[12/78]``; empty before the first."""
    counts = re.findall(r'^\s*\[(\d+)/(\d+)\]', log, flags=re.MULTILINE)
    return ', {} of {} files compiled'.format(*counts[-1]) if counts else ''


def explain(log: str, env: Path) -> str:
    """The likely cause of a failed step and its mend, read from pip's output."""
    if 'No space left on device' in log:
        return f'the disk is full; free {FREE_GIB} GiB under {env.parent} and run this again'
    if re.search(
        r'(g\+\+|gcc|cc1plus|c\+\+)\S* failed|command .?(g\+\+|gcc|c\+\+)|Killed signal', log
    ):
        if shutil.which('g++') is None and shutil.which('c++') is None:
            return 'there is no C++ compiler; install one (apt-get install g++) and run this again'
        return (
            'the C++ compiler failed; if it was killed for memory, run this again with MAX_JOBS=1'
        )
    if 'Python.h' in log:
        return 'Python.h is missing; install the headers (apt-get install python3.11-dev)'
    if re.search(
        'Temporary failure in name resolution|NewConnectionError|ConnectionError'
        '|ReadTimeout|ProxyError|SSLError|Max retries exceeded',
        log,
    ):
        return 'the registry cannot be reached; check the network and the index settings of pip'
    if missing := re.search(r'No matching distribution found for (\S+)', log):
        return (
            f'the registry does not offer {missing[1]} for Python '
            f'{sys.version_info[0]}.{sys.version_info[1]} on this platform'
        )
    return 'the reason is in the last lines above'


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f'{minutes} min {rest:02d} s' if minutes else f'{rest} s'


def watch(command: list[str], log_path: Path, environ: dict[str, str]) -> str | None:
    """Runs ``command`` into a log file, saying every 20 s that it lives; the log if it failed."""
    start = said = time.monotonic()
    with log_path.open('w', encoding='utf-8') as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environ, start_new_session=True
        )
        try:
            while process.poll() is None:
                time.sleep(0.2)
                if time.monotonic() - said >= HEARTBEAT_S:
                    said = time.monotonic()
                    done = progress(log_path.read_text(encoding='utf-8', errors='replace'))
                    print(f'      {duration(said - start)}{done}', flush=True)
        finally:
            if process.poll() is None:  # interrupted: take the compilers along
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()
    if process.returncode == 0:
        return None
    return log_path.read_text(encoding='utf-8', errors='replace')


def check_machine(env: Path) -> None:
    """Refuses what would fail only after minutes.

    Raises:
        SetupError: wrong Python, or too little room on the disk.
    """
    if sys.version_info[:2] != PYTHON:
        raise SetupError(
            f'Python {PYTHON[0]}.{PYTHON[1]} is needed, this is {sys.version.split()[0]} '
            f'({sys.executable}); name the right one: make env PYTHON=/path/to/python3.11'
        )
    free = shutil.disk_usage(env).free
    if free < FREE_GIB << 30:
        raise SetupError(
            f'{env} needs {FREE_GIB} GiB on its disk and {free / 2**30:.1f} GiB are free; '
            'make room, or name a folder elsewhere: make env ENV=/elsewhere/venv'
        )


def build_environ(env: Path) -> dict[str, str]:
    """The caller's environment plus what pip and mmcv's build need."""
    environ = dict(os.environ)
    try:
        memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    except (ValueError, OSError):
        memory = BYTES_PER_COMPILER
    jobs = max(1, min(len(os.sched_getaffinity(0)), memory // BYTES_PER_COMPILER))
    environ['PATH'] = f'{env / "bin"}{os.pathsep}{environ.get("PATH", os.defpath)}'
    environ['PIP_CONSTRAINT'] = (
        f'{environ.get("PIP_CONSTRAINT", "")} {env / "constraints.txt"}'.strip()
    )
    environ['PIP_DISABLE_PIP_VERSION_CHECK'] = '1'
    environ['CFLAGS'] = f'{environ.get("CFLAGS", "")} -g0'.strip()  # debug symbols double the time
    environ['MMCV_WITH_OPS'] = '1'
    environ.setdefault('MAX_JOBS', str(jobs))
    return environ


def install(stack: str, env: Path) -> None:
    """Runs every step, then has ``tools/doctor.py`` judge the result.

    Raises:
        SetupError: a step failed.
    """
    check_machine(env)
    pins = read_pins(stack)
    logs = env / 'logs'
    logs.mkdir(exist_ok=True)
    (env / 'constraints.txt').write_text(constraints(pins), encoding='utf-8')
    environ = build_environ(env)
    python = str(env / 'bin' / 'python')
    pip = [python, '-m', 'pip', 'install']
    commands = [('venv', [sys.executable, '-m', 'venv', str(env)], '', 'seconds')]
    for step in STEPS:
        commands.append(
            (step.key, [*pip, *step.options, *pins[step.key]], ' '.join(pins[step.key]), step.cost)
        )
    commands.append(
        (
            'editable',
            [*pip, '--no-deps', '--no-build-isolation', '-e', str(ROOT)],
            'mminstance from this checkout',
            'seconds',
        )
    )
    commands.append(('doctor', [python, str(ROOT / 'tools' / 'doctor.py')], 'a check', 'seconds'))
    print(f'Making {env} ({stack} stack); logs in {logs}', flush=True)
    for number, (name, command, what, cost) in enumerate(commands, 1):
        print(f'[{number}/{len(commands)}] {name}: {what or env}  ({cost})', flush=True)
        log = watch(command, logs / f'{number}-{name}.log', environ)
        if log is not None:
            print('\n'.join(f'    | {line}' for line in log.splitlines()[-25:]), flush=True)
            cause = explain(log, env)
            if name == 'venv' and 'ensurepip' in log:
                cause = 'the venv module is missing; install it (apt-get install python3.11-venv)'
            raise SetupError(f'step {name!r} failed: {cause}. Log: {logs / f"{number}-{name}.log"}')


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('env', nargs='?', type=Path, help='its folder (.venv or .venv-onedl)')
    parser.add_argument('--stack', choices=STACKS, default='openmmlab')
    args = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    env = Path(os.path.abspath(args.env or ROOT / STACKS[args.stack]))
    wanted = fingerprint(read_pins(args.stack), env)
    stamp = env / STAMP
    try:
        env.mkdir(parents=True, exist_ok=True)
        with (env / 'mminstance.lock').open('w') as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # a second `make` waits for the first one
            if stamp.is_file() and stamp.read_text(encoding='utf-8') == wanted:
                return 0
            start = time.monotonic()
            stamp.unlink(missing_ok=True)
            install(args.stack, env)
            temporary = stamp.with_suffix('.tmp')
            temporary.write_text(wanted, encoding='utf-8')
            os.replace(temporary, stamp)
            print(f'{env} is ready after {duration(time.monotonic() - start)}', flush=True)
    except (SetupError, OSError) as error:
        print(f'setup_env: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('setup_env: interrupted; run it again to go on where it stopped', file=sys.stderr)
        return 130
    return 0


if __name__ == '__main__':
    sys.exit(main())
