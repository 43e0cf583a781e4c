"""Where the receptive fields of a map are measured, and how their masses are spread to the positions between.

A field costs a backward pass, and a pyramid's finest map has 3,136 positions at 224 pixels. So a map is measured at one
position in each cell of the coarsest map, its middle: every position of the coarsest map itself, and as many of each
finer one. Between these, masses are interpolated linearly within the region, and beyond the last of them, up to the
region's border or the image's, they stay: nothing is interpolated across a border, where masses jump. Arithmetic only;
docs/lab-notebook.md has what it is off by. Without a neck there is one map, and every position is measured.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from jigsaw_pretrain.formats.jigsaw import Template


@dataclass(frozen=True)
class Grid:
    """lines: the rows, and likewise the columns, of the positions measured.

    Row (or column) j has the masses of the line ``before[j]`` by 1 - ``share[j]`` and of ``after[j]`` by ``share[j]``:
    indices into lines, int64 [side], and float64 [side] from 0 to below 1.
    """

    lines: tuple[int, ...]
    before: Tensor
    after: Tensor
    share: Tensor

    def fill(self, measured: Tensor) -> Tensor:
        """Masses [4, lines, lines] of the positions measured to those of all, [4, side, side], in the same dtype."""
        before, after, share = (one.to(measured.device) for one in (self.before, self.after, self.share))
        filled = measured.double()
        for _ in range(2):
            # By index, not by a product with zeros: a mass that is not finite must not reach other positions.
            near, far = filled[..., before], filled[..., after]
            filled = torch.where(share > 0, torch.lerp(near, far, share), near).transpose(1, 2)
        return filled.to(measured.dtype)


def grid(template: Template, stride: int, coarsest: int) -> Grid:
    """The grid of a map of ``stride`` beside (or as) the coarsest map, of stride ``coarsest``; pixels.

    Raises UserError where the template is off the coarsest map's grid.
    """
    template.region_map(coarsest)
    cell, side, cut = coarsest // stride, template.size // stride, template.split // stride
    lines = torch.arange(cell // 2, side, cell)
    positions = torch.arange(side)
    after = torch.searchsorted(lines, positions, right=True).clamp(max=len(lines) - 1)
    before = (torch.searchsorted(lines, positions, right=True) - 1).clamp(min=0)
    # Of two lines on either side of the border, a position has its own region's alone.
    before = torch.where((lines[before] < cut) == (positions < cut), before, after)
    after = torch.where((lines[after] < cut) == (positions < cut), after, before)
    share = torch.where(after == before, 0.0, (positions - lines[before]).double() / cell)
    after = torch.where(share == 0, before, after)
    return Grid(tuple(lines.tolist()), before, after, share)
