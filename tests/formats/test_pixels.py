"""Members give back the pixels that were put into them."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jigsaw_pretrain.formats.pixels import PixelFormat, decode_member, encode_member, lossless
from tests.helpers.sensors import noise

sides = st.integers(8, 40)
kinds = st.sampled_from(["uint8", "uint16", "float32"])


@given(sides, sides, st.integers(1, 9), kinds)
def test_members_give_back_their_pixels(height: int, width: int, channels: int, dtype: str) -> None:
    form = lossless(channels, dtype)
    pixels = noise(height, width, channels, dtype)
    raw = encode_member(pixels, form)
    found = decode_member(raw, form, width, height)
    assert found is not None and found.dtype == pixels.dtype and np.array_equal(found, pixels)
    assert decode_member(raw, form, width + 1, height) is None
    assert decode_member(raw[: len(raw) // 2], form, width, height) is None
    other = PixelFormat(member=form.member, channels=channels % 3 + 1, dtype=dtype)
    assert decode_member(raw, other, width, height) is None
