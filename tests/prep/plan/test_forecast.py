"""Slot fill against drawing pairs and ratios at random, and the words that go with thin groups and small objects."""

import numpy as np
import pytest

from jigsaw_pretrain.formats.jigsaw import aspect_groups
from jigsaw_pretrain.prep.plan.forecast import slot_fill, warnings


def drawn_fill(widths: np.ndarray, heights: np.ndarray, groups: np.ndarray) -> dict[str, float]:
    rng = np.random.default_rng(0)
    count = 40_000
    ratio = rng.uniform(0.8, 1.5, (4, count))

    def cover(rows: np.ndarray, ratio: np.ndarray, width: int, height: int) -> float:
        return float((np.minimum(widths[rows] * ratio, width) * np.minimum(heights[rows] * ratio, height)).mean()) / (
            width * height
        )

    square, tall, wide = (np.flatnonzero(groups == code) for code in range(3))
    pair = rng.choice(square, (2, count))
    by_area = np.sort((widths * heights)[pair] * 1_000_000 + pair, axis=0).astype(np.int64) % 1_000_000
    return {
        "S-small": cover(by_area[0], ratio[0], 64, 64),
        "W": cover(rng.choice(wide, count), ratio[1], 160, 64),
        "T": cover(rng.choice(tall, count), ratio[2], 64, 160),
        "S-large": cover(by_area[1], ratio[3], 160, 160),
    }


def test_fill_against_random_jigsaws() -> None:
    rng = np.random.default_rng(1)
    widths, heights = np.exp(rng.uniform(2, 5.5, (2, 300))).astype(np.int64)
    groups = aspect_groups(widths, heights)
    expected = drawn_fill(widths, heights, groups)
    for slot in slot_fill(widths, heights, groups):
        assert slot.fill == pytest.approx(expected[slot.name], abs=0.01)


def test_empty_groups_are_filled_from_others() -> None:
    slots = slot_fill([100, 100], [100, 100], [0, 0])
    assert all(slot.fill > 0 for slot in slots)
    said = warnings([2, 0, 0], slots)
    assert len(said) == 3
    assert "tall" in said[0] and "wide" in said[1] and "small" in said[2]


def test_large_objects_fill_everything_and_nothing_is_said() -> None:
    slots = slot_fill([400, 400, 900], [400, 900, 400], [0, 1, 2])
    assert [slot.fill for slot in slots] == [1.0] * 4
    assert warnings([50, 25, 25], slots) == []


def test_thin_groups_are_told() -> None:
    slots = slot_fill([400, 400, 900], [400, 900, 400], [0, 1, 2])
    said = warnings([9_000, 10, 990], slots)
    assert len(said) == 1 and "10 of 10,000" in said[0] and "250 times" in said[0]


def test_no_crops_at_all() -> None:
    slots = slot_fill([], [], np.empty(0, dtype=np.uint8))
    assert [slot.fill for slot in slots] == [0.0] * 4 and warnings([0, 0, 0], slots) == []
