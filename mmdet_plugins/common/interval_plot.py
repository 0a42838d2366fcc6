"""A plot for a page of Markdown: values of some things one above the other, with intervals."""

from collections.abc import Sequence
from typing import NamedTuple

WIDTH, LINE = 560, 34


class Interval(NamedTuple):
    """A line of the plot."""

    name: str
    value: float
    low: float
    high: float
    colour: str


def interval_plot(rows: Sequence[Interval], reference: tuple[str, float] | None = None) -> str:
    """SVG of values from zero on with their intervals, and of one to compare with, dotted."""
    left = max(110, 16 + 7 * max(len(row.name) for row in rows))
    scale = (WIDTH - left - 20) / (1.1 * max(row.high for row in rows))
    height = LINE * len(rows) + 40
    bottom = height - 26
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
    ]
    for i, row in enumerate(rows):
        y = LINE * i + 24
        at, low, high = (left + scale * x for x in (row.value, row.low, row.high))
        parts += [
            f'<text x="8" y="{y + 4}">{row.name}</text>',
            f'<path d="M{low:.1f} {y}H{high:.1f}" stroke="{row.colour}" stroke-width="3"/>',
            f'<circle cx="{at:.1f}" cy="{y}" r="5" fill="{row.colour}"/>',
            f'<text x="{at:.1f}" y="{y - 9}" text-anchor="middle" font-size="11">'
            f'{row.value:.3f}</text>',
        ]
    if reference:
        name, value = reference
        x = left + scale * value
        parts += [
            f'<path d="M{x:.1f} 4V{bottom}" stroke="black" stroke-dasharray="2 3"/>',
            f'<text x="{x:.1f}" y="{height - 8}" text-anchor="middle">{name}</text>',
        ]
    parts += [f'<path d="M{left} {bottom}H{WIDTH - 20}" stroke="#bbb"/>', '</svg>\n']
    return '\n'.join(parts)
