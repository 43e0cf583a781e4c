"""Enlargement and rounding, against exact arithmetic on single boxes."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jigsaw_pretrain.formats import boxes

WIDTH, HEIGHT = 100, 60
SIZE = np.array([WIDTH]), np.array([HEIGHT])
coordinate = st.floats(-300, 300, allow_nan=False)
share = st.floats(0, 1, exclude_max=True)


def one(box: tuple[float, ...]) -> np.ndarray:
    return np.array([box], dtype=np.float64)


@given(st.tuples(coordinate, coordinate, coordinate, coordinate), st.tuples(share, share, share, share))
def test_enlarged_boxes(box: tuple[float, ...], shifts: tuple[float, ...]) -> None:
    x, y, w, h = box
    usable = boxes.with_area(one(box))[0] and boxes.inside(one(box), *SIZE)[0]
    assert usable == (w > 0 and h > 0 and x < min(x + w, WIDTH) and y < min(y + h, HEIGHT) and x + w > 0 and y + h > 0)
    if not usable:
        return
    left, top, right, bottom = boxes.enlarge(one(box), one(shifts), 2.0, boxes.image_edges(*SIZE))[0]
    expected = (
        max(0, math.floor(x - 0.5 * shifts[0] * w)),
        max(0, math.floor(y - 0.5 * shifts[1] * h)),
        min(WIDTH, math.ceil(x + w + 0.5 * shifts[2] * w)),
        min(HEIGHT, math.ceil(y + h + 0.5 * shifts[3] * h)),
    )
    assert (left, top, right, bottom) == expected
    assert 0 <= left < right <= WIDTH and 0 <= top < bottom <= HEIGHT
    # The ground truth lies within, and no side grows to more than twice (and the two roundings).
    assert left <= max(x, 0) and right >= min(x + w, WIDTH)
    assert right - left <= 2 * w + 2 and bottom - top <= 2 * h + 2


@given(st.tuples(*[st.floats(allow_nan=True, allow_infinity=True)] * 4))
def test_any_numbers_are_sorted_out_without_a_warning(box: tuple[float, ...]) -> None:
    with np.errstate(all="raise"):
        finite = boxes.finite(one(box))[0]
        with_area = boxes.with_area(one(box))[0]
        if finite and with_area and boxes.inside(one(box), *SIZE)[0]:
            left, top, right, bottom = boxes.enlarge(one(box), 0.999, 10.0, boxes.image_edges(*SIZE))[0]
            assert 0 <= left < right <= WIDTH and 0 <= top < bottom <= HEIGHT
    assert finite == all(abs(value) < boxes.FARTHEST for value in (*box, box[0] + box[2], box[1] + box[3]))


def test_context_one_leaves_boxes_as_they_are() -> None:
    found = boxes.enlarge(one((10, 20, 30, 40)), 0.9, 1.0, boxes.image_edges(*SIZE))
    assert found.tolist() == [[10, 20, 40, 60]]
