"""Measures effective receptive fields, and derives the label weights of section 3.3, equation 2, from them.

The field of a position of the feature map is the gradient of its channel-summed features with respect to the normalised
input: absolute value, summed over the input's channels, averaged over images, model in eval mode, float32 without
autocast, no logarithm (Luo et al. 2016). Equation 2 asks only for its mass in each of the four regions, so each field
is reduced on the device as soon as it is known and [4, h, w] numbers are kept. One field as a map and as numbers is
for pictures; for the label weights prefer the region masses.

Costs one forward and h * w backward passes to the input (49 at the paper's size, no parameter gradients): about what 30
training steps on the same images cost, so the trainer refreshes the table every few thousand steps on a few images. One
field is one backward pass of the whole batch: ResNet-18 at 128 px with 16 images takes about 0.5 s on one CPU core.

A pyramid's finest map has 3,136 positions at 224 pixels. So a map is measured at one position in each cell of the
coarsest map, its middle: every position of the coarsest map itself, and as many of each finer one, so each level costs
the same again. Between these, masses are interpolated linearly within the region, and beyond the last of them, up to
the region's border or the image's, they stay: nothing is interpolated across a border, where masses jump.
docs/lab-notebook.md has what it is off by. Without a neck there is one map, and every position is measured.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from jigsaw_pretrain.formats.jigsaw import REGIONS, Template

SHARES = (0.2, 0.3, 0.5, 0.99)

RegionMap = Tensor | npt.NDArray[np.integer]

IMAGES_AT_ONCE = 32
"""Bounds the memory of the retained graph; the table, a sum over images, depends on it to rounding only."""


@dataclass(frozen=True)
class Grid:
    """Which positions of a map are measured, and how the others follow from them.

    lines: the rows, and likewise the columns, of the positions measured. Row (or column) j has the masses of the line
    ``before[j]`` by 1 - ``share[j]`` and of ``after[j]`` by ``share[j]``: indices into lines, int64 [side], and float64
    [side] from 0 to below 1.
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


def measuring_grid(template: Template, stride: int, coarsest: int) -> Grid:
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


@dataclass(frozen=True)
class FieldNumbers:
    """A field in numbers, in pixels: ``sides[i]`` of the smallest centred square that holds SHARES[i] of the mass."""

    sides: tuple[int, ...]
    rms_radius: float


def field_map(backbone: nn.Module, images: Tensor, positions: Sequence[tuple[int, int]] | None = None) -> Tensor:
    """The field of the summed features at ``positions`` (row, column), float32 [H, W] that sums to 1.

    images: [n, channels, H, W], normalised. None takes the central position, of an even map the lower right of the
    four. The model runs in eval mode and float32 and is left as it was. A field that is zero everywhere stays zero.
    """
    with eval_mode(backbone), torch.enable_grad(), torch.autocast(images.device.type, enabled=False):
        inputs = images.detach().float().requires_grad_()
        features = backbone(inputs)
        chosen = positions if positions is not None else [(features.shape[2] // 2, features.shape[3] // 2)]
        rows = torch.tensor([row for row, _ in chosen], device=features.device)
        columns = torch.tensor([column for _, column in chosen], device=features.device)
        total = features[:, :, rows, columns].sum()
        (gradient,) = torch.autograd.grad(total, inputs)
    mass = gradient.abs().sum(dim=1).mean(dim=0)
    whole = mass.sum()
    return mass / whole if whole > 0 else mass


def field_numbers(field: Tensor, centre: tuple[float, float] | None = None) -> FieldNumbers:
    """The field's extent about ``centre`` (y, x in pixels; None: its centre of mass).

    A square of side s about the centre holds the pixels that lie in it whole: one of side 1 the pixel at the centre,
    and one of side 4 about a corner of four pixels the sixteen around it. An empty field has sides 0.
    """
    height, width = field.shape
    mass = field.double()
    whole = float(mass.sum())
    if not 0 < whole < math.inf:
        return FieldNumbers(tuple(0 for _ in SHARES), 0.0)
    ys = torch.arange(height, dtype=torch.float64)
    xs = torch.arange(width, dtype=torch.float64)
    if centre is None:
        centre = float((mass.sum(1) * ys).sum() / whole), float((mass.sum(0) * xs).sum() / whole)
    dy, dx = (ys - centre[0])[:, None], (xs - centre[1])[None, :]
    radius = float(((mass * (dy**2 + dx**2)).sum() / whole) ** 0.5)
    reach = torch.maximum(dy.abs(), dx.abs()).expand(height, width)
    sides = torch.ceil(2 * reach + 1 - 1e-9).long()
    held = torch.zeros(int(sides.max()) + 1, dtype=torch.float64).index_add_(0, sides.reshape(-1), mass.reshape(-1))
    cumulative = held.cumsum(0) / whole
    found = tuple(int(torch.nonzero(cumulative >= share - 1e-12)[0]) for share in SHARES)
    return FieldNumbers(found, radius)


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode inside, each submodule's own mode afterwards (frozen ones stay frozen)."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        # Parents come first and set their children, so train() runs on every part: a traced one swaps its graph there.
        for part, mode in modes:
            part.train(mode)


def region_masses(
    backbone: nn.Module,
    images: Tensor,
    region_map: RegionMap,
    at_once: int = IMAGES_AT_ONCE,
    grid: Grid | None = None,
) -> Tensor:
    """The mass of each position's effective receptive field in each region: float32 [4, h, w] on the images' device.

    ``out[i, j, k] = mean over images of sum over channels and pixels of region i of |d sum_c X[c, j, k] / d image|``.

    backbone: maps [n, 3, H, W] to [n, C, h, w]; run in eval mode, which is undone afterwards; its parameters' gradients
    are not touched. images: normalised, [n, 3, H, W], any number of channels (float64 stays float64, with a float64
    backbone and result). region_map: int [h, w], 0 to 3; a pixel belongs to the region of its nearest position.
    at_once: images in memory at a time, at most IMAGES_AT_ONCE. grid: the positions to measure, the rest being filled
    in from them; None measures all.
    Raises ValueError where the backbone's map is not of the region map's size or there are no images.
    """
    if images.dim() != 4 or images.shape[0] == 0:
        raise ValueError(f"images of shape {list(images.shape)}: region masses need [n, channels, H, W] with n > 0")
    dtype = images.dtype if images.dtype == torch.float64 else torch.float32
    regions = torch.as_tensor(region_map, device=images.device)
    height, width = regions.shape
    pixels = _pixel_regions(regions, images.shape[2], images.shape[3])
    masks = torch.stack([pixels == region for region in range(len(REGIONS))]).flatten(1).to(dtype)
    rows, columns = (range(height), range(width)) if grid is None else (grid.lines, grid.lines)
    total = torch.zeros(len(REGIONS), len(rows), len(columns), dtype=dtype, device=images.device)
    with eval_mode(backbone), torch.enable_grad(), torch.autocast(images.device.type, enabled=False):
        for part in images.detach().to(dtype).split(min(at_once, IMAGES_AT_ONCE)):
            leaf = part.requires_grad_()
            features = backbone(leaf.clone())  # a first layer that works in place would fail on a leaf
            if features.shape[2:] != regions.shape:
                raise ValueError(
                    f"the backbone maps {list(part.shape)} to {list(features.shape)}, "
                    f"the region map is {height} x {width}"
                )
            sums = features.sum(dim=1)
            for j, row in enumerate(rows):
                for k, column in enumerate(columns):
                    target = sums[:, row, column].sum()
                    (gradient,) = torch.autograd.grad(target, leaf, retain_graph=True, materialize_grads=True)
                    field = gradient.abs().sum(dim=(0, 1))
                    total[:, j, k] += masks @ field.flatten()
            del features, sums
    measured = total / images.shape[0]
    return measured if grid is None else grid.fill(measured)


def label_weights(masses: Tensor, region_map: RegionMap, tau: float) -> Tensor:
    """Equation 2: the weight of each region's label at each position, [4, h, w] in the masses' dtype.

    ``w[r] = max(tau, m[r] / sum(m))`` for the position's own region r; ``w[i] = (1 - w[r]) m[i] / sum of the other
    three`` for the rest. Finite and summing to 1 everywhere: where the other three have no mass (or a mass is not
    finite) the own region's weight is 1. ``tau = 1`` gives one-hot weights.

    masses: [4, h, w], not negative. region_map: int [h, w]. Raises ValueError for other shapes or tau outside [0, 1].
    """
    regions = torch.as_tensor(region_map, device=masses.device).long()
    if masses.shape != (len(REGIONS), *regions.shape):
        raise ValueError(f"masses of shape {list(masses.shape)} for a region map of {list(regions.shape)}")
    if not 0 <= tau <= 1:
        raise ValueError(f"tau {tau} is a share between 0 and 1")
    own = torch.nn.functional.one_hot(regions, len(REGIONS)).permute(2, 0, 1).bool()
    mass = masses.double()
    mass = torch.where(mass.isfinite().all(dim=0), mass.nan_to_num(), 0.0)
    # Scaled by each position's largest mass, sums neither overflow nor vanish.
    largest = mass.amax(dim=0)
    mass = mass / torch.where(largest > 0, largest, 1.0)
    inside = mass.masked_fill(~own, 0).sum(dim=0)
    outside = mass.masked_fill(own, 0).sum(dim=0)
    alone = outside == 0
    own_weight = torch.where(alone, 1.0, (inside / torch.where(alone, 1.0, inside + outside)).clamp(min=tau))
    shares = mass / torch.where(alone, 1.0, outside)
    return torch.where(own, own_weight, (1 - own_weight) * shares).to(masses.dtype)


def _pixel_regions(regions: Tensor, height: int, width: int) -> Tensor:
    """The region of every input pixel, [height, width]: nearest upsampling of the region map."""
    rows = torch.arange(height, device=regions.device) * regions.shape[0] // height
    columns = torch.arange(width, device=regions.device) * regions.shape[1] // width
    return regions[rows][:, columns]
