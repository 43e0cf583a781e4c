"""Cuts crops out of an image and encodes them: as JPEG, as PNG or npy, or out of the source JPEG's own blocks.

``encode_crops``: the pixels of a box as a JPEG of its own, about 0.15 ms and 6.5 ns per pixel. At the default quality
95 without subsampled colour the crops of photographs reach 40 dB (PSNR) against their source on average; 4:2:0 saves
a fifth of the bytes and costs 4 dB, most on small objects.

``encode_members``: pixels other than 8-bit RGB as PNG or npy, measured on the way. About 60 ns per byte for PNG, which
halves smooth pictures and leaves noise as it is; npy costs next to nothing.

``cut_lossless``: no decoding, by the turbojpeg library of the system. A crop is grown outwards to the grid of the
source's blocks; how far is its margin, which the trainer cuts off. The pixels are exactly the source's: no second
compression. It takes about two thirds of decoding the image for its coefficients, and 130 us per crop of COCO. Prefer
it for large datasets of JPEGs that are good already; crops are then as good, and as large, as their source. What is no
plain JPEG (YCbCr or grey) or is refused by the library is for the caller to decode and encode. The binding is four
functions by ctypes: PyTurboJPEG's ``crop_multiple`` takes a quarter of an image's decoding longer, since it makes a new
ctypes type for every crop, and lets damaged images pass with a warning.
"""

import ctypes
import functools
import os
from collections.abc import Iterator, Sequence
from ctypes.util import find_library
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import simplejpeg

from jigsaw_pretrain.config import choices
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.dataset.dataset import Subsampling
from jigsaw_pretrain.formats.images.decode import ImageError, Pixels, fill_missing, jpeg_frame, pillow_header
from jigsaw_pretrain.formats.pixels import Array, PixelFormat, encode_member
from jigsaw_pretrain.prep.images.statistics import ChannelStatistics

SUBSAMPLINGS = choices(Subsampling)

CropBoxes = npt.NDArray[np.int32]

NOT_JPEG = "image is not a plain JPEG (YCbCr or grey)"
TURNED = "image is turned by its EXIF orientation"
REFUSED = "image is refused by the turbojpeg library"

MOST_PIXELS = 32 << 20
"""Pixels of crops that are cut in one pass over an image: they are held as coefficients, six bytes per pixel."""

MOST_CROPS = 64

_ENVIRONMENT = "TURBOJPEG"
_USUAL_PLACES = (
    "/opt/homebrew/opt/jpeg-turbo/lib/libturbojpeg.dylib",
    "/usr/local/opt/jpeg-turbo/lib/libturbojpeg.dylib",
    "/opt/libjpeg-turbo/lib64/libturbojpeg.so.0",
)

# turbojpeg.h, the same in versions 2 and 3: TJXOPT_PERFECT | TJXOPT_CROP | TJXOPT_COPYNONE (no EXIF in crops), and
# TJFLAG_STOPONWARNING | TJFLAG_LIMITSCANS (damage is refused, and so are bombs of thousands of scans).
_OPTIONS, _FLAGS = 1 | 4 | 64, 8192 | 32768
_Pointers = ctypes.c_void_p * MOST_CROPS
_Sizes = ctypes.c_ulong * MOST_CROPS


def encode_crops(pixels: Pixels, boxes: npt.NDArray[np.int32], quality: int, subsampling: str) -> list[bytes]:
    """A JPEG for each box (int32 [n, 4]: left, top, right, bottom, inside the image) of pixels uint8 [h, w, 3].

    The rows of a box are read where they lie: a copy of them would cost a seventh of decoding the image.
    """
    return [
        bytes(simplejpeg.encode_jpeg(pixels[top:bottom, left:right], quality, "RGB", subsampling))
        for left, top, right, bottom in boxes.tolist()
    ]


def encode_members(
    pixels: Array, boxes: npt.NDArray[np.int32], form: PixelFormat, measure: ChannelStatistics
) -> list[bytes]:
    """A member for each box (int32 [n, 4]: left, top, right, bottom, inside the image) of pixels in the format.

    Missing data (NaN) is not measured, and filled by the image's mean.
    """
    members = []
    filled = fill_missing(pixels) if form.dtype == "float32" else pixels
    for left, top, right, bottom in boxes.tolist():
        measure.add(pixels[top:bottom, left:right])
        members.append(encode_member(np.ascontiguousarray(filled[top:bottom, left:right]), form))
    return members


class _Transform(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_int),
        ("y", ctypes.c_int),
        ("width", ctypes.c_int),
        ("height", ctypes.c_int),
        ("operation", ctypes.c_int),
        ("options", ctypes.c_int),
        ("data", ctypes.c_void_p),
        ("filter", ctypes.c_void_p),
    )


# Array types are made once: ctypes takes as long for a new one as libjpeg for a small crop.
_Transforms = _Transform * MOST_CROPS


@dataclass(frozen=True)
class LosslessCut:
    """Crops that were cut losslessly, and int32 [n, 4], how far each extends beyond its box: left, top, right, bottom.

    refused: why the image cannot be cut so; there are no crops then.
    """

    jpegs: list[bytes]
    margins: CropBoxes
    refused: str = ""


def cut_lossless(raw: bytes, boxes: CropBoxes, width: int, height: int, exif: str) -> LosslessCut:
    """Cut boxes (int32 [n, 4]: left, top, right, bottom) out of an image file that should have that size.

    exif: as in formats/images/decode.py. Raises UserError where the library is missing.
    """
    library = load_turbojpeg()
    none = np.zeros((0, 4), dtype=np.int32)
    try:
        found_height, found_width, colours, subsampling = simplejpeg.decode_jpeg_header(raw)
    except (ValueError, KeyError):
        # Of a subsampling that it does not know (4:4:1) it raises a KeyError.
        return LosslessCut([], none, NOT_JPEG)
    unit = block_unit(raw)
    if colours not in ("YCbCr", "Gray") or subsampling not in (*SUBSAMPLINGS, "Gray") or unit is None:
        return LosslessCut([], none, NOT_JPEG)
    if exif == "apply" and _is_turned(raw):
        return LosslessCut([], none, TURNED)
    if (found_width, found_height) != (width, height):
        return LosslessCut([], none, REFUSED)
    members = align_to_blocks(boxes, width, height, unit)
    jpegs: list[bytes] = []
    for some in _passes(members):
        made = _transform(library, raw, some)
        if made is None or not all(map(_has_size, made, some)):
            return LosslessCut([], none, REFUSED)
        jpegs += made
    return LosslessCut(jpegs, np.abs(members - boxes))


def block_unit(raw: bytes) -> tuple[int, int] | None:
    """Width and height in pixels of the blocks that a JPEG can be cut along; None where its frame is not found.

    They are eight times the largest sampling factors of all its components: the name of a subsampling does not tell
    them. Three components of 1 x 2 each are 4:4:4, and are cut by 16 in height.
    """
    frame = jpeg_frame(raw)
    if frame is None:
        return None
    if len(frame.factors) == 1:
        return 8, 8
    return 8 * max(h for h, _ in frame.factors), 8 * max(v for _, v in frame.factors)


def _has_size(jpeg: bytes, box: Sequence[int]) -> bool:
    height, width, _, _ = simplejpeg.decode_jpeg_header(jpeg)
    return (width, height) == (box[2] - box[0], box[3] - box[1])


def align_to_blocks(boxes: CropBoxes, width: int, height: int, unit: tuple[int, int]) -> CropBoxes:
    """Boxes grown outwards to the grid of ``unit`` = (width, height) pixels or the image's edge: int32 [n, 4].

    Where colour is subsampled (a unit of more than 8 pixels) the decoder smooths it over the neighbouring pixel, so a
    side that lies on the grid within the image grows by one unit more, and a sliver at the image's right or bottom
    edge likewise to the left or top: libjpeg does not smooth planes of two samples or less. Every pixel of the box
    then decodes to what it is in the source.
    """
    grown = np.empty_like(boxes)
    for axis, (size, step) in enumerate(zip((width, height), unit, strict=True)):
        smoothed = int(max(unit) > 8)
        first, last = boxes[:, axis] - smoothed, boxes[:, axis + 2] + smoothed
        first = np.maximum(first, 0) // step * step
        last = np.minimum(-(-last // step) * step, size)
        sliver = smoothed * ((last - first) < step)
        grown[:, axis] = np.maximum(first - step * sliver, 0)
        grown[:, axis + 2] = last
    return grown


@functools.cache
def load_turbojpeg() -> ctypes.CDLL:
    """The turbojpeg library: the one that TURBOJPEG names, else the system's. Raises UserError where there is none."""
    named = os.environ.get(_ENVIRONMENT)
    for place in [named] if named else [find_library("turbojpeg"), *_USUAL_PLACES]:
        try:
            library = ctypes.CDLL(place) if place else None
        except OSError:
            continue
        if library is not None and hasattr(library, "tjTransform"):
            return _declared(library)
    raise UserError(
        f"--encode lossless needs the turbojpeg library, and {named or 'it'} is not to be found here. Install it "
        "(Debian, Ubuntu: apt-get install libturbojpeg0; Fedora: turbojpeg; macOS: brew install jpeg-turbo), name its "
        f"file in {_ENVIRONMENT}, or leave --encode out."
    )


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    library.tjInitTransform.restype = ctypes.c_void_p
    library.tjTransform.argtypes = (
        *(ctypes.c_void_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_int),
        *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int),
    )
    library.tjFree.argtypes = library.tjDestroy.argtypes = (ctypes.c_void_p,)
    return library


def _transform(library: ctypes.CDLL, raw: bytes, members: Sequence[list[int]]) -> list[bytes] | None:
    """A JPEG for each box (left, top, right, bottom on the grid); None where the library refuses the image."""
    handle = library.tjInitTransform()
    if not handle:
        return None
    made, sizes = _Pointers(), _Sizes()
    wanted = _Transforms()
    for transform, (left, top, right, bottom) in zip(wanted, members, strict=False):
        transform.x, transform.y, transform.width, transform.height = left, top, right - left, bottom - top
        transform.options = _OPTIONS
    try:
        if library.tjTransform(handle, raw, len(raw), len(members), made, sizes, wanted, _FLAGS):
            return None
        return [ctypes.string_at(made[i] or 0, sizes[i]) for i in range(len(members))]
    finally:
        for i in range(len(members)):
            library.tjFree(made[i])
        library.tjDestroy(handle)


def _passes(members: CropBoxes) -> Iterator[list[list[int]]]:
    """The boxes in order, as many at a time as one pass over the image may cut."""
    some: list[list[int]] = []
    pixels = 0
    for box in members.tolist():
        area = (box[2] - box[0]) * (box[3] - box[1])
        if some and (pixels + area > MOST_PIXELS or len(some) == MOST_CROPS):
            yield some
            some, pixels = [], 0
        some.append(box)
        pixels += area
    if some:
        yield some


def _is_turned(raw: bytes) -> bool:
    try:
        return pillow_header(raw)[2] in range(2, 9)
    except ImageError:
        return True
