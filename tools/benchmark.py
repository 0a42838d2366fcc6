#!/usr/bin/env python
"""Time this project beside its peers: the same task, the same inputs, the same process.

    python tools/benchmark.py --list
    python tools/benchmark.py --path carafe --path dual_sim_ota --json results/benchmark_cpu.json
    python tools/benchmark.py --device cuda --json results/benchmark_cuda.json

A path is one file in ``tools/benchmarks``; ``_case.py`` there is the contract. For each case:

1. Both sides run once on the same seeded inputs and their results are compared. Where they differ
   nothing is timed. This first call is the warm-up, too.
2. Rounds of one call a side, the order alternating from round to round. A round gives one ratio,
   peer time / our time; the record holds the median and its bootstrap 95 % interval.
3. Peak memory. On the CPU each side runs in a forked process of its own, which builds the same
   inputs, calls once to load what is loaded lazily, hands freed memory back to the system, resets
   the high-water mark of its resident memory, and calls again: the peak is the mark less what was
   resident before that second call. Inputs, and what the first call leaves cached, count for
   neither side. On CUDA it is the allocator's peak less what was allocated before the call.
4. On CUDA, host synchronisations (warnings of ``torch.cuda.set_sync_debug_mode``) and kernel
   launches (``torch.profiler``) of one call.

Records are written to the JSON file after each case; one of the same path, case and device is
replaced, others stay.
"""

import argparse
import ast
import ctypes
import gc
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PATHS = ROOT / 'tools' / 'benchmarks'
sys.path.insert(0, str(ROOT))
sys.path.append(str(PATHS))  # for _case

from mmdet_plugins.common.files import atomic_write  # noqa: E402

PACKAGES = (
    'torch triton numpy opencv-python hotcoco pycocotools faster-coco-eval '
    'mmengine mmcv mmdet mmsegmentation '
    'onedl-mmengine onedl-mmcv onedl-mmdetection onedl-mmsegmentation'
).split()
THREAD_VARIABLES = (
    'OMP_NUM_THREADS',
    'MKL_NUM_THREADS',
    'OPENBLAS_NUM_THREADS',
    'RAYON_NUM_THREADS',
)
# Every block of 64 KiB or more comes from the system and goes back when freed, so that the resident
# memory follows what is in use. By default the threshold grows to 32 MiB as blocks are freed.
CHILD_ENVIRONMENT = {'MALLOC_MMAP_THRESHOLD_': '65536', 'MALLOC_TRIM_THRESHOLD_': '65536'}
MOST_ROUNDS = 200


class Refusal(Exception):
    """Something asked for cannot be measured; the message is the sentence the user reads."""


def discover(folder: Path) -> dict[str, str]:
    """Name of each path in ``folder`` and its workload, without importing any."""
    paths = {}
    for file in sorted(folder.glob('[!_]*.py')):
        text = ast.get_docstring(ast.parse(file.read_text(encoding='utf-8'), str(file))) or ''
        paths[file.stem] = text.partition('\n')[0]
    return paths


def load(folder: Path, path: str) -> ModuleType:
    """Import ``<folder>/<path>.py``."""
    spec = importlib.util.spec_from_file_location(f'benchmark_{path}', folder / f'{path}.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # data classes of the module look it up
    spec.loader.exec_module(module)
    return module


def set_threads(threads: int) -> None:
    """Give torch and OpenCV, where a case uses them, the same number of threads."""
    for name, setter in (('torch', 'set_num_threads'), ('cv2', 'setNumThreads')):
        if name in sys.modules:
            getattr(sys.modules[name], setter)(threads)


def check_device(device: str) -> None:
    """Refuse CUDA where there is none."""
    if device == 'cpu':
        return
    import torch

    if not torch.cuda.is_available():
        raise Refusal('No CUDA device is visible to torch; run with --device cpu.')


def synchroniser(device: str) -> Callable[[], None]:
    if device == 'cpu':
        return lambda: None
    import torch

    return torch.cuda.synchronize


def time_rounds(
    sides: dict[str, Callable[[], Any]],
    sync: Callable[[], None],
    least: int,
    seconds: float,
) -> dict[str, list[float]]:
    """Seconds of each side in each round: ``least`` rounds, then more until ``seconds`` are over.

    The freeing of a result is not timed on either side.
    """
    times = {name: [] for name in sides}
    names = list(sides)
    start = time.perf_counter()
    while (done := len(times[names[0]])) < least or (
        done < MOST_ROUNDS and time.perf_counter() - start < seconds
    ):
        for name in names if done % 2 == 0 else reversed(names):
            gc.collect()
            sync()
            begin = time.perf_counter()
            result = sides[name]()
            sync()
            times[name].append(time.perf_counter() - begin)
            del result
    return times


def median_with_interval(values: list[float], resamples: int = 2000) -> tuple[float, float, float]:
    """Median and its percentile-bootstrap 95 % interval ``(median, low, high)``, seeded."""
    import numpy as np

    values = np.asarray(values)
    drawn = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    low, high = np.percentile(np.median(values[drawn], axis=1), (2.5, 97.5))
    return float(np.median(values)), float(low), float(high)


def status_bytes(key: str) -> int:
    """A size from ``/proc/self/status``, e.g. ``'VmRSS'``, in bytes."""
    for line in Path('/proc/self/status').read_text().splitlines():
        if line.startswith(f'{key}:'):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def child_peak(call: Callable[[], Any]) -> int:
    """Peak resident bytes of one call above what was resident before it (this process, Linux)."""
    call()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path('/proc/self/clear_refs').write_text('5')  # resets VmHWM
    before = status_bytes('VmRSS')
    result = call()
    peak = status_bytes('VmHWM')
    del result
    return max(peak - before, 0)


def cpu_peak(args: argparse.Namespace, path: str, case: str, side: str) -> int | None:
    """``child_peak`` of one side, in a process that does nothing else; None if it died."""
    command = [sys.executable, __file__, '--child', path, case, side]
    command += ['--folder', str(args.folder), '--threads', str(args.threads)]
    done = subprocess.run(
        command, env=os.environ | CHILD_ENVIRONMENT, capture_output=True, text=True
    )
    if done.returncode:
        reason = done.stderr.strip().rpartition('\n')[2] or f'exit status {done.returncode}'
        print(f'  The peak memory of {side} is unknown, its process died: {reason}')
        return None
    return json.loads(done.stdout.rpartition('\nPEAK ')[2])


def cuda_counts(call: Callable[[], Any]) -> dict[str, int]:
    """Peak bytes, host synchronisations and kernel launches, each of a call of its own."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before

    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        torch.cuda.set_sync_debug_mode('warn')
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    syncs = sum('synchronizing CUDA operation' in str(w.message) for w in caught)

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    launches = sum(
        event.count
        for event in profiler.key_averages()
        if event.key.startswith(('cudaLaunchKernel', 'cuLaunchKernel'))
    )
    return {'peak_bytes': peak, 'syncs': syncs, 'launches': launches}


def commit() -> str:
    """The commit that is checked out, ``-dirty`` appended where tracked code differs from it.

    In a copy without git it is the variable BENCHMARK_COMMIT, or ``unknown``.
    """

    def git(*arguments: str) -> str:
        return subprocess.run(
            ['git', '-C', ROOT, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        code = ('--', '*.py', '*.cpp', '*.cu')
        dirty = git('status', '--porcelain', '--untracked-files=no', *code)
        return git('rev-parse', '--short=12', 'HEAD') + ('-dirty' if dirty else '')
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get('BENCHMARK_COMMIT', 'unknown')


def versions() -> dict[str, str]:
    found = {'python': platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine(device: str) -> str:
    """The card, or the processor."""
    if device == 'cuda':
        import torch

        return torch.cuda.get_device_name()
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        return next(line.partition(': ')[2] for line in lines if line.startswith('model name'))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def measure(args: argparse.Namespace, path: str, case: Any, workload: str) -> dict[str, Any]:
    """The record of one case.

    Raises:
        Refusal: The peer is missing or the sides differ.
    """
    device = args.device
    try:
        sides = case.build(device)
        calls = {'ours': sides.ours, 'peer': sides.peer}
        results = [calls['ours'](), calls['peer']()]
    except ImportError as error:
        raise Refusal(f'a package is missing: {error}') from error
    try:
        parity = sides.parity(*results)
    except AssertionError as error:
        raise Refusal(f'parity failed, nothing was timed: {error}') from error
    del results
    print(f'  parity: {parity}', flush=True)

    set_threads(args.threads)  # late: building a model may have changed them
    times = time_rounds(calls, synchroniser(device), args.rounds, args.max_seconds)
    ratio, low, high = median_with_interval(
        [peer / ours for peer, ours in zip(times['peer'], times['ours'], strict=True)]
    )
    if device == 'cuda':
        counts = {side: cuda_counts(call) for side, call in calls.items()}
    else:
        counts = {side: {'peak_bytes': cpu_peak(args, path, case.name, side)} for side in calls}
    record = {'path': path, 'case': case.name, 'device': device, 'parity': parity}
    record |= {'ratio': ratio, 'ratio_low': low, 'ratio_high': high}
    record |= {f'{side}_ms': 1e3 * median_with_interval(times[side])[0] for side in calls}
    for key in ('peak_bytes', 'syncs', 'launches'):
        record |= {f'{side}_{key}': counts[side].get(key) for side in calls}
    floor = case.floors.get(device)
    return record | {
        'rounds': len(times['ours']),
        'floor': asdict(floor) if floor else None,
        'workload': workload,
        'machine': machine(device),
        'threads': args.threads,
        'commit': commit(),
        'versions': versions(),
    }


def read_records(file: Path) -> list[dict[str, Any]]:
    """The records that are already in ``file``; none if it does not exist."""
    if not file.exists():
        return []
    try:
        records = json.loads(file.read_text(encoding='utf-8'))
        if isinstance(records, list) and all(isinstance(r, dict) for r in records):
            return records
    except ValueError:
        pass
    raise Refusal(f'{file} is not a list of benchmark records; name another file with --json.')


def put(records: list[dict[str, Any]], record: dict[str, Any]) -> list[dict[str, Any]]:
    """``records`` with ``record`` in the place of the one with the same path, case and device."""

    def key(item: dict[str, Any]) -> tuple[str, str, str]:
        return item['path'], item['case'], item['device']

    return sorted([r for r in records if key(r) != key(record)] + [record], key=key)


def figures(record: dict[str, Any]) -> str:
    """One line for people."""

    def both(key: str, unit: str, scale: float) -> str:
        values = [record[f'{side}_{key}'] for side in ('ours', 'peer')]
        if None in values:
            return ''
        ours, peer = (f'{value * scale:,.4g}' for value in values)
        return f'   {ours} against {peer} {unit}'

    line = (
        f'  {record["ratio"]:.2f}x [{record["ratio_low"]:.2f}, {record["ratio_high"]:.2f}]'
        f' in {record["rounds"]} rounds'
    )
    line += both('ms', 'ms', 1) + both('peak_bytes', 'MiB', 2**-20)
    return line + both('syncs', 'syncs', 1) + both('launches', 'launches', 1)


def run(args: argparse.Namespace) -> int:
    """Measure what was asked for; 0 if each case gave a record."""
    paths = discover(args.folder)
    if unknown := [path for path in args.path if path not in paths]:
        raise Refusal(f'No path {", ".join(unknown)}; there are: {", ".join(paths) or "none"}.')
    check_device(args.device)
    records = read_records(args.json) if args.json else []
    failed = 0
    for path in args.path or paths:
        print(f'{path}: {paths[path]}', flush=True)
        try:
            cases = load(args.folder, path).CASES
        except ImportError as error:
            print(f'  Skipped, a package is missing: {error}')
            failed += 1
            continue
        for case in cases:
            print(f'{path} / {case.name} on {args.device}', flush=True)
            try:
                record = measure(args, path, case, paths[path])
            except Refusal as refusal:
                print(f'  No figure: {refusal}', flush=True)
                failed += 1
                continue
            except Exception:
                print(f'  No figure, a side raised:\n{traceback.format_exc()}', flush=True)
                failed += 1
                continue
            print(figures(record), flush=True)
            records = put(records, record)
            if args.json:
                with atomic_write(args.json) as file:
                    json.dump(records, file, indent=1)
                    file.write('\n')
    return int(failed > 0)


def run_child(args: argparse.Namespace) -> int:
    """Print the peak of one side of one case."""
    path, name, side = args.child
    case = next(case for case in load(args.folder, path).CASES if case.name == name)
    call = getattr(case.build('cpu'), side)
    set_threads(args.threads)
    print(f'\nPEAK {child_peak(call)}')
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Time this project beside its peers.')
    parser.add_argument(
        '--path',
        action='append',
        default=[],
        metavar='NAME',
        help='measure this path only; may be repeated',
    )
    parser.add_argument('--list', action='store_true', help='print the paths and their workloads')
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    parser.add_argument(
        '--json', type=Path, metavar='FILE', help='merge the records into this file'
    )
    parser.add_argument('--rounds', type=int, default=3, help='fewest rounds a case (default: 3)')
    parser.add_argument(
        '--max-seconds',
        type=float,
        default=30,
        help=f'more rounds within this time a case, at most {MOST_ROUNDS} (default: 30)',
    )
    parser.add_argument(
        '--threads',
        type=int,
        default=2,
        help='threads of torch, OpenCV and the numeric libraries (default: 2)',
    )
    parser.add_argument(
        '--folder', type=Path, default=PATHS, help='where the paths are (default: tools/benchmarks)'
    )
    parser.add_argument('--child', nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.rounds < 3:
        parser.error('--rounds must be at least 3: fewer give no interval.')
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    for variable in THREAD_VARIABLES:
        os.environ[variable] = str(args.threads)  # read when the libraries are first imported
    try:
        if args.list:
            for path, workload in discover(args.folder).items():
                print(f'{path:20} {workload}')
            return 0
        return run_child(args) if args.child else run(args)
    except Refusal as refusal:
        print(refusal, file=sys.stderr)
        return 1


if __name__ == '__main__':
    sys.exit(main())
