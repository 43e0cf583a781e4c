"""Decode image files: bytes -> pixels in the dataset's format, never rotated unless asked, never more than planned.

``decode`` gives 8-bit RGB: simplejpeg for plain JPEG (YCbCr or grey; 1 ms for 640 x 480), Pillow for all else and for
JPEG that simplejpeg is too strict for (three times slower). Alpha is dropped, as detectors drop it; 16-bit grey is
scaled by 255 / 65535, over its whole range, so that all images of a sensor stay comparable. The size in the file's
header is compared with the expected one before anything is decoded, which is also the guard against decompression
bombs.

``raster_header`` tells what an image file holds, ``decode_raster`` gives its pixels in the dataset's format
(formats/pixels.py), with any number of channels, from PNG, TIFF, npy and ordinary pictures. Nothing is scaled or
rounded but for one step that loses nothing: 8 bits in a dataset of 16 are multiplied by 257. Other integers that a
float32 holds exactly (int8, int16) and float16 become float32. Ordinary 8-bit pictures go through ``decode``, 16-bit
PNG through OpenCV, TIFF through tifffile, of every compression that imagecodecs knows.

An npy is [height, width] or [height, width, channels], or [channels, height, width] where the first axis alone is no
longer than the two others; the annotations' width and height then tell whether that was right. Of a TIFF the first page
counts, unless it has several pages of one size and one sample each: these are its channels.
"""

import io
import logging
import warnings
from dataclasses import dataclass
from typing import Any, TypeVar

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, ImageFile

from jigsaw_pretrain.formats.pixels import (
    MAX_PIXELS,
    MOST_CHANNELS,
    NPY_MAGIC,
    PNG_MAGIC,
    Array,
    BadArray,
    PixelFormat,
    npy_array,
    npy_header,
)

Pixels = npt.NDArray[np.uint8]
Kind = TypeVar("Kind", bound=np.generic)

_ORIENTATION = 274
_DIRECT_MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"}

_DAMAGE = ("premature end", "bad huffman code")
"""libjpeg's words for pixels that are not in the file, which Pillow lets pass where an end marker follows."""

MOST_BYTES = 16 * MAX_PIXELS
"""The most bytes of an image's pixels: what a compressed file may make one worker allocate."""

_TIFF_MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_WHITE, _BLACK, _RGB = 0, 1, 2
"""PhotometricInterpretation of a TIFF: grey whose 0 is white, grey whose 0 is black, colour."""


class ImageError(Exception):
    """Why an image cannot be used, in words for skipped.parquet: fixed text, what is particular after a colon."""


class PixelBuffer:
    """Memory for one image's pixels, used for image after image: fresh pages cost a quarter of decoding."""

    def __init__(self) -> None:
        self._room: Pixels = np.empty(0, dtype=np.uint8)

    def of(self, size: int) -> Pixels:
        """At least ``size`` bytes, uint8; what was in them is lost. Raises MemoryError."""
        if len(self._room) < size:
            self._room = np.empty(size, dtype=np.uint8)
        return self._room


def decode(raw: bytes, width: int, height: int, exif: str = "ignore", buffer: PixelBuffer | None = None) -> Pixels:
    """Pixels uint8 [height, width, 3] of an image file that must have that size; raises ImageError.

    exif: ``ignore`` leaves pixels as they are stored (COCO's boxes refer to them); ``apply`` turns them upright, and
    ``width`` and ``height`` are then the upright picture's. buffer: where the pixels may be put; they are good until
    the next image is decoded into it.
    """
    if not raw:
        raise ImageError("image file is empty")
    if exif == "ignore":
        quick = _decode_plain_jpeg(raw, width, height, buffer)
        if quick is not None:
            return quick
    try:
        with warnings.catch_warnings():
            # The size is checked below, before pixels are decoded; other warnings are about metadata.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(raw)) as image:
                # Asking a PNG for its orientation loads it, which must wait until its size is known to be right.
                asked = exif == "apply" or image.format == "TIFF"
                wide, high, orientation = _stored(image) if asked else (*image.size, 1)
                turned = orientation if exif == "apply" else 1
                check_size((high, wide) if turned in (5, 6, 7, 8) else (wide, high), width, height)
                return np.ascontiguousarray(upright(_as_stored(_to_rgb(image), image, orientation), turned))
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"image has too many pixels: {error}") from error
    except Image.UnidentifiedImageError as error:
        # Pillow knows no BigTIFF of big-endian numbers.
        found = _tiff_header(raw) if is_tiff(raw) else None
        if found is None or found.dtype != "uint8" or found.channels not in (1, 3):
            raise ImageError(_unread(raw)) from error
        pixels = _raster_pixels(raw, found, found.channels, width, height, exif)
        return pixels if found.channels == 3 else np.repeat(pixels, 3, axis=2)
    except MemoryError as error:
        raise ImageError("image does not fit into memory") from error
    except Exception as error:
        # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error, IndexError and more on damaged files.
        raise ImageError(f"image is damaged: {one_line(error)}") from error


def _decode_plain_jpeg(raw: bytes, width: int, height: int, buffer: PixelBuffer | None) -> Pixels | None:
    """Pixels of a YCbCr or grey JPEG without defects; None for anything else."""
    if not raw.startswith(b"\xff\xd8"):
        return None
    try:
        found_height, found_width, colorspace, _ = simplejpeg.decode_jpeg_header(raw)
        if colorspace not in ("YCbCr", "Gray"):
            return None
        check_size((found_width, found_height), width, height)
        room = None if buffer is None else buffer.of(3 * width * height)
        return np.asarray(simplejpeg.decode_jpeg(raw, "RGB", buffer=room))
    except ImageError:
        raise
    except Exception as error:
        # Whatever it raises (KeyError: a subsampling that it has no name for, such as 4:4:1) is Pillow's turn.
        if any(words in str(error).lower() for words in _DAMAGE):
            raise ImageError(f"image is damaged: {one_line(error)}") from error
        return None


@dataclass(frozen=True)
class JpegFrame:
    """The frame of a JPEG: bits per sample, and the horizontal and vertical sampling factors of each component."""

    precision: int
    factors: tuple[tuple[int, int], ...]


_FRAMES = frozenset({0xC0, 0xC1, 0xC2, 0xC9, 0xCA})
"""Markers of frames: baseline, extended and progressive, and with arithmetic coding the latter two again."""


def jpeg_frame(raw: bytes) -> JpegFrame | None:
    """The frame of a JPEG; None where there is none before the first scan."""
    at = 2
    while raw.startswith(b"\xff\xd8") and at + 10 <= len(raw) and raw[at] == 0xFF:
        marker = raw[at + 1]
        if marker in _FRAMES:
            count = raw[at + 9]
            factors = raw[at + 11 : at + 10 + 3 * count : 3]
            found = tuple((one >> 4, one & 15) for one in factors)
            return JpegFrame(raw[at + 4], found) if 0 < len(found) == count else None
        # A fill byte, or a segment.
        at += 1 if marker == 0xFF else 2 + int.from_bytes(raw[at + 2 : at + 4], "big")
    return None


def _unread(raw: bytes) -> str:
    """Why Pillow does not know a file."""
    frame = jpeg_frame(raw)
    if frame is not None and frame.precision != 8:
        return f"JPEG of {frame.precision} bits is not supported (save it as 16-bit PNG or TIFF, or as 8-bit JPEG)"
    return "not an image that can be read"


def pillow_header(raw: bytes) -> tuple[int, int, int]:
    """Width, height and EXIF orientation (1: upright) in an image file's header; raises ImageError."""
    if not raw:
        raise ImageError("image file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(raw)) as image:
                return _stored(image)
    except Image.DecompressionBombError as error:
        raise ImageError(f"image has too many pixels: {error}") from error
    except Image.UnidentifiedImageError as error:
        raise ImageError(_unread(raw)) from error
    except Exception as error:
        raise ImageError(f"image is damaged: {one_line(error)}") from error


def _stored(image: ImageFile.ImageFile) -> tuple[int, int, int]:
    """Width and height as stored, and the orientation, of an image that Pillow has opened and not yet loaded."""
    orientation = int(image.getexif().get(_ORIENTATION, 1))
    if image.format == "TIFF" and orientation in (5, 6, 7, 8):
        # Pillow turns TIFFs itself when it loads them, and their size when it opens them.
        return image.height, image.width, orientation
    return image.width, image.height, orientation


def _as_stored(pixels: npt.NDArray[Kind], image: ImageFile.ImageFile, orientation: int) -> npt.NDArray[Kind]:
    """Loaded pixels as they are stored, whatever Pillow did by itself; orientation: of ``_stored``."""
    return upright(pixels, {6: 8, 8: 6}.get(orientation, orientation)) if image.format == "TIFF" else pixels


def check_size(found: tuple[int, int], width: int, height: int) -> None:
    """Raise ImageError where a file's width and height are too many pixels or not the expected ones."""
    if found[0] * found[1] > MAX_PIXELS:
        raise ImageError(f"image has too many pixels: {found[0]}x{found[1]}, at most {MAX_PIXELS:,}")
    if found != (width, height):
        raise ImageError(
            f"size disagrees with the annotations: file {found[0]}x{found[1]}, annotations {width}x{height}"
        )


def _to_rgb(image: ImageFile.ImageFile) -> Pixels:
    """Load an opened image as RGB; raises ImageError for modes that have no sensible 8-bit form."""
    if image.mode in _DIRECT_MODES:
        return np.asarray(image.convert("RGB"))
    if image.mode.startswith("I"):
        wide = np.asarray(image).astype(np.int64)
        if image.format == "TIFF" and image.mode != "I" and image.tag_v2.get(262) == _WHITE:  # type: ignore[attr-defined]
            wide = 65535 - wide
        if wide.min() < 0 or wide.max() > 65535:
            raise ImageError(f"pixels are beyond 16 bits: mode {image.mode}, {wide.min()} to {wide.max()}")
        grey = ((wide * 255 + 32767) // 65535).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    raise ImageError(f"pixel format is not supported: mode {image.mode}")


def upright(pixels: npt.NDArray[Kind], orientation: int) -> npt.NDArray[Kind]:
    """Pixels turned by an EXIF orientation, 1 to 8; others mean nothing and turn nothing."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels


def one_line(error: Exception) -> str:
    """An exception's words for a table: its type and message on one line, no machine paths or addresses."""
    text = " ".join(str(error).split())
    return type(error).__name__ if not text or "<" in text or "/" in text else f"{type(error).__name__} {text[:120]}"


@dataclass(frozen=True)
class RasterHeader:
    """What an image file holds; dtype is the file's own. plain: ``decode`` reads it without loss, as 8-bit RGB.

    alpha: whether one more channel follows, of transparency. narrow: whether its 32-bit integers should be of 16 bits.
    planes: whether the array's first axis is its channels.
    """

    width: int
    height: int
    orientation: int
    channels: int
    dtype: str
    plain: bool = False
    alpha: bool = False
    narrow: bool = False
    planes: bool = False

    @property
    def form(self) -> tuple[int, str]:
        """Channels and the type that stores them without loss; raises ImageError where none does."""
        if self.channels > MOST_CHANNELS:
            raise ImageError(f"pixel format is not supported: {self.channels} channels, at most {MOST_CHANNELS}")
        return self.channels, "uint16" if self.narrow else _stored_values(self.dtype)


def is_tiff(raw: bytes) -> bool:
    """Whether a file is a TIFF, whose header may lie at its end."""
    return raw.startswith(_TIFF_MAGICS)


def raster_header(raw: bytes) -> RasterHeader:
    """The header of an image file of any kind; raises ImageError."""
    if raw.startswith(NPY_MAGIC):
        try:
            shape, _, dtype, _ = npy_header(raw)
        except BadArray as error:
            raise ImageError(f"image is damaged: {error}") from error
        return _npy_raster(shape, dtype)
    return (_tiff_header(raw) if is_tiff(raw) else None) or _picture_header(raw)


def size_and_orientation(raw: bytes) -> tuple[int, int, int]:
    """Width, height and EXIF orientation (1: upright) in an image file's header; raises ImageError."""
    if not raw.startswith(NPY_MAGIC):
        try:
            return pillow_header(raw)
        except ImageError:
            # Pillow knows no TIFF of five channels.
            if not is_tiff(raw):
                raise
    found = raster_header(raw)
    return found.width, found.height, found.orientation


def decode_raster(
    raw: bytes,
    width: int,
    height: int,
    exif: str,
    form: PixelFormat,
    buffer: PixelBuffer | None = None,
    nodata: float | None = None,
) -> Array:
    """Pixels [height, width, channels] of an image file in the dataset's format; raises ImageError.

    width, height, exif, buffer: as of ``decode``. nodata: what marks missing data in float images, beside the value of
    GDAL's tag: such pixels are NaN (fill_missing).
    """
    if not raw:
        raise ImageError("image file is empty")
    found = None
    if form.is_rgb8 and not raw.startswith(NPY_MAGIC):
        found = _tiff_header(raw) if is_tiff(raw) else None
        if found is None or found.plain or (found.channels, found.dtype) != (3, "uint8"):
            return decode(raw, width, height, exif, buffer)
    found = found or raster_header(raw)
    own = found.form
    if found.alpha and form.channels == found.channels + 1:
        own = (form.channels, own[1])
    wanted = (form.channels, form.dtype)
    if own != wanted and not (own[1] == "uint8" and wanted == (own[0], "uint16")):
        kind = f"{own[0]} x {own[1]}, not {form}"
        raise ImageError(f"pixels are of another form than the dataset's: {kind}")
    if found.plain and own[0] in (1, 3):
        pixels: Array = decode(raw, width, height, exif, buffer)[..., : own[0]]
    else:
        pixels = _raster_pixels(raw, found, own[0], width, height, exif)
    if form.dtype == "uint16" and pixels.dtype == np.uint8:
        pixels = pixels.astype(np.uint16) * 257
    if pixels.dtype.kind == "i" and form.dtype == "uint16" and (pixels.min() < 0 or pixels.max() > 65535):
        raise ImageError(f"pixels are beyond 16 bits: {pixels.min()} to {pixels.max()}")
    pixels = pixels.astype(form.dtype, copy=False)
    return _marked(raw, pixels, nodata) if form.dtype == "float32" else pixels


def _raster_pixels(raw: bytes, found: RasterHeader, channels: int, width: int, height: int, exif: str) -> Array:
    """The first channels of an image of that header, turned as asked; raises ImageError."""
    turned = found.orientation if exif == "apply" else 1
    stored = (found.height, found.width) if turned in (5, 6, 7, 8) else (found.width, found.height)
    check_size(stored, width, height)
    if found.width * found.height * found.channels * np.dtype(found.dtype).itemsize > MOST_BYTES:
        raise ImageError(f"image has too many pixels: {found.width}x{found.height} x {found.channels}")
    return upright(_values(raw, found, channels), turned)


def fill_missing(pixels: Array) -> Array:
    """Pixels float32 [height, width, channels] without NaN: missing values are the mean of their channel's others."""
    missing = np.isnan(pixels)
    if not missing.any():
        return pixels
    known = np.where(missing, 0, pixels).sum(axis=(0, 1), dtype=np.float64)
    means = known / np.maximum((~missing).sum(axis=(0, 1)), 1)
    return np.where(missing, means.astype(pixels.dtype), pixels)


_NODATA = 42113
"""GDAL's TIFF tag of the value that marks pixels without data, as text."""

_NO_MEASUREMENT = 1e30
"""Beyond this no sensor measures: exporters mark missing data so."""


def _marked(raw: bytes, pixels: Array, nodata: float | None) -> Array:
    """Pixels of a float image, NaN where they mark missing data; raises ImageError where they are no measurements."""
    values = [value for value in (_tagged_nodata(raw), nodata) if value is not None]
    missing = np.zeros(pixels.shape, dtype=bool)
    for value in values:
        missing |= np.isnan(pixels) if np.isnan(value) else pixels == np.float32(value)
    extreme = np.abs(pixels, where=~missing, out=np.zeros_like(pixels))
    if not np.isfinite(extreme).all():
        raise ImageError("pixels are not finite (where NaN marks missing data, give --nodata nan)")
    if extreme.max(initial=0) > _NO_MEASUREMENT:
        value = float(pixels.flat[int(extreme.argmax())])
        raise ImageError(f"pixels hold what no sensor measures: {value:g} (missing data? name it with --nodata)")
    if not missing.any():
        return pixels
    if missing.all():
        raise ImageError("image holds no data: all of its pixels are marked as missing")
    return np.where(missing, np.float32("nan"), pixels)


def _tagged_nodata(raw: bytes) -> float | None:
    """What GDAL's tag of a TIFF says; None where there is none, or none that is a number."""
    if not is_tiff(raw):
        return None
    try:
        with _open_tiff(raw) as tiff:
            tag = tiff.pages[0].tags.get(_NODATA)
            return None if tag is None else float(str(tag.value).strip("\0 "))
    except Exception:
        return None


def _stored_values(dtype: str) -> str:
    if dtype in ("uint8", "uint16"):
        return dtype
    kind = np.dtype(dtype)
    if kind.kind in "if" and np.can_cast(kind, np.float32):
        return "float32"
    raise ImageError(f"pixel format is not supported: {dtype}")


def _npy_raster(shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> RasterHeader:
    said = "x".join(map(str, shape))
    if len(shape) not in (2, 3):
        raise ImageError(f"array is not height x width x channels: {said}")
    if not all(shape):
        raise ImageError(f"image is damaged: an array of {said}")
    planes = len(shape) == 3 and shape[2] > min(shape[:2])
    if planes and shape[0] > min(shape[1:]):
        raise ImageError(f"array is not height x width x channels: {said}")
    channels, height, width = shape if planes else (shape[2] if len(shape) == 3 else 1, shape[0], shape[1])
    if height * width > MAX_PIXELS:
        raise ImageError(f"image has too many pixels: {said}, at most {MAX_PIXELS:,}")
    return RasterHeader(width, height, 1, channels, dtype.newbyteorder("=").name, planes=planes)


def _picture_header(raw: bytes) -> RasterHeader:
    """The header of an image that Pillow reads."""
    width, height, orientation = pillow_header(raw)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(raw)) as image:
            mode = image.mode
    deep = raw.startswith(PNG_MAGIC) and raw[24] == 16
    if deep and raw[25] in (2, 4, 6):
        return RasterHeader(width, height, orientation, 1 if raw[25] == 4 else 3, "uint16", alpha=raw[25] == 6)
    if mode.startswith("I;16"):
        return RasterHeader(width, height, orientation, 1, "uint16")
    if mode == "I":
        return RasterHeader(width, height, orientation, 1, "int32", narrow=True)
    if mode == "F":
        return RasterHeader(width, height, orientation, 1, "float32")
    grey = mode in ("1", "L")
    return RasterHeader(width, height, orientation, 1 if grey else 3, "uint8", plain=True, alpha=mode == "RGBA")


def _tiff_header(raw: bytes) -> RasterHeader | None:
    """The header of a TIFF, by tifffile; None where Pillow is to read it (ordinary pictures, what tifffile refuses)."""
    try:
        with _open_tiff(raw) as tiff:
            page = tiff.pages[0]
            if page.dtype is None:
                return None
            channels, name = int(page.samplesperpixel), page.dtype.name
            extra = tuple(map(int, page.extrasamples or ()))
            tag = page.tags.get(274)
            size = int(page.imagewidth), int(page.imagelength), int(tag.value) if tag else 1
            bands = _bands(tiff)
            photometric = int(page.photometric)
    except Exception:
        return None
    if bands:
        return RasterHeader(*size, bands, name)
    alpha = (photometric, channels) in ((_BLACK, 2), (_RGB, 4)) and extra[:1] in ((1,), (2,))
    if name == "uint8" and channels in (3, 4) and photometric != _BLACK and (channels, photometric) != (4, _RGB):
        return RasterHeader(*size, 3, name, plain=True)
    if name in ("uint8", "bool") and channels <= 2 and (alpha or photometric not in (_BLACK, _RGB)):
        return None  # palettes, grey that begins at white, and grey with alpha
    if name == "bool" or (name == "uint8" and channels == 1):
        return RasterHeader(*size, 1, "uint8", plain=True)
    if alpha:
        return RasterHeader(*size, channels - 1, name, plain=name == "uint8", alpha=True)
    return RasterHeader(*size, channels, name)


def _open_tiff(raw: bytes) -> Any:
    import tifffile

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # damage is reported in skipped.parquet
    return tifffile.TiffFile(io.BytesIO(raw))


def _bands(tiff: Any) -> int:
    """How many pages of a TIFF are its channels, 0 where one page is the image."""
    count = len(tiff.pages)
    if not 1 < count <= MOST_CHANNELS:
        return 0
    first = tiff.pages[0]
    for page in tiff.pages:
        if page.samplesperpixel != 1 or page.is_reduced or (page.shape, page.dtype) != (first.shape, first.dtype):
            return 0
    return count


def _values(raw: bytes, found: RasterHeader, channels: int) -> Array:
    """The first channels of an image of that header, as they are stored; raises ImageError."""
    try:
        if raw.startswith(NPY_MAGIC):
            whole = np.moveaxis(npy_array(raw), 0, 2) if found.planes else npy_array(raw)
        elif is_tiff(raw):
            whole = _tiff_values(raw)
        elif raw.startswith(PNG_MAGIC) and raw[25] != 0:
            with Image.open(io.BytesIO(raw)) as image:
                image.verify()  # OpenCV reads on where pixels are missing
            whole = _by_opencv(raw)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with Image.open(io.BytesIO(raw)) as image:
                    whole = np.asarray(image)
    except ImageError:
        raise
    except BadArray as error:
        raise ImageError(f"image is damaged: {error}") from error
    except MemoryError as error:
        raise ImageError("image does not fit into memory") from error
    except Exception as error:
        raise ImageError(f"image is damaged: {one_line(error)}") from error
    whole = whole if whole.ndim == 3 else whole[..., None]
    if whole.shape[:2] != (found.height, found.width) or whole.shape[2] < channels:
        raise ImageError("image is damaged: its pixels are not what its head says")
    return np.ascontiguousarray(whole[..., :channels], dtype=whole.dtype.newbyteorder("="))


def _tiff_values(raw: bytes) -> Array:
    """Pixels [height, width, samples] of a TIFF."""
    with _open_tiff(raw) as tiff:
        pages = list(tiff.pages) if _bands(tiff) else [tiff.pages[0]]
        planes = [_black_is_zero(_plane(page), page) for page in pages]
    return planes[0] if len(planes) == 1 else np.concatenate(planes, axis=2)


def _plane(page: Any) -> Array:
    """A page as [height, width, samples]."""
    whole: npt.NDArray[np.generic] = page.asarray()
    whole = whole.reshape([side for axis, side in zip(page.axes, whole.shape, strict=True) if axis in "YXS"])
    axes = "".join(axis for axis in page.axes if axis in "YXS")
    if axes == "YX":
        return whole[..., None]
    return np.moveaxis(whole, 0, 2) if axes == "SYX" else whole


def _black_is_zero(values: Array, page: Any) -> Array:
    """Grey of a TIFF counted from black, as Pillow gives 8 bits; raises ImageError for floats counted from white."""
    if int(page.photometric) != _WHITE:
        return values
    if values.dtype.kind != "u":
        raise ImageError(f"pixel format is not supported: {values.dtype.name} whose 0 is white (write it from black)")
    return (np.array((1 << int(page.bitspersample)) - 1, dtype=values.dtype) - values).astype(values.dtype)


def _by_opencv(raw: bytes) -> Array:
    """Pixels as OpenCV reads them, in red, green and blue; raises ImageError."""
    found = cv2.imdecode(np.frombuffer(raw, dtype=np.uint8), cv2.IMREAD_UNCHANGED)
    if found is None:
        raise ImageError("image is damaged: OpenCV reads no pixels")
    if found.ndim == 2:
        return found
    return np.asarray(cv2.cvtColor(found, cv2.COLOR_BGR2RGB if found.shape[2] == 3 else cv2.COLOR_BGRA2RGBA))
