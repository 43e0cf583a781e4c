"""Decoding: bytes of an image file -> RGB pixels, never rotated unless asked, never more pixels than planned.

simplejpeg for plain JPEG (YCbCr or grey; 1 ms for 640 x 480), Pillow for all else and for JPEG that simplejpeg is too
strict for (three times slower). Alpha is dropped, as detectors drop it; 16-bit grey is scaled by 255 / 65535, over its
whole range, so that all images of a sensor stay comparable. The size in the file's head is compared with the expected
one before anything is decoded, which is also the guard against decompression bombs.
"""

import io
import warnings
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, ImageFile

from jigsaw_pretrain.formats.annotations.table import MAX_PIXELS

Pixels = npt.NDArray[np.uint8]
Kind = TypeVar("Kind", bound=np.generic)

_ORIENTATION = 274
_DIRECT_MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"}

_DAMAGE = ("premature end", "bad huffman code")
"""libjpeg's words for pixels that are not in the file, which Pillow lets pass where an end marker follows."""


class ImageTrouble(Exception):
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
    """Pixels uint8 [height, width, 3] of an image file that must have that size; raises ImageTrouble.

    exif: ``ignore`` leaves pixels as they are stored (COCO's boxes refer to them); ``apply`` turns them upright, and
    ``width`` and ``height`` are then the upright picture's. buffer: where the pixels may be put; they are good until
    the next image is decoded into it.
    """
    if not raw:
        raise ImageTrouble("image file is empty")
    if exif == "ignore":
        quick = _decode_plain_jpeg(raw, width, height, buffer)
        if quick is not None:
            return quick
    try:
        with warnings.catch_warnings():
            # The size is checked below, before pixels are decoded; other warnings are about metadata.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(raw)) as image:
                turned = int(image.getexif().get(_ORIENTATION, 1)) if exif == "apply" else 1
                stored = (image.height, image.width) if turned in (5, 6, 7, 8) else (image.width, image.height)
                check_size(stored, width, height)
                return np.ascontiguousarray(upright(_to_rgb(image), turned))
    except ImageTrouble:
        raise
    except Image.DecompressionBombError as error:
        raise ImageTrouble(f"image has too many pixels: {error}") from error
    except Image.UnidentifiedImageError as error:
        raise ImageTrouble("not an image that can be read") from error
    except MemoryError as error:
        raise ImageTrouble("image does not fit into memory") from error
    except Exception as error:
        # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error, IndexError and more on damaged files.
        raise ImageTrouble(f"image is damaged: {one_line(error)}") from error


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
    except ValueError as error:
        if any(words in str(error).lower() for words in _DAMAGE):
            raise ImageTrouble(f"image is damaged: {one_line(error)}") from error
        return None
    except MemoryError:
        return None


def head(raw: bytes) -> tuple[int, int, int]:
    """Width, height and EXIF orientation (1: upright) in an image file's head; raises ImageTrouble."""
    if not raw:
        raise ImageTrouble("image file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(raw)) as image:
                return image.width, image.height, int(image.getexif().get(_ORIENTATION, 1))
    except Image.DecompressionBombError as error:
        raise ImageTrouble(f"image has too many pixels: {error}") from error
    except Image.UnidentifiedImageError as error:
        raise ImageTrouble("not an image that can be read") from error
    except Exception as error:
        raise ImageTrouble(f"image is damaged: {one_line(error)}") from error


def check_size(found: tuple[int, int], width: int, height: int) -> None:
    """Raise ImageTrouble where a file's width and height are too many pixels or not the expected ones."""
    if found[0] * found[1] > MAX_PIXELS:
        raise ImageTrouble(f"image has too many pixels: {found[0]}x{found[1]}, at most {MAX_PIXELS:,}")
    if found != (width, height):
        raise ImageTrouble(
            f"size disagrees with the annotations: file {found[0]}x{found[1]}, annotations {width}x{height}"
        )


def _to_rgb(image: ImageFile.ImageFile) -> Pixels:
    """Load an opened image as RGB; raises ImageTrouble for modes that have no sensible 8-bit form."""
    if image.mode in _DIRECT_MODES:
        return np.asarray(image.convert("RGB"))
    if image.mode.startswith("I"):
        wide = np.asarray(image).astype(np.int64)
        if wide.min() < 0 or wide.max() > 65535:
            raise ImageTrouble(f"pixels are beyond 16 bits: mode {image.mode}, {wide.min()} to {wide.max()}")
        grey = ((wide * 255 + 32767) // 65535).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    raise ImageTrouble(f"pixel format is not supported: mode {image.mode}")


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
