"""Decoding every kind of image file that datasets hold, and saying plainly what cannot be decoded."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from jigsaw_pretrain.prep.images.decode import ImageError, decode
from tests.helpers.prepped import ramp

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
    monkeypatch.setattr("jigsaw_pretrain.prep.images.decode.MAX_PIXELS", 100)
    with pytest.raises(ImageError, match="too many pixels"):
        decode(GOOD, 61, 43)


def test_what_only_pillow_forgives_is_forgiven() -> None:
    # Bytes between two markers: libjpeg warns, and simplejpeg takes the warning for an error.
    tables = GOOD.index(b"\xff\xdb")
    odd = GOOD[:tables] + b"\x00\x00\x01" + GOOD[tables:]
    assert close(decode(odd, 61, 43), np.asarray(Image.open(io.BytesIO(GOOD))))
