"""What a dataset amounts to: counts, bytes, slot fill, what was not used, and what a user should know of it.

The same figures, of a plan or of what was cut, make the plan's table, the final table and the totals of dataset.json.

Slot fill is the share of each slot of the jigsaw that crops cover, the rest being padding. A crop of w x h pixels,
resized by r, covers min(r w, W) * min(r h, H) of a W x H slot. The mean over r in U[0.8, 1.5] is taken at a few fixed
ratios, over all crops of the group that fills the slot; of two S crops the smaller goes top left, so the crop of rank k
among n (by area) is the larger of a pair with probability (2 k + 1) / n^2. A hundred milliseconds for a million crops.
Template, ratios and slot rule are the paper's, training's defaults (formats/jigsaw.py). ``CropSizes.fit``
says which ratios suit the crops, for the recipe that prep writes (prep/plan/recipe.py).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from jigsaw_pretrain.formats.jigsaw import (
    GROUPS,
    REGION_GROUPS,
    REGIONS,
    RESIZE_HIGH,
    RESIZE_LOW,
    Fit,
    Region,
    Template,
    fill_slots,
    stand_in,
)
from jigsaw_pretrain.formats.pixels import RGB8, PixelFormat

LITTLE_SHOWN = 0.2
"""Below this share of an object that the large slot shows the user is told that the objects are large."""

ONE_SIDED = 0.7
"""From this share of one label on the user is told that accuracy says little."""

LITTLE_FILL = 0.65
"""Below this fill of the large slot the user is told that the objects are small."""

_STEPS, _MOST = 8, 20_000


@dataclass(frozen=True)
class SlotFill:
    """A slot of the template: its name, the group it takes crops of, its size in pixels, and its mean fill, 0 to 1.

    shown: how much of an object the slot shows, 0 to 1: the median over its crops, the mean over places and ratios.
    """

    name: str
    group: str
    width: int
    height: int
    fill: float
    shown: float = 1.0


PAPER_RATIOS = (RESIZE_LOW, RESIZE_HIGH)

Ratios = tuple[float, float]


def slot_fill(
    widths: npt.ArrayLike,
    heights: npt.ArrayLike,
    groups: npt.ArrayLike,
    template: Template | None = None,
    ratios: Ratios = PAPER_RATIOS,
    objects: npt.NDArray[Any] | None = None,
    fit: Fit = "crop",
) -> list[SlotFill]:
    """The four slots of a template (the paper's by default), filled with n crops of these sizes and group codes.

    A slot whose group is empty is filled from the group that stands in for it in training. ratios: the smallest and the
    largest that crops are resized by. objects: where in its crop each object lies (CropSizes); whole crops without.
    fit: data.fit of the recipe; by the other ones than "crop" a region shows whole crops.
    """
    wide, high = np.asarray(widths, dtype=np.float64), np.asarray(heights, dtype=np.float64)
    codes = np.asarray(groups)
    counts = {group: int(np.count_nonzero(codes == code)) for code, group in enumerate(GROUPS)}
    slots = []
    for name, group, region in zip(REGIONS, REGION_GROUPS, (template or Template()).regions, strict=True):
        taken = stand_in(group, counts) if any(counts.values()) else group
        rows = np.flatnonzero(codes == GROUPS.index(taken))
        covered = _covered(wide[rows], high[rows], region, ratios, fit)
        weights = np.ones(len(rows))
        if group == "S":
            rank = np.empty(len(rows))
            rank[np.argsort(wide[rows] * high[rows], kind="stable")] = np.arange(len(rows))
            weights = 2 * rank + 1 if name == "S-large" else 2 * (len(rows) - rank) - 1
        fill = float((covered * weights).sum() / weights.sum()) if len(rows) else 0.0
        # Every so many are enough for a median.
        some = slice(None, None, max(1, len(rows) // _MOST))
        found = rows[some]
        shown = np.ones(len(found))
        if fit == "crop":
            shown = _shown(wide[found], high[found], None if objects is None else objects[found], region, ratios)
        known = ~np.isnan(shown)
        median = _median(shown[known], weights[some][known])
        slots.append(SlotFill(name, group, region.width, region.height, fill, median))
    return slots


@dataclass(frozen=True)
class JigsawFit:
    """A template, the ratios between which crops are resized, and its slots as these fill them.

    fit: how a crop meets its region, data.fit of the recipe; the ratios are those of "crop".
    """

    template: Template
    ratios: Ratios
    slots: Sequence[SlotFill]
    fit: Fit = "crop"


COCO_FILL = 0.69
"""The fill of the paper's large slot by COCO's crops: measured, 0.69 over some of train2017 and 0.70 of val2017."""

NEAR = 0.09
"""How near to COCO_FILL the fill must be for the paper's ratios to be kept."""

_SMALLEST, _LARGEST = 1 / 64, 2.0
"""Factors of the paper's ratios. Enlarging further adds no pixel that could be learnt from."""


@dataclass(frozen=True)
class CropSizes:
    """Widths, heights and group codes of n crops as they are trained on, [n] each.

    objects: left, top, right and bottom of each object in its crop, [n, 4], NaN for background; None for whole crops.
    """

    widths: npt.NDArray[Any]
    heights: npt.NDArray[Any]
    groups: npt.NDArray[Any]
    objects: npt.NDArray[Any] | None = None

    @classmethod
    def of(cls, boxes: npt.NDArray[Any], xywh: npt.NDArray[Any], groups: npt.NDArray[Any]) -> "CropSizes":
        """The sizes of crops with edges [n, 4] and ground-truth boxes [n, 4], NaN for background."""
        sizes = boxes[:, 2:] - boxes[:, :2]
        ends = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1) - boxes[:, [0, 1, 0, 1]]
        return cls(sizes[:, 0], sizes[:, 1], groups, np.clip(ends, 0, sizes[:, [0, 1, 0, 1]]).astype(np.float32))

    @classmethod
    def joined(cls, parts: Sequence["CropSizes"]) -> "CropSizes":
        """Those of several parts, in their order, all of them with objects."""
        if not parts:
            return cls.of(np.empty((0, 4), dtype=np.int32), np.empty((0, 4)), np.empty(0, dtype=np.uint8))
        columns = ([getattr(part, one.name) for part in parts] for one in fields(cls))
        return cls(*(np.concatenate(column) for column in columns))

    @property
    def side(self) -> float:
        """The median of the square root of their area, pixels; 0 without crops."""
        return float(np.median(np.sqrt(self.widths * 1.0 * self.heights))) if len(self.widths) else 0.0

    def jigsaw(self, template: Template | None = None, ratios: Ratios = PAPER_RATIOS, fit: Fit = "crop") -> JigsawFit:
        """A template (the paper's by default) with given ratios, or where crops meet their regions in another way."""
        template = template or Template()
        slots = slot_fill(self.widths, self.heights, self.groups, template, ratios, self.objects, fit)
        return JigsawFit(template, ratios, slots, fit)

    def fit(self, template: Template) -> JigsawFit:
        """A template with the ratios that fill its large slot as COCO's crops fill the paper's."""
        found = self.jigsaw(template)
        if not len(self.widths) or abs(_large(found.slots).fill - COCO_FILL) <= NEAR:
            return found
        # Every so many of the crops by area are enough.
        chosen = np.argsort(self.widths * 1.0 * self.heights, kind="stable")[:: max(1, len(self.widths) // 4000)]
        some = CropSizes(self.widths[chosen], self.heights[chosen], self.groups[chosen])
        low, high = math.log(_SMALLEST), math.log(_LARGEST)
        for _ in range(12):
            middle = (low + high) / 2
            fill = _large(some.jigsaw(template, _scaled(math.exp(middle))).slots).fill
            low, high = (middle, high) if fill < COCO_FILL else (low, middle)
        return self.jigsaw(template, _scaled(math.exp((low + high) / 2)))


def _scaled(factor: float) -> Ratios:
    """The paper's ratios times a factor, to two digits."""
    return float(f"{factor * RESIZE_LOW:.2g}"), float(f"{factor * RESIZE_HIGH:.2g}")


def _large(slots: Sequence[SlotFill]) -> SlotFill:
    return next(slot for slot in slots if slot.name == "S-large")


def _shown(
    widths: npt.NDArray[np.float64],
    heights: npt.NDArray[np.float64],
    objects: npt.NDArray[Any] | None,
    region: Region,
    ratios: Ratios,
) -> npt.NDArray[np.float64]:
    """The share of each object that a region shows, the mean over places and ratios: float64 [n], NaN for none."""
    left, top, right, bottom = (0.0, 0.0, widths, heights) if objects is None else objects.astype(np.float64).T
    total = np.zeros(len(widths))
    for ratio in _steps(ratios):
        across = _shown_along(widths, region.width / ratio, left, right)
        total += across * _shown_along(heights, region.height / ratio, top, bottom)
    return total / _STEPS


def _shown_along(
    length: npt.NDArray[np.float64], window: float, start: npt.NDArray[np.float64] | float, end: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """The share of what lies from ``start`` to ``end`` in a crop that a window shows, the mean over its places.

    The window lies anywhere in the crop with equal chance. A point at t is in it with a chance of (min(t, room) - max(t
    - window, 0)) / room, where room is what the crop is longer by; the share is the integral of that.
    """
    room = np.maximum(length - window, 1e-9)

    def integral(t: npt.NDArray[np.float64] | float) -> npt.NDArray[np.float64]:
        parts = np.square(t) - np.square(np.maximum(t - room, 0)) - np.square(np.maximum(t - window, 0))
        return np.asarray(parts / 2, dtype=np.float64)

    share = (integral(end) - integral(start)) / (room * np.maximum(end - start, 1e-9))
    # All of a crop that is not longer than the window; of a missing object nothing is known.
    return np.where((length <= window) & ~np.isnan(share), 1.0, np.minimum(share, 1.0))


def _median(values: npt.NDArray[np.float64], weights: npt.NDArray[np.float64]) -> float:
    """The value that half of the weights lie below; 1 where there is none."""
    if not len(values):
        return 1.0
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(reached, reached[-1] / 2)])


def _steps(ratios: Ratios) -> npt.NDArray[np.float64]:
    low, high = ratios
    return low + (high - low) * (np.arange(_STEPS) + 0.5) / _STEPS


def _covered(
    widths: npt.NDArray[np.float64], heights: npt.NDArray[np.float64], region: Region, ratios: Ratios, fit: Fit
) -> npt.NDArray[np.float64]:
    """The share of a slot that each crop covers, by "crop" the mean over the resize ratio: float64 [n]."""
    width, height = region.width, region.height
    if fit == "warp":
        return np.ones(len(widths))
    if fit == "resize":
        # One side fills the slot.
        return np.asarray(np.minimum(widths * height, heights * width) / np.maximum(widths * height, heights * width))
    total = np.zeros(len(widths))
    for ratio in _steps(ratios):
        total += np.minimum(ratio * widths, width) * np.minimum(ratio * heights, height)
    return total / (_STEPS * width * height)


def warnings(counts: Sequence[int], slots: Sequence[SlotFill]) -> list[tuple[str, str]]:
    """What a user should know of these crops, its name and plain words; counts: by group, in the order of GROUPS."""
    total = sum(counts)
    notes = fill_slots(dict(zip(GROUPS, counts, strict=True))).notes() if total else []
    said = [("uneven shapes", text) for text in notes]
    large = _large(slots)
    if total and large.fill < LITTLE_FILL:
        text = (
            f"crops fill {large.fill:.0%} of the large square of a jigsaw ({large.width} x {large.height} pixels in "
            "the paper's), the rest is padding. If the objects are as small as that, train with smaller jigsaws "
            "(data.template_size = 128, data.template_split = 32) or enlarge crops more (data.resize_high), as "
            "recipe.toml does where they are much smaller than COCO's; if not, `jigsaw-prep doctor` may tell what is "
            "wrong with the boxes."
        )
        said.append(("small objects", text))
    if total and large.shown < LITTLE_SHOWN:
        text = (
            f"the large square of a jigsaw ({large.width} x {large.height} pixels in the paper's) shows "
            f"{large.shown:.0%} of its object (median), the rest is cut off. Train with recipe.toml, which resizes "
            "crops to suit (data.resize_low, data.resize_high), or with data.fit = resize, which shows whole crops."
        )
        said.append(("large objects", text))
    return said


@dataclass(frozen=True)
class Summary:
    """Figures of a dataset with C classes.

    counts: int64 [C + 1, 3], crops by label (background last) and group. images: those with crops. bytes: of the
    shards, estimated for a plan. negatives_wanted: as many as were asked for. seconds: one core's time, estimated; None
    once it is known. encoded: of a lossless dataset, the crops that were encoded all the same, by reason; else None.
    drawn_context: where the trainer draws the context, how much at most; the slots are then filled with crops of the
    mean context. pixels: of the crops. measured: their ``mean`` and ``std``, of what is not 8-bit RGB. filled: pixels
    of crops that held no data. slots: of the paper's template and ratios. sizes: of the crops.
    """

    classes: Sequence[str]
    counts: npt.NDArray[np.int64]
    images: int
    images_listed: int
    negatives_wanted: int
    parts: int
    shards: int
    bytes: int
    skipped: Mapping[str, int]
    slots: Sequence[SlotFill]
    sizes: CropSizes
    seconds: float | None = None
    encoded: Mapping[str, int] | None = None
    drawn_context: float | None = None
    pixels: PixelFormat = RGB8
    measured: Mapping[str, Sequence[float]] = field(default_factory=dict)
    filled: int = 0

    @property
    def crops(self) -> int:
        """All crops."""
        return int(self.counts.sum())

    @property
    def negatives(self) -> int:
        """Background crops."""
        return int(self.counts[-1].sum())

    @property
    def by_group(self) -> list[int]:
        """Crops of S, T and W."""
        return [int(count) for count in self.counts.sum(axis=0)]

    def commonest(self) -> tuple[str, float]:
        """The label that most regions will have, and their share, 0 to 1; ("", 0) without crops."""
        if not self.crops:
            return "", 0.0
        drawn = fill_slots(dict(zip(GROUPS, self.by_group, strict=True))).shares()
        shares = sum(
            drawn.get(group, 0.0) * self.counts[:, code] / max(1, self.by_group[code])
            for code, group in enumerate(GROUPS)
        )
        label = int(np.argmax(shares))
        return [*self.classes, "background"][label], float(np.max(shares))

    def warnings(self) -> list[tuple[str, str]]:
        """What the user should know, each with a name and in plain words."""
        said = warnings(self.by_group, self.slots)
        name, share = self.commonest()
        if share >= ONE_SIDED:
            text = (
                f"{share:.1%} of all regions will be {name}: a network that always says so is right that often and "
                "has learned nothing. Ask for more background (--negatives-per-positive), and train with data.balance "
                "= sqrt, as recipe.toml does."
            )
            said.append(("one label", text))
        if self.negatives < self.negatives_wanted:
            missing = self.negatives_wanted - self.negatives
            text = (
                f"{missing:,} of {self.negatives_wanted:,} background crops are missing: the images are too full of "
                "objects to hold more, or could not be read."
            )
            said.append(("missing background", text))
        if self.filled:
            text = (
                f"{self.filled:,} pixels of crops hold no data (nodata): they are filled by the mean of their image, "
                "and left out of mean and std."
            )
            said.append(("missing values", text))
        return said

    def totals(self) -> dict[str, Any]:
        """The totals of dataset.json (manifests/README.md)."""
        # Keys of lossless datasets alone are written for these alone: others keep their bytes.
        encoded = {} if self.encoded is None else {"encoded": dict(sorted(self.encoded.items()))}
        filled = {"filled_pixels": self.filled} if self.filled else {}
        return {
            **encoded,
            **filled,
            "images": self.images,
            "images_listed": self.images_listed,
            "crops": self.crops,
            "positives": self.crops - self.negatives,
            "negatives": self.negatives,
            "negatives_wanted": self.negatives_wanted,
            "by_group": dict(zip(GROUPS, self.by_group, strict=True)),
            "by_label": [int(count) for count in self.counts.sum(axis=1)],
            "parts": self.parts,
            "shards": self.shards,
            "bytes": self.bytes,
            "skipped": dict(sorted(self.skipped.items())),
            "slot_fill": {slot.name: round(slot.fill, 3) for slot in self.slots},
            **{name: list(values) for name, values in self.measured.items()},
        }


def count_crops(labels: npt.ArrayLike, groups: npt.ArrayLike, classes: int) -> npt.NDArray[np.int64]:
    """Crops by label and group: int64 [classes + 1, 3]."""
    cell = np.asarray(labels, dtype=np.int64) * len(GROUPS) + np.asarray(groups, dtype=np.int64)
    return np.bincount(cell, minlength=(classes + 1) * len(GROUPS)).reshape(classes + 1, len(GROUPS))
