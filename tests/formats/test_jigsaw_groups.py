from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jigsaw_pretrain.formats.jigsaw import GROUPS, aspect_group, aspect_groups

SIZE = st.integers(1, 100_000)


@given(SIZE, SIZE)
def test_group_follows_the_exact_ratio(width: int, height: int) -> None:
    ratio = Fraction(width, height)
    expected = "T" if ratio < Fraction(1, 2) else "W" if ratio > Fraction(3, 2) else "S"
    assert aspect_group(width, height) == expected


@pytest.mark.parametrize(("width", "height", "group"), [(1, 2, "S"), (3, 2, "S"), (49, 100, "T"), (151, 100, "W")])
def test_limits_belong_to_s(width: int, height: int, group: str) -> None:
    assert aspect_group(width, height) == group


def test_vector_form_agrees_with_scalar_form() -> None:
    widths, heights = np.array([10, 30, 5, 7]), np.array([10, 10, 20, 14])
    assert [GROUPS[c] for c in aspect_groups(widths, heights)] == [
        aspect_group(int(w), int(h)) for w, h in zip(widths, heights, strict=True)
    ]


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (-1, 5)])
def test_empty_sizes_have_no_group(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="positive"):
        aspect_group(*size)
