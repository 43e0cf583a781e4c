"""Stored size, stored pixels and orientation, whatever a decoder turns by itself: formats, orientations, modes."""

import io

import numpy as np
import pytest
import tifffile
from PIL import Image, features

from jigsaw_pretrain.formats.images.decode import decode_raster, size_and_orientation, upright
from jigsaw_pretrain.formats.pixels import RGB8, named


def scene() -> np.ndarray:
    pixels = np.full((48, 64, 3), 40, np.uint8)
    pixels[4:20, 6:30, 0] = 220
    pixels[30:44, 40:60, 2] = 220
    return pixels


def encoded(kind: str, orientation: int) -> bytes:
    buffer = io.BytesIO()
    if kind == "TIFF of 16 bits":
        deep = scene().astype(np.uint16) * 257
        tifffile.imwrite(buffer, deep, photometric="rgb", extratags=[(274, "H", 1, orientation, True)])
    elif kind == "TIFF":
        tifffile.imwrite(buffer, scene(), photometric="rgb", extratags=[(274, "H", 1, orientation, True)])
    else:
        exif = Image.Exif()
        exif[274] = orientation
        Image.fromarray(scene()).save(buffer, kind, exif=exif, quality=100)
    return buffer.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["TIFF", "TIFF of 16 bits", "JPEG", "PNG", "WEBP", "AVIF"])
def test_boxes_meet_their_pixels_in_both_modes(kind: str, orientation: int) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    raw = encoded(kind, orientation)
    assert size_and_orientation(raw) == (64, 48, orientation)
    form = named("3xuint16") if "16" in kind else RGB8
    scale = 257 if "16" in kind else 1
    stored = decode_raster(raw, 64, 48, "ignore", form) / scale
    assert np.abs(stored - scene()).mean() < 4
    turned = upright(scene(), orientation)
    found = decode_raster(raw, turned.shape[1], turned.shape[0], "apply", form) / scale
    assert np.abs(found - turned).mean() < 4
