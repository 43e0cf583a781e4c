"""Chooses the four crops of each jigsaw from counts alone, before any pixel is read.

The arithmetic of data/lanes.py and formats/jigsaw.py applied to a dataset's shards. About 5 us per jigsaw as long as
lanes stay in their units; opening a unit sorts its crops, about 0.1 ms, and the first of a shard reads its rows, about
3 ms. Positions may be asked for in any order; ascending order is what is fast.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from jigsaw_pretrain.formats.dataset.dataset import Dataset
from jigsaw_pretrain.formats.jigsaw import GROUPS, REGIONS, SlotPlan, SlotSource, by_aspect, fill_slots
from jigsaw_pretrain.rng import U64, derive_key, key_of_text, permutation, randint
from jigsaw_pretrain.train.data.lanes import I64, GroupLanes, OpenUnit, resample_by_class, weights_of
from jigsaw_pretrain.train.data.reader import CropArray, CropReader
from jigsaw_pretrain.train.data.remote import FIRST, NEXT
from jigsaw_pretrain.train.recipe import DataOptions


def slots_of(dataset: Dataset, options: DataOptions) -> SlotPlan:
    """How a dataset's groups fill the slots; raises UserError for a dataset without crops."""
    counts = {group: sum(shard.crops for shard in dataset.of_group(group)) for group in GROUPS}
    return fill_slots(counts, options.max_repeat)


class _Stream:
    """One lane's stream of one group, with the unit that it has open."""

    def __init__(
        self, lanes: GroupLanes, lane: int, shards: Sequence[int], reader: CropReader, balance: tuple[int, I64 | None]
    ) -> None:
        self._lanes, self._lane, self._shards, self._reader = lanes, lane, shards, reader
        self._balance_key, self._weights = balance
        self._opened: OpenUnit | None = None
        self._crops: CropArray = np.empty(0, dtype=reader.dtype)

    def opened(self, position: int) -> tuple[OpenUnit, CropArray]:
        """The unit open at a position and its crops in drawing order."""
        unit = self._opened
        if unit is None or not unit.first <= position < unit.end:
            unit = self._opened = self._lanes.locate(self._lane, position)
            self.ask(unit.end, NEXT)
            self._crops = self._reader.crops(self._shards[unit.shard])[self._lanes.rows(unit)]
            if self._weights is not None:
                key = int(derive_key(self._balance_key, unit.epoch, unit.unit)[0])
                self._crops = self._crops[resample_by_class(self._weights[self._crops["label"]], key)]
        return unit, self._crops

    def ask(self, position: int, urgency: int) -> None:
        """Fetch ahead the shard that a position falls in."""
        self._reader.ask(self._shards[self._lanes.locate(self._lane, position).shard], urgency)

    def take(self, first: int, count: int) -> CropArray:
        """The crops at positions ``first`` to ``first + count`` exclusive."""
        unit, crops = self.opened(first)
        if first + count <= unit.end:
            return crops[first - unit.first : first - unit.first + count]
        # Written in place: np.concatenate spends more on looking at the fields than on the crops.
        taken, done = np.empty(count, dtype=self._reader.dtype), 0
        while done < count:
            unit, crops = self.opened(first + done)
            part = crops[first + done - unit.first : first + count - unit.first]
            taken[done : done + len(part)] = part
            done += len(part)
        return taken


class CropSampler:
    """The crops that the jigsaws of ``lanes`` take from a dataset.

    ``lanes`` are the lanes to be asked for, of ``options.lane_count`` in all.
    """

    def __init__(
        self, dataset: Dataset, slots: SlotPlan, options: DataOptions, lanes: Sequence[int], reader: CropReader
    ) -> None:
        self._slots, self._count = slots, options.lane_count
        self._replacement_key = key_of_text(options.seed, "unreadable")
        self._reader = reader
        self._groups: dict[str, GroupLanes] = {}
        self._shards: dict[str, list[int]] = {}
        self._streams: dict[tuple[int, str], _Stream] = {}
        weights = weights_of(dataset, options)
        for source in slots.sources:
            balance = (key_of_text(options.seed, f"balance {source.group}"), weights)
            of_group = dataset.of_group(source.group)
            shards = self._shards[source.group] = [shard.index for shard in of_group]
            group = self._groups[source.group] = GroupLanes(
                [shard.crops for shard in of_group], self._count, key_of_text(options.seed, f"group {source.group}")
            )
            for lane in lanes:
                self._streams[lane, source.group] = _Stream(group, lane, shards, reader, balance)

    def begin(self, first: int) -> None:
        """Fetch the shards that all lanes read for their jigsaw ``first`` at once, before any lane waits for one."""
        for (lane, group), stream in self._streams.items():
            source = self._slots.source(group)
            stream.ask(source.drawn_before(first * len(source.regions), lane, self._count), FIRST)

    def chunk(self, lane: int, first: int, count: int, substitute: U64) -> CropArray:
        """The crops of a lane's jigsaws ``first`` to ``first + count`` exclusive: CROP [count, 4] by slot.

        substitute: words [count, 4], one per slot. The two S slots are in drawing order, not yet in order of area.
        """
        out = np.empty((count, len(REGIONS)), dtype=self._reader.dtype)
        for source in self._slots.sources:
            width = len(source.regions)
            if source.share == 1:
                taken = self._streams[lane, source.group].take(first * width, count * width)
                out[:, source.regions] = taken.reshape(count, width)
            else:
                self._chunk_of_thin(lane, first, source, substitute, out)
        return out

    def _chunk_of_thin(self, lane: int, first: int, source: SlotSource, substitute: U64, out: CropArray) -> None:
        width = len(source.regions)
        for nth in range(len(out)):
            for ordinal, region in enumerate(source.regions):
                slot = (first + nth) * width + ordinal
                own = source.drawn_before(slot, lane, self._count)
                if own < source.drawn_before(slot + 1, lane, self._count):
                    out[nth, region] = self._streams[lane, source.group].take(own, 1)[0]
                else:
                    crops = self._opened(lane, str(source.topped_up_from), first + nth)
                    out[nth, region] = crops[int(randint(substitute[nth, region], len(crops))[0])]

    def _opened(self, lane: int, group: str, position: int) -> CropArray:
        """The crops of the unit that a lane has open in a group as its jigsaw ``position`` begins."""
        source = self._slots.source(group)
        at = source.drawn_before(position * len(source.regions), lane, self._count)
        return self._streams[lane, group].opened(at)[1]

    def replacements(self, lane: int, position: int, slot: int, crop: CropArray) -> Iterator[CropArray]:
        """What may replace an unreadable crop (CROP scalar) in a slot, best first: CROP scalars.

        The crops of its unit in a keyed order, then those of its shard, then those of its group's other shards. All
        crops of a shard that is left out are replaced from the same other shard, so that no more than one has to be
        fetched for it; where its group has no other, from the next group by aspect.
        """
        group = GROUPS[int(crop["group"])]
        shards = self._shards[group]
        home = shards.index(int(crop["shard"]))
        key = derive_key(self._replacement_key, lane, position, slot)

        def shuffled(crops: CropArray, purpose: int) -> CropArray:
            return crops[permutation(derive_key(key, purpose), len(crops))]

        gone = shards[home] in self._reader.left_out
        order_key = derive_key(self._replacement_key, shards[home]) if gone else derive_key(key, 2)
        order = permutation(order_key, len(shards))
        others = [shards[nth] for nth in order.tolist()]
        if gone:
            others += [shard for name in by_aspect(group, self._slots.counts) for shard in self._shards.get(name, [])]
        else:
            low, high = self._groups[group].unit_rows(home, int(crop["row"]))
            own = self._reader.crops(shards[home])
            yield from shuffled(own[low:high], 0)
            yield from shuffled(own, 1)
        for other in others:
            if other != shards[home] and other not in self._reader.left_out:
                yield from shuffled(self._reader.crops(other), 3)


def sort_square_crops(drawn: CropArray) -> CropArray:
    """Crops by region from crops by slot, CROP [n, 4]: the smaller of the two S slots' by area goes top left.

    Where the trainer draws the context that is the area of the boxes, for the crops are as read.
    """
    area = drawn["width"].astype(np.int64) * drawn["height"]
    small, large = REGIONS.index("S-small"), REGIONS.index("S-large")
    swap: npt.NDArray[np.bool_] = area[:, small] > area[:, large]
    crops = drawn.copy()
    crops[swap, small], crops[swap, large] = drawn[swap, large], drawn[swap, small]
    return crops
