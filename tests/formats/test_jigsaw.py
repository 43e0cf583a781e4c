"""Section 3.2: aspect groups, and which group fills which slot where groups are missing or thin."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.jigsaw import GROUPS, SHAPES, SlotPlan, aspect_group, aspect_groups, fill_slots


def regions_of(slots: SlotPlan) -> dict[str, tuple[int, ...]]:
    return {source.group: tuple(sorted(source.regions)) for source in slots.sources}


def test_all_groups_feed_their_own_slots() -> None:
    slots = fill_slots({"S": 500, "T": 200, "W": 300})
    assert regions_of(slots) == {"S": (0, 3), "W": (1,), "T": (2,)}
    assert all(source.share == 1 for source in slots.sources)
    assert slots.notes() == []
    assert slots.shares() == {"S": 0.5, "T": 0.25, "W": 0.25}


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({"S": 9, "T": 0, "W": 0}, {"S": (0, 1, 2, 3)}),
        ({"S": 0, "T": 9, "W": 0}, {"T": (0, 1, 2, 3)}),
        ({"W": 9}, {"W": (0, 1, 2, 3)}),
        ({"S": 9, "T": 9, "W": 0}, {"S": (0, 1, 3), "T": (2,)}),
        ({"S": 9, "T": 0, "W": 9}, {"S": (0, 2, 3), "W": (1,)}),
        ({"S": 0, "T": 9, "W": 8}, {"T": (0, 2, 3), "W": (1,)}),
        ({"S": 0, "T": 8, "W": 9}, {"T": (2,), "W": (0, 1, 3)}),
    ],
)
def test_empty_groups_are_fed_by_the_next_by_aspect(
    counts: dict[str, int], expected: dict[str, tuple[int, ...]]
) -> None:
    slots = fill_slots(counts)
    assert regions_of(slots) == expected
    for group in "STW":
        if not counts.get(group):
            assert any(SHAPES[group] in line and "no crops" in line for line in slots.notes())


def test_a_dataset_without_crops_is_refused() -> None:
    with pytest.raises(UserError, match="no crops at all"):
        fill_slots({"S": 0})


@settings(max_examples=200, deadline=None)
@given(
    counts=st.fixed_dictionaries({group: st.integers(0, 100_000) for group in "STW"}).filter(
        lambda counts: any(counts.values())
    ),
    max_repeat=st.integers(4, 50),
)
def test_no_crop_is_expected_too_often(counts: dict[str, int], max_repeat: int) -> None:
    slots = fill_slots(counts, max_repeat)
    shares = slots.shares()
    assert sum(shares.values()) == pytest.approx(1)
    rates = {group: shares[group] / counts[group] for group in "STW" if counts[group]}
    assert max(rates.values()) <= max_repeat * min(rates.values()) * (1 + 1e-9)
    assert sorted(region for source in slots.sources for region in source.regions) == [0, 1, 2, 3]


def test_the_pattern_of_a_thin_group_is_even_in_every_lane() -> None:
    slots = fill_slots({"S": 4000, "T": 4, "W": 1500})
    source = slots.source("T")
    assert source.topped_up_from == "S" and float(source.share) == pytest.approx(20 * 4 / 2000)
    for lane in (0, 3, 7):
        own = [source.drawn_before(slot, lane, 8) for slot in range(1001)]
        steps = [slot for slot in range(1000) if own[slot] < own[slot + 1]]
        assert own[0] == 0 and len(steps) == 40
        assert {later - earlier for earlier, later in zip(steps, steps[1:], strict=False)} == {25}
    first = {next(s for s in range(1000) if source.drawn_before(s + 1, lane, 8)) for lane in range(8)}
    assert len(first) == 8
    assert any(SHAPES["T"] in line and "4.0%" in line for line in slots.notes())


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
