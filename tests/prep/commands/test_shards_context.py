"""``--context-at train``: what is stored against the annotations, and the trainer's enlargement against prep's own."""

import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from click.testing import CliRunner
from PIL import Image

from jigsaw_pretrain.formats.dataset import schema
from jigsaw_pretrain.formats.dataset.dataset import open_dataset
from jigsaw_pretrain.formats.jigsaw import aspect_group
from jigsaw_pretrain.prep.commands.report import report
from jigsaw_pretrain.prep.commands.retry_skipped import retry_skipped
from jigsaw_pretrain.prep.commands.status import status
from jigsaw_pretrain.prep.commands.verify import verify
from jigsaw_pretrain.prep.plan import plan as plans
from jigsaw_pretrain.prep.plan.crop_table import expected_sizes, margins
from jigsaw_pretrain.prep.plan.forecast import slot_fill
from jigsaw_pretrain.rng import derive_key, key_of_text, random_u64, uniform
from jigsaw_pretrain.train.cli import main as train
from jigsaw_pretrain.train.data.augment import with_drawn_context, with_mean_context
from jigsaw_pretrain.train.data.reader import SOURCE, CropReader, LocalShards
from tests.helpers.prepped import Drawn, inputs, invoke, needs_turbojpeg, rows, run_shards, tree

Edges = tuple[int, int, int, int]
OPTIONS = ("--context-at", "train", "--negatives-per-positive", "0.5", "--crops-per-part", "20", "--workers", "1")
SHAPES = ((40, 40), (20, 60), (70, 30), (9.5, 19.1), (12.2, 24.4), (33.3, 22.2))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images with boxes in the middle and over their edges."""
    drawn = Drawn(tmp_path_factory.mktemp("source"))
    rng = np.random.default_rng(7)
    for nth in range(8):
        size = (320, 240) if nth % 2 else (200, 260)
        boxes = [(*np.round(rng.uniform(-10, (size[0] - 30, size[1] - 30)), 2).tolist(), *wh) for wh in SHAPES]
        drawn.add(f"{nth}.jpg", size, boxes)
    drawn.box(1, [-30, 20, 80, 50])  # Wide as annotated, square as far as it can be seen.
    drawn.box(2, [100, 100, 90, 60], iscrowd=1)
    drawn.write()
    return drawn.folder


@pytest.fixture(scope="module")
def made(source: Path) -> Path:
    result = run_shards(source / "annotations.json", source / "images", source / "train", *OPTIONS)
    assert result.exit_code == 0, result.output
    # A table's title is wrapped to the table's width.
    shown = " ".join(result.output.split())
    assert "drawn by the trainer" in shown and "surroundings of mean size" in shown
    return source / "train"


@pytest.fixture(scope="module")
def at_prep(source: Path) -> Path:
    result = run_shards(source / "annotations.json", source / "images", source / "prep", "--workers", "1")
    assert result.exit_code == 0, result.output
    return source / "prep"


def within(edges: tuple[float, ...], size: tuple[int, int]) -> Edges:
    left, top, right, bottom = edges
    return (
        max(0, math.floor(left)),
        max(0, math.floor(top)),
        min(size[0], math.ceil(right)),
        min(size[1], math.ceil(bottom)),
    )


def box_of(row: dict[str, Any], reach: float, size: tuple[int, int]) -> Edges:
    x, y, w, h = (row[name] for name in schema.BOX)
    return within((x - reach * w, y - reach * h, x + w + reach * w, y + h + reach * h), size)


def member_of(row: dict[str, Any]) -> Edges:
    left, top, right, bottom = (row[name] for name in schema.MARGINS)
    return row["left"] - left, row["top"] - top, row["right"] + right, row["bottom"] + bottom


def test_members_hold_all_of_the_context_and_rows_the_box(source: Path, made: Path) -> None:
    lists = json.loads((source / "annotations.json").read_text())
    sizes = {image["file_name"]: (image["width"], image["height"]) for image in lists["images"]}
    crops = rows(made, "crops")
    objects = [row for row in crops if row["box_x"] is not None]
    assert len(objects) == 8 * len(SHAPES) + 1 and len(crops) > len(objects)
    for row in crops:
        edges, size = (row["left"], row["top"], row["right"], row["bottom"]), sizes[row["image_file"]]
        shape: tuple[float, float] = edges[2] - edges[0], edges[3] - edges[1]
        if row["box_x"] is None:
            assert member_of(row) == edges
            for other in objects:
                if other["image_file"] == row["image_file"]:
                    left, top, right, bottom = box_of(other, 0.5, size)
                    apart = right <= edges[0] or left >= edges[2] or bottom <= edges[1] or top >= edges[3]
                    assert apart
        else:
            assert edges == box_of(row, 0.0, size) and member_of(row) == box_of(row, 0.5, size)
            x, y, w, h = (row[name] for name in schema.BOX)
            if x >= 0 and y >= 0 and x + w <= size[0] and y + h <= size[1]:
                shape = w, h
            else:
                shape = min(x + w, size[0]) - max(x, 0), min(y + h, size[1]) - max(y, 0)
        assert row["group"] == aspect_group(*shape)
        raw = (made / "shards" / row["shard"]).read_bytes()[row["offset"] :][: row["size"]]
        left, top, right, bottom = member_of(row)
        pixels = np.asarray(Image.open(source / "images" / row["image_file"]))[top:bottom, left:right].astype(float)
        found = np.asarray(Image.open(io.BytesIO(raw))).astype(float)
        assert found.shape == pixels.shape and np.abs(found - pixels).mean() < 3


def test_equal_shifts_give_the_crops_that_prep_enlarges(made: Path, at_prep: Path) -> None:
    begun = json.loads((at_prep / "manifests/plan.json").read_text())
    assert begun["format_version"] == 1 and "context_at" not in begun["options"]
    fixed = {row["key"]: row for row in rows(at_prep, "crops") if row["box_x"] is not None}
    dataset = open_dataset(str(made))
    reader = CropReader(dataset, LocalShards(dataset), capacity=9, with_keys=True)
    found = set()
    by_key = {row["key"]: row for row in rows(made, "crops")}
    for shard in dataset.shards:
        crops = reader.crops(shard.index)
        keys = reader.keys(crops)
        images = np.array([key_of_text(0, by_key[key]["image_id"]) for key in keys], dtype=np.uint64)
        ordinals = np.array([by_key[key]["ordinal"] for key in keys])
        shifts = uniform(random_u64(derive_key(derive_key(images, plans._ENLARGE), ordinals), 4))
        assert dataset.drawn_context == 2
        for key, crop in zip(keys, with_drawn_context(crops, shifts, dataset.drawn_context), strict=True):
            if key in fixed:
                row = fixed[key]
                edges = (crop["left"], crop["top"], crop["left"] + crop["width"], crop["top"] + crop["height"])
                assert edges == (row["left"], row["top"], row["right"], row["bottom"])
                found.add(key)
    assert found == fixed.keys()


def test_background_follows_the_sizes_of_boxes_enlarged_once(made: Path, at_prep: Path) -> None:
    fixed = [row for row in rows(at_prep, "crops") if row["box_x"] is not None]
    sizes = {(row["right"] - row["left"], row["bottom"] - row["top"]) for row in fixed}
    empty = [row for row in rows(made, "crops") if row["box_x"] is None]
    assert {(row["right"] - row["left"], row["bottom"] - row["top"]) for row in empty} <= sizes


def test_slot_fill_is_that_of_the_mean_context(made: Path) -> None:
    crops = rows(made, "crops")
    boxes = np.array([[row[name] for name in schema.EDGES] for row in crops])
    outer = np.array([member_of(row) for row in crops])
    assert (margins(boxes, outer) == [[row[name] for name in schema.MARGINS] for row in crops]).all()
    truth = np.array([[row[name] for name in schema.BOX] for row in crops], dtype=np.float64)
    sizes = expected_sizes(boxes, truth, outer, 2.0)
    for row, size in zip(crops, sizes.tolist(), strict=True):
        left, top, right, bottom = member_of(row)
        if row["box_x"] is None:
            assert size == [right - left, bottom - top]
        elif left > 0 and top > 0 and right < 200 and bottom < 240:
            assert 0 <= size[0] - 1.5 * row["box_width"] < 2 and 0 <= size[1] - 1.5 * row["box_height"] < 2
    groups = ["STW".index(row["group"]) for row in crops]
    slots = {slot.name: round(slot.fill, 3) for slot in slot_fill(sizes[:, 0], sizes[:, 1], groups)}
    assert json.loads((made / "manifests/dataset.json").read_text())["totals"]["slot_fill"] == slots


@pytest.mark.slow(seconds=3)
def test_every_command_holds_for_such_a_dataset(source: Path, made: Path, tmp_path: Path) -> None:
    out, annotations, images = tmp_path / "out", source / "annotations.json", tmp_path / "images"
    shutil.copytree(source / "images", images)
    (images / "3.jpg").write_bytes(b"")
    plan = run_shards(annotations, images, out, *OPTIONS, "--dry-run")
    assert plan.exit_code == 0 and "mean size" in " ".join(plan.output.split()) and not out.exists()
    more = ("--max-skipped", "1")
    told = run_shards(annotations, images, out, *OPTIONS, "--task-index", "1", "--task-count", "2", *more)
    assert told.exit_code == 0, told.output
    again = run_shards(annotations, images, out, *OPTIONS[2:])
    assert again.exit_code != 0 and "context_at" in again.output and "Traceback" not in again.output
    finished = run_shards(annotations, images, out, *OPTIONS, *more)
    assert finished.exit_code == 0, finished.output
    assert invoke(status, "--out", str(out)).exit_code == 0
    shutil.copy(source / "images" / "3.jpg", images)
    mended = invoke(retry_skipped, "--out", str(out), *inputs(annotations, images), "--workers", "1")
    assert mended.exit_code == 0, mended.output
    assert tree(out) == tree(made)
    shard = out / "shards" / "S-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-1])
    repaired = invoke(verify, "--out", str(out), *inputs(annotations, images), "--workers", "1", "--repair")
    # Every other crop is of the size that its row and margins say.
    assert repaired.exit_code == 0 and "another size than" not in repaired.output and "repaired" in repaired.output
    assert tree(out) == tree(made)
    assert invoke(report, "--out", str(out)).exit_code == 0
    assert "drawn anew each time" in " ".join((out / "report.html").read_text().split())


@needs_turbojpeg
def test_lossless_members_show_the_same_crops_in_the_sources_pixels(source: Path, made: Path) -> None:
    out = source / "lossless"
    result = run_shards(source / "annotations.json", source / "images", out, *OPTIONS, "--encode", "lossless")
    assert result.exit_code == 0, result.output
    file_of = {row["key"]: row["image_file"] for row in rows(made, "crops")}
    found: list[dict[str, tuple[int, ...]]] = []
    for folder in (made, out):
        dataset = open_dataset(str(folder))
        reader = CropReader(dataset, LocalShards(dataset), capacity=9, with_keys=True)
        edges = {}
        for shard in dataset.shards:
            crops = with_mean_context(reader.crops(shard.index), 2.0)
            for key, crop in zip(reader.keys(crops), crops, strict=True):
                left, top, width, height = edges[key] = tuple(
                    int(crop[name]) for name in ("left", "top", "width", "height")
                )
                if folder == out:
                    pixels = simplejpeg.decode_jpeg((source / "images" / file_of[key]).read_bytes())
                    shown = reader.decode(*(int(crop[name]) for name in SOURCE))
                    assert shown is not None
                    assert np.array_equal(shown, pixels[top : top + height, left : left + width])
        found.append(edges)
    assert found[0] == found[1]
    lines = [
        CliRunner().invoke(train, ["digest", "--data", str(one), "--set", "data.batch=4"]).stdout for one in (made, out)
    ]
    identities = [[line.split()[:2] for line in text.splitlines()] for text in lines]
    assert identities[0] == identities[1] and len(identities[0]) == 4
