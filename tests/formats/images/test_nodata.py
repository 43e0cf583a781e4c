"""Pixels that mark missing data are no measurements: they are marked, filled, and never averaged."""

import io

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.images.decode import ImageError, decode_raster, fill_missing
from jigsaw_pretrain.formats.images.nodata import sentinel
from jigsaw_pretrain.formats.pixels import missing_value, named

FLOATS = named("1xfloat32")


def tile(value: float, tag: str | None) -> tuple[bytes, np.ndarray]:
    """A TIFF whose first three columns hold a value, with GDAL's tag or without, and its pixels."""
    pixels = np.random.default_rng(0).normal(400, 20, (16, 20)).astype(np.float32)
    pixels[:, :3] = value
    buffer = io.BytesIO()
    tags = [] if tag is None else [(42113, "s", 0, tag, True)]
    tifffile.imwrite(buffer, pixels, photometric="minisblack", extratags=tags)
    return buffer.getvalue(), pixels


@pytest.mark.parametrize("tagged", [True, False])
@pytest.mark.parametrize("value", [-9999.0, -3.4028235e38, float("nan")])
def test_missing_data_is_marked_and_filled_by_the_mean_of_the_rest(value: float, tagged: bool) -> None:
    raw, pixels = tile(value, str(value) if tagged else None)
    found = decode_raster(raw, 20, 16, "ignore", FLOATS, nodata=None if tagged else value)
    assert np.isnan(found[:, :3]).all() and np.array_equal(found[:, 3:, 0], pixels[:, 3:])
    filled = fill_missing(found)
    assert np.allclose(filled[:, :3], pixels[:, 3:].mean()) and np.array_equal(filled[:, 3:, 0], pixels[:, 3:])


def test_a_value_that_is_not_there_changes_nothing() -> None:
    raw, pixels = tile(400, "-9999")
    assert np.array_equal(decode_raster(raw, 20, 16, "ignore", FLOATS, nodata=-1.0)[..., 0], pixels)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -3.4028235e38])
def test_what_no_sensor_measures_is_refused_where_nothing_says_that_it_is_missing(value: float) -> None:
    with pytest.raises(ImageError, match="--nodata"):
        decode_raster(tile(value, None)[0], 20, 16, "ignore", FLOATS)


def test_an_image_without_any_data_is_refused() -> None:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, np.full((16, 20), -9999, dtype=np.float32), photometric="minisblack")
    with pytest.raises(ImageError, match="no data"):
        decode_raster(buffer.getvalue(), 20, 16, "ignore", FLOATS, nodata=-9999.0)


@given(st.floats(allow_nan=True, allow_infinity=False, width=32))
def test_a_value_is_read_as_it_is_written(value: float) -> None:
    found = missing_value(repr(value))
    assert found == value or (found != found and value != value)


def test_other_words_are_refused() -> None:
    assert missing_value(None) is missing_value("none") is None
    with pytest.raises(UserError, match="nodata"):
        missing_value("empty")


@given(
    st.integers(0, 99),
    st.sampled_from(["normal", "skewed", "steps", "flat", "saturated", "bimodal"]),
    st.sampled_from([-9999.0, -32768.0, 1e20, 65535.0]),
    st.floats(0.002, 0.4),
)
def test_ordinary_values_have_no_sentinel_and_a_far_one_of_many_is_found(
    seed: int, kind: str, value: float, share: float
) -> None:
    rng = np.random.default_rng(seed)
    values = {
        "normal": rng.normal(300, 15, 4000),
        "skewed": rng.gamma(1.5, 20, 4000),
        "steps": rng.integers(0, 8, 4000).astype(float),
        "flat": np.where(rng.random(4000) < 0.7, 5.0, rng.normal(5, 2, 4000)),
        "saturated": np.minimum(rng.gamma(2, 30, 4000), 150),
        "bimodal": np.where(rng.random(4000) < 0.5, rng.normal(10, 1, 4000), rng.normal(500, 3, 4000)),
    }[kind].astype(np.float32)
    assert sentinel(values) is None
    spoilt = values.copy()
    spoilt[: int(share * len(values))] = value
    assert sentinel(spoilt) == np.float32(value)
    assert sentinel(values[:1]) is None
