"""pretrain on a dataset and in a run folder that both lie in an object store; validation; and data gone bad."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs
from click.testing import CliRunner, Result

from jigsaw_pretrain.train.cli import main
from jigsaw_pretrain.train.engine.checkpoint import list_checkpoints, read_checkpoint
from jigsaw_pretrain.train.engine.run_folder import open_run_folder
from tests.helpers.jobs import SMALL, rows, same, untimed
from tests.helpers.servers import Store
from tests.helpers.stores import proxied_store, upload
from tests.helpers.tiny import CLASSES, all_crops, make_dataset, spoil

SETTINGS = (*SMALL, "optim.steps=4", "loss.erf_every=3", "run.checkpoint_every=1", "run.log_every=1")
BASE = [part for setting in SETTINGS for part in ("--set", setting)]
SHARDS = {"S": [20, 14], "T": [10], "W": [12]}


def call(*arguments: object) -> Result:
    arguments += ("--no-page",) if arguments[0] == "pretrain" else ()
    result = CliRunner().invoke(main, [str(one) for one in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with proxied_store() as (store, _):
        yield store


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))


def names(store: Store, run: str) -> list[str]:
    files = s3fs.S3FileSystem(**store.options(), skip_instance_cache=True)
    return sorted(path.removeprefix(f"{store.bucket}/{run}/") for path in files.find(f"{store.bucket}/{run}"))


@pytest.mark.slow(seconds=12)
def test_a_run_in_a_store_is_the_one_in_a_folder(store: Store, tmp_path: Path) -> None:
    make_dataset(tmp_path / "data", SHARDS)
    url, run = upload(store, tmp_path / "data", "data"), f"s3://{store.bucket}/runs/a"
    whole = call(
        "pretrain", "--data", tmp_path / "data", "--run", tmp_path / "run", "--workers", 0, "--log-digest", *BASE
    )
    assert whole.exit_code == 0 and "square 50.0%" in whole.output
    start = ("pretrain", "--data", url, "--run", run, "--log-digest", "--log", "none", "--keep", 2)
    first = call(*start, *BASE, "--workers", 1, "--stop-after", 3)
    assert first.exit_code == 0, first.output
    assert names(store, "runs/a") == [
        "checkpoints/newest",
        "checkpoints/step-00000002.pt",
        "checkpoints/step-00000003.pt",
        "digest.txt",
        "metrics.jsonl",
        "recipe.toml",
        "run.json",
    ]
    # The machine is lost, and with it what was staged there and the cache.
    folder = open_run_folder(run)
    assert folder.remote is not None
    (folder.path / "checkpoints" / "step-00000099.pt").write_bytes(b"left by another run")
    taken = call(*start, *BASE)
    assert taken.exit_code == 2 and f"{run} already holds a run: add --resume" in taken.output
    second = call(*start, "--workers", 0, "--resume")
    assert second.exit_code == 0, second.output
    assert f"done: {run}/backbone.pth" in second.output
    assert same(
        *(read_checkpoint(list_checkpoints(one / "checkpoints")[-1][1]) for one in (tmp_path / "run", folder.path))
    )
    assert untimed(tmp_path / "run") == untimed(folder.path)
    assert (tmp_path / "run" / "digest.txt").read_text() == (folder.path / "digest.txt").read_text()
    assert "backbone.pth" in names(store, "runs/a") and "checkpoints/step-00000004.pt" in names(store, "runs/a")


@pytest.mark.slow(seconds=5)
def test_a_damaged_newest_checkpoint_in_a_store_is_passed_over(store: Store, tmp_path: Path) -> None:
    make_dataset(tmp_path / "data", SHARDS)
    run = f"s3://{store.bucket}/runs/b"
    start = ("pretrain", "--data", tmp_path / "data", "--run", run, "--workers", 0)
    assert call(*start, *BASE, "--stop-after", 3).exit_code == 0
    files = s3fs.S3FileSystem(**store.options(), skip_instance_cache=True)
    files.pipe_file(f"{store.bucket}/runs/b/checkpoints/step-00000003.pt", b"damaged")
    again = call(*start, "--resume")
    assert again.exit_code == 0 and "steps 2 to 4 of 4" in again.output


@pytest.mark.slow(seconds=5)
def test_validation_is_in_the_metrics_and_changes_nothing(tmp_path: Path) -> None:
    make_dataset(tmp_path / "data", SHARDS)
    make_dataset(tmp_path / "held", {"S": [12], "T": [6], "W": [6]}, seed=5)
    start = ("pretrain", "--data", tmp_path / "data", "--workers", 0, *BASE)
    assert call(*start, "--run", tmp_path / "plain").exit_code == 0
    judged = call(*start, "--run", tmp_path / "judged", "--val-data", tmp_path / "held", "--val-every", 2)
    assert judged.exit_code == 0 and "step 2: validation accuracy" in judged.output
    newest = [list_checkpoints(tmp_path / run / "checkpoints")[-1][1] for run in ("plain", "judged")]
    assert same(*map(read_checkpoint, newest))
    found = rows(tmp_path / "judged")
    assert [("validation" in row) for row in found] == [False, True, False, True]
    report = found[1]["validation"]
    assert list(report["regions"]) == ["S-small", "W", "T", "S-large"] and set(report["groups"]) == {"S", "T", "W"}
    assert [one["class"] for one in report["classes"]] == [*CLASSES, "background"]
    assert report["jigsaws"] == 8 and report["overall"]["count"] == 32


@pytest.mark.slow(seconds=3)
def test_another_dataset_is_refused_with_what_differs(tmp_path: Path) -> None:
    make_dataset(tmp_path / "data", SHARDS)
    make_dataset(tmp_path / "other", {"S": [20, 13], "T": [10], "W": [12]}, seed=4)
    start = ("pretrain", "--run", tmp_path / "run", "--workers", 0)
    assert call(*start, "--data", tmp_path / "data", *BASE, "--stop-after", 1).exit_code == 0
    refused = call(*start, "--data", tmp_path / "other", "--resume")
    assert refused.exit_code == 2
    assert "run on another dataset" in refused.output
    assert "crops was 56, is 55" in refused.output and "seed was 0, is 4" in refused.output
    shares = json.loads((tmp_path / "run" / "run.json").read_text())["shares"]
    assert shares == {"S": 0.5, "T": 0.25, "W": 0.25}


@pytest.mark.slow(seconds=3)
def test_too_many_undecodable_crops_stop_the_run(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "data", SHARDS)
    for key in list(all_crops(dataset))[:5]:
        spoil(dataset, key)
    result = call(
        "pretrain",
        "--data",
        tmp_path / "data",
        "--run",
        tmp_path / "run",
        "--workers",
        0,
        *BASE,
        "--set",
        "optim.steps=20",
    )
    assert result.exit_code == 2
    assert "could not be decoded, above 0.1%" in result.output and "verify --repair" in result.output


@pytest.mark.slow(seconds=5)
def test_a_skipped_shard_is_said_counted_and_in_the_checkpoint(tmp_path: Path) -> None:
    make_dataset(tmp_path / "data", SHARDS)
    (tmp_path / "data" / "shards" / "S-000001.tar").unlink()
    start = ("pretrain", "--data", tmp_path / "data", "--run", tmp_path / "run", "--workers", 1, "--log-digest")
    stopped = call(*start, *BASE)
    assert stopped.exit_code == 2 and "S-000001.tar is missing" in stopped.output
    first = call(*start, *BASE, "--on-bad-shard", "skip", "--resume", "--stop-after", 3)
    assert first.exit_code == 0 and first.output.count("going on without a shard") == 1
    content = read_checkpoint(list_checkpoints(tmp_path / "run" / "checkpoints")[-1][1])
    assert content["left_out"] == ["S-000001.tar"] and rows(tmp_path / "run")[-1]["left_out"] == 1
    # What the run has left out it leaves out for good.
    second = call(*start, "--resume")
    assert second.exit_code == 0 and "warning: going on" not in second.output
    assert [row["left_out"] for row in rows(tmp_path / "run")] == [1, 1, 1, 1]
