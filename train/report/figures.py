"""Pictures of receptive fields and label weights (the paper's figures 6 and 5)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jigsaw_pretrain.formats.jigsaw import REGIONS, Template
from jigsaw_pretrain.html import INK, Figure, chart
from jigsaw_pretrain.train.report.snapshots import ErfSnapshot, brightness

MAP = "cividis"
SHOWN = 6


def _grid(axes: Any, rows: int, columns: int) -> Any:
    """Take the place of one pair of axes by a grid of them."""
    figure = axes.figure
    axes.remove()
    return figure.subplots(rows, columns, squeeze=False)


def _outline(axes: Any, template: Template) -> None:
    axes.axvline(template.split - 0.5, color="white", linewidth=0.6, linestyle="--")
    axes.axhline(template.split - 0.5, color="white", linewidth=0.6, linestyle="--")


def spread(steps: Sequence[int], most: int = SHOWN) -> list[int]:
    """The first, the last and evenly spread steps between, at most ``most``."""
    if len(steps) <= most:
        return list(steps)
    picked = np.linspace(0, len(steps) - 1, most).round().astype(int)
    return [steps[i] for i in picked]


def field_figure(found: Mapping[int, ErfSnapshot], template: Template) -> Figure:
    """The four regions' fields, one row per refresh."""
    steps = list(found)

    def draw(axes: Any) -> None:
        grid = _grid(axes, len(steps), 4)
        for row, step in enumerate(steps):
            for region in range(4):
                cell = grid[row][region]
                cell.imshow(brightness(found[step].fields[region]), cmap=MAP, vmin=0, vmax=1)
                _outline(cell, template)
                cell.set_xticks([])
                cell.set_yticks([])
                if row == 0:
                    cell.set_title(REGIONS[region], fontsize=9, color=INK)
                if region == 0:
                    cell.set_ylabel(f"step {step}", fontsize=9)

    alt = f"effective receptive fields of the four regions at steps {', '.join(map(str, steps))}"
    caption = (
        "What each region's features look at: gradient magnitude on the input, logarithmic over two decades "
        "(bright is most). Dashed: the template's cut. The paper's figure 6 is the first column."
    )
    return chart(draw, alt, caption, (8.0, 2.0 * len(steps) + 0.3))


def weight_figure(step: int, snapshot: ErfSnapshot) -> Figure:
    """Equation 2's table: the weight of each region's label at each position."""

    def draw(axes: Any) -> None:
        figure = axes.figure
        grid = _grid(axes, 1, 4)
        for region in range(4):
            cell = grid[0][region]
            image = cell.imshow(snapshot.weights[region], cmap=MAP, vmin=0, vmax=1)
            cell.set_title(REGIONS[region], fontsize=9, color=INK)
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
    return chart(draw, alt, caption, (9.0, 2.5))
