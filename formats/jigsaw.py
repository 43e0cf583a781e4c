"""The jigsaw (section 3.2): aspect groups S, T and W, the template of figure 4b, and which group fills which slot.

Groups: a crop's own width and height decide, after enlargement and truncation; where the trainer draws the
enlargement, its object's box.

Template: which part of the image each of the four crops fills. Regions are numbered 0 to 3: S-small top left, W top
right, T bottom left, S-large bottom right; labels, masks and weights use that order everywhere.

Slots: decided once from the groups' counts, as exact fractions. A slot whose group is empty belongs to the next group
by aspect for good and advances that group's stream. A thin group, whose crops would be drawn more than ``max_repeat``
times as often as those of the best-supplied group, feeds its slots only as often as that allows, spread evenly over the
positions; a substitute from the next group by aspect fills the rest, advancing nothing.

Pure arithmetic: milliseconds for the groups of a million crops, a few integer operations per crop for the slots.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
import numpy.typing as npt

from jigsaw_pretrain.errors import UserError

GROUPS = ("S", "T", "W")
"""The groups in the order of their codes 0, 1, 2 and of the shards' names."""

TALL_BELOW = 0.5
WIDE_ABOVE = 1.5

REGIONS = ("S-small", "W", "T", "S-large")
REGION_GROUPS = ("S", "W", "T", "S")

REGION_WORDS = {"S-small": "small square", "W": "wide", "T": "tall", "S-large": "large square"}
"""The regions in everyday words, for the screen and pages."""

SHAPES = {"S": "square", "T": "tall", "W": "wide"}
"""The groups in everyday words, for the screen."""

GROUP_WORDS = {group: f"{group} ({shape})" for group, shape in SHAPES.items()}

Fit = Literal["crop", "warp", "resize"]
"""How a crop meets its region (data.fit of train/recipe.py)."""

NARROW_TO_WIDE = ("T", "S", "W")

RESIZE_LOW, RESIZE_HIGH = 0.8, 1.5
"""Crops are resized by a ratio drawn evenly from this range (section 4.1)."""

MAX_REPEAT = 20
"""How many times as often as a crop of the best-supplied group one of a thin group may be drawn, unless asked for."""

MOST_LANES = 64


def usual_lanes(batch: int) -> int:
    """The streams that batches of this size are made of, unless asked for: their largest divisor up to MOST_LANES."""
    return max(count for count in range(1, min(MOST_LANES, batch) + 1) if batch % count == 0)


def aspect_groups(widths: npt.ArrayLike, heights: npt.ArrayLike) -> npt.NDArray[np.uint8]:
    """Group codes (indices into GROUPS) of crops ``widths`` by ``heights`` pixels: T < 0.5 <= S <= 1.5 < W.

    Compares products, not quotients, so that integer sizes on a limit are decided exactly.
    Raises ValueError for a size that is not positive.
    """
    width, height = np.asarray(widths), np.asarray(heights)
    if not (np.all(width > 0) and np.all(height > 0)):
        raise ValueError("aspect groups are defined for positive widths and heights only")
    return np.where(2 * width < height, 1, np.where(2 * width > 3 * height, 2, 0)).astype(np.uint8)


def aspect_group(width: float, height: float) -> str:
    """The group of one crop: 'T' below 0.5, 'S' from 0.5 to 1.5 (both included), 'W' above."""
    return GROUPS[int(aspect_groups(width, height))]


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
    def regions(self) -> tuple[Region, ...]:
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
        edges = {edge for one in self.regions for edge in (one.left, one.top, one.width, one.height)}
        if any(edge % stride for edge in edges):
            raise UserError(
                f"a template of {self.size} split at {self.split} is off the backbone's grid of stride {stride}: "
                f"choose a size and a split that are multiples of {stride} (such as {7 * stride} and {2 * stride})"
            )
        found = np.zeros((self.size // stride, self.size // stride), dtype=np.int64)
        for number, one in enumerate(self.regions):
            rows = slice(one.top // stride, (one.top + one.height) // stride)
            found[rows, one.left // stride : (one.left + one.width) // stride] = number
        return found


@dataclass(frozen=True)
class SlotSource:
    """How one group's stream fills its slots.

    regions: the regions it fills, in the order in which it is drawn from. share: the part of these slots that its own
    stream fills; a substitute from the group ``topped_up_from`` fills the others.
    """

    group: str
    regions: tuple[int, ...]
    share: Fraction
    topped_up_from: str | None = None

    def drawn_before(self, slot: int, lane: int, lanes: int) -> int:
        """Number of crops that the lane has drawn from this group before slot number ``slot``.

        A slot's number is position x len(regions) + ordinal. The lanes are out of step with each other, so that each
        batch holds about its share of the group.
        """
        top, bottom = self.share.numerator, self.share.denominator
        return (slot * top + lane * bottom // lanes) // bottom


@dataclass(frozen=True)
class SlotPlan:
    """The sources of a dataset, one per group that is drawn from, and the counts of crops by group they follow from."""

    sources: tuple[SlotSource, ...]
    counts: Mapping[str, int]
    max_repeat: int

    def source(self, group: str) -> SlotSource:
        """The source of a group that has one."""
        return next(source for source in self.sources if source.group == group)

    def shares(self) -> dict[str, float]:
        """The expected share of each group in all crops drawn: they sum to 1."""
        drawn = {group: Fraction(0) for group in GROUPS}
        for source in self.sources:
            drawn[source.group] += source.share * len(source.regions)
            if source.topped_up_from:
                drawn[source.topped_up_from] += (1 - source.share) * len(source.regions)
        return {group: float(value / len(REGION_GROUPS)) for group, value in drawn.items()}

    def notes(self) -> list[str]:
        """What a user should know before the run, in plain words: one line for each empty and each thin group."""
        lines = []
        for group in GROUPS:
            if not self.counts.get(group):
                other = stand_in(group, self.counts)
                lines.append(f"no crops are {SHAPES[group]}: {SHAPES[other]} ones fill their region of each jigsaw")
        for source in self.sources:
            if source.topped_up_from:
                lines.append(
                    f"few crops are {SHAPES[source.group]} ({self.counts[source.group]:,}): they fill "
                    f"{float(source.share):.1%} of their regions and {SHAPES[source.topped_up_from]} crops the others, "
                    f"so that none is drawn more than {self.max_repeat} times as often as one of the commonest shape"
                )
        if lines:
            shares = ", ".join(f"{SHAPES[group]} {share:.1%}" for group, share in self.shares().items())
            lines.append(f"shares of the crops drawn: {shares}")
        return lines


def by_aspect(group: str, counts: Mapping[str, int]) -> tuple[str, ...]:
    """The other groups, the next by aspect first; of two that are equally near the better supplied comes first."""
    place = NARROW_TO_WIDE.index(group)
    distance = {other: abs(NARROW_TO_WIDE.index(other) - place) for other in NARROW_TO_WIDE if other != group}
    return tuple(sorted(distance, key=lambda other: (distance[other], -counts.get(other, 0))))


def stand_in(group: str, counts: Mapping[str, int]) -> str:
    """The group that fills a group's slots: itself, or the next by aspect that has crops; one must have some."""
    return next(other for other in (group, *by_aspect(group, counts)) if counts.get(other, 0) > 0)


def fill_slots(counts: Mapping[str, int], max_repeat: int = MAX_REPEAT) -> SlotPlan:
    """Decide the sources from the number of crops in each group; raises UserError where all are empty."""
    if not any(counts.get(group, 0) > 0 for group in GROUPS):
        raise UserError("the dataset has no crops at all: prep it again from annotations with valid boxes")
    regions: dict[str, list[int]] = {}
    # The S pair comes first, so that a group standing in for others draws its own slots before theirs.
    for region, group in sorted(enumerate(REGION_GROUPS), key=lambda item: item[1] != "S"):
        regions.setdefault(stand_in(group, counts), []).append(region)
    rate = {group: Fraction(len(filled), counts[group]) for group, filled in regions.items()}
    # Every non-empty group is drawn from: its own slots are never remapped.
    limit = max_repeat * min(rate.values())
    thin = [group for group in regions if rate[group] > limit]
    sources = []
    for group, filled in regions.items():
        if group not in thin:
            sources.append(SlotSource(group, tuple(filled), Fraction(1)))
            continue
        share = limit / rate[group]
        others = [other for other in by_aspect(group, counts) if other in regions and other not in thin]
        extra = {other: (1 - share) * len(filled) / counts[other] for other in others}
        # A neighbour that the top-up itself would make a thin group is passed over where the other one can take it.
        chosen = next((other for other in others if rate[other] + extra[other] <= limit), None)
        chosen = chosen or min(others, key=lambda other: rate[other])
        rate[chosen] += extra[chosen]
        sources.append(SlotSource(group, tuple(filled), share, chosen))
    return SlotPlan(tuple(sources), dict(counts), max_repeat)
