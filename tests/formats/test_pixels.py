"""Members give back the pixels that were put into them."""

import gc
import io
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jigsaw_pretrain.formats.pixels import PixelFormat, decode_member, encode_member, lossless, npy_header
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


def test_heads_are_read_by_several_threads_at_a_time() -> None:
    # Python 3.11's parser mixes up the depths of threads that change while it collects garbage.
    head = io.BytesIO()
    np.save(head, np.zeros((2, 3, 4), dtype=np.float32))
    former = gc.get_threshold()

    def give_way(phase: str, info: dict[str, int]) -> None:
        time.sleep(0)

    gc.callbacks.append(give_way)
    gc.set_threshold(10)
    try:
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda _: npy_header(head.getvalue())[:2], range(2000)))
    finally:
        gc.set_threshold(*former)
        gc.callbacks.remove(give_way)
    assert found == [((2, 3, 4), False)] * 2000
