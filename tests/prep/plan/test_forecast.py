"""Slot fill against drawing pairs and ratios at random, and the words that go with thin groups and small objects."""

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from jigsaw_pretrain.formats.jigsaw import GROUPS, Fit, aspect_groups, fill_slots
from jigsaw_pretrain.prep.plan.forecast import CropSizes, Summary, slot_fill, warnings


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
    said = [text for _, text in warnings([2, 0, 0], slots)]
    assert "tall" in said[0] and "wide" in said[1] and "small" in said[-1]


def test_objects_that_fill_everything_are_not_told() -> None:
    slots = slot_fill([250, 400, 900], [250, 900, 400], [0, 1, 2])
    assert [slot.fill for slot in slots] == [1.0] * 4
    assert warnings([50, 25, 25], slots) == []


@given(st.tuples(*[st.integers(0, 20)] * 3))
@example((0, 2, 9))
def test_each_slot_is_forecast_of_the_group_that_training_fills_it_from(counts: tuple[int, int, int]) -> None:
    assume(sum(counts))
    codes = np.repeat(np.arange(3), counts)
    slots = slot_fill(10 * codes + 10, np.full(len(codes), 20), codes)
    for source in fill_slots(dict(zip(GROUPS, counts, strict=True))).sources:
        alone = codes[codes == GROUPS.index(source.group)]
        expected = slot_fill(10 * alone + 10, np.full(len(alone), 20), alone)
        for region in source.regions:
            assert slots[region].fill == pytest.approx(expected[region].fill)


@given(st.tuples(*[st.integers(0, 20) | st.integers(0, 100_000)] * 3))
@example((0, 8, 900))
@example((10_000, 300, 5_000))
def test_what_prep_says_of_stand_ins_and_top_ups_is_what_training_does(counts: tuple[int, int, int]) -> None:
    assume(sum(counts))
    trained = fill_slots(dict(zip(GROUPS, counts, strict=True)))
    said = warnings(counts, slot_fill([250, 400, 900], [250, 900, 400], [0, 1, 2]))
    empty = {group for group, count in zip(GROUPS, counts, strict=True) if not count}
    thin = {source.group for source in trained.sources if source.topped_up_from}
    assert [text for _, text in said] == trained.notes() and len(said) == len(empty) + len(thin) + bool(empty or thin)


def test_no_crops_at_all() -> None:
    slots = slot_fill([], [], np.empty(0, dtype=np.uint8))
    assert [slot.fill for slot in slots] == [0.0] * 4 and warnings([0, 0, 0], slots) == []


def test_large_objects_are_told_with_what_a_slot_shows_of_them() -> None:
    sizes = [100, 700, 800, 900]
    large = next(slot for slot in slot_fill(sizes, sizes, [0] * 4) if slot.name == "S-large")
    # The larger of two crops is the 800 one or a larger one in most pairs; a resized side is 0.8 to 1.5 times as long.
    shares = [(160 / (ratio * 800)) ** 2 for ratio in np.linspace(0.8, 1.5, 1001)]
    assert large.shown == pytest.approx(np.mean(shares), rel=0.01)
    (told,) = [line for _, line in warnings([100, 50, 50], [large]) if "data.fit" in line]
    assert f"{large.shown:.0%}" in told


@given(st.lists(st.integers(1, 400), min_size=1, max_size=30), st.integers(0, 99))
def test_a_slot_shows_all_of_what_fits_and_never_more(sides: list[int], seed: int) -> None:
    high = np.random.default_rng(seed).integers(1, 400, len(sides))
    for slot in slot_fill(sides, high, aspect_groups(np.array(sides), high)):
        assert 0 < slot.shown <= 1 + 1e-9
    for slot in slot_fill([20], [20], [0]):
        assert slot.shown == pytest.approx(1)


def test_a_region_shows_whole_crops_where_they_are_resized_or_stretched_to_it() -> None:
    sizes = CropSizes.of(np.array([[0, 0, 400, 200]]), np.array([[100.0, 0, 200, 200]]), np.array([0]))
    fills: dict[Fit, float] = {"resize": 0.5, "warp": 1.0}
    for fit, fill in fills.items():
        large = next(slot for slot in sizes.jigsaw(fit=fit).slots if slot.name == "S-large")
        assert (large.shown, large.fill) == (1, pytest.approx(fill))


def test_what_a_region_shows_is_told_of_the_object_and_not_of_its_surroundings() -> None:
    # One square crop of 400 pixels: its object, of 100 x 200, lies in the middle of its width and at its bottom.
    boxes, xywh = np.array([[10, 20, 410, 420]] * 2), np.array([[160.0, 220, 100, 200], [np.nan] * 4])
    sizes = CropSizes.of(boxes, xywh, np.array([0, 0]))
    shown = {slot.name: slot.shown for slot in sizes.jigsaw(ratios=(1.0, 1.0)).slots}
    places = np.random.default_rng(0).integers(0, 400 - 160, (20_000, 2), endpoint=True)
    overlap = [
        np.clip(np.minimum(end, places[:, axis] + 160) - np.maximum(start, places[:, axis]), 0, None)
        for axis, start, end in ((0, 150, 250), (1, 200, 400))
    ]
    assert shown["S-large"] == pytest.approx(np.mean(overlap[0] * overlap[1]) / (100 * 200), rel=0.02)


def test_the_commonest_label_is_told_where_it_is_nearly_all() -> None:
    def summary(counts: list[list[int]]) -> Summary:
        one = CropSizes(np.array([100]), np.array([100]), np.array([0]))
        return Summary(["raccoon"], np.array(counts), 1, 1, 0, 1, 3, 1, {}, slot_fill([100], [100], [0]), one)

    # Half of the regions are of square crops, a quarter of tall and of wide ones each.
    one = summary([[90, 45, 10], [10, 5, 10]])
    assert one.commonest() == ("raccoon", pytest.approx(0.5 * 0.9 + 0.25 * 0.9 + 0.25 * 0.5))
    assert any("raccoon" in line and "balance" in line for _, line in one.warnings())
    assert not any("balance" in line for _, line in summary([[50, 50, 50], [50, 50, 50]]).warnings())
    assert summary([[0, 0, 0], [0, 0, 0]]).commonest() == ("", 0.0)
