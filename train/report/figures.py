"""Pictures of receptive fields and label weights (the paper's figures 6 and 5)."""

import textwrap
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jigsaw_pretrain.formats.jigsaw import REGION_WORDS, REGIONS, Template
from jigsaw_pretrain.html import INK, Figure, chart
from jigsaw_pretrain.train.report.snapshots import ErfSnapshot, brightness

MAP = "cividis"
SHOWN = 6


def spread(steps: Sequence[int], most: int = SHOWN) -> list[int]:
    """The first, the last and evenly spread steps between, at most ``most``."""
    if len(steps) <= most:
        return list(steps)
    picked = np.linspace(0, len(steps) - 1, most).round().astype(int)
    return [steps[i] for i in picked]


def short_names(paths: Sequence[str | Path]) -> list[str]:
    """The files' or folders' own names, with as much of their parents as tells them apart."""
    whole = [Path(path).absolute().parts for path in paths]
    for depth in range(1, 8):
        named = ["/".join(parts[-depth:]) for parts in whole]
        if len(set(named)) == len(named):
            return named
    return [str(path) for path in paths]


def field_figure(found: Mapping[int, ErfSnapshot], template: Template) -> Figure:
    """The four regions' fields, one row per refresh."""
    steps = list(found)
    rows = {f"step {step}": list(snapshot.fields) for step, snapshot in found.items()}
    alt = f"effective receptive fields of the four regions at steps {', '.join(map(str, steps))}"
    caption = (
        "What each region's features look at: gradient magnitude on the input, logarithmic over two decades "
        "(bright is most). Dashed: the template's cut. The paper's figure 6 is the first column."
    )
    draw = partial(draw_fields, rows=rows, titles=list(REGION_WORDS.values()), split=template.split)
    return chart(draw, alt, caption, (8.0, 2.0 * len(steps) + 0.3), large=True)


def draw_fields(
    axes: Any,
    rows: Mapping[str, Sequence[npt.NDArray[np.float32]]],
    titles: Sequence[str],
    split: int | None = None,
) -> None:
    """Draw a grid of fields, one row per name; ``split`` marks where the template is cut."""
    grid = _grid(axes, len(rows), len(titles))
    for row, (name, fields) in enumerate(rows.items()):
        for column, field in enumerate(fields):
            cell = grid[row][column]
            cell.imshow(brightness(field), cmap=MAP, vmin=0, vmax=1)
            if split is not None:
                cell.axvline(split - 0.5, color="white", linewidth=0.6, linestyle="--")
                cell.axhline(split - 0.5, color="white", linewidth=0.6, linestyle="--")
            cell.set_xticks([])
            cell.set_yticks([])
            if row == 0:
                cell.set_title(titles[column], fontsize=9, color=INK)
        grid[row][0].set_ylabel(textwrap.fill(name, 24), fontsize=9)


def weight_figure(step: int, snapshot: ErfSnapshot) -> Figure:
    """Equation 2's table: the weight of each region's label at each position."""

    def draw(axes: Any) -> None:
        figure = axes.figure
        grid = _grid(axes, 1, len(REGIONS))
        for region in range(len(REGIONS)):
            cell = grid[0][region]
            image = cell.imshow(snapshot.weights[region], cmap=MAP, vmin=0, vmax=1)
            cell.set_title(REGION_WORDS[REGIONS[region]], fontsize=9, color=INK)
            cell.set_xticks([])
            cell.set_yticks([])
            if max(snapshot.weights.shape[1:]) <= 8:
                for j, k in np.ndindex(*snapshot.weights.shape[1:]):
                    value = snapshot.weights[region, j, k]
                    ink = "black" if value > 0.55 else "white"
                    cell.text(k, j, f"{value:.2f}".lstrip("0"), ha="center", va="center", fontsize=6, color=ink)
        figure.colorbar(image, ax=list(grid[0]), label="weight of the region's label", shrink=0.8)

    alt = f"label weights of the four regions at every position of the feature map, from step {step}"
    caption = f"The soft labels in force since step {step}: how much each region's label counts at each position."
    return chart(draw, alt, caption, (9.0, 2.5), large=True)


def _grid(axes: Any, rows: int, columns: int) -> Any:
    """Replace one pair of axes by a grid of them."""
    figure = axes.figure
    axes.remove()
    return figure.subplots(rows, columns, squeeze=False)
