"""Datasets of other sensors through the whole of prep: pixel-exact crops, one format, measured, and the same bytes."""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from click.testing import Result
from PIL import Image

from jigsaw_pretrain.formats.dataset import layout, schema
from jigsaw_pretrain.formats.dataset.dataset import open_dataset
from jigsaw_pretrain.prep.commands.doctor import doctor
from jigsaw_pretrain.prep.commands.report import report
from jigsaw_pretrain.prep.commands.retry_skipped import retry_skipped
from jigsaw_pretrain.prep.commands.verify import verify
from tests.helpers.commands import told
from tests.helpers.prepped import inputs, invoke, rows, tree
from tests.helpers.sensors import Sensor, bands_tiff, draw, grey_png, multispectral, stack_npy, thermal

PARTS = ("--crops-per-part", "5", "--workers", "1")


def run(sensor: Sensor, out: Path, *more: str) -> Result:
    from jigsaw_pretrain.prep.commands.shards import shards

    return invoke(shards, *inputs(sensor.annotations, sensor.images), "--out", str(out), *more)


def stored(out: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Every member's pixels by key, by webdataset and the formats' own readers alone."""
    found = {}
    for shard in sorted((out / layout.SHARDS).iterdir()):
        for sample in webdataset.WebDataset(str(shard), shardshuffle=False):
            if "npy" in sample:
                pixels = np.load(io.BytesIO(sample["npy"]), allow_pickle=False)
            else:
                pixels = np.asarray(Image.open(io.BytesIO(sample["png"])))
            found[sample["__key__"]] = pixels
    return found


KINDS: dict[str, tuple[Callable[[Path], Sensor], str, str]] = {
    "thermal": (thermal, "png", "1 x uint16"),
    "multispectral": (multispectral, "npy", "6 x uint16"),
    "tiff of floats": (lambda folder: draw(folder, 5, "tif", bands_tiff, "float32"), "npy", "5 x float32"),
    "grey of 8 bits": (lambda folder: draw(folder, 1, "png", grey_png, "uint8"), "png", "1 x uint8"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_crops_are_the_sources_own_pixels(kind: str, tmp_path: Path) -> None:
    make, member, form = KINDS[kind]
    sensor = make(tmp_path / "drawn")
    out = tmp_path / "out"
    said = sensor.shards(out, *PARTS)
    assert form in said, said
    dataset = open_dataset(str(out))
    assert (str(dataset.pixels), dataset.pixels.member, dataset.description.format_version) == (form, member, 2)
    listed, found, crops = rows(out, "crops"), stored(out), []
    assert len(listed) == len(found) >= 12
    for row in listed:
        whole = sensor.pixels[row["image_file"]]
        crop = whole[row["top"] : row["bottom"], row["left"] : row["right"]]
        pixels = found[row["key"]]
        assert pixels.dtype == crop.dtype and np.array_equal(pixels.reshape(crop.shape), crop)
        crops.append(crop.reshape(-1, crop.shape[2]).astype(np.float64) / dataset.pixels.full_scale)
    mean, std = dataset.measured
    everything = np.concatenate(crops)
    assert np.allclose(mean, everything.mean(axis=0), rtol=1e-8)
    assert np.allclose(std, everything.std(axis=0), rtol=1e-6)


@pytest.mark.slow(seconds=6)
@pytest.mark.parametrize("kind", ["thermal", "multispectral"])
def test_workers_resuming_and_repair_change_nothing(kind: str, tmp_path: Path) -> None:
    sensor = KINDS[kind][0](tmp_path / "drawn")
    out = tmp_path / "out"
    sensor.shards(out, *PARTS)
    whole = tree(out)
    sensor.shards(tmp_path / "two", "--crops-per-part", "5", "--workers", "2")
    assert tree(tmp_path / "two") == whole
    # Killed in between: a part and the manifests are missing. The format is the plan's, whatever the images say now.
    for name in ("dataset.json", "parts/000001.json"):
        (out / "manifests" / name).unlink()
    sensor.shards(out, *PARTS)
    assert tree(out) == whole
    assert invoke(verify, "--out", str(out), "--workers", "1").exit_code == 0
    shard = next((out / "shards").glob("*-000001.tar"))
    os.truncate(shard, 700)
    assert invoke(verify, "--out", str(out), "--workers", "1").exit_code == 1
    repaired = invoke(
        verify, "--out", str(out), *inputs(sensor.annotations, sensor.images), "--repair", "--workers", "1"
    )
    assert repaired.exit_code == 0, repaired.output
    assert tree(out) == whole


@pytest.mark.parametrize("kind", ["thermal", "multispectral"])
def test_members_hold_all_of_the_context_where_the_trainer_draws_it(kind: str, tmp_path: Path) -> None:
    make, member, form = KINDS[kind]
    sensor = make(tmp_path / "drawn")
    out = tmp_path / "out"
    said = sensor.shards(out, *PARTS, "--context-at", "train")
    assert f"{form} as {member}" in said and "drawn by the trainer" in said, said
    dataset = open_dataset(str(out))
    assert dataset.drawn_context == 2.0 and (str(dataset.pixels), dataset.description.format_version) == (form, 2)
    found, members, reaching = stored(out), [], 0
    for row in rows(out, "crops"):
        left, top, right, bottom = (row[name] for name in schema.MARGINS)
        across = slice(row["left"] - left, row["right"] + right)
        whole = sensor.pixels[row["image_file"]][row["top"] - top : row["bottom"] + bottom, across]
        assert np.array_equal(found[row["key"]].reshape(whole.shape), whole)
        members.append(whole.reshape(-1, whole.shape[2]) / dataset.pixels.full_scale)
        reaching += max(left, top, right, bottom) > 0
    assert reaching == 12
    assert np.allclose(dataset.measured[0], np.concatenate(members).mean(axis=0), rtol=1e-8)
    assert invoke(report, "--out", str(out)).exit_code == 0
    assert "with all of the context" in (out / "report.html").read_text()
    (out / "report.html").unlink()
    whole_tree = tree(out)
    assert invoke(verify, "--out", str(out), "--workers", "1").exit_code == 0
    os.truncate(next((out / "shards").glob("*-000001.tar")), 700)
    repaired = invoke(
        verify, "--out", str(out), *inputs(sensor.annotations, sensor.images), "--repair", "--workers", "1"
    )
    assert repaired.exit_code == 0 and tree(out) == whole_tree, repaired.output


@pytest.mark.parametrize(("kind", "remedy"), [("thermal", False), ("grey of 8 bits", True)])
def test_lossless_cutting_of_what_is_no_rgb_is_refused_in_one_line(kind: str, remedy: bool, tmp_path: Path) -> None:
    sensor = KINDS[kind][0](tmp_path / "drawn")
    for more in ((), ("--dry-run",), ("--pixels", "1xuint16")):
        result = run(sensor, tmp_path / "out", "--encode", "lossless", *more)
        assert result.exit_code == 2 and not (tmp_path / "out").exists(), result.output
        told = [line for line in result.output.splitlines() if "--encode lossless" in line]
        assert len(told) == 1 and "leave --encode out" in told[0], result.output
        assert ("--pixels rgb8" in told[0]) == (remedy and not more[1:])


def test_other_pixels_are_skipped_and_told(tmp_path: Path) -> None:
    sensor = draw(tmp_path / "drawn", 2, "npy", stack_npy)
    np.save(sensor.images / "3.npy", np.zeros((96, 128, 3), np.uint16))
    out = tmp_path / "out"
    result = run(sensor, out, *PARTS)
    assert result.exit_code == 2 and "several forms: 2 x uint16 (3), 3 x uint16 (1)" in result.output
    assert "--pixels" in result.output and not out.exists()
    named = ("--pixels", "2xuint16", "--max-skipped", "50%")
    assert run(sensor, out, *PARTS, *named).exit_code == 0
    (skipped,) = rows(out, "skipped")
    assert skipped["image_file"] == "3.npy" and skipped["stage"] == "cut"
    assert skipped["reason"] == "pixels are of another form than the dataset's: 3 x uint16, not 2 x uint16"
    # Mended, it is used; the format is the recorded one.
    np.save(sensor.images / "3.npy", sensor.pixels["3.npy"])
    result = invoke(retry_skipped, "--out", str(out), *inputs(sensor.annotations, sensor.images), "--workers", "1")
    assert result.exit_code == 0, result.output
    sensor.shards(tmp_path / "whole", *PARTS)
    assert tree(tmp_path / "whole") == tree(out)
    assert "pixels was" in run(sensor, out, *PARTS, "--pixels", "rgb8").output


def test_grey_among_colours_stays_rgb_of_version_1(tmp_path: Path) -> None:
    sensor = draw(tmp_path / "drawn", 1, "png", grey_png, "uint8", count=5)
    Image.fromarray(np.repeat(sensor.pixels["2.png"], 3, axis=2)).save(sensor.images / "2.png")
    sensor.shards(tmp_path / "out", *PARTS)
    sensor.shards(tmp_path / "named", *PARTS, "--pixels", "rgb8")
    assert tree(tmp_path / "out") == tree(tmp_path / "named")
    description = json.loads((tmp_path / "out" / layout.DATASET).read_text())
    assert description["format_version"] == 1 and "pixels" not in description["options"]
    assert "mean" not in description["totals"]


def test_mixed_depths_become_16_bits(tmp_path: Path) -> None:
    sensor = thermal(tmp_path / "drawn")
    eight = (sensor.pixels["0.png"] >> 8).astype(np.uint8)
    grey_png(sensor.images / "0.png", eight)
    sensor.shards(tmp_path / "out", *PARTS)
    found = stored(tmp_path / "out")
    row = next(row for row in rows(tmp_path / "out", "crops") if row["image_file"] == "0.png")
    crop = eight[row["top"] : row["bottom"], row["left"] : row["right"], 0]
    assert np.array_equal(found[row["key"]], crop.astype(np.uint16) * 257)


def test_the_page_and_the_doctor(tmp_path: Path) -> None:
    sensor = multispectral(tmp_path / "drawn")
    sensor.shards(tmp_path / "out", *PARTS)
    assert invoke(report, "--out", str(tmp_path / "out")).exit_code == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Channels 1, 2 and 3 of 6 as red, green and blue" in page and page.count("data:image/webp") >= 4
    given = ("--annotations", str(sensor.annotations), "--images", str(sensor.images), "--deep", "--json")
    found = json.loads(invoke(doctor, *given).output)
    assert any("6 x uint16" in finding["text"] for finding in found["findings"])
    assert not any("cannot be used" in finding["text"] for finding in found["findings"]), found


@pytest.mark.parametrize("text", ["grey", "0xuint8", "1xint32", "600xuint8", "3x"])
def test_a_format_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    sensor = draw(tmp_path / "drawn", 1, "png", grey_png, "uint8", count=1)
    result = run(sensor, tmp_path / "out", "--pixels", text)
    assert result.exit_code == 2 and "names no pixel format" in result.output and len(told(result.output)) == 1
