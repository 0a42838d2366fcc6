"""The HTML of the report: numbers and pictures in, one string out.

The page fetches nothing: style, script, plots (SVG) and pictures (``data:`` URIs) are part of it,
and its content security policy forbids everything else. Plots take their colours from the page, so
that they follow its light or dark scheme.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

Curve = Sequence[tuple[int, float]]
Bins = Sequence[tuple[str, int, float]]  # label, count, value from 0 to 1

WIDTH, HEIGHT = 420, 280
LEFT, RIGHT, TOP, BOTTOM = 34, 410, 14, 236  # of a plot's axes
HERE = Path(__file__).parent
KINDS = {'segm': 'Masks', 'boundary': 'Boundaries', 'bbox': 'Boxes'}
PARTS = {'': '', 'novel_': ', novel objects', 'base_': ', base objects'}
METRIC = re.compile(r'(?:open_world/)?(novel_|base_)?(segm|boundary|bbox)_(.+)')
DETAIL = re.compile(r'_(small|medium|large)$|^TIDE')


@dataclass(frozen=True)
class Card:
    """One image of the page; ``photo``, ``truth`` and ``prediction`` are ``data:`` URIs.

    Attributes:
        num_found: Objects that one of the 100 best predictions matches at IoU 0.5.
        recall: AR@100 of this image, NaN without objects.
        problem: What is wrong with the image file, if anything.
    """

    file_name: str
    num_objects: int
    num_found: int
    num_predictions: int
    recall: float
    photo: str
    truth: str
    prediction: str
    problem: str | None = None


def render(
    *,
    title: str,
    num_images: int,
    num_objects: int,
    metrics: Mapping[str, Mapping[str, float]],
    curves: Mapping[str, Curve],
    bins: Mapping[str, Bins],
    groups: Mapping[str, Sequence[Card]],
    notices: Sequence[str],
    by_masks: bool,
) -> str:
    """The page.

    Args:
        title: Heading.
        num_images: Images of the annotations.
        num_objects: Objects in them, crowds left out.
        metrics: Figures by name of the results; the first name is the one the page is about.
        curves: ``(k, AR@k)`` by name.
        bins: ``(size, number of objects, AR@100)`` by name, the same sizes under each.
        groups: Cards by heading.
        notices: Troubles with image files.
        by_masks: Whether plots and pictures are about masks; boxes otherwise.
    """
    kind = 'mask' if by_masks else 'box'
    first = next(iter(metrics))
    top = axis_top(curves, bins)
    facts = [counted(num_images, 'image'), counted(num_objects, 'object')]
    beside = ''.join(f', {escape(name)}' for name in metrics if name != first)
    body = f"""
<header>
<h1>{escape(title)}</h1>
<p class="lede">{' and '.join(facts)}, every object counted whatever its class.
Results of <b>{escape(first)}</b>{beside and f' beside {beside[2:]}'}.</p>
{tiles(metrics[first])}
</header>
<section id="plots">
<h2>Recall</h2>
{legend(curves)}
<div class="plots">
<figure>{curve_plot(curves, top)}
<figcaption><b>AR over the number of predictions.</b> Average {kind} recall at IoU 0.50 to 0.95 when
each image may give its <i>k</i> best-scored predictions.</figcaption></figure>
<figure>{bar_plot('AR@100 by object size', bins, top)}
<figcaption><b>AR@100 by object size.</b> Square root of the object’s area in pixels; below it, how
many objects there are.</figcaption></figure>
</div>
</section>
<section id="metrics">
<h2>Figures</h2>
{metric_tables(metrics)}
</section>
{gallery(groups, notices, kind)}
"""
    return page(title, body)


def page(title: str, body: str) -> str:
    """A self-contained document of which ``body`` is what it shows, in the report's style."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>
{(HERE / 'report.css').read_text(encoding='utf-8')}</style>
</head>
<body>
<main>{body}</main>
<dialog aria-label="Enlarged picture"><img alt=""><p></p></dialog>
<script>
{(HERE / 'report.js').read_text(encoding='utf-8')}</script>
</body>
</html>
"""


def counted(count: int, noun: str) -> str:
    return f'{count:,} {noun}{"" if count == 1 else "s"}'


def number(value: float | None) -> str:
    """Three decimals; a dash where there is nothing to measure (COCO writes -1)."""
    return '–' if value is None or math.isnan(value) or value < 0 else f'{value:.3f}'


def tiles(metrics: Mapping[str, float]) -> str:
    """The four leading figures, as far as there are any."""
    plain = {key.removeprefix('open_world/'): value for key, value in metrics.items()}
    wanted = [
        ('segm_AR@100', 'mask AR@100'),
        ('segm_AP', 'mask AP'),
        ('bbox_AR@100', 'box AR@100'),
        ('bbox_AP', 'box AP'),
    ]
    items = [f'<div><dt>{name}</dt><dd>{number(plain[key])}</dd></div>'
             for key, name in wanted if key in plain]  # fmt: skip
    return f'<dl class="tiles">{"".join(items)}</dl>' if items else ''


def metric_tables(metrics: Mapping[str, Mapping[str, float]]) -> str:
    """A table of the main figures, and one of the rest that opens on request."""
    rows: dict[bool, dict[str, list[tuple[str, str]]]] = {False: {}, True: {}}
    for key in dict.fromkeys(key for figures in metrics.values() for key in figures):
        match = METRIC.fullmatch(key)
        part, kind, name = match.groups() if match else ('', '', key)
        heading = f'{KINDS[kind]}{PARTS[part or ""]}' if match else 'Other'
        detail = bool(DETAIL.search(name))
        rows[detail].setdefault(heading, []).append((name.replace('_', ' '), key))
    order = [f'{kind}{part}' for kind in KINDS.values() for part in PARTS.values()] + ['Other']
    main, detail = (
        metric_table(metrics, sorted(groups.items(), key=lambda group: order.index(group[0])))
        for groups in (rows[False], rows[True])
    )
    if rows[True]:
        main += f'<details><summary>By size of object</summary>{detail}</details>'
    return main


def metric_table(
    metrics: Mapping[str, Mapping[str, float]],
    groups: Iterable[tuple[str, Sequence[tuple[str, str]]]],
) -> str:
    """One table for each of ``(heading, [(row title, key), ...])``, side by side where they fit."""
    names = ''.join(f'<th scope="col">{escape(name)}</th>' for name in metrics)
    tables = ''
    for heading, rows in groups:
        body = ''
        for title, key in rows:
            values = [figures.get(key) for figures in metrics.values()]
            best = max((v for v in values if v is not None), default=-1)
            cells = ''.join(
                f'<td{" class=best" if v == best > 0 else ""}>{number(v)}</td>' for v in values
            )
            body += f'<tr><th scope="row">{escape(title)}</th>{cells}</tr>'
        head = f'<thead><tr><th scope="col">{heading}</th>{names}</tr></thead>'
        tables += f'<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>'
    return f'<div class="tables">{tables}</div>'


def legend(names: Iterable[str]) -> str:
    items = ''.join(
        f'<li><svg viewBox="0 0 22 8" aria-hidden="true"><path class="s{i % 5}" d="M1 4H21"/></svg>'
        f'{escape(name)}</li>'
        for i, name in enumerate(names)
    )
    return f'<ul class="legend">{items}</ul>'


def axis_top(curves: Mapping[str, Curve], bins: Mapping[str, Bins]) -> float:
    """Top of the recall axis of both plots: the next tenth above the largest value."""
    values = [recall for curve in curves.values() for _, recall in curve]
    values += [recall for rows in bins.values() for _, _, recall in rows]
    top = math.ceil(max(values, default=0) * 10 + 0.2)
    return min(1.0, max(2, top + (top > 5 and top % 2)) / 10)


def rules(top: float) -> str:
    """Horizontal rules and their values from 0 to ``top``."""
    step = 0.1 if top <= 0.5 else 0.2
    parts = []
    for i in range(int(top / step + 1e-9) + 1):
        y = BOTTOM - i * step / top * (BOTTOM - TOP)
        parts.append(
            f'<path class="{"grid" if i else "axis"}" d="M{LEFT} {y:.1f}H{RIGHT}"/>'
            f'<text class="left" x="{LEFT - 7}" y="{y + 4:.1f}">{i * step:.1f}</text>'
        )
    return ''.join(parts)


def svg(label: str, content: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{content}</svg>'


def curve_plot(curves: Mapping[str, Curve], top: float) -> str:
    """AR@k over k from 1 to 1000, k on a logarithmic axis."""

    def xy(k: int, recall: float) -> tuple[float, float]:
        return (
            LEFT + math.log10(k) / 3 * (RIGHT - LEFT),
            BOTTOM - recall / top * (BOTTOM - TOP),
        )

    parts = [rules(top)]
    for k in (1, 10, 100, 1000):
        x = xy(k, 0)[0]
        place = ' class="left"' if k == 1000 else ''
        parts.append(
            f'<path class="grid" d="M{x:.1f} {TOP}V{BOTTOM}"/>'
            f'<text{place} x="{x + 2 * (k == 1000):.1f}" y="{BOTTOM + 18}">{k}</text>'
        )
    parts.append(f'<text x="{(LEFT + RIGHT) / 2}" y="{BOTTOM + 38}">predictions an image, k</text>')
    for i, (name, curve) in reversed(list(enumerate(curves.items()))):
        points = ' '.join('{:.1f},{:.1f}'.format(*xy(*point)) for point in curve)
        parts.append(f'<polyline class="s{i % 5}" points="{points}"/>')
        for k, recall in curve:
            if k in (1, 10, 100, 1000):
                x, y = xy(k, recall)
                tip = f'<title>{escape(name)}, AR@{k} {recall:.3f}</title>'
                parts.append(
                    f'<circle class="s{i % 5}" cx="{x:.1f}" cy="{y:.1f}" r="3.5">{tip}</circle>'
                )
    return svg('AR over the number of predictions', ''.join(parts))


def bar_plot(label: str, bins: Mapping[str, Bins], top: float) -> str:
    """A bar for each bin and name; under each bin, what the first name's ``count`` is."""
    first = next(iter(bins.values()))
    if not first:
        return svg(label, f'{rules(top)}<text x="220" y="125">no objects</text>')
    parts = [rules(top)]
    pitch = (RIGHT - LEFT) / len(first)
    width = min(22.0, 0.76 * pitch / len(bins))
    for j, (place, count, _) in enumerate(first):
        middle = LEFT + (j + 0.5) * pitch
        parts.append(
            f'<text x="{middle:.1f}" y="{BOTTOM + 18}">{escape(place)}</text>'
            f'<text class="soft" x="{middle:.1f}" y="{BOTTOM + 34}">{count:,}</text>'
        )
        for i, (name, rows) in enumerate(bins.items()):
            value = rows[j][2]
            height = value / top * (BOTTOM - TOP)
            x = middle + (i - len(bins) / 2) * width
            parts.append(
                f'<rect class="s{i % 5}" x="{x + 0.5:.1f}" y="{BOTTOM - height:.1f}" '
                f'width="{width - 1:.1f}" height="{height:.1f}">'
                f'<title>{escape(name)}, {escape(place)}: {value:.3f}</title></rect>'
            )
    return svg(label, ''.join(parts))


def gallery(groups: Mapping[str, Sequence[Card]], notices: Sequence[str], kind: str) -> str:
    """The images, with a switch between the pictures of each."""
    if not groups:
        return ''
    views = {
        'pair': 'Side by side',
        'truth': 'Ground truth',
        'prediction': 'Prediction',
        'photo': 'Photo',
    }
    switch = ''.join(
        f'<label><input type="radio" name="view" id="view-{key}"{" checked" * (key == "pair")}>'
        f'<span>{name}</span></label>'
        for key, name in views.items()
    )
    sections = ''.join(
        f'<h3>{heading}</h3><div class="cards">{"".join(map(card_html, cards))}</div>'
        for heading, cards in groups.items()
    )
    return f"""<section id="images">
<h2>Images</h2>
<p>Filled: an object and the {kind} that found it, in the same colour on both sides. White outline:
an object that was missed, or a prediction without a partner, which in an open world may still be
right. Best and worst are by the image’s own AR@100.</p>
{trouble(notices)}
<fieldset class="switch"><legend>Show</legend>{switch}</fieldset>
{sections}
</section>"""


def trouble(notices: Sequence[str]) -> str:
    """What is wrong with image files, if anything."""
    notes = ''.join(f'<li>{escape(notice)}</li>' for notice in notices)
    return f'<div class="notice"><b>Trouble with image files</b><ul>{notes}</ul></div>' * bool(
        notes
    )


def card_html(card: Card) -> str:
    name = escape(card.file_name)
    if card.num_objects:
        facts = f'{card.num_found} of {card.num_objects} found · AR {number(card.recall)}'
    else:
        facts = f'no objects · {counted(card.num_predictions, "prediction")}'
    views = ''.join(
        f'<button type="button" class="{view}"><img alt="{name}: {label}" src="{picture}">'
        f'<span>{label}</span></button>'
        for view, label, picture in (
            ('photo', 'photo', card.photo),
            ('truth', 'ground truth', card.truth),
            ('prediction', 'prediction', card.prediction),
        )
    )
    note = ' · image file unreadable' if card.problem else ''
    return (
        f'<figure class="card"><div class="views">{views}</div>'
        f'<figcaption><b>{name}</b> · {facts}{note}</figcaption></figure>'
    )
