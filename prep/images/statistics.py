"""Mean and standard deviation of a dataset's pixels, by channel, over the pixels of all its crops.

A part's record carries counts and sums, which finishing adds up in the order of the parts. Sums of integers are exact.
Those of floats are rounded to 12 digits, so that neither the number of workers nor the width of a processor's vectors
shows in a file. About 1 ns per value.
"""

import math
from collections.abc import Iterable

import msgspec
import numpy as np

from jigsaw_pretrain.formats.pixels import Array, PixelFormat

Number = int | float


class PixelSums(msgspec.Struct, frozen=True, omit_defaults=True):
    """Pixels of some crops: how many, and by channel the sums of their values and of these values' squares.

    Written as text: sums of large images' squares may pass 64 bits. missing: pixels without data, which are not among
    those counted.
    """

    count: int
    sums: list[str]
    squares: list[str]
    missing: int = 0


class ChannelStatistics:
    """Adds up crops' pixels."""

    def __init__(self, form: PixelFormat) -> None:
        self._whole = form.dtype != "float32"
        self._count = self._missing = 0
        zero: Number = 0 if self._whole else 0.0
        self._sums, self._squares = [zero] * form.channels, [zero] * form.channels

    def add(self, pixels: Array) -> None:
        """Take in a crop, [height, width, channels]; pixels with a NaN are missing data."""
        values = pixels.reshape(-1, pixels.shape[2]).astype(np.uint64 if self._whole else np.float64)
        if not self._whole and (missing := np.isnan(values).any(axis=1)).any():
            self._missing += int(missing.sum())
            values = values[~missing]
        self._count += len(values)
        number = int if self._whole else float
        sums, squares = values.sum(axis=0), (values * values).sum(axis=0)
        self._sums = [total + number(one) for total, one in zip(self._sums, sums, strict=True)]
        self._squares = [total + number(one) for total, one in zip(self._squares, squares, strict=True)]

    def total(self) -> PixelSums:
        """What was added."""
        said = str if self._whole else "{:.12g}".format
        sums, squares = [said(one) for one in self._sums], [said(one) for one in self._squares]
        return PixelSums(self._count, sums, squares, self._missing)


def mean_and_std(parts: Iterable[PixelSums], form: PixelFormat) -> dict[str, list[float]]:
    """``mean`` and ``std`` by channel in units of the format's full scale, to 9 digits; zeros without any crop."""
    listed = [part for part in parts if part.count]
    count = sum(part.count for part in listed)
    found: dict[str, list[float]] = {"mean": [], "std": []}
    for channel in range(form.channels):
        if form.dtype == "float32":
            total: Number = math.fsum(float(part.sums[channel]) for part in listed)
            squares: Number = math.fsum(float(part.squares[channel]) for part in listed)
        else:
            total = sum(int(part.sums[channel]) for part in listed)
            squares = sum(int(part.squares[channel]) for part in listed)
        # In whole numbers the difference of the two large terms is exact.
        spread = max(0, squares * count - total * total)
        mean = total / count if count else 0.0
        std = math.sqrt(spread) / count if count else 0.0
        found["mean"].append(_digits(mean / form.full_scale))
        found["std"].append(_digits(std / form.full_scale))
    return found


def _digits(value: float) -> float:
    return float(f"{value:.9g}")
