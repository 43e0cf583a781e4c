"""Jigsaws end to end: whose pixels are where, told from the pixels themselves."""

import itertools
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.dataset import layout
from jigsaw_pretrain.formats.dataset.dataset import Dataset
from jigsaw_pretrain.formats.jigsaw import GROUPS, REGION_GROUPS, Template
from jigsaw_pretrain.rng import key_of_text
from jigsaw_pretrain.train.data.augment import draw
from jigsaw_pretrain.train.data.batch import Batch
from jigsaw_pretrain.train.data.jigsaw import Assembler
from jigsaw_pretrain.train.data.lanes import GroupLanes
from jigsaw_pretrain.train.data.loader import JigsawLoader
from jigsaw_pretrain.train.data.reader import CropReader, LocalShards
from jigsaw_pretrain.train.data.sampler import CropSampler, slots_of
from jigsaw_pretrain.train.recipe import DataOptions
from tests.helpers.references import centred
from tests.helpers.sources import small_data
from tests.helpers.tiny import Colours, all_crops, flat_pictures, make_dataset, spoil

TEMPLATE = Template(96, 32)


def batches(dataset: Dataset, options: DataOptions, steps: int, **more: Any) -> list[Batch]:
    found = []
    for batch in JigsawLoader(dataset, options, workers=0, stop_step=steps, **more):
        found.append(Batch(batch.step, batch.images.clone(), batch.labels, batch.groups, batch.replaced, batch.digests))
    return found


def region_of(image: npt.NDArray[np.uint8], region: int) -> npt.NDArray[np.uint8]:
    place = TEMPLATE.regions[region]
    return image[place.top : place.top + place.height, place.left : place.left + place.width]


def flat_dataset(folder: Path, shards: dict[str, list[int]]) -> Dataset:
    return make_dataset(folder, shards, pictures=flat_pictures(shards))


def owners(dataset: Dataset, found: list[Batch]) -> list[list[dict[str, Any]]]:
    """For each jigsaw, the crops of its regions, checked against the batch's labels and groups."""
    colours = Colours(dataset)
    every = []
    for batch in found:
        for image, labels, groups in zip(batch.images.numpy(), batch.labels, batch.groups, strict=True):
            rows = [colours.owner(region_of(image, region)) for region in range(4)]
            assert [row["label"] for row in rows] == labels.tolist()
            assert [row["group"] for row in rows] == [GROUPS[code] for code in groups.tolist()]
            every.append(rows)
    return every


def area(row: dict[str, Any]) -> int:
    return int((row["right"] - row["left"]) * (row["bottom"] - row["top"]))


def test_every_region_holds_its_group_and_the_smaller_square_is_top_left(tmp_path: Path) -> None:
    dataset = flat_dataset(tmp_path, {"S": [20, 11], "T": [9], "W": [6, 7]})
    jigsaws = owners(dataset, batches(dataset, small_data(batch=8, lanes=4), 5))
    for rows in jigsaws:
        assert tuple(row["group"] for row in rows) == REGION_GROUPS
        assert area(rows[0]) <= area(rows[3])


@pytest.mark.parametrize("shards", [{"S": [9, 7], "T": [8], "W": [2, 2, 2, 2]}, {"S": [3], "T": [2], "W": [16]}])
def test_each_lane_cycle_draws_every_crop_equally_often(tmp_path: Path, shards: dict[str, list[int]]) -> None:
    dataset = flat_dataset(tmp_path, shards)
    # 4 lanes: after n jigsaws a lane, each group's streams have given 4 n crops a slot.
    jigsaws = owners(dataset, batches(dataset, small_data(batch=8, lanes=4), 24))
    drawn = Counter(row["key"] for rows in jigsaws for row in rows)
    for key, row in all_crops(dataset).items():
        of_group = sum(shards[row["group"]])
        slots = 2 if row["group"] == "S" else 1
        assert drawn[key] == 24 * 8 * slots / of_group


@pytest.mark.slow(seconds=3)
@settings(max_examples=12, deadline=None)
@given(
    shards=st.fixed_dictionaries({group: st.lists(st.integers(1, 9), max_size=5) for group in "STW"}).filter(
        lambda found: any(found.values())
    ),
    lanes=st.sampled_from([1, 2, 4, 6]),
)
def test_every_pass_draws_every_key_once(
    tmp_path_factory: pytest.TempPathFactory, shards: dict[str, list[int]], lanes: int
) -> None:
    dataset = make_dataset(tmp_path_factory.mktemp("pass"), shards, low=8, high=24)
    options = small_data(batch=lanes, lanes=lanes)
    reader = CropReader(dataset, LocalShards(dataset), capacity=3, with_keys=True)
    slots = slots_of(dataset, options)
    sampler = CropSampler(dataset, slots, options, range(lanes), reader)
    passes: dict[tuple[str, int], Counter[str]] = defaultdict(Counter)
    totals = {group: sum(counts) for group, counts in shards.items() if counts}
    for source in (source for source in slots.sources if source.share == 1):
        total, counts = totals[source.group], [shard.crops for shard in dataset.of_group(source.group)]
        group = GroupLanes(counts, lanes, key_of_text(options.seed, f"group {source.group}"))
        # A lane's share of a cycle of L passes is the group's size: its last jigsaw may begin the next cycle.
        jigsaws = -(-total // len(source.regions))
        for lane in range(lanes):
            substitute = draw(options, np.full(jigsaws, lane), np.arange(jigsaws)).substitute
            crops = sampler.chunk(lane, 0, jigsaws, substitute)[:, list(source.regions)]
            for position, key in enumerate(reader.keys(crops.reshape(-1))[:total]):
                passes[source.group, group.locate(lane, position).epoch][key] += 1
        keys = [key for key, row in all_crops(dataset).items() if row["group"] == source.group]
        for turn in range(lanes):
            assert passes[source.group, turn] == Counter(keys)


@pytest.mark.parametrize(
    ("shards", "expected"),
    [
        ({"S": [9]}, "SSSS"),
        ({"T": [9]}, "TTTT"),
        ({"W": [5, 4]}, "WWWW"),
        ({"S": [9], "W": [9]}, "SWSS"),
        ({"T": [5], "W": [9]}, "WWTW"),
    ],
)
def test_empty_groups(tmp_path: Path, shards: dict[str, list[int]], expected: str) -> None:
    dataset = flat_dataset(tmp_path, shards)
    jigsaws = owners(dataset, batches(dataset, small_data(batch=4, lanes=2), 6))
    assert {"".join(row["group"] for row in rows) for rows in jigsaws} == {expected}
    assert all(area(rows[0]) <= area(rows[3]) for rows in jigsaws)
    if expected == "SSSS":
        # Each lane's stream goes on by four a jigsaw: 24 draws of 2 lanes, 9 crops.
        drawn = Counter(row["key"] for rows in jigsaws for row in rows)
        assert len(drawn) == 9 and max(drawn.values()) - min(drawn.values()) <= 2 * 2


def test_a_thin_group_is_topped_up(tmp_path: Path) -> None:
    dataset = flat_dataset(tmp_path, {"S": [100, 100], "T": [1], "W": [50]})
    options = small_data(batch=20, lanes=10, max_repeat=10)
    loader = JigsawLoader(dataset, options, workers=0)
    assert any(note.startswith("few crops are tall") for note in loader.notes)
    jigsaws = owners(dataset, batches(dataset, options, 20))
    in_slot = Counter(rows[2]["group"] for rows in jigsaws)
    # The best-supplied crop is drawn 1 / 100 a jigsaw, so the one T crop may be drawn 10 / 100.
    assert in_slot == {"T": 40, "S": 360}
    substitutes = {rows[2]["key"] for rows in jigsaws if rows[2]["group"] == "S"}
    assert len(substitutes) > 50
    # They advance nothing: the S and W streams are those of a dataset whose T group is full.
    full = flat_dataset(tmp_path / "full", {"S": [100, 100], "T": [40], "W": [50]})

    def streams(of: Dataset) -> list[tuple[str, int]]:
        reader = CropReader(of, LocalShards(of), capacity=9)
        crops = CropSampler(of, slots_of(of, options), options, [3], reader).chunk(
            3, 0, 60, np.zeros((60, 4), np.uint64)
        )
        return [(of.shards[crop["shard"]].name, int(crop["row"])) for crop in crops[:, [0, 1, 3]].reshape(-1)]

    assert streams(dataset) == streams(full)


def test_unreadable_crops_are_replaced_and_counted_and_others_unchanged(tmp_path: Path) -> None:
    dataset = flat_dataset(tmp_path, {"S": [30], "T": [12], "W": [12]})
    options = small_data(batch=8, lanes=2)
    before = batches(dataset, options, 6)
    was = owners(dataset, before)
    bad = [next(key for key, row in all_crops(dataset).items() if row["group"] == group) for group in "ST"]
    colours = Colours(dataset)
    for key in bad:
        spoil(dataset, key)
    after = batches(dataset, options, 6)
    again = batches(dataset, options, 6)
    hit = [[row["key"] in bad for row in rows] for rows in was]
    assert sum(batch.replaced for batch in after) == sum(map(sum, hit)) > 0
    for step in range(6):
        assert after[step].replaced == sum(map(sum, hit[step * 8 : step * 8 + 8]))
        assert (after[step].images == again[step].images).all()
        for nth in range(8):
            if not any(hit[step * 8 + nth]):
                assert (after[step].images[nth] == before[step].images[nth]).all()
                continue
            rows = [colours.owner(region_of(after[step].images[nth].numpy(), region)) for region in range(4)]
            assert not {row["key"] for row in rows} & set(bad)
            assert tuple(row["group"] for row in rows) == REGION_GROUPS
            assert area(rows[0]) <= area(rows[3])
            kept = {row["key"] for row in was[step * 8 + nth]} - set(bad)
            assert kept <= {row["key"] for row in rows}


def test_a_group_of_one_unreadable_crop_a_unit_borrows_from_its_neighbours(tmp_path: Path) -> None:
    dataset = flat_dataset(tmp_path, {"S": [4, 1, 1], "T": [4], "W": [4]})
    for key, row in all_crops(dataset).items():
        if row["shard"] == "S-000001.tar":
            spoil(dataset, key)
    found = batches(dataset, small_data(batch=4, lanes=2), 6)
    assert sum(batch.replaced for batch in found) > 0


def test_a_group_without_one_readable_crop_stops_the_run(tmp_path: Path) -> None:
    dataset = flat_dataset(tmp_path, {"S": [4], "T": [2], "W": [4]})
    for key, row in all_crops(dataset).items():
        if row["group"] == "T":
            spoil(dataset, key)
    with pytest.raises(UserError, match="group T has no crop that can be decoded"):
        batches(dataset, small_data(batch=2, lanes=2), 1)


def test_a_missing_or_cut_shard_is_named(tmp_path: Path) -> None:
    dataset = flat_dataset(tmp_path, {"S": [4], "T": [2], "W": [4]})
    shard = tmp_path / layout.SHARDS / "T-000000.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:700])
    with pytest.raises(UserError, match="T-000000.tar has 700 bytes where the manifest says"):
        batches(dataset, small_data(batch=2, lanes=2), 1)
    shard.unlink()
    with pytest.raises(UserError, match="T-000000.tar is missing"):
        batches(dataset, small_data(batch=2, lanes=2), 1)


def test_without_augmentation_the_pixels_are_the_crops_own_centred(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, {"S": [5], "T": [3], "W": [3]}, low=20, high=90)
    options = small_data(batch=4, lanes=2, augment=False)
    assembler_keys = CropReader(dataset, LocalShards(dataset), capacity=9, with_keys=True)
    sampler = CropSampler(dataset, slots_of(dataset, options), options, range(2), assembler_keys)
    rows = all_crops(dataset)
    images = batches(dataset, options, 1)[0].images.numpy()
    for lane in range(2):
        drawn = sampler.chunk(lane, 0, 2, np.zeros((2, 4), dtype=np.uint64))
        for nth in range(2):
            wanted = np.zeros((96, 96, 3), dtype=np.uint8)
            chosen = [rows[key] for key in assembler_keys.keys(drawn[nth])]
            if area(chosen[0]) > area(chosen[3]):
                chosen[0], chosen[3] = chosen[3], chosen[0]
            for region, row in enumerate(chosen):
                place = TEMPLATE.regions[region]
                raw = (tmp_path / layout.SHARDS / row["shard"]).read_bytes()[row["offset"] :][: row["size"]]
                pixels = simplejpeg.decode_jpeg(raw)
                pixels = centred(pixels, place.height, place.width)
                region_of(wanted, region)[...] = pixels
            assert (images[lane * 2 + nth] == wanted).all()


def test_the_identity_names_all_that_chance_decided(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, {"S": [6], "T": [3], "W": [3]})
    base, left_before = small_data(batch=2, lanes=2), itertools.cycle([0, 255])

    def digests(options: DataOptions) -> tuple[tuple[bytes, bytes], ...]:
        # Whatever lay there before, such as the batch before last, is written over.
        out = np.full((2, 96, 96, 3), next(left_before), dtype=np.uint8)
        found = Assembler(dataset, options, [0, 1], with_digests=True).step(0, out).digests
        assert found is not None
        return found

    assert digests(base) == digests(small_data(batch=2, lanes=2))
    seen = {digests(base)[0]}
    for other in (
        small_data(batch=2, lanes=2, seed=1),
        small_data(batch=2, lanes=2, flip=0.0),
        small_data(batch=2, lanes=2, flip=1.0),
        small_data(batch=2, lanes=2, resize_high=1.6),
        small_data(batch=2, lanes=2, fit="warp"),
        small_data(batch=2, lanes=2, fit="resize"),
        small_data(batch=2, lanes=2, augment=False),
    ):
        seen.add(digests(other)[0])
    assert len({identity for identity, _ in seen}) >= 7
