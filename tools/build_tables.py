#!/usr/bin/env python
"""Fill the tables of the Markdown pages from ``results/*.json``.

    python tools/build_tables.py            # rewrite what is stale
    python tools/build_tables.py --check    # say what is stale, exit 1

Between ``<!-- table:NAME -->`` and ``<!-- /table -->`` stands the table of ``results/NAME.json``:
either records of ``tools/benchmark.py``, or a list of flat objects, one a row, whose keys are the
column titles.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mmdet_plugins.common.files import atomic_write  # noqa: E402

PAGES = ('*.md', 'configs/**/*.md', 'projects/**/*.md')
OPENING = re.compile(r'<!-- table:([\w.-]+) -->')
NUMBER = re.compile(r'(–|[-+]?(1/)?[\d.,]+( ± [\d.,]+)?( \w+)?)?')
TABLE = re.compile(r'(<!-- table:([\w.-]+) -->\n).*?(<!-- /table -->)', re.DOTALL)


def markdown(rows: list[dict[str, str]]) -> str:
    """A pipe table; columns of numbers, with a spread or a unit or without, go right."""
    titles = list(dict.fromkeys(title for row in rows for title in row))
    right = {title: all(NUMBER.fullmatch(row.get(title, '')) for row in rows) for title in titles}
    lines = [titles, ['---:' if right[title] else '---' for title in titles]]
    lines += [[row.get(title, '') for title in titles] for row in rows]
    return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def cell(value: Any) -> str:
    """Text of one value: fractions to three decimals, larger numbers to one, none as a dash."""
    if value is None:
        return '–'
    if isinstance(value, float):
        return f'{value:.3f}' if abs(value) < 10 else f'{value:,.1f}'
    return f'{value:,}' if isinstance(value, int) else str(value).replace('|', r'\|')


def duration(milliseconds: float) -> str:
    if milliseconds >= 1e4:
        return f'{milliseconds / 1e3:.1f} s'
    return f'{milliseconds:.0f} ms' if milliseconds >= 100 else f'{milliseconds:.2g} ms'


def size(count: int | None) -> str:
    if count is None:
        return '–'
    return f'{count / 2**30:.1f} GiB' if count >= 2**30 else f'{count / 2**20:.1f} MiB'


def times(ratio: float) -> str:
    return f'{ratio:.0f}' if ratio >= 99.5 else f'{ratio:.1f}' if ratio >= 9.95 else f'{ratio:.2f}'


def floor_text(bound: str, met: bool) -> str:
    return bound if met else f'{bound} **missed**'


def benchmark_row(record: dict[str, Any]) -> dict[str, str]:
    """Figures of one benchmark record, with the floors its path sets beside them."""
    floor = record.get('floor') or {}
    ours, peer = record['ours_peak_bytes'], record['peer_peak_bytes']
    row = {
        'path': f'`{record["path"]}`',
        'case': record['case'],
        'time, ours': duration(record['ours_ms']),
        'time, peer': duration(record['peer_ms']),
        'faster': f'**{times(record["ratio"])}×** '
        f'({times(record["ratio_low"])}–{times(record["ratio_high"])})',
        'floor': '',
        'memory, ours': size(ours),
        'memory, peer': size(peer),
        'share': f'1/{times(peer / ours)}' if ours and peer else '–',
        'limit': '',
    }
    if (bound := floor.get('ratio')) is not None:
        row['floor'] = floor_text(f'≥ {bound:g}×', record['ratio'] >= bound)
    if (bound := floor.get('memory')) is not None:
        met = None not in (ours, peer) and ours <= bound * peer
        row['limit'] = floor_text(f'≤ 1/{1 / bound:.4g}', met)
    if record['ours_syncs'] is not None:
        row['host syncs (peer)'] = f'{record["ours_syncs"]} ({record["peer_syncs"]})'
        if (bound := floor.get('syncs')) is not None and record['ours_syncs'] > bound:
            row['host syncs (peer)'] += f', ≤ {bound} **missed**'
    return row


def benchmark_table(records: list[dict[str, Any]]) -> str:
    """One table a device, each with the machines and commits it was measured on."""
    parts = []
    for device, group in groupby(records, key=lambda record: record['device']):
        group = list(group)
        where = unique(f'{r["machine"]}, {r["threads"]} threads' for r in group)
        torch = unique(r['versions'].get('torch', '–') for r in group)
        note = (
            f'{device.upper()}: {where}; torch {torch}; commit {unique(r["commit"] for r in group)}'
        )
        parts.append(f'{note}.\n\n{markdown([benchmark_row(record) for record in group])}')
    return '\n'.join(parts)


def unique(values: Iterable[str]) -> str:
    return ', '.join(dict.fromkeys(values))


def render(records: list[dict[str, Any]]) -> str:
    """The Markdown of one results file."""
    if records and {'path', 'ratio', 'ours_ms'} <= set(records[0]):
        return benchmark_table(sorted(records, key=lambda r: (r['device'], r['path'], r['case'])))
    return markdown([{key: cell(value) for key, value in row.items()} for row in records])


def fill(text: str, page: str, results: Path) -> str:
    """``text`` with each table replaced.

    Raises:
        ValueError: A marker is not closed, or its results file is missing or not a list of rows.
    """

    def table(match: re.Match) -> str:
        file = results / f'{match[2]}.json'
        try:
            records = json.loads(file.read_text(encoding='utf-8'))
        except FileNotFoundError:
            raise ValueError(f'{page} wants the table {match[2]}, but {file} is missing.') from None
        if not (isinstance(records, list) and all(isinstance(row, dict) for row in records)):
            raise ValueError(f'{file} is not a list of rows.')
        return f'{match[1]}\n{render(records)}\n{match[3]}'

    if len(OPENING.findall(text)) != len(TABLE.findall(text)):
        raise ValueError(f'{page} opens a table that no <!-- /table --> closes.')
    return TABLE.sub(table, text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description='Fill the tables of the Markdown pages.')
    parser.add_argument('--check', action='store_true', help='change nothing, exit 1 if stale')
    parser.add_argument('--root', type=Path, default=ROOT, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    stale = []
    for file in sorted({file for pattern in PAGES for file in args.root.glob(pattern)}):
        old, page = file.read_text(encoding='utf-8'), str(file.relative_to(args.root))
        try:
            new = fill(old, page, args.root / 'results')
        except ValueError as error:
            print(error, file=sys.stderr)
            return 1
        if new == old:
            continue
        stale.append(page)
        if not args.check:
            with atomic_write(file) as out:
                out.write(new)
    if stale:
        verb = 'Stale, run python tools/build_tables.py' if args.check else 'Rewrote'
        print(f'{verb}: {", ".join(stale)}')
    return int(args.check and bool(stale))


if __name__ == '__main__':
    sys.exit(main())
