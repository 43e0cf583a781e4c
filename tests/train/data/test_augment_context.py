"""Context drawn by the trainer: against a slow reference of single crops, from the formula to the pixels."""

import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st

from jigsaw_pretrain.formats.boxes import draw_crops, enlarge
from jigsaw_pretrain.formats.dataset import layout, schema
from jigsaw_pretrain.formats.dataset.dataset import EXTENDED, Dataset, open_dataset
from jigsaw_pretrain.formats.jigsaw import Template
from jigsaw_pretrain.rng import derive_key, key_of_text, random_u64, uniform
from jigsaw_pretrain.storage import Storage
from jigsaw_pretrain.train.commands.probe import read_crops
from jigsaw_pretrain.train.data import jigsaw
from jigsaw_pretrain.train.data.augment import draw, with_mean_context
from jigsaw_pretrain.train.data.jigsaw import Assembler
from jigsaw_pretrain.train.data.reader import CropReader, LocalShards
from jigsaw_pretrain.train.data.sampler import CropSampler, slots_of
from jigsaw_pretrain.train.recipe import StreamOptions
from tests.helpers.references import centred
from tests.helpers.tiny import CLASSES, all_crops, make_dataset

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
    for options in (StreamOptions(), StreamOptions(augment=False)):
        plain, more = draw(options, lanes, positions), draw(options, lanes, positions, with_shifts=True)
        assert plain.shifts is None and more.shifts is not None and more.shifts.shape == (2, 4, 4)
        assert len(np.unique(more.shifts)) == more.shifts.size
        for name in ("ratio", "flip", "across", "down", "substitute"):
            assert np.array_equal(getattr(plain, name), getattr(more, name))


def test_jigsaws_show_what_their_draws_say_and_squares_are_ordered_by_their_boxes(tmp_path: Path) -> None:
    dataset = in_context(tmp_path)
    assert dataset.drawn_context == 1.8
    options, rows = StreamOptions(seed=2, batch=24, lanes=2, augment=False), all_crops(dataset)
    reader = CropReader(dataset, LocalShards(dataset), capacity=9, with_keys=True)
    picks = CropSampler(dataset, slots_of(dataset, options), options, range(2), reader)
    images = np.zeros((24, 96, 96, 3), dtype=np.uint8)
    Assembler(dataset, TEMPLATE, options, range(2)).step(0, images)
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
    dataset, options = in_context(tmp_path), StreamOptions(batch=2, lanes=2, fit="warp", flip=0.0)

    def identities() -> list[bytes]:
        images = np.zeros((2, 96, 96, 3), dtype=np.uint8)
        found = Assembler(dataset, TEMPLATE, options, range(2), with_digests=True).step(0, images).digests
        assert found is not None
        return [identity for identity, _ in found]

    first = identities()
    assert first == identities()
    # Warped crops leave no other trace in an identity than their edges.
    monkeypatch.setattr(jigsaw, "enlarged", lambda crops, shifts, context: with_mean_context(crops, context))
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
