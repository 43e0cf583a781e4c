"""Says which crops of an aspect group a lane draws, and in which order, by arithmetic on counts.

A group's shards are its units, cut into equal slices where there are fewer shards than lanes; empty units make their
number a multiple of the lanes. In every pass over the group the units are dealt out in a keyed order, lane ``l`` taking
every ``L``-th, and the crops within a unit are drawn in a keyed order of their own, so each pass draws every crop
exactly once over all lanes. ``L`` passes make a cycle: the units are shuffled once per cycle, and its passes shift
the deal by every offset from 0 to L - 1 once, in a keyed order. So a cycle gives every lane every crop exactly once,
its length is the group's count of crops for each lane whatever the shards' sizes, and any position is found from the
counts alone, in one division and one short sort: about 60 us at 128 shards, at position 0 as at position 10**12.
Prefer a shuffle buffer only where shards cannot be indexed; it promises neither a pass nor a resume.

Class balance (--balance) draws rare classes more often. A unit keeps its length, so positions, passes and resuming are
as without it; within the unit a crop is taken in proportion to its class's weight, evenly (each floor or ceiling of its
expected times), decided by the pass and the unit alone. With weights 1 / f for a class of frequency f (uniform) every
class is drawn about equally often, with 1 / sqrt(f) (sqrt) rare ones gain half of that on a logarithmic scale; no crop
weighs more than max_repeat times another. The background is a class like any other. Balancing works within each shard:
a class that a shard lacks cannot be drawn from it. About 0.2 ms per unit of 4,000 crops. No balance is the paper's way,
and better where the frequencies are those that detection will meet; prefer sqrt for long-tailed datasets.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.dataset.dataset import Dataset
from jigsaw_pretrain.rng import derive_key, permutation, randint
from jigsaw_pretrain.train.recipe import DataOptions

I64 = npt.NDArray[np.int64]

UNIT_WEIGHT = 1024
"""The weight of the commonest class: weights are whole numbers, so that every machine draws the same."""


@dataclass(frozen=True)
class OpenUnit:
    """The unit that a lane draws from, from position ``first`` of its stream to ``first + size`` exclusive.

    epoch: the pass over the group that it belongs to. unit: its number. shard: the index of its shard within the group.
    low, high: its rows in that shard, high exclusive; never empty.
    """

    epoch: int
    unit: int
    shard: int
    low: int
    high: int
    first: int

    @property
    def size(self) -> int:
        """How many crops it has."""
        return self.high - self.low

    @property
    def end(self) -> int:
        """The lane's first position after this unit."""
        return self.first + self.size


class GroupLanes:
    """The streams of all lanes over one group whose shards hold ``counts`` crops each (int64 [shards]).

    Streams have no end. ``key`` is the group's key under the run's seed. Raises ValueError for a group without crops.
    """

    def __init__(self, counts: Sequence[int] | I64, lanes: int, key: int) -> None:
        shards = np.asarray(counts, dtype=np.int64)
        self.total = int(shards.sum())
        if self.total <= 0 or lanes < 1:
            raise ValueError("a group without crops has no lanes")
        self.lanes = lanes
        self._cycles, self._shifts, self._epochs, self._units = (derive_key(key, purpose) for purpose in range(4))
        slices = -(-lanes // len(shards))
        edges = shards[:, None] * np.arange(slices + 1) // slices
        self._shard = np.repeat(np.arange(len(shards)), slices)
        self._edges = edges
        self._low, self._high = edges[:, :-1].reshape(-1), edges[:, 1:].reshape(-1)
        self._rounds = -(-len(self._shard) // lanes)
        self._size = np.zeros(self._rounds * lanes, dtype=np.int64)
        self._size[: len(self._shard)] = self._high - self._low
        self._cycle: tuple[int, I64, I64] | None = None

    def _deal(self, cycle: int) -> tuple[I64, I64]:
        """Units as dealt in a cycle, int64 [rounds, lanes], and the order of its shifts, int64 [lanes]."""
        if self._cycle is None or self._cycle[0] != cycle:
            units = permutation(derive_key(self._cycles, cycle), len(self._size)).reshape(self._rounds, self.lanes)
            self._cycle = (cycle, units, permutation(derive_key(self._shifts, cycle), self.lanes))
        return self._cycle[1], self._cycle[2]

    def locate(self, lane: int, position: int) -> OpenUnit:
        """The unit that ``position`` (from 0) of ``lane``'s stream falls in."""
        cycle, rest = divmod(position, self.total)
        units, shifts = self._deal(cycle)
        columns = (lane + shifts) % self.lanes
        ends = np.cumsum(self._size[units].sum(axis=0)[columns])
        nth = int(np.searchsorted(ends, rest, side="right"))
        epoch = cycle * self.lanes + nth
        rest -= int(ends[nth - 1]) if nth else 0
        column = int(columns[nth])
        mine = units[:, column]
        if self._rounds > 1:
            # Its order changes from pass to pass, so that other shards are open together each time.
            mine = mine[permutation(derive_key(self._epochs, epoch, column), self._rounds)]
        ends = np.cumsum(self._size[mine])
        nth = int(np.searchsorted(ends, rest, side="right"))
        rest -= int(ends[nth - 1]) if nth else 0
        unit = int(mine[nth])
        return OpenUnit(
            epoch, unit, int(self._shard[unit]), int(self._low[unit]), int(self._high[unit]), position - rest
        )

    def rows(self, opened: OpenUnit) -> I64:
        """The rows of the unit's shard in the order in which this pass draws them: int64 [opened.size]."""
        return opened.low + permutation(derive_key(self._units, opened.epoch, opened.unit), opened.size)

    def unit_rows(self, shard: int, row: int) -> tuple[int, int]:
        """The rows, high exclusive, of the unit that a row of the group's ``shard`` belongs to."""
        edges = self._edges[shard]
        nth = int(np.searchsorted(edges, row, side="right"))
        return int(edges[nth - 1]), int(edges[nth])


def class_weights(counts: Sequence[int], balance: str, max_repeat: int) -> I64 | None:
    """Weight of each label, int64 [labels], from how many crops each has; None where all weigh the same."""
    if balance == "none":
        return None
    present = np.maximum(np.asarray(counts, dtype=np.float64), 1)
    ratio = present.max() / present
    if balance == "sqrt":
        ratio = np.sqrt(ratio)
    return np.rint(np.minimum(ratio, max_repeat) * UNIT_WEIGHT).astype(np.int64)


def weights_of(dataset: Dataset, options: DataOptions) -> I64 | None:
    """The weights of a dataset's labels; raises UserError where its manifest does not count them."""
    if options.balance == "none":
        return None
    counts = dataset.description.totals.get("by_label")
    if not isinstance(counts, list) or len(counts) != dataset.label_count:
        raise UserError(
            f"{dataset.url.rstrip('/')}/manifests/dataset.json does not count crops by label, which data.balance = "
            f"{options.balance} needs: prep the dataset again with this version, or --set data.balance=none"
        )
    return class_weights(counts, options.balance, options.max_repeat)


def resample_by_class(weights: I64, key: int) -> I64:
    """Which of a unit's crops (weights [n], in drawing order) are drawn instead, in drawing order: int64 [n]."""
    count = len(weights)
    edges = np.cumsum(weights)
    # Equally spaced points over the summed weights, from one drawn start; scaled by the count to stay whole numbers.
    start = int(randint(derive_key(key, 0), int(edges[-1]))[0])
    points = start + np.arange(count, dtype=np.int64) * edges[-1]
    chosen = np.searchsorted(edges * count, points, side="right")
    return chosen[permutation(derive_key(key, 1), count)]
