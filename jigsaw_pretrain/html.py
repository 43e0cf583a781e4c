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

from jigsaw_pretrain.fonts import families
from jigsaw_pretrain.words import number

INK = "#010203"
"""The colour that a chart's text and axes are drawn in; the page replaces it with the reader's text colour."""

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8a8a8a")
"""Okabe and Ito's colours, told apart by the colour-blind and legible on light and dark."""


@dataclass(frozen=True)
class Figure:
    """A picture of a page: its markup, with what it shows in words (alt text), and a caption below it.

    large: it is moved under a phone's window rather than made too small to read.
    """

    markup: Markup
    caption: str
    large: bool = False


@dataclass(frozen=True)
class Table:
    """A table: column heads and rows of plain values; numbers are set to the right."""

    heads: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Bars:
    """Named numbers as bars, drawn by the browser so that names of any script and length are legible.

    caption: of what the numbers are, with their unit; the page shows it above them. most: the longest bar's number; by
    default the largest there is.
    """

    caption: str
    rows: Sequence[tuple[str, float]]
    most: float | None = None


@dataclass(frozen=True)
class Section:
    """A part of a page: a title, a plain-words paragraph, then tables and figures."""

    title: str
    text: str = ""
    tables: Sequence[Table] = ()
    bars: Bars | None = None
    figures: Sequence[Figure] = ()
    missing: str = ""


def picture(data: bytes, alt: str, caption: str = "", kind: str = "jpeg", large: bool = False) -> Figure:
    """A JPEG, PNG or WebP as a figure."""
    encoded = base64.b64encode(data).decode()
    markup = Markup('<img alt="{}" src="data:image/{};base64,{}">').format(alt, kind, encoded)
    return Figure(markup, caption, large)


def chart(
    draw: Callable[[Any], None],
    alt: str,
    caption: str = "",
    size: tuple[float, float] = (5.2, 2.9),
    large: bool = False,
) -> Figure:
    """A chart drawn by ``draw(axes)`` on matplotlib axes of ``size`` inches, as scalable SVG in the page's colours."""
    import matplotlib
    from cycler import cycler
    from matplotlib.figure import Figure as Canvas

    style: dict[Any, Any] = {
        "svg.fonttype": "path",
        "svg.hashsalt": "jigsaw-pretrain",
        "font.size": 10,
        "font.family": families(),
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.prop_cycle": cycler(color=PALETTE),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "text.parse_math": False,
    }
    with matplotlib.rc_context(style):
        # No pyplot: it would choose a backend for the whole process.
        figure = Canvas(figsize=size, layout="constrained")
        draw(figure.subplots())
        sink = io.StringIO()
        figure.savefig(sink, format="svg", transparent=True, metadata={"Date": None})
    svg = sink.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    head = Markup('<svg role="img" aria-label="{}" ').format(alt)
    return Figure(head + Markup(svg[len("<svg ") :]), caption, large)


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
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jigsaw_pretrain", ""),
        autoescape=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["number"] = number
    environment.filters["numeric"] = _numeric
    template = environment.get_template("page.html.j2")
    return template.render(title=title, lead=lead, sections=sections, tiles=tiles or {}, refresh=refresh_seconds)
