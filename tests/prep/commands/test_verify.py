"""Verify finds every flipped bit and names the parts; repair gives back the same bytes."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from jigsaw_pretrain.prep import verify as checks
from jigsaw_pretrain.prep.commands.status import status
from jigsaw_pretrain.prep.commands.verify import verify
from jigsaw_pretrain.prep.manifests import finish
from jigsaw_pretrain.storage.store import Storage
from tests.helpers.prepped import Drawn, Small, inputs, invoke, run_shards, tree


def test_whole(made: Path) -> None:
    result = invoke(verify, "--out", str(made), "--workers", "2")
    assert result.exit_code == 0 and "is whole" in result.output, result.output


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


Harm = Callable[[Path], object]
HARMS: dict[str, tuple[Harm, str]] = {
    "a bit of a shard": (lambda out: flip(next((out / "shards").glob("*-000001.tar"))), "1"),
    "a shard cut short": (lambda out: os.truncate(next((out / "shards").glob("*-000002.tar")), 5000), "2"),
    "a shard missing": (lambda out: next((out / "shards").glob("*-000000.tar")).unlink(), "0"),
    "rows missing": (lambda out: (out / "manifests" / "parts" / "000001.parquet").unlink(), "1"),
    "rows damaged": (lambda out: os.truncate(out / "manifests" / "parts" / "000001.parquet", 300), "1"),
    "a record missing": (lambda out: (out / "manifests" / "parts" / "000003.json").unlink(), "3"),
    "a record damaged": (lambda out: (out / "manifests" / "parts" / "000003.json").write_text("{"), "3"),
    "crops.parquet damaged": (lambda out: flip(out / "manifests" / "crops.parquet"), "none"),
    "shards.parquet missing": (lambda out: (out / "manifests" / "shards.parquet").unlink(), "none"),
    "dataset.json missing": (lambda out: (out / "manifests" / "dataset.json").unlink(), "none"),
    "what the plan skipped missing": (lambda out: (out / "manifests/parts/plan-skipped.parquet").unlink(), "none"),
    "a shard of nobody": (lambda out: (out / "shards" / "S-009999.tar").write_bytes(b"x"), "none"),
}


@pytest.mark.slow(seconds=7)
@pytest.mark.parametrize("harm", HARMS)
def test_damage_is_found_and_mended(small: Small, made: Path, harm: str) -> None:
    do, parts = HARMS[harm]
    do(made)
    damaged = tree(made)
    result = invoke(verify, "--out", str(made), "--workers", "1")
    assert result.exit_code == 1 and f"Parts to cut again: {parts}" in result.output, result.output
    assert tree(made) == damaged
    named = () if parts == "none" and "skipped" not in harm else inputs(small.annotations, small.images)
    result = invoke(verify, "--out", str(made), "--workers", "1", "--repair", *named)
    assert result.exit_code == 0 and "Traceback" not in result.output, result.output
    assert tree(made) == small.tree


def test_repair_that_must_cut_without_images_changes_nothing_and_names_the_options(made: Path) -> None:
    flip(next((made / "shards").glob("*-000001.tar")))
    before = tree(made)
    result = invoke(verify, "--out", str(made), "--workers", "1", "--repair")
    assert result.exit_code == 2 and tree(made) == before
    assert "--annotations" in result.output and "--images" in result.output and "Traceback" not in result.output


def test_repair_removes_dataset_json_first(small: Small, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(next((made / "shards").glob("*-000001.tar")))

    def stop(*arguments: object, **told: object) -> None:
        assert not (made / "manifests" / "dataset.json").exists()
        raise OSError("the machine is lost")

    monkeypatch.setattr("jigsaw_pretrain.prep.pipeline.run_part", stop)
    named = inputs(small.annotations, small.images)
    result = invoke(verify, "--out", str(made), "--workers", "1", "--repair", *named)
    assert result.exit_code == 2 and not (made / "manifests" / "dataset.json").exists()


@pytest.mark.parametrize("cutting", [False, True])
def test_repair_changes_nothing_while_another_command_writes(
    small: Small, made: Path, monkeypatch: pytest.MonkeyPatch, cutting: bool
) -> None:
    monkeypatch.setattr("jigsaw_pretrain.storage.files.LOCK_SECONDS", 0.1)
    (made / "shards" / "S-000099.tar").write_bytes(b"stray")
    if cutting:
        flip(next((made / "shards").glob("*-000001.tar")))
    before = tree(made)
    with Storage(made).locked(exclusive=False):
        named = inputs(small.annotations, small.images) if cutting else ()
        result = invoke(verify, "--out", str(made), "--workers", "1", "--repair", *named)
    assert result.exit_code == 2 and "another command" in result.output, result.output
    assert tree(made) == before


def test_random_bits(small: Small, tmp_path: Path, made: Path) -> None:
    rng = random.Random(4)
    shards = sorted((made / "shards").iterdir())
    for _ in range(5):
        path = rng.choice(shards)
        whole = path.read_bytes()
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        found = checks.verify(str(made), workers=1)
        assert [damage.file for damage in found] == [f"shards/{path.name}"]
        path.write_bytes(whole)


def test_nothing_there_is_said(tmp_path: Path) -> None:
    for command in (verify, status):
        result = invoke(command, "--out", str(tmp_path))
        assert result.exit_code == 2 and "nothing was begun" in result.output


def test_a_part_whose_group_vanished_leaves_no_shard(drawn: Drawn) -> None:
    # Cut when a tall object's image was there; killed before the record; cut again when it was gone.
    drawn.add("wide.jpg", (300, 200), [(10, 10, 100, 30)])
    drawn.add("tall.jpg", (200, 300), [(10, 10, 30, 100)])
    annotations, images, out = drawn.write(), drawn.folder / "images", drawn.folder / "out"
    run = ("--workers", "1", "--context", "1", "--max-skipped", "50%")
    assert run_shards(annotations, images, out, *run).exit_code == 0
    assert (out / "shards" / "T-000000.tar").exists()
    (out / "manifests" / "dataset.json").unlink()
    (out / "manifests" / "parts" / "000000.json").unlink()
    (images / "tall.jpg").unlink()
    assert run_shards(annotations, images, out, *run).exit_code == 0
    assert not (out / "shards" / "T-000000.tar").exists()
    assert invoke(verify, "--out", str(out), "--workers", "1").exit_code == 0


def test_finishing_twice_is_the_same(small: Small, made: Path) -> None:
    finish(str(made))
    assert tree(made) == small.tree
    shutil.rmtree(made / "shards")
    assert pq.read_table(made / "manifests" / "shards.parquet").num_rows
