"""The jigsaw's template (figure 4b): which part of the image each of the four crops fills.

Pure geometry, a few microseconds. Regions are numbered 0 to 3: S-small top left, W top right, T bottom left, S-large
bottom right; labels, masks and weights use that order everywhere.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from jigsaw_pretrain.errors import UserError

REGIONS = ("S-small", "W", "T", "S-large")
REGION_GROUPS = ("S", "W", "T", "S")


@dataclass(frozen=True)
class Region:
    """A rectangle of the template in pixels."""

    left: int
    top: int
    width: int
    height: int


@dataclass(frozen=True)
class Template:
    """A ``size`` x ``size`` image cut at ``split`` pixels in both directions; the paper's is 224 cut at 64."""

    size: int = 224
    split: int = 64

    def __post_init__(self) -> None:
        """Refuse a split that leaves a region empty."""
        if not 0 < self.split < self.size:
            raise UserError(
                f"template split {self.split} must lie inside the size {self.size}: choose 1 to {self.size - 1}"
            )

    @property
    def regions(self) -> tuple[Region, Region, Region, Region]:
        """S-small, W, T, S-large: top left, top right, bottom left, bottom right."""
        split, rest = self.split, self.size - self.split
        return (
            Region(0, 0, split, split),
            Region(split, 0, rest, split),
            Region(0, split, split, rest),
            Region(split, split, rest, rest),
        )

    def region_map(self, stride: int = 1) -> npt.NDArray[np.int64]:
        """The region of every position of a feature map of that stride: [size / stride, size / stride], 0 to 3.

        Raises UserError for a template off the stride's grid, whose positions would straddle regions.
        """
        if self.size % stride or self.split % stride:
            raise UserError(
                f"a template of {self.size} split at {self.split} is off the backbone's grid of stride {stride}: "
                f"choose a size and a split that are multiples of {stride} (such as {7 * stride} and {2 * stride})"
            )
        lower = (np.arange(self.size // stride) >= self.split // stride).astype(np.int64)
        return 2 * lower[:, None] + lower[None, :]
