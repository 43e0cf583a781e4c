"""A value that looks like missing data stops the plan; named, it is left out of mean and std, filled, and stated."""

import json
from pathlib import Path

import numpy as np
import pytest

import jigsaw_pretrain as jp
from jigsaw_pretrain.formats.dataset.dataset import open_dataset
from jigsaw_pretrain.formats.pixels import decode_member
from jigsaw_pretrain.prep.commands.doctor import doctor
from jigsaw_pretrain.prep.commands.shards import shards
from tests.helpers.commands import run_command
from tests.helpers.prepped import Drawn, rows
from tests.helpers.sensors import tiles


@pytest.mark.parametrize("value", [-9999.0, 32767.0])
def test_an_unnamed_value_stops_before_anything_is_written(drawn: Drawn, tmp_path: Path, value: float) -> None:
    common = ("--annotations", tiles(drawn, value), "--images", drawn.folder / "images")
    for command in ((shards, *common, "--out", tmp_path / "out"), (doctor, *common, "--json")):
        result = run_command(*command)
        assert result.exit_code == 2 and f"--nodata {value:g}" in result.output.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_a_named_value_is_left_out_filled_and_stated(drawn: Drawn, tmp_path: Path) -> None:
    file, out = tiles(drawn, -9999.0), tmp_path / "out"
    images = str(drawn.folder / "images")
    dataset = jp.shards(str(file), images, str(out), workers=1, nodata="-9999", negatives_per_positive=0)
    mean, std = dataset.measured
    assert mean == pytest.approx((300, 300), abs=3) and std == pytest.approx((15, 15), abs=1.5)
    members = []
    for row in rows(out, "crops"):
        data = (out / "shards" / row["shard"]).read_bytes()[row["offset"] :][: row["size"]]
        pixels = decode_member(data, dataset.pixels, row["right"] - row["left"], row["bottom"] - row["top"])
        assert pixels is not None
        members.append(pixels)
    assert min(float(one.min()) for one in members) > 200
    told = json.loads((out / "manifests" / "dataset.json").read_text())
    assert told["totals"]["filled_pixels"] > 0 and told["options"]["nodata"] == "-9999"
    kept = sum(one.shape[0] * one.shape[1] for one in members) - told["totals"]["filled_pixels"]
    parts = [json.loads(one.read_text()) for one in (out / "manifests" / "parts").glob("*.json")]
    counted = sum(part["pixels"]["count"] for part in parts)
    assert counted == kept


def test_what_was_measured_is_kept_where_the_user_says_so(drawn: Drawn, tmp_path: Path) -> None:
    file = tiles(drawn, -9999.0)
    jp.shards(str(file), str(drawn.folder / "images"), str(tmp_path / "out"), workers=1, nodata="none")
    assert open_dataset(str(tmp_path / "out")).measured[1][0] > 100


def test_a_channel_of_small_values_beside_one_of_large_ones_is_looked_at_by_itself(drawn: Drawn) -> None:
    channels = 6
    for nth in range(20):
        number = drawn.add(f"{nth}.npy", (64, 48), draw=False)
        drawn.box(number, [4, 4, 12, 12])
        rng = np.random.default_rng(nth)
        pixels = rng.normal(1500, 300, (48, 64, channels)).astype(np.float32)
        pixels[..., 4] = rng.normal(0.2, 0.05, (48, 64))
        if nth < 2:
            pixels[:12, :32, 4] = -9999
        np.save(drawn.folder / "images" / f"{nth}.npy", pixels)
    with pytest.raises(jp.UserError, match=r"channel 5 .*--nodata -9999"):
        jp.plan(str(drawn.write()), str(drawn.folder / "images"))


def test_it_is_of_float_images_only(drawn: Drawn, tmp_path: Path) -> None:
    drawn.add("a.jpg", (60, 40), [(5, 5, 20, 20)])
    with pytest.raises(jp.UserError, match="--nodata"):
        jp.plan(str(drawn.write()), str(drawn.folder / "images"), nodata="0")


def test_a_dataset_without_such_pixels_says_nothing_of_them(drawn: Drawn, tmp_path: Path) -> None:
    file = tiles(drawn, 300.0, count=4)
    jp.shards(str(file), str(drawn.folder / "images"), str(tmp_path / "out"), workers=1)
    text = (tmp_path / "out" / "manifests" / "dataset.json").read_text()
    record = next((tmp_path / "out" / "manifests" / "parts").glob("*.json")).read_text()
    assert "filled" not in text and "nodata" not in text and "missing" not in record
