"""Draws, windows and context: pixels against slow references of whole resized images and of single crops."""

import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from jigsaw_pretrain.formats.boxes import draw_crops, enlarge
from jigsaw_pretrain.formats.dataset import layout, schema
from jigsaw_pretrain.formats.dataset.dataset import EXTENDED, Dataset, open_dataset
from jigsaw_pretrain.formats.jigsaw import Template
from jigsaw_pretrain.rng import derive_key, key_of_text, random_u64, uniform
from jigsaw_pretrain.storage.store import Storage
from jigsaw_pretrain.train.data import jigsaw
from jigsaw_pretrain.train.data.augment import (
    Draws,
    draw,
    jitter_colours,
    place_windows,
    resample,
    resample_channels,
    resized,
    with_mean_context,
)
from jigsaw_pretrain.train.data.jigsaw import Assembler
from jigsaw_pretrain.train.data.reader import CropReader, LocalShards
from jigsaw_pretrain.train.data.sampler import CropSampler, slots_of
from jigsaw_pretrain.train.probe import read_crops
from jigsaw_pretrain.train.recipe import DataOptions, Fit
from tests.helpers.references import centred
from tests.helpers.sources import small_data
from tests.helpers.tiny import CLASSES, all_crops, make_dataset

Pixels = npt.NDArray[np.uint8]


def smooth_image(width: int, height: int, seed: int = 0) -> Pixels:
    """Random, but without the hard edges that magnify a small difference of place."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (max(2, height // 8), max(2, width // 8), 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def weights(length: int, scaled: int) -> npt.NDArray[np.float64]:
    """Bilinear interpolation of one axis as a matrix [scaled, length], border pixels repeated."""
    matrix = np.zeros((scaled, length))
    for i in range(scaled):
        x = min(max((i + 0.5) * length / scaled - 0.5, 0), length - 1)
        low = int(np.floor(x))
        matrix[i, low] += 1 - (x - low)
        matrix[i, min(low + 1, length - 1)] += x - low
    return matrix


def area_weights(length: int, scaled: int) -> npt.NDArray[np.float64]:
    """Area averages of one axis as a matrix [scaled, length]."""
    matrix = np.zeros((scaled, length))
    step = length / scaled
    for i in range(scaled):
        for j in range(length):
            matrix[i, j] = max(0.0, min((i + 1) * step, j + 1) - max(i * step, j)) / step
    return matrix


def reference(pixels: Pixels, scaled: tuple[int, int], flip: bool, smooth: bool) -> npt.NDArray[np.float64]:
    """The whole crop, resized and flipped."""
    image = pixels.astype(np.float64)
    for axis, size in ((0, scaled[1]), (1, scaled[0])):
        kind = area_weights if smooth and size < image.shape[axis] else weights
        image = np.moveaxis(np.tensordot(kind(image.shape[axis], size), image, axes=(1, axis)), 0, axis)
    return image[:, ::-1] if flip else image


@pytest.mark.slow(seconds=4)
@pytest.mark.parametrize("fit", ["crop", "warp", "resize"])
@pytest.mark.parametrize("flip", [False, True])
def test_windows_are_those_of_the_whole_resized_crop(fit: Fit, flip: bool) -> None:
    template, rng = Template(128, 32), np.random.default_rng(1)
    for trial in range(12):
        sizes = rng.integers(8, 260, (1, 4, 2))
        options = DataOptions(seed=trial, fit=fit, flip=float(flip), batch=1, resize_low=0.3, resize_high=1.8)
        draws = draw(options, np.array([0]), np.array([trial]))
        windows = place_windows(sizes[..., 0], sizes[..., 1], draws, template, fit)
        for region, place in enumerate(windows.table()[0].tolist()):
            scaled_x, scaled_y, flipped, x, y, to_x, to_y, width, height, smooth = place
            assert bool(flipped) == flip
            pixels = smooth_image(int(sizes[0, region, 0]), int(sizes[0, region, 1]), seed=trial)
            canvas = np.zeros((128, 128, 3), dtype=np.uint8)
            out = canvas[to_y : to_y + height, to_x : to_x + width]
            resample(pixels, (scaled_x, scaled_y), flip, (x, y), bool(smooth), out)
            whole = reference(pixels, (scaled_x, scaled_y), flip, bool(smooth))
            wanted = whole[y : y + height, x : x + width]
            difference = np.abs(out - wanted)
            assert difference.max() <= 2, (fit, trial, region, place)
            assert difference.mean() <= 0.5
            canvas[to_y : to_y + height, to_x : to_x + width] = 0
            assert not canvas.any()


def test_large_crops_meet_an_independent_library() -> None:
    pixels = smooth_image(900, 700)
    out = np.zeros((160, 160, 3), dtype=np.uint8)
    resample(pixels, (1080, 840), False, (333, 217), False, out)
    whole = np.asarray(Image.fromarray(pixels).resize((1080, 840), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(whole[217:377, 333:493] - out).max() <= 2


def test_the_border_of_a_crop_is_not_blended_with_padding() -> None:
    for size, scaled in (((10, 10), (15, 15)), ((300, 300), (450, 450)), ((300, 40), (400, 53))):
        pixels = np.full((size[1], size[0], 3), 200, dtype=np.uint8)
        for smooth in (False, True):
            for start in ((0, 0), (max(0, scaled[0] - 100), max(0, scaled[1] - 100))):
                out = np.zeros((min(100, scaled[1]), min(100, scaled[0]), 3), dtype=np.uint8)
                resample(pixels, scaled, False, start, smooth, out)
                assert (out == 200).all()


def one(width: int, height: int, options: DataOptions, position: int = 0) -> tuple[Draws, list[list[int]]]:
    draws = draw(options, np.array([0]), np.array([position]))
    sizes = np.array([[width] * 4]), np.array([[height] * 4])
    return draws, place_windows(*sizes, draws, Template(), options.fit).table()[0].tolist()


def test_one_ratio_for_both_axes_from_the_range() -> None:
    options = DataOptions(batch=1)
    ratios = []
    for position in range(300):
        draws, places = one(1000, 500, options, position)
        for region, place in enumerate(places):
            ratio = float(draws.ratio[0, region])
            assert place[0] == round(1000 * ratio) and place[1] == round(500 * ratio)
            ratios.append(ratio)
    assert 0.8 <= min(ratios) < 0.81 and 1.49 < max(ratios) < 1.5
    assert np.mean(ratios) == pytest.approx(1.15, abs=0.03)


def test_places_cover_the_whole_range_in_each_axis() -> None:
    options = DataOptions(batch=1, resize_low=1, resize_high=1)
    cut, laid = set(), set()
    for position in range(400):
        _, places = one(170, 150, options, position)
        _, _, _, from_x, from_y, to_x, to_y, width, height, _ = places[3]
        assert (width, height, from_y, to_x) == (160, 150, 0, 64)
        cut.add(from_x)
        laid.add(to_y - 64)
    assert cut == set(range(11)) and laid == set(range(11))


def test_without_augmentation_all_is_centred() -> None:
    for position in range(5):
        draws, places = one(170, 100, DataOptions(batch=1, augment=False), position)
        assert (draws.ratio == 1).all() and not draws.flip.any()
        assert places[3] == [170, 100, 0, 5, 0, 64, 64 + 30, 160, 100, 0]


def test_resize_fits_inside_and_warp_fills() -> None:
    options = DataOptions(batch=1, fit="resize")
    _, places = one(300, 100, options)
    # 160 x 53.33 in the large square, 64 x 21.33 in the small one.
    assert [place[:2] for place in places] == [[64, 21], [160, 53], [64, 21], [160, 53]]
    _, places = one(10, 10, options)
    assert [place[:2] for place in places] == [[64, 64], [64, 64], [64, 64], [160, 160]]
    _, places = one(300, 100, DataOptions(batch=1, fit="warp"))
    assert [place[:2] for place in places] == [[64, 64], [160, 64], [64, 160], [160, 160]]


def test_a_crop_never_vanishes() -> None:
    _, places = one(1, 1, DataOptions(batch=1, resize_low=0.1, resize_high=0.1))
    assert all(place[:2] == [1, 1] and place[7:9] == [1, 1] for place in places)
    _, places = one(5000, 3, DataOptions(batch=1, fit="resize"))
    assert all(place[1] >= 1 for place in places)


def test_sides_beyond_the_warp_of_opencv() -> None:
    pixels = np.full((2, 40_000, 3), 90, dtype=np.uint8)
    out = np.zeros((2, 100, 3), dtype=np.uint8)
    resample(pixels, (40_000, 2), True, (123, 0), False, out)
    assert (out == 90).all()


@given(
    st.integers(1, 9), st.sampled_from(["uint8", "uint16", "float32"]), st.booleans(), st.booleans(), st.integers(0, 9)
)
def test_windows_of_many_channels_are_those_of_each(
    channels: int, dtype: str, flip: bool, smooth: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    height, width, rows, columns = (int(side) for side in rng.integers(8, 40, 4))
    scaled = columns + int(rng.integers(0, 60)), rows + int(rng.integers(0, 60))
    start = tuple(int(rng.integers(0, whole - part + 1)) for whole, part in zip(scaled, (columns, rows), strict=True))
    pixels = (rng.random((height, width, channels)) * 255).astype(dtype)
    out = np.zeros((rows + 3, columns + 3, channels), dtype=dtype)
    resample_channels(pixels, scaled, flip, (start[0], start[1]), smooth, out[1:-2, 2:-1])
    for channel in range(channels):
        one = np.zeros((rows, columns), dtype=dtype)
        resample(np.ascontiguousarray(pixels[..., channel]), scaled, flip, (start[0], start[1]), smooth, one)
        difference = np.abs(out[1:-2, 2:-1, channel].astype(float) - one.astype(float))
        # OpenCV's kernels for one and for four channels round apart.
        assert difference.max() <= (0.01 if dtype == "float32" else 1)
    assert not out[0].any() and not out[:, :2].any()
    assert resized(pixels, (7, 5), cv2.INTER_AREA).shape == (5, 7, channels)


TEMPLATE = Template(96, 32)


Box = tuple[int, int, int, int]


def in_context(folder: Path, context: float = 1.8) -> Dataset:
    """A tiny dataset whose members are all of the context of boxes drawn inside them; background has margins too."""
    dataset = make_dataset(folder, {"S": [9, 7], "T": [6], "W": [8]}, low=20, high=70)
    rng, tables = np.random.default_rng(5), []
    for shard in dataset.shards:
        rows = pq.ParquetFile(folder / layout.CROPS).read_row_group(shard.index).to_pylist()
        for row in rows:
            width, height = row["right"] - row["left"], row["bottom"] - row["top"]
            x, y = rng.uniform(0, 0.4, 2) * (width, height)
            w, h = rng.uniform(0.3, 0.6, 2) * (width, height)
            edges = (math.floor(x), math.floor(y), math.ceil(x + w), math.ceil(y + h))
            row |= dict(
                zip(schema.MARGINS, (edges[0], edges[1], width - edges[2], height - edges[3]), strict=True),
            )
            row |= {"right": row["left"] + edges[2], "bottom": row["top"] + edges[3]}
            row |= {"left": row["left"] + edges[0], "top": row["top"] + edges[1]}
            box = (3 + x, 5 + y, w, h) if row["label"] < len(CLASSES) else (None,) * 4
            row |= dict(zip(schema.BOX, box, strict=True))
        tables.append(pa.Table.from_pylist(rows, schema=schema.crops_schema(EXTENDED)))
    storage = Storage(folder)
    storage.publish(layout.CROPS, schema.table_bytes(schema.crops_schema(EXTENDED), tables))
    description = (folder / layout.DATASET).read_text().replace('"format_version": 1', '"format_version": 2')
    options = f'"options": {{"context": {context}, "context_at": "train"}}'
    storage.publish(layout.DATASET, description.replace('"options": {}', options).encode())
    return open_dataset(str(folder))


def member_of(row: dict[str, Any]) -> Box:
    """What is stored of a crop, in pixels of its image."""
    left, top, right, bottom = (row[name] for name in schema.MARGINS)
    return row["left"] - left, row["top"] - top, row["right"] + right, row["bottom"] + bottom


def shown(row: dict[str, Any], shifts: Any, context: float) -> Box:
    """What is shown of a crop for these shifts."""
    if row["box_x"] is None:
        return row["left"], row["top"], row["right"], row["bottom"]
    x, y, w, h = (row[name] for name in schema.BOX)
    left, top, right, bottom = member_of(row)
    reach = [(context - 1) / 2 * float(shift) for shift in shifts]
    return (
        max(left, math.floor(x - reach[0] * w)),
        max(top, math.floor(y - reach[1] * h)),
        min(right, math.ceil(x + w + reach[2] * w)),
        min(bottom, math.ceil(y + h + reach[3] * h)),
    )


def pixels_of(folder: Path, row: dict[str, Any], edges: Box) -> np.ndarray:
    raw = (folder / layout.SHARDS / row["shard"]).read_bytes()[row["offset"] :][: row["size"]]
    left, top, _, _ = member_of(row)
    return np.asarray(simplejpeg.decode_jpeg(raw))[edges[1] - top : edges[3] - top, edges[0] - left : edges[2] - left]


def area(row: dict[str, Any]) -> int:
    return int((row["right"] - row["left"]) * (row["bottom"] - row["top"]))


share = st.floats(0, 1, exclude_max=True)


number = st.floats(-50, 150)


side = st.floats(0.01, 200)


@given(st.tuples(number, number, side, side), st.tuples(share, share, share, share), st.floats(1, 4))
def test_no_draw_leaves_the_member_that_prep_cut_or_the_box(
    box: tuple[float, ...], shifts: tuple[float, ...], context: float
) -> None:
    image, xywh = np.array([0, 0, 100, 80]), np.array(box)
    member, none = enlarge(xywh, np.ones(4), context, image), enlarge(xywh, np.zeros(4), context, image)
    in_image = enlarge(xywh, np.array(shifts), context, image)
    # The member's edges stand in for the image's: they are all that the trainer knows.
    in_member = draw_crops(none, xywh, np.array(shifts), context, member)
    assert in_member.tolist() == in_image.tolist()
    assert (member[:2] <= in_member[:2]).all() and (in_member[:2] <= none[:2]).all()
    assert (member[2:] >= in_member[2:]).all() and (in_member[2:] >= none[2:]).all()


def test_the_other_draws_are_the_same_with_and_without_context() -> None:
    lanes, positions = np.array([0, 3]), np.array([7, 10**9])
    for options in (DataOptions(), DataOptions(augment=False)):
        plain, more = draw(options, lanes, positions), draw(options, lanes, positions, with_shifts=True)
        assert plain.shifts is None and more.shifts is not None and more.shifts.shape == (2, 4, 4)
        assert len(np.unique(more.shifts)) == more.shifts.size
        for name in ("ratio", "flip", "across", "down", "substitute"):
            assert np.array_equal(getattr(plain, name), getattr(more, name))


def test_jigsaws_show_what_their_draws_say_and_squares_are_ordered_by_their_boxes(tmp_path: Path) -> None:
    dataset = in_context(tmp_path)
    assert dataset.drawn_context == 1.8
    options, rows = small_data(seed=2, batch=24, lanes=2, augment=False), all_crops(dataset)
    reader = CropReader(dataset, LocalShards(dataset), capacity=9, with_keys=True)
    picks = CropSampler(dataset, slots_of(dataset, options), options, range(2), reader)
    images = np.zeros((24, 96, 96, 3), dtype=np.uint8)
    Assembler(dataset, options, range(2)).step(0, images)
    contrary = 0
    for nth, image in enumerate(images):
        lane, position = divmod(nth, 12)
        drawn = picks.chunk(lane, position, 1, np.zeros((1, 4), dtype=np.uint64))[0]
        chosen = [rows[key] for key in reader.keys(drawn)]
        if area(chosen[0]) > area(chosen[3]):
            chosen[0], chosen[3] = chosen[3], chosen[0]
        wanted, sizes = np.zeros_like(image), []
        for region, row in enumerate(chosen):
            place = TEMPLATE.regions[region]
            raw = random_u64(derive_key(key_of_text(2, "augment"), lane, position, region), 9)[0]
            pixels = pixels_of(tmp_path, row, shown(row, uniform(raw[5:]), 1.8))
            sizes.append(pixels.shape[0] * pixels.shape[1])
            pixels = centred(pixels, place.height, place.width)
            wanted[place.top : place.top + place.height, place.left : place.left + place.width] = pixels
        assert (image == wanted).all()
        contrary += sizes[0] > sizes[3]
    assert contrary


def test_the_identity_covers_the_drawn_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, options = in_context(tmp_path), small_data(batch=2, lanes=2, fit="warp", flip=0.0)

    def identities() -> list[bytes]:
        images = np.zeros((2, 96, 96, 3), dtype=np.uint8)
        found = Assembler(dataset, options, range(2), with_digests=True).step(0, images).digests
        assert found is not None
        return [identity for identity, _ in found]

    first = identities()
    assert first == identities()
    # Warped crops leave no other trace in an identity than their edges.
    monkeypatch.setattr(jigsaw, "with_drawn_context", lambda crops, shifts, context: with_mean_context(crops, context))
    assert not set(first) & set(identities())


def test_the_probe_takes_half_of_the_context(tmp_path: Path) -> None:
    dataset = in_context(tmp_path)
    rows = list(all_crops(dataset).values())
    found = read_crops(dataset, 64, 1000)
    assert found.labels.tolist() == [row["label"] for row in rows]
    halves = [shown(row, [0.5] * 4, 1.8) for row in rows]
    assert any(row["label"] == len(CLASSES) for row in rows)
    reader = CropReader(dataset, LocalShards(dataset), capacity=9)
    crops = np.concatenate([with_mean_context(reader.crops(shard.index), 1.8) for shard in dataset.shards])
    edges = [(c["left"], c["top"], c["left"] + c["width"], c["top"] + c["height"]) for c in crops]
    assert edges == halves
    nth = next(i for i, row in enumerate(rows) if row["label"] < len(CLASSES))
    pixels = pixels_of(tmp_path, rows[nth], halves[nth])
    method = cv2.INTER_AREA if pixels.shape[0] * pixels.shape[1] > 64 * 64 else cv2.INTER_LINEAR
    assert (found.pixels[nth] == cv2.resize(np.ascontiguousarray(pixels), (64, 64), interpolation=method)).all()


@given(
    st.sampled_from(["uint8", "uint16", "int16", "float32"]),
    st.integers(1, 6),
    st.integers(0, 2**32),
    st.floats(0, 0.9),
)
def test_jittered_colours_are_those_of_the_formula(dtype: str, channels: int, seed: int, strength: float) -> None:
    random = np.random.default_rng(seed)
    jigsaw = (random.random((20, 30, channels)) * 255).astype(dtype)
    factors = 1 + strength * (2 * random.random(1 + channels) - 1)
    before, window = jigsaw.copy(), jigsaw[3:17, 5:]
    x = window.astype(np.float64)
    means = [x[..., channel].sum() / x[..., channel].size for channel in range(channels)]
    wanted = factors[1:] * (means + factors[0] * (x - means))
    if dtype != "float32":
        wanted = np.clip(wanted, np.iinfo(dtype).min, np.iinfo(dtype).max)
    jitter_colours(window, factors)
    np.testing.assert_allclose(window, wanted, atol=0.51 if dtype != "float32" else 1e-3)
    assert (
        (jigsaw[:3] == before[:3]).all()
        and (jigsaw[17:] == before[17:]).all()
        and (jigsaw[:, :5] == before[:, :5]).all()
    )


def test_jitter_is_drawn_apart_from_all_else_and_changes_pixels_alone(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, {"S": [9], "T": [5], "W": [5]})
    images, draws = [], []
    for options in (small_data(batch=4, lanes=2), small_data(batch=4, lanes=2, jitter=0.4)):
        out = np.zeros((4, 96, 96, 3), dtype=np.uint8)
        found = Assembler(dataset, options, range(2)).step(0, out)
        images.append((out, found))
        draws.append(draw(options, np.array([0, 1]), np.array([3, 4])))
    plain, jittered = draws
    assert plain.jitter is None and jittered.jitter is not None and jittered.jitter.shape == (2, 4, 4)
    assert np.abs(jittered.jitter - 1).max() <= 0.4 and len(np.unique(jittered.jitter)) == jittered.jitter.size
    for name in ("ratio", "flip", "across", "down", "substitute"):
        assert np.array_equal(getattr(plain, name), getattr(jittered, name))
    (first, one), (second, other) = images
    assert (one.labels == other.labels).all()
    assert (first[0] != second[0]).any(axis=-1).mean() > 0.2
    # What no crop covers stays zero.
    tiny = small_data(batch=4, lanes=2, jitter=0.4, resize_low=0.05, resize_high=0.05)
    Assembler(dataset, tiny, range(2)).step(0, second)
    assert 0.5 < (second == 0).mean() < 1
    assert draw(small_data(jitter=0.4, augment=False), np.array([0]), np.array([0])).jitter is None


def test_padding_is_even_where_asked_and_cropping_stays_random() -> None:
    template, sizes = Template(), np.array([[20, 300, 30, 400]])
    found = {}
    for pad in ("random", "centre"):
        places = []
        for trial in range(30):
            draws = draw(
                DataOptions(seed=trial, batch=1, resize_low=1, resize_high=1), np.zeros(1, int), np.zeros(1, int)
            )
            places.append(place_windows(sizes, sizes, draws, template, "crop", pad))
        found[pad] = places
    for nth, region in enumerate(template.regions):
        for one, other in zip(*found.values(), strict=True):
            assert (one.from_x[0, nth], one.width[0, nth]) == (other.from_x[0, nth], other.width[0, nth])
        lefts = {int(one.to_x[0, nth]) - region.left for one in found["centre"]}
        assert lefts == {max(0, region.width - int(sizes[0, nth])) // 2}
    assert len({int(one.to_x[0, 0]) for one in found["random"]}) > 5
