"""Lanes: every pass draws every crop once, any position is computable alone, and class balance resamples a unit."""

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.rng import derive_key, permutation
from jigsaw_pretrain.train.data import lanes
from jigsaw_pretrain.train.data.lanes import UNIT_WEIGHT, GroupLanes, class_weights, resample_by_class
from tests.helpers.sources import small_data
from tests.helpers.stores import lines
from tests.helpers.tiny import make_dataset

counts = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda values: sum(values) > 0)


def stream(group: GroupLanes, lane: int, length: int) -> list[tuple[int, int, int]]:
    """(pass, shard, row) at the lane's first positions."""
    drawn: list[tuple[int, int, int]] = []
    while len(drawn) < length:
        unit = group.locate(lane, len(drawn))
        assert unit.first == len(drawn) and unit.size > 0
        drawn += [(unit.epoch, unit.shard, row) for row in group.rows(unit).tolist()]
    return drawn[:length]


def naive_stream(shards: list[int], lanes: int, key: int, lane: int, length: int) -> list[tuple[int, int, int]]:
    """The same from the definition: pass after pass, unit after unit, crop after crop."""
    slices = 1
    while slices * len(shards) < lanes:
        slices += 1
    units = []
    for shard, crops in enumerate(shards):
        for nth in range(slices):
            units.append((shard, list(range(crops * nth // slices, crops * (nth + 1) // slices))))
    while len(units) % lanes:
        units.append((-1, []))
    rounds = len(units) // lanes
    drawn: list[tuple[int, int, int]] = []
    turn = 0
    while len(drawn) < length:
        cycle, nth = divmod(turn, lanes)
        dealt = permutation(derive_key(key, 0, cycle), len(units)).tolist()
        shift = permutation(derive_key(key, 1, cycle), lanes).tolist()[nth]
        column = (lane + shift) % lanes
        mine = dealt[column::lanes]
        if rounds > 1:
            mine = [mine[place] for place in permutation(derive_key(key, 2, turn, column), rounds).tolist()]
        for unit in mine:
            shard, rows = units[unit]
            order = permutation(derive_key(key, 3, turn, unit), len(rows)).tolist()
            drawn += [(turn, shard, rows[place]) for place in order]
        turn += 1
    return drawn[:length]


@settings(max_examples=60, deadline=None)
@given(shards=counts, lanes=st.integers(1, 12), key=st.integers(0, 2**64 - 1))
def test_every_pass_draws_every_crop_once(shards: list[int], lanes: int, key: int) -> None:
    group = GroupLanes(shards, lanes, key)
    passes: dict[int, Counter[tuple[int, int]]] = defaultdict(Counter)
    for lane in range(lanes):
        for turn, shard, row in stream(group, lane, group.total):
            passes[turn][shard, row] += 1
    every = {(shard, row): 1 for shard, crops in enumerate(shards) for row in range(crops)}
    # A lane's share of a whole cycle is the group's size, so these are exactly the cycle's passes.
    assert sorted(passes) == list(range(lanes))
    assert all(passes[turn] == every for turn in passes)


@settings(max_examples=40, deadline=None)
@given(shards=counts, lanes=st.integers(1, 9), key=st.integers(0, 2**32))
def test_agrees_with_a_slow_simulation(shards: list[int], lanes: int, key: int) -> None:
    group = GroupLanes(shards, lanes, key)
    for lane in {0, lanes // 2, lanes - 1}:
        length = 2 * group.total + 3
        assert stream(group, lane, length) == naive_stream(shards, lanes, key, lane, length)


@settings(max_examples=40, deadline=None)
@given(shards=counts, lanes=st.integers(1, 9), lane=st.integers(0, 8), position=st.integers(0, 500))
def test_a_position_needs_no_earlier_one(shards: list[int], lanes: int, lane: int, position: int) -> None:
    lane %= lanes
    in_order = stream(GroupLanes(shards, lanes, 1), lane, position + 1)[position]
    group = GroupLanes(shards, lanes, 1)
    unit = group.locate(lane, position)
    assert in_order == (unit.epoch, unit.shard, int(group.rows(unit)[position - unit.first]))


@pytest.mark.parametrize("shards", [[1], [3, 2], [4000] * 300])
def test_a_far_position_takes_no_more_work_than_a_near_one(shards: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    def counted(key: int, count: int) -> np.ndarray:
        drawn.append(count)
        return permutation(key, count)

    monkeypatch.setattr(lanes, "permutation", counted)

    def work(first: int) -> int:
        """Random numbers drawn to find a position in each of 64 lanes."""
        drawn.clear()
        group = GroupLanes(shards, 64, 5)
        for lane in range(64):
            unit = group.locate(lane, first + lane)
            assert unit.first <= first + lane < unit.end
        return sum(drawn)

    assert 0 < work(10**11) <= 2 * work(0)


def test_seeds_passes_and_lanes_differ() -> None:
    orders = {tuple(stream(GroupLanes([30, 30, 30], 2, key), lane, 90)) for key in range(4) for lane in range(2)}
    assert len(orders) == 8
    group = GroupLanes([50], 1, 3)
    first, second = stream(group, 0, 100)[:50], stream(group, 0, 100)[50:]
    assert [row for _, _, row in first] != [row for _, _, row in second]


def test_shards_open_together_change_from_pass_to_pass() -> None:
    group = GroupLanes([10] * 64, 8, 0)
    together = set()
    for turn in range(8):
        opened = frozenset(group.locate(lane, turn * 80).shard for lane in range(8))
        assert len(opened) == 8
        together.add(opened)
    assert len(together) == 8


def test_a_row_knows_its_unit() -> None:
    group = GroupLanes([7, 30], 4, 0)
    for lane in range(4):
        unit = group.locate(lane, 0)
        for row in range(unit.low, unit.high):
            assert group.unit_rows(unit.shard, row) == (unit.low, unit.high)


def test_a_group_without_crops_is_refused() -> None:
    with pytest.raises(ValueError, match="without crops"):
        GroupLanes(np.array([0, 0]), 4, 1)


def test_weights_follow_the_frequencies_and_are_capped() -> None:
    assert class_weights([900, 100, 1, 0], "none", 20) is None
    for balance, expected in (("uniform", [1, 9, 20, 20]), ("sqrt", [1, 3, 20, 20])):
        weights = class_weights([900, 100, 1, 0], balance, 20)
        assert weights is not None and (weights / UNIT_WEIGHT).tolist() == expected


def test_a_crop_is_taken_its_expected_times_or_the_next_whole_number() -> None:
    weights = np.where(np.arange(100) < 90, UNIT_WEIGHT, 9 * UNIT_WEIGHT).astype(np.int64)
    expected = weights * 100 / weights.sum()
    for key in range(50):
        chosen = resample_by_class(weights, key)
        assert len(chosen) == 100 and chosen.min() >= 0 and chosen.max() < 100
        times = np.bincount(chosen, minlength=100)
        assert (np.abs(times - expected) < 1).all()
        assert (resample_by_class(weights, key) == chosen).all()
    assert Counter((resample_by_class(weights, key) < 90).sum() for key in range(50)).most_common(1)[0][0] == 50


def test_batches_are_balanced_whatever_the_ranks(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, {"S": [25, 14], "T": [11, 9, 3], "W": [20]})
    plain = lines(dataset)
    for balance in ("sqrt", "uniform"):
        options = small_data(batch=16, lanes=8, balance=balance)
        found = lines(dataset, options=options)
        assert found != plain
        assert lines(dataset, options=options, world=2, workers=2, first=2, steps=3) == found[2:]


def test_a_manifest_without_counts_is_refused(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, {"S": [9]})
    dataset.description.totals.pop("by_label")
    with pytest.raises(UserError, match="does not count crops by label"):
        lines(dataset, options=small_data(batch=16, lanes=8, balance="sqrt"))
    with pytest.raises(UserError, match="balance must be one of"):
        small_data(balance="cubic")
