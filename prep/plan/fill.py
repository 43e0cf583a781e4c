"""Slot fill: the share of each slot of the jigsaw that crops cover, the rest being padding, and what to say about it.

Follows from the plan alone: a crop of w x h pixels, resized by r, covers min(r w, W) * min(r h, H) of a W x H slot. The
mean over r in U[0.8, 1.5] is taken at a few fixed ratios, over all crops of the slot's group; of two S crops the
smaller goes top left, so the crop of rank k among n (by area) is the larger of a pair with probability (2 k + 1) / n^2.
A hundred milliseconds for a million crops. Template and ratios are training's defaults; training may use others.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from jigsaw_pretrain.formats.jigsaw import GROUPS

TEMPLATE_SIZE, TEMPLATE_SPLIT = 224, 64
RESIZE_LOW, RESIZE_HIGH = 0.8, 1.5
LITTLE_FILL = 0.65
"""A large slot filled less than this is worth a word about small objects."""

HEAVY_REPETITION = 8.0
"""A group whose crops would be drawn this many times as often as the average crop is thin."""

_PER_JIGSAW = {"S": 2, "T": 1, "W": 1}
_STAND_INS = {"S": ("T", "W"), "T": ("S", "W"), "W": ("S", "T")}
_SHAPES = {"S": "square", "T": "tall (width below half of the height)", "W": "wide (width above 1.5 times the height)"}
_STEPS = 8


@dataclass(frozen=True)
class Slot:
    """A slot of the template: its name, the group it takes crops of, its size in pixels, and its mean fill, 0 to 1."""

    name: str
    group: str
    width: int
    height: int
    fill: float


def slot_fill(
    widths: npt.ArrayLike,
    heights: npt.ArrayLike,
    groups: npt.ArrayLike,
    size: int = TEMPLATE_SIZE,
    split: int = TEMPLATE_SPLIT,
) -> list[Slot]:
    """The four slots of a ``size`` template cut at ``split``, filled with n crops of these sizes and group codes.

    A slot whose group is empty is filled from the next group by aspect, as in training.
    """
    wide, high = np.asarray(widths, dtype=np.float64), np.asarray(heights, dtype=np.float64)
    codes = np.asarray(groups)
    rest = size - split
    slots = []
    for name, group, width, height in (
        ("S-small", "S", split, split),
        ("W", "W", rest, split),
        ("T", "T", split, rest),
        ("S-large", "S", rest, rest),
    ):
        rows = _crops_for(codes, group)
        covered = _cover(wide[rows], high[rows], width, height)
        weights = np.ones(len(rows))
        if group == "S":
            rank = np.empty(len(rows))
            rank[np.argsort(wide[rows] * high[rows], kind="stable")] = np.arange(len(rows))
            weights = 2 * rank + 1 if name == "S-large" else 2 * (len(rows) - rank) - 1
        fill = float((covered * weights).sum() / weights.sum()) if len(rows) else 0.0
        slots.append(Slot(name, group, width, height, fill))
    return slots


def _crops_for(codes: npt.NDArray[np.uint8], group: str) -> npt.NDArray[np.int64]:
    """The crops that fill a group's slots: its own, or those of the nearest group that has any."""
    for candidate in (group, *_STAND_INS[group]):
        rows = np.flatnonzero(codes == GROUPS.index(candidate))
        if len(rows):
            return rows
    return np.empty(0, dtype=np.int64)


def _cover(
    widths: npt.NDArray[np.float64], heights: npt.NDArray[np.float64], width: int, height: int
) -> npt.NDArray[np.float64]:
    """The share of a slot that each crop covers, the mean over the resize ratio: float64 [n]."""
    ratios = RESIZE_LOW + (RESIZE_HIGH - RESIZE_LOW) * (np.arange(_STEPS) + 0.5) / _STEPS
    total = np.zeros(len(widths))
    for ratio in ratios:
        total += np.minimum(ratio * widths, width) * np.minimum(ratio * heights, height)
    return total / (_STEPS * width * height)


def warnings(counts: Sequence[int], slots: Sequence[Slot]) -> list[str]:
    """What a user should know of these crops, in plain words; counts: crops by group, in the order of GROUPS."""
    total, said = sum(counts), []
    by_group = dict(zip(GROUPS, counts, strict=True))
    for group, count in by_group.items():
        if not total:
            break
        if not count:
            nearest = next((other for other in _STAND_INS[group] if by_group[other]), None)
            said.append(
                f"no crop is {_SHAPES[group]}: group {group} is empty and its slots take crops of group {nearest}."
            )
        elif (repetition := _PER_JIGSAW[group] / 4 / (count / total)) >= HEAVY_REPETITION:
            said.append(
                f"only {count:,} of {total:,} crops are {_SHAPES[group]}: group {group} is thin, each of its crops "
                f"would be drawn {repetition:,.0f} times as often as the average; training tops its slot up from "
                "other groups."
            )
    large = next(slot for slot in slots if slot.name == "S-large")
    if total and large.fill < LITTLE_FILL:
        said.append(
            f"the objects are small: crops fill {large.fill:.0%} of the large slot of {large.width}x{large.height} "
            "pixels, the rest is padding. Train with a smaller template (such as 128 split at 32) or a larger resize "
            "ratio."
        )
    return said
