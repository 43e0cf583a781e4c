"""How many bytes crops will take and how long cutting them takes, before they are cut.

The figures were measured over the crops of coco_small_train (a dataset of smooth pictures weighs half: bccd).

A module of its own, because these figures decide where parts end: a change here raises plan.PLAN_VERSION.
"""

import numpy as np
import numpy.typing as npt

from jigsaw_pretrain.formats.pixels import RGB8, PixelFormat

QUALITIES = (50, 75, 85, 90, 95, 98, 100)
BYTES_PER_PIXEL_444 = (0.147, 0.227, 0.329, 0.41, 0.6, 0.855, 1.28)
BYTES_PER_PIXEL_420 = (0.12, 0.184, 0.259, 0.322, 0.464, 0.642, 0.877)
JPEG_HEADER = 620
TAR_OVERHEAD = 512 + 512 + 512 + 256
"""Two member headers, the class in a block of its own, and on average half a block of padding."""

SECONDS_PER_IMAGE = 0.0003
SECONDS_PER_DECODED_PIXEL = 5e-9
SECONDS_PER_CROP = 0.0003
SECONDS_PER_ENCODED_PIXEL = 6.5e-9
LOSSLESS_SHARE = 0.6
"""The share of the time per pixel where blocks are copied and not decoded."""

PNG_SHARE = 0.85
"""The share of the bytes of a sensor's pixels that a PNG of them takes: their noise does not compress."""

NPY_HEADER = 128


def crop_bytes(
    pixels: npt.NDArray[np.int64], quality: int, subsampling: str, form: PixelFormat = RGB8
) -> npt.NDArray[np.int64]:
    """About how many bytes of a shard each crop takes: int64 [n] for areas [n] in pixels."""
    if form != RGB8:
        share = PNG_SHARE if form.member == "png" else 1.0
        return (NPY_HEADER + TAR_OVERHEAD + share * form.channels * form.itemsize * pixels).astype(np.int64)
    per_pixel = BYTES_PER_PIXEL_444 if subsampling == "444" else BYTES_PER_PIXEL_420
    slope = float(np.interp(quality, QUALITIES, per_pixel))
    return (JPEG_HEADER + TAR_OVERHEAD + slope * pixels).astype(np.int64)


def cutting_seconds(images: int, image_pixels: int, crops: int, crop_pixels: int, lossless: bool) -> float:
    """About how long one core of 2020's making cuts these."""
    pixels = image_pixels * SECONDS_PER_DECODED_PIXEL + crop_pixels * SECONDS_PER_ENCODED_PIXEL
    return images * SECONDS_PER_IMAGE + crops * SECONDS_PER_CROP + pixels * (LOSSLESS_SHARE if lossless else 1.0)
