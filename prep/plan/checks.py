"""What a dataset's boxes as a whole look like: mistakes of a whole dataset, which no single box shows.

Each finding names the probable cause and a few boxes. A hundred milliseconds for a million boxes.

A module of its own, because it looks at a dataset and decides nothing: no plan depends on it.
"""

from collections.abc import Sequence
from typing import overload

import numpy as np

from jigsaw_pretrain.formats import boxes
from jigsaw_pretrain.formats.annotations.skipped import BoxReason, Note
from jigsaw_pretrain.formats.annotations.table import Annotations, Ints
from jigsaw_pretrain.formats.boxes import Flags

SMALLEST = 2.0
"""Boxes with a side below this many pixels are hardly objects."""

ROUNDING = 2.0
"""Pixels by which boxes leave their images where they were rounded; for large images a hundredth of a side."""


def box_notes(annotations: Annotations) -> list[Note]:
    """What all boxes together look like; nothing for a dataset without oddities."""
    finite = boxes.finite(annotations.xywh)
    xywh = np.where(finite[:, None], annotations.xywh, 0)
    sides = np.stack([annotations.widths, annotations.heights], axis=1)[annotations.image].astype(np.float64)
    some = finite & (xywh[:, 2:] > 0).all(axis=1)
    end = xywh[:, :2] + xywh[:, 2:]
    reach = np.maximum(ROUNDING, 0.01 * sides)
    leaving = some & ((xywh[:, :2] < -reach) | (end > sides + reach)).any(axis=1)
    unit = some & (xywh >= 0).all(axis=1) & (end <= 1.001).all(axis=1) & (sides > 2).all(axis=1)
    corners = some & (xywh[:, 2:] > xywh[:, :2]).all(axis=1) & (xywh[:, 2:] <= sides + reach).all(axis=1)
    tiny = some & (xywh[:, 2:] < SMALLEST).any(axis=1)
    count = max(1, int(some.sum()))
    notes = []

    def note(check: str, found: Flags, text: str) -> None:
        notes.append(Note(check, text, _Boxes(annotations, np.flatnonzero(found))))

    if 2 * unit.sum() >= count:
        text = "they are shares of their images (normalised), not pixels: multiply them by the image's size"
        note("boxes within the unit square", unit, text)
    elif tiny.any():
        note("boxes below 2 pixels", tiny, "they are hardly objects: clicks by mistake, or boxes of a resized copy")
    if leaving.any():
        wrong = corners.sum() >= 0.9 * count and leaving.sum() >= 0.1 * count
        text = "their annotations may be of other pictures, or of pictures of another size"
        if wrong:
            text = "they are likely corners (x1, y1, x2, y2), where x, y, width, height are expected: subtract x and y"
        note("boxes that leave their image by more than rounding", leaving, text)
    repeated = annotations.reason == BoxReason.REPEATED
    if repeated.any():
        note("boxes given more than once", repeated, "the same box and class again in one image; repeats are not used")
    return notes


class _Boxes(Sequence[str]):
    """Boxes by their rows, in words; a box is put into words where it is asked for, as there may be a million."""

    def __init__(self, annotations: Annotations, rows: Ints) -> None:
        self._annotations, self._rows = annotations, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[nth] for nth in range(len(self))[index]]
        row = int(self._rows[index])
        box = [round(float(value), 3) for value in self._annotations.xywh[row]]
        return f"{self._annotations.files[self._annotations.image[row]]} {box}"
