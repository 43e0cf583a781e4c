"""Pixel formats: what a stored crop's pixels are, how they are written and read, and how a page shows them.

A dataset has one format. Ordinary pictures are 8-bit RGB in JPEG members (format version 1). All else is stored
losslessly: as PNG where that holds it (one channel of 8 or 16 bits, three of 8), else as npy, an array [height, width,
channels] in little-endian C order. What a header claims is compared with what is expected before anything is decoded or
allocated (3 us for a JPEG), and nothing is ever unpickled. A PNG of 100 x 100 pixels of 16 bits takes about 1 ms to
write (Pillow) and 0.2 ms to read (OpenCV); an npy of it some microseconds.

Pages and sheets show such pixels in grey (one or two channels: the first) or in red, green and blue (three or more: the
first three). Each channel is stretched from two standard deviations below the dataset's mean (black) to two above
(white), so that a sensor that uses a sliver of its range can be seen at all; what lies beyond is black or white.
"""

import io
import os
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import msgspec
import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

from jigsaw_pretrain.config import as_number
from jigsaw_pretrain.errors import UserError

MAX_PIXELS = 178_956_970
"""The largest image that is decoded (Pillow's own limit against decompression bombs)."""

MOST_CHANNELS = 512
"""The most that OpenCV resamples."""

FULL_SCALE = {"uint8": 255.0, "uint16": 65535.0, "float32": 1.0}
"""By type: the value that means and standard deviations count as 1. Floats count in their own unit."""

_NAMED = re.compile(r"(\d{1,4}) ?x ?(\w+)")

Array = npt.NDArray[Any]
Buffer = bytes | memoryview | npt.NDArray[np.uint8]

NPY_MAGIC = b"\x93NUMPY"
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"

_ANIMATED = b"acTL"
"""The chunk of a PNG with several pictures."""

_SCAN = b"\xff\xda"
MOST_SCANS = 100
"""The most scans of a JPEG member, as each may take as long as decoding a whole picture; prep writes one."""

SPREAD = 2.0
"""Standard deviations from the mean to black and to white, where pixels are shown."""


class PixelFormat(msgspec.Struct, frozen=True, kw_only=True):
    """What the pixels of a dataset's crops are, and how a crop is kept.

    member: the suffix of a crop's member, jpg, png or npy. dtype: a name in FULL_SCALE.
    """

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
"""The format of a dataset that states none: format version 1."""


NO_NODATA = "none"
"""Says that no value of float images marks missing data."""


def missing_value(text: str | None) -> float | None:
    """The value that marks missing data in float images, from ``--nodata``; raises UserError for what is no number."""
    if text is None or text == NO_NODATA:
        return None
    try:
        return as_number(text)
    except ValueError as error:
        raise UserError(f"--nodata {text}: give a number, nan, or none") from error


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


class BadArray(ValueError):
    """Why bytes are no npy file that can be used."""


def encode_member(pixels: Array, form: PixelFormat) -> bytes:
    """The member of pixels [height, width, channels] of the format's own type."""
    sink = io.BytesIO()
    if form.member == "png":
        Image.fromarray(pixels[..., 0] if form.channels == 1 else pixels).save(sink, "PNG")
    else:
        little = np.ascontiguousarray(pixels, dtype=np.dtype(form.dtype).newbyteorder("<"))
        np.lib.format.write_array(sink, little, version=(1, 0), allow_pickle=False)
    return sink.getvalue()


def decode_member(raw: Buffer, form: PixelFormat, width: int, height: int) -> Array | None:
    """Pixels [height, width, channels] of a member; None where its size or format is another."""
    if form.member == "jpg":
        return _jpeg(raw, width, height)
    return _png(raw, form, width, height) if form.member == "png" else _npy(raw, form, width, height)


def _jpeg(raw: Buffer, width: int, height: int) -> Array | None:
    if bytes(raw).count(_SCAN) > MOST_SCANS:
        return None
    try:
        if simplejpeg.decode_jpeg_header(raw)[:2] != (height, width):
            return None
        found: Array = simplejpeg.decode_jpeg(raw, colorspace="RGB")
    except ValueError:
        return None
    return found if found.shape == (height, width, 3) else None


def _png(raw: Buffer, form: PixelFormat, width: int, height: int) -> Array | None:
    kind = bytes((8 * form.itemsize, 0 if form.channels == 1 else 2))
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + kind
    if bytes(raw[:8]) != PNG_MAGIC or bytes(raw[12:26]) != b"IHDR" + header or _ANIMATED in bytes(raw[:4096]):
        return None
    try:
        found = cv2.imdecode(np.frombuffer(raw, dtype=np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        return None
    if found is None or found.dtype != form.dtype or found.shape != ((height, width, 3)[: found.ndim]):
        return None
    if (1 if found.ndim == 2 else 3) != form.channels:
        return None
    return found[..., None] if found.ndim == 2 else np.asarray(cv2.cvtColor(found, cv2.COLOR_BGR2RGB))


def _npy(raw: Buffer, form: PixelFormat, width: int, height: int) -> Array | None:
    try:
        found = npy_array(raw)
    except BadArray:
        return None
    fits = found.shape == (height, width, form.channels) and found.dtype == form.dtype
    return found if fits and (found.dtype.kind != "f" or np.isfinite(found).all()) else None


def npy_header(raw: Buffer) -> tuple[tuple[int, ...], bool, np.dtype[np.generic], int]:
    """Shape, whether in Fortran order, type, and the offset of the first value in an npy file; raises BadArray.

    Format versions 1 to 3. Nothing is allocated by what the header says.
    """
    stream = io.BytesIO(bytes(raw[: 1 << 16]))
    try:
        # Python 3.11's parser counts its depth for all threads together (gh-106905), so that a healthy head may fail.
        with _parsing:
            shape, fortran, dtype = _parsed(stream)
    except BadArray:
        raise
    except Exception as error:
        # A hostile header makes Python's own parser raise nearly anything.
        raise BadArray("its npy head cannot be read") from error
    if dtype.kind not in "uifb":
        raise BadArray("it holds something else than numbers")
    if any(not isinstance(side, int) or isinstance(side, bool) or side < 0 for side in shape):
        raise BadArray("its npy head gives no shape")
    return shape, fortran, dtype, stream.tell()


_parsing = threading.RLock()


def _renew_lock() -> None:
    """In a forked child, where nobody would give back what another thread held."""
    global _parsing
    _parsing = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)


def _parsed(stream: io.BytesIO) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    """Shape, whether in Fortran order, and type; raises BadArray for another format version, else nearly anything."""
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    if version in ((2, 0), (3, 0)):
        # The third differs from the second in the encoding of field names alone, and arrays with fields are no images.
        return np.lib.format.read_array_header_2_0(stream)
    raise BadArray(f"npy format {version[0]}.{version[1]}")


def npy_array(raw: Buffer) -> Array:
    """The array of an npy file, in this machine's byte order and C order; raises BadArray.

    A view of ``raw`` where that is possible. The header's claim must equal the bytes that are there.
    """
    shape, fortran, dtype, begin = npy_header(raw)
    count = 1
    for side in shape:
        count *= side
    if not count:
        raise BadArray("it has no pixels")
    if count * dtype.itemsize != len(raw) - begin:
        raise BadArray(f"its npy head claims {count * dtype.itemsize:,} bytes where {len(raw) - begin:,} are")
    found = np.frombuffer(raw, dtype=dtype, count=count, offset=begin)
    found = found.reshape(shape[::-1]).T if fortran else found.reshape(shape)
    return np.ascontiguousarray(found, dtype=dtype.newbyteorder("="))


@dataclass(frozen=True)
class DisplayRange:
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
