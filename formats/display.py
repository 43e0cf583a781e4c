"""Pixels for the eye: what a page or a sheet shows of crops that are not 8-bit RGB.

One or two channels become grey (the first), three or more red, green and blue (the first three). Each channel is
stretched from two standard deviations below the dataset's mean (black) to two above (white), so that a sensor that uses
a sliver of its range is seen at all; what lies beyond is black or white. For looking only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from jigsaw_pretrain.formats.pixels import PixelFormat

SPREAD = 2.0
"""Standard deviations from the mean to black and to white."""


@dataclass(frozen=True)
class Look:
    """How a dataset's crops are shown: their format, and mean and deviation by channel in units of full scale."""

    pixels: PixelFormat
    mean: Sequence[float]
    std: Sequence[float]


def displayed(
    pixels: npt.NDArray[np.generic], form: PixelFormat, mean: Sequence[float], std: Sequence[float]
) -> npt.NDArray[np.uint8]:
    """uint8 [..., 3] of pixels [..., channels]; those of 8-bit RGB as they are. mean, std: in units of full scale."""
    if form.is_rgb8:
        return pixels.astype(np.uint8, copy=False)
    shown = 3 if form.channels >= 3 else 1
    middle = np.array(mean[:shown]) * form.full_scale
    reach = np.array(std[:shown]) * form.full_scale * SPREAD
    reach = np.where(reach > 0, reach, 1.0)
    level = (pixels[..., :shown].astype(np.float64) - middle + reach) / (2 * reach)
    grey = (np.clip(level, 0, 1) * 255 + 0.5).astype(np.uint8)
    return np.repeat(grey, 3, axis=-1) if shown == 1 else grey


def display_note(form: PixelFormat) -> str:
    """What ``displayed`` shows, in a sentence for a caption; nothing for 8-bit RGB."""
    if form.is_rgb8:
        return ""
    if form.channels == 1:
        what = "One channel, as grey"
    elif form.channels == 2:
        what = "The first of 2 channels, as grey"
    else:
        what = f"Channels 1, 2 and 3 of {form.channels} as red, green and blue"
    return f"{what}; black to white is the mean of all crops ± {SPREAD:g} standard deviations ({form})."
