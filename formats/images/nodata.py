"""Finds the value that marks missing data in float images, before it is averaged and trained on.

Where a file does not say it (GDAL's tag), a value like -9999 looks like a measurement: in 6 tiles of 60 it took a run's
accuracy from 100 % to 55 %. Such a value is an extreme one that many pixels hold and none comes near. It is named and
the plan stops; guessing it away could remove what was measured. Each channel is looked at by itself: beside heights in
metres, -9999 in a channel of indices is nothing extreme. Decodes the sample of images that decides the pixel format (up
to 256; 10 ms each for 512 x 512 x 6), of float data only.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.images.decode import ImageError, decode_raster, raster_header
from jigsaw_pretrain.formats.images.source import ImageSource
from jigsaw_pretrain.formats.pixels import NO_NODATA, PixelFormat, missing_value
from jigsaw_pretrain.storage.store import map_ahead

MOST_VALUES = 1 << 14
"""Values of an image that are looked at, evenly spread over its pixels."""

SHARE = 0.001
"""The share of a channel's values from which a value is many."""

FAR = 10.0
"""Interquartile ranges from the median, and from the next value, beyond which a value is no measurement."""

Floats = npt.NDArray[np.float32]


def check_nodata(files: Sequence[str], source: ImageSource, pixels: PixelFormat, nodata: str | None) -> None:
    """Stop where a value of float images looks like missing data.

    Args:
        files: The images to look at.
        source: Where they are.
        pixels: The dataset's format.
        nodata: The value that marks missing data as the user has named it, ``none``, or None to look for one.

    Raises:
        UserError: With the value, its share, and the option that names it.
    """
    named = missing_value(nodata)
    if named is not None and pixels.dtype != "float32":
        raise UserError(f"--nodata is of float images, and the pixels of this dataset are {pixels}: leave it out")
    if pixels.dtype != "float32" or nodata == NO_NODATA:
        return
    found = list(map_ahead(lambda file: _values(source, file, pixels, named), files, source.threads))
    looked = np.concatenate([one for one in found if one is not None] or [np.empty((0, pixels.channels), np.float32)])
    for channel, column in enumerate(looked.T, 1):
        values = column[~np.isnan(column)]
        value = sentinel(values)
        if value is None:
            continue
        low, high = np.quantile(values, (0.25, 0.75))
        where = f" of channel {channel}" if pixels.channels > 1 else ""
        raise UserError(
            f"{(values == np.float32(value)).mean():.1%} of the values{where} in {len(found):,} images looked at are "
            f"{value:g}, far from all others (half of them are between {low:.4g} and {high:.4g}): this looks like "
            f"missing data. Name it with --nodata {value:g}, which leaves it out of mean and std and fills it; or give "
            "--nodata none where it was measured."
        )


def sentinel(values: Floats) -> float | None:
    """The extreme value of float32 [n] that looks like no measurement; None where there is none."""
    if not len(values):
        return None
    for value in (values.min(), values.max()):
        rest = values[values != value]
        if not len(rest) or 1 - len(rest) / len(values) < SHARE:
            continue
        low, median, high = np.quantile(rest, (0.25, 0.5, 0.75))
        # Where half of the values are the same, all of them tell how far values lie apart.
        spread = high - low or rest.std()
        nearest = rest.min() if value < median else rest.max()
        if spread and min(abs(value - median), abs(value - nearest)) > FAR * spread:
            return float(value)
    return None


def _values(source: ImageSource, file: str, pixels: PixelFormat, named: float | None) -> Floats | None:
    """Some pixels of an image, [n, channels]; None where it cannot be read: cutting tells why."""
    try:
        raw = source.read(file)
        head = raster_header(raw)
        whole = decode_raster(raw, head.width, head.height, "ignore", pixels, nodata=named)
    except ImageError:
        return None
    listed = whole.reshape(-1, pixels.channels)
    return listed[:: -(-listed.size // MOST_VALUES)]
