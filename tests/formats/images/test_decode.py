"""Reading images of any kind: pixels are what was written, and what cannot be kept is refused with a reason."""

import io
import struct
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from jigsaw_pretrain.formats.images.decode import (
    ImageError,
    JpegFrame,
    decode,
    decode_raster,
    jpeg_frame,
    pillow_header,
    raster_header,
    size_and_orientation,
)
from jigsaw_pretrain.formats.pixels import RGB8, decode_member, lossless, named
from tests.helpers.jpegs import flat_blocks
from tests.helpers.prepped import ramp
from tests.helpers.sensors import noise

Array = np.ndarray[Any, np.dtype[Any]]


def npy(pixels: Array, version: tuple[int, int] | None = None) -> bytes:
    sink = io.BytesIO()
    np.lib.format.write_array(sink, pixels, version=version)
    return sink.getvalue()


def tiff(pixels: Array, **options: Any) -> bytes:
    sink = io.BytesIO()
    tifffile.imwrite(sink, pixels, **{"photometric": "minisblack", **options})
    return sink.getvalue()


def png(pixels: Array) -> bytes:
    order = {1: None, 3: cv2.COLOR_RGB2BGR, 4: cv2.COLOR_RGBA2BGRA}[pixels.shape[2]]
    done, raw = cv2.imencode(".png", pixels if order is None else cv2.cvtColor(pixels, order))
    assert done
    return raw.tobytes()


sides = st.integers(8, 40)
kinds = st.sampled_from(["uint8", "uint16", "float32"])


@given(sides, sides, st.integers(1, 8), kinds, st.sampled_from([(1, 0), (2, 0), (3, 0)]), st.booleans(), st.booleans())
def test_npy(
    height: int, width: int, channels: int, dtype: str, version: tuple[int, int], fortran: bool, swapped: bool
) -> None:
    pixels = noise(height, width, channels, dtype, height)
    stored = np.asfortranarray(pixels) if fortran else pixels
    stored = stored.astype(pixels.dtype.newbyteorder(">")) if swapped else stored
    raw = npy(stored[..., 0] if channels == 1 and swapped else stored, version)
    assert size_and_orientation(raw) == (width, height, 1)
    assert raster_header(raw).form == (channels, dtype)
    found = decode_raster(raw, width, height, "ignore", lossless(channels, dtype))
    assert found.dtype == pixels.dtype and np.array_equal(found, pixels)


@given(sides, sides, st.integers(1, 7), kinds, st.sampled_from(["contig", "separate", "pages"]), st.booleans())
def test_tiff(height: int, width: int, channels: int, dtype: str, layout: str, deflated: bool) -> None:
    pixels = noise(height, width, channels, dtype, width)
    options: dict[str, Any] = {"compression": "zlib"} if deflated else {}
    if channels == 1:
        raw = tiff(pixels[..., 0], **options)
    elif layout == "contig":
        raw = tiff(pixels, planarconfig="contig", **options)
    else:
        more = {"planarconfig": "separate"} if layout == "separate" else {}
        raw = tiff(np.ascontiguousarray(np.moveaxis(pixels, 2, 0)), **more, **options)
    form = raster_header(raw).form
    assert form == (channels, dtype)
    assert size_and_orientation(raw) == (width, height, 1)
    assert np.array_equal(decode_raster(raw, width, height, "ignore", lossless(*form)), pixels)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_png_of_16_bits(channels: int) -> None:
    pixels = noise(21, 34, channels, "uint16")
    raw = png(pixels)
    kept = min(channels, 3)
    assert raster_header(raw).form == (kept, "uint16")
    assert np.array_equal(decode_raster(raw, 34, 21, "ignore", lossless(kept, "uint16")), pixels[..., :kept])
    # A fourth channel that the file calls alpha is kept where it is asked for.
    assert channels < 4 or np.array_equal(decode_raster(raw, 34, 21, "ignore", named("4xuint16")), pixels)


@pytest.mark.parametrize("compression", ["lzw", "zstd", "packbits", "lzma"])
@pytest.mark.parametrize(("channels", "dtype"), [(1, "uint16"), (3, "uint16"), (4, "uint16"), (1, "float32")])
def test_a_tiff_of_any_compression_is_read(compression: str, channels: int, dtype: str) -> None:
    pixels = noise(21, 34, channels, dtype)
    options: dict[str, Any] = {"photometric": "rgb"} if channels == 3 else {"planarconfig": "contig"}
    raw = (
        tiff(pixels[..., 0], compression=compression)
        if channels == 1
        else tiff(pixels, compression=compression, **options)
    )
    assert np.array_equal(decode_raster(raw, 34, 21, "ignore", lossless(channels, dtype)), pixels)


@pytest.mark.parametrize("mode", ["L", "1", "RGB", "P", "RGBA", "LA", "CMYK"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG"])
def test_ordinary_pictures_are_what_they_always_were(mode: str, kind: str) -> None:
    if (kind == "JPEG" and mode in ("P", "RGBA", "LA", "1")) or (kind, mode) == ("PNG", "CMYK"):
        pytest.skip(f"{kind} has no such pictures")
    sink = io.BytesIO()
    Image.fromarray(noise(21, 34, 3, "uint8")).convert(mode).save(sink, kind)
    raw = sink.getvalue()
    grey = mode in ("L", "1")
    assert raster_header(raw).form == (1 if grey else 3, "uint8")
    assert np.array_equal(decode_raster(raw, 34, 21, "ignore", RGB8), decode(raw, 34, 21))
    if grey:
        one = decode_raster(raw, 34, 21, "ignore", lossless(1, "uint8"))
        assert np.array_equal(one, decode(raw, 34, 21)[..., :1])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_16_bits_as_it_turns_8(orientation: int) -> None:
    pixels = noise(21, 34, 1, "uint8")
    exif = Image.Exif()
    exif[274] = orientation
    raws = []
    for values in (pixels[..., 0], pixels[..., 0].astype(np.uint16) * 257):
        sink = io.BytesIO()
        Image.fromarray(values).save(sink, "PNG", exif=exif)
        raws.append(sink.getvalue())
    size = (21, 34) if orientation >= 5 else (34, 21)
    turned = decode(raws[0], *size, "apply")[..., :1]
    assert np.array_equal(decode_raster(raws[1], *size, "apply", named("1xuint16")), turned.astype(np.uint16) * 257)


def test_an_npy_of_8_bit_rgb_is_an_ordinary_picture() -> None:
    pixels = noise(9, 12, 3, "uint8")
    assert raster_header(npy(pixels)).form == (3, "uint8")
    assert np.array_equal(decode_raster(npy(pixels), 12, 9, "ignore", RGB8), pixels)


def test_channels_may_come_first() -> None:
    pixels = noise(9, 12, 6, "uint16")
    raw = npy(np.ascontiguousarray(np.moveaxis(pixels, 2, 0)))
    assert size_and_orientation(raw) == (12, 9, 1)
    assert np.array_equal(decode_raster(raw, 12, 9, "ignore", named("6xuint16")), pixels)


def test_what_loses_nothing_is_converted() -> None:
    small = noise(9, 12, 2, "int16")
    assert np.array_equal(decode_raster(npy(small), 12, 9, "ignore", named("2xfloat32")), small)
    half = noise(9, 12, 1, "float16")
    assert np.array_equal(decode_raster(npy(half), 12, 9, "ignore", named("1xfloat32")), half)
    grey = noise(9, 12, 1, "uint8")
    assert np.array_equal(decode_raster(png(grey), 12, 9, "ignore", named("1xuint16")), grey.astype(np.uint16) * 257)


REFUSED = {
    "pixels are of another form": (npy(noise(9, 12, 3, "uint16")), "2xuint16"),
    "pixels are of another form than the dataset's: 1 x uint16, not 1 x uint8": (
        npy(noise(9, 12, 1, "uint16")),
        "1xuint8",
    ),
    "pixel format is not supported: int32": (npy(noise(9, 12, 1, "int32")), "1xfloat32"),
    "pixel format is not supported: float64": (npy(noise(9, 12, 1, "float64")), "1xfloat32"),
    "array is not height x width x channels: 20x9x30": (npy(noise(20, 9, 30, "uint16")), "6xuint16"),
    "size disagrees with the annotations: file 9x12": (npy(noise(6, 12, 9, "uint16")), "6xuint16"),
    "array is not height x width x channels: 2x9x12x1": (npy(np.zeros((2, 9, 12, 1), np.uint8)), "1xuint8"),
    "size disagrees with the annotations: file 10x9": (npy(noise(9, 10, 1, "uint16")), "1xuint16"),
    "pixels are not finite": (npy(np.full((9, 12), np.nan, np.float32)), "1xfloat32"),
    "image is damaged": (png(noise(9, 12, 3, "uint16"))[:-60], "3xuint16"),
    "image file is empty": (b"", "1xuint16"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_kept_is_refused(reason: str) -> None:
    raw, form = REFUSED[reason]
    with pytest.raises(ImageError, match=reason):
        decode_raster(raw, 12, 9, "ignore", named(form))


def npy_with(header: str, data: bytes = bytes(216), version: bytes = b"\1\0") -> bytes:
    text = header.encode("latin1")
    size = struct.pack("<H" if version == b"\1\0" else "<I", len(text))
    return b"\x93NUMPY" + version + size + text + data


def described(shape: str, descr: str = "'<u2'") -> str:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}"


HOSTILE = [
    npy_with(described("(9, 12)", "'|O'")),
    npy_with(described("(9, 12)", "[('a', '<u2')]")),
    npy_with(described("(9, 12)", "'S0'")),
    npy_with(described("(100000, 100000)")),
    npy_with(described(f"({2**62}, {2**62})")),
    npy_with(described("(-9, -12)")),
    npy_with(described("(9, 13)")),
    npy_with(described("(0, 12)")),
    npy_with(described("(9, True)")),
    npy_with(described("()")),
    npy_with(described("(9, 12, 100000)")),
    npy_with(described("(9, 1" + "0" * 5000 + ")")),
    npy_with("(" * 9000),
    npy_with("__import__('os').system('touch hacked')"),
    npy_with("{'descr': '<u2'}"),
    npy_with(described("(9, 12)"), version=b"\7\0"),
    b"\x93NUMPY\2\0\xff\xff\xff\xff" + b" " * 50,
    b"\x93NUMPY",
    b"\x93NUMPY\1\0",
]


@pytest.mark.parametrize("nth", range(len(HOSTILE)))
def test_hostile_npy_heads_are_refused_and_allocate_nothing(nth: int) -> None:
    raw = HOSTILE[nth]
    with pytest.raises(ImageError):
        decode_raster(raw, 12, 9, "ignore", named("1xuint16"))
    assert decode_member(raw, named("6xuint16"), 12, 9) is None
    assert not Path("hacked").exists()


PICTURE = Image.fromarray(ramp(61, 43))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def close(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.abs(a.astype(int) - b.astype(int)).max() <= 2)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("extra", [{}, {"progressive": True}, {"subsampling": 2}])
def test_jpeg(mode: str, extra: dict[str, Any]) -> None:
    raw = encoded(PICTURE.convert(mode), "JPEG", quality=95, **extra)
    found = decode(raw, 61, 43)
    assert found.shape == (43, 61, 3) and found.dtype == np.uint8
    assert close(found, np.asarray(Image.open(io.BytesIO(raw)).convert("RGB")))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "1"])
def test_png(mode: str) -> None:
    raw = encoded(PICTURE.convert(mode), "PNG")
    assert (decode(raw, 61, 43) == np.asarray(Image.open(io.BytesIO(raw)).convert("RGB"))).all()


def test_png_palette_with_transparency() -> None:
    raw = encoded(PICTURE.convert("P"), "PNG", transparency=3)
    assert (decode(raw, 61, 43) == np.asarray(PICTURE.convert("P").convert("RGB"))).all()


def test_alpha_is_dropped() -> None:
    picture = PICTURE.copy()
    picture.putalpha(0)
    assert (decode(encoded(picture, "PNG"), 61, 43) == np.asarray(PICTURE)).all()


def test_png_of_16_bits_is_scaled_over_its_range() -> None:
    wide = np.linspace(0, 65535, 43 * 61).astype(np.uint16).reshape(43, 61)
    found = decode(encoded(Image.fromarray(wide), "PNG"), 61, 43)
    assert found.min() == 0 and found.max() == 255
    assert np.abs(found[..., 0] - wide / 257).max() <= 0.5 and (found[..., 0] == found[..., 2]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_turns_only_when_asked(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    raw = encoded(PICTURE, kind, exif=exif)
    stored = Image.open(io.BytesIO(raw))
    assert close(decode(raw, 61, 43), np.asarray(stored.convert("RGB")))
    upright = np.asarray(ImageOps.exif_transpose(stored))
    assert close(decode(raw, upright.shape[1], upright.shape[0], "apply"), upright)


GOOD = encoded(PICTURE, "JPEG", quality=90)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "empty"),
        (b"<html>not found</html>", "not an image"),
        (GOOD[: len(GOOD) // 2], "damaged"),
        (encoded(PICTURE, "PNG")[:500], "damaged"),
        (GOOD[:2] + b"\x00" * 500, "not an image"),
        (encoded(PICTURE.resize((43, 61)), "JPEG"), "size disagrees with the annotations: file 43x61"),
        (encoded(PICTURE.convert("F"), "TIFF"), "not supported"),
        (encoded(Image.fromarray(np.full((43, 61), 70_000, np.int32)), "TIFF"), "beyond 16 bits"),
    ],
)
def test_trouble_is_told(raw: bytes, said: str) -> None:
    with pytest.raises(ImageError, match=said):
        decode(raw, 61, 43)


def test_bombs_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = encoded(Image.new("1", (20_000, 10_000)), "PNG")
    for size in ((61, 43), (20_000, 10_000)):
        with pytest.raises(ImageError, match="pixels|size"):
            decode(bomb, *size)
    monkeypatch.setattr("jigsaw_pretrain.formats.images.decode.MAX_PIXELS", 100)
    with pytest.raises(ImageError, match="too many pixels"):
        decode(GOOD, 61, 43)


def test_what_only_pillow_forgives_is_forgiven() -> None:
    # Bytes between two markers: libjpeg warns, and simplejpeg takes the warning for an error.
    tables = GOOD.index(b"\xff\xdb")
    odd = GOOD[:tables] + b"\x00\x00\x01" + GOOD[tables:]
    assert close(decode(odd, 61, 43), np.asarray(Image.open(io.BytesIO(GOOD))))


@pytest.mark.parametrize(
    "factors", [((1, 4), (1, 1), (1, 1)), ((4, 2), (1, 1), (1, 1)), ((1, 1), (2, 2), (2, 2))], ids=str
)
def test_a_jpeg_of_unusual_subsampling_is_read(factors: tuple[tuple[int, int], ...]) -> None:
    raw = flat_blocks(70, 50, factors)
    assert jpeg_frame(raw) == JpegFrame(8, factors)
    assert np.array_equal(decode(raw, 70, 50), np.asarray(Image.open(io.BytesIO(raw)).convert("RGB")))


def test_a_jpeg_of_12_bits_is_told_as_such() -> None:
    raw = flat_blocks(64, 48, ((1, 1),) * 3, precision=12)
    for read in (lambda: decode(raw, 64, 48), lambda: pillow_header(raw)):
        with pytest.raises(ImageError, match="12 bits"):
            read()
    for cut in range(0, 200, 7):
        assert jpeg_frame(raw[:cut]) in (None, JpegFrame(12, ((1, 1),) * 3))


@pytest.mark.parametrize("deep", [False, True])
def test_grey_that_begins_at_white_is_turned_at_any_depth(deep: bool) -> None:
    grey = noise(20, 30, 1, "uint16" if deep else "uint8", 0)[..., 0]
    raw = tiff(grey, photometric="miniswhite")
    form = named("1xuint16") if deep else named("1xuint8")
    inverted = np.iinfo(grey.dtype).max - grey
    assert np.array_equal(decode_raster(raw, 30, 20, "ignore", form)[..., 0], inverted)
    as_rgb = decode_raster(raw, 30, 20, "ignore", RGB8)
    assert np.abs(as_rgb[..., 1].astype(int) * (257 if deep else 1) - inverted).max() <= (129 if deep else 0)


def test_floats_that_begin_at_white_are_refused() -> None:
    raw = tiff(noise(20, 30, 1, "float32", 0)[..., 0], photometric="miniswhite")
    with pytest.raises(ImageError, match="0 is white"):
        decode_raster(raw, 30, 20, "ignore", named("1xfloat32"))


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize(("channels", "dtype"), [(1, "uint8"), (3, "uint8"), (1, "uint16"), (6, "float32")])
def test_a_bigtiff_of_big_endian_numbers_is_read(channels: int, dtype: str, orientation: int) -> None:
    pixels = noise(20, 30, channels, dtype, 1)
    plain = pixels[..., 0] if channels == 1 else pixels
    options = {"photometric": "rgb" if channels == 3 else "minisblack", "planarconfig": "contig"}
    tags = [(274, "H", 1, orientation, True)]
    raw = tiff(plain, bigtiff=True, byteorder=">", extratags=tags, **({} if channels == 1 else options))
    form = RGB8 if (channels, dtype) == (3, "uint8") else lossless(channels, dtype)
    assert np.array_equal(decode_raster(raw, 30, 20, "ignore", form), pixels)
    turned = decode_raster(raw, *((20, 30) if orientation == 6 else (30, 20)), "apply", form)
    assert turned.shape[:2] == ((30, 20) if orientation == 6 else (20, 30))
    if dtype == "uint8":
        assert np.array_equal(decode(raw, 30, 20)[..., :channels], pixels)


@pytest.mark.parametrize(("kind", "mode"), [("PNG", "RGBA"), ("PNG", "LA"), ("TIFF", "RGBA"), ("WEBP", "RGBA")])
def test_alpha_is_dropped_by_every_way_of_reading(kind: str, mode: str) -> None:
    colours = np.concatenate([ramp(30, 20), np.full((20, 30, 1), 255, np.uint8)], axis=2)
    sink = io.BytesIO()
    Image.fromarray(colours).convert(mode).save(sink, kind, **({"lossless": True} if kind == "WEBP" else {}))
    expected = np.asarray(Image.fromarray(colours).convert(mode).convert("RGB"))
    for found in (decode(sink.getvalue(), 30, 20), decode_raster(sink.getvalue(), 30, 20, "ignore", RGB8)):
        assert np.array_equal(found, expected)
