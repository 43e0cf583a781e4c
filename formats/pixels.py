"""Pixel formats: what a stored crop's pixels are, one format for a whole dataset.

Ordinary pictures are 8-bit RGB in JPEG members (format version 1). All else is stored losslessly: as PNG where that
holds it (one channel of 8 or 16 bits, three of 8), else as npy, an array [height, width, channels] in little-endian C
order.
"""

import re
from typing import Any

import msgspec

from jigsaw_pretrain.errors import UserError

MOST_CHANNELS = 512
"""The most that OpenCV resamples."""

FULL_SCALE = {"uint8": 255.0, "uint16": 65535.0, "float32": 1.0}
"""By type: the value that means and standard deviations count as 1. Floats count in their own unit."""


class PixelFormat(msgspec.Struct, frozen=True, kw_only=True):
    """member: the suffix of a crop's member, jpg, png or npy. dtype: a name in FULL_SCALE."""

    member: str
    channels: int
    dtype: str

    @property
    def is_rgb8(self) -> bool:
        """Whether these are 8-bit pictures in red, green and blue, as public weights were trained on."""
        return (self.channels, self.dtype) == (3, "uint8")

    @property
    def full_scale(self) -> float:
        """The value that means and standard deviations count as 1."""
        return FULL_SCALE[self.dtype]

    @property
    def itemsize(self) -> int:
        """Bytes of one channel of one pixel."""
        return {"uint8": 1, "uint16": 2, "float32": 4}[self.dtype]

    def to_dict(self) -> dict[str, Any]:
        """As plan.json, dataset.json and run.json hold it."""
        return msgspec.structs.asdict(self)

    def __str__(self) -> str:
        """``1 x uint16``."""
        return f"{self.channels} x {self.dtype}"


RGB8 = PixelFormat(member="jpg", channels=3, dtype="uint8")
"""What a dataset has that does not say: format version 1."""

_NAMED = re.compile(r"(\d{1,4}) ?x ?(\w+)")


def lossless(channels: int, dtype: str) -> PixelFormat:
    """The format that stores such pixels without loss."""
    png = (channels == 1 and dtype in ("uint8", "uint16")) or (channels == 3 and dtype == "uint8")
    return PixelFormat(member="png" if png else "npy", channels=channels, dtype=dtype)


def named(text: str) -> PixelFormat:
    """The format of a name: ``rgb8`` or channels and type such as ``6xuint16``; raises UserError."""
    if text == "rgb8":
        return RGB8
    match = _NAMED.fullmatch(text)
    if match is None or match[2] not in FULL_SCALE or not 1 <= int(match[1]) <= MOST_CHANNELS:
        raise UserError(
            f"{text!r} names no pixel format: write rgb8, or channels (1 to {MOST_CHANNELS}) and type "
            f"({', '.join(FULL_SCALE)}) such as 1xuint16 or 6xfloat32"
        )
    return lossless(int(match[1]), match[2])


def pixel_format(stated: Any, where: str) -> PixelFormat:
    """The format as plan.json, dataset.json or run.json state it, RGB8 where they state none; raises UserError."""
    if stated is None:
        return RGB8
    try:
        found = msgspec.convert(stated, PixelFormat)
        known = found == RGB8 or found == named(f"{found.channels}x{found.dtype}")
    except (msgspec.ValidationError, UserError):
        known = False
    if not known:
        raise UserError(f"{where} states pixels that this program does not know ({stated}): use a newer version")
    return found
