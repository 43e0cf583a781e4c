"""One self-contained HTML page: its frame, its figures and its style, for the reports of both stages.

Everything is inside the file (pictures as data, charts as SVG), nothing is loaded, every string is escaped, the
colours follow the reader's light or dark setting, and the columns fold on a phone. A page with a dozen charts and 300
thumbnails takes about 3 s and 2 MB; for numbers alone read the Parquet and JSON files instead.
"""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from markupsafe import Markup

INK = "#010203"
"""The colour that a chart's text and axes are drawn in; the page replaces it with the reader's text colour."""

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8a8a8a")
"""Okabe and Ito's colours, told apart by the colour-blind and legible on light and dark."""


@dataclass(frozen=True)
class Figure:
    """A picture of a page: its markup, a caption below it, and what it shows in words (alt text)."""

    markup: Markup
    caption: str


@dataclass(frozen=True)
class Table:
    """A table: column heads and rows of plain values; numbers are set to the right."""

    heads: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Bars:
    """Named counts as bars, drawn by the browser so that names of any script and length are legible."""

    heads: tuple[str, str]
    rows: Sequence[tuple[str, float]]


@dataclass(frozen=True)
class Section:
    """A part of a page: a title, a plain-words paragraph, then tables and figures."""

    title: str
    text: str = ""
    tables: Sequence[Table] = ()
    bars: Bars | None = None
    figures: Sequence[Figure] = ()
    missing: str = ""


def number(value: Any) -> str:
    """A value as a reader wants it: thousands apart, four significant digits, nothing for None."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return str(value)


def picture(data: bytes, alt: str, caption: str = "", kind: str = "jpeg") -> Figure:
    """A JPEG, PNG or WebP as a figure."""
    encoded = base64.b64encode(data).decode()
    markup = Markup('<img alt="{}" src="data:image/{};base64,{}">').format(alt, kind, encoded)
    return Figure(markup, caption)


def chart(draw: Callable[[Any], None], alt: str, caption: str = "", size: tuple[float, float] = (6.0, 3.2)) -> Figure:
    """A chart drawn by ``draw(axes)`` on matplotlib axes of ``size`` inches, as scalable SVG in the page's colours."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style: dict[Any, Any] = {
        "svg.fonttype": "path",
        "svg.hashsalt": "jigsaw-pretrain",
        "font.size": 9,
        "font.family": "sans-serif",
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.prop_cycle": pyplot.cycler(color=PALETTE),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "text.parse_math": False,
    }
    with matplotlib.rc_context(style):
        figure, axes = pyplot.subplots(figsize=size, layout="constrained")
        try:
            draw(axes)
            sink = io.StringIO()
            figure.savefig(sink, format="svg", transparent=True, metadata={"Date": None})
        finally:
            pyplot.close(figure)
    svg = sink.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    head = Markup('<svg role="img" aria-label="{}" ').format(alt)
    return Figure(head + Markup(svg[len("<svg ") :]), caption)


_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
{% if refresh %}<meta http-equiv="refresh" content="{{ refresh }}">{% endif %}
<link rel="icon" href="data:,">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --ink: #1c2126; --quiet: #5b6670; --paper: #fbfbf9; --line: #d9dcdf; --card: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaec; --quiet: #a3adb6; --paper: #15181b; --line: #353c43; --card: #1d2226; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 40px 0 8px; padding-top: 12px; border-top: 1px solid var(--line); }
p { margin: 4px 0 12px; max-width: 75ch; overflow-wrap: anywhere; }
.lead, figcaption, .missing { color: var(--quiet); }
.missing { font-style: italic; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: 10px; margin: 18px 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 12px; }
.tile b { display: block; font-size: 1.25rem; overflow-wrap: anywhere; }
.tile span { color: var(--quiet); font-size: .85rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 20px; }
.figures.wide { grid-template-columns: minmax(0, 1fr); }
figure { margin: 0; min-width: 0; }
figcaption { font-size: .85rem; overflow-wrap: anywhere; }
figure img, figure svg { max-width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; margin: 8px 0 16px; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 4px 14px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--quiet); font-weight: 600; }
td { overflow-wrap: anywhere; max-width: 60ch; white-space: pre-line; }
.bars { margin: 8px 0 20px; columns: 340px; column-gap: 28px; font-size: .85rem; font-variant-numeric: tabular-nums; }
.bars div { display: grid; grid-template-columns: 9em minmax(30px, 1fr) 4.5em; gap: 8px; align-items: center;
  break-inside: avoid; padding: 1px 0; }
.bars span { overflow-wrap: anywhere; text-align: right; }
.bars i { height: .8em; width: max(1px, calc(var(--share) * 100%)); background: #0072B2; border-radius: 2px; }
.bars b { font-weight: 400; }
td.n, th.n { text-align: right; white-space: nowrap; }
</style>
</head>
<body><main>
<h1>{{ title }}</h1>
<p class="lead">{{ lead }}</p>
{% if tiles %}<div class="tiles">{% for name, value in tiles.items() -%}
<div class="tile"><b>{{ value | number }}</b><span>{{ name }}</span></div>
{%- endfor %}</div>{% endif %}
{% for section in sections %}
<section>
<h2>{{ section.title }}</h2>
{% if section.text %}<p>{{ section.text }}</p>{% endif %}
{% if section.missing %}<p class="missing">{{ section.missing }}</p>{% endif %}
{% for table in section.tables %}<div class="scroll"><table>
<thead><tr>{% for head in table.heads %}<th{% if loop.index0 in table | numeric %} class="n"{% endif %}>{{ head }}</th>
{%- endfor %}</tr></thead>
<tbody>{% for row in table.rows %}<tr>{% for cell in row -%}
<td{% if cell is number and cell is not boolean %} class="n"{% endif %}>{{ cell | number }}</td>
{%- endfor %}</tr>
{% endfor %}</tbody></table></div>{% endfor %}
{% if section.bars and section.bars.rows %}<div class="bars" role="table" aria-label="{{ section.bars.heads[0] }}">
{% set most = section.bars.rows | map(attribute=1) | max %}
{% for name, value in section.bars.rows %}<div role="row"><span role="cell">{{ name }}</span>
<i style="--share: {{ (value / most if most else 0) | round(4) }}"></i><b role="cell">{{ value | number }}</b></div>
{% endfor %}</div>{% endif %}
{% if section.figures %}<div class="figures{% if section.figures | length == 1 %} wide{% endif %}">
{% for figure in section.figures %}<figure>{{ figure.markup }}
{%- if figure.caption %}<figcaption>{{ figure.caption }}</figcaption>{% endif %}</figure>
{% endfor %}</div>{% endif %}
</section>
{% endfor %}
</main></body></html>
"""


def _numeric(table: Table) -> set[int]:
    """The columns whose first row holds a number."""
    first = table.rows[0] if table.rows else ()
    return {i for i, cell in enumerate(first) if isinstance(cell, int | float) and not isinstance(cell, bool)}


def render(
    title: str,
    lead: str,
    sections: Sequence[Section],
    tiles: Mapping[str, Any] | None = None,
    refresh_seconds: int | None = None,
) -> str:
    """The page: ``tiles`` are its few large figures; ``refresh_seconds`` reloads it while what it shows goes on."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters["number"] = number
    environment.filters["numeric"] = _numeric
    template = environment.from_string(_TEMPLATE)
    return template.render(title=title, lead=lead, sections=sections, tiles=tiles or {}, refresh=refresh_seconds)
