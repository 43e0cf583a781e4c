"""The pretrain command as a user runs it, on a tiny dataset."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from jigsaw_pretrain.train.cli import main
from jigsaw_pretrain.train.engine.checkpoint import list_checkpoints, read_checkpoint
from tests.helpers.commands import call
from tests.helpers.detection import TINY
from tests.helpers.jobs import BASE, SMALL, rows, same, untimed
from tests.helpers.prepped import tree
from tests.helpers.settings import FIRST_VERSION
from tests.helpers.tiny import CLASSES


@pytest.mark.slow(seconds=8)
def test_a_run_in_two_parts_with_other_workers_is_the_same(data: Path, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    start = ("pretrain", "--data", data, "--run", run, "--log-digest", "--no-page")
    first = call(*start, *BASE, "--workers", 1, "--stop-after", 2)
    assert first.exit_code == 0 and "stopped after step 2 of 4: continue with --resume" in first.output
    second = call(*start, "--workers", 2, "--resume")
    assert second.exit_code == 0, second.output
    contents = [read_checkpoint(list_checkpoints(one / "checkpoints")[-1][1]) for one in (finished, run)]
    assert same(*contents)
    assert untimed(finished) == untimed(run)
    assert (finished / "digest.txt").read_text() == (run / "digest.txt").read_text()


def test_the_run_folder_says_what_was_run(finished: Path) -> None:
    description = json.loads((finished / "run.json").read_text())
    assert description["classes"] == CLASSES
    assert description["recipe"]["data"]["lanes"] == 4 and description["recipe"]["loss"]["tau"] == 0.7
    assert description["backbone"] == {"name": TINY, "channels": 64, "stride": 32}
    assert set(description["versions"]) == {"python", "jigsaw-pretrain", "torch", "torchvision", "numpy"}
    assert "steps = 4" in (finished / "recipe.toml").read_text()
    assert len(rows(finished)) == 4


def test_the_digest_of_a_run_is_that_of_the_command(data: Path, finished: Path) -> None:
    printed = call("digest", "--data", data, "--steps", 4, *BASE)
    assert (finished / "digest.txt").read_text() in printed.output


@pytest.mark.slow(seconds=5)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "stepz=3"], "did you mean optim.steps?"),
        (["--recipe", "nowhere.toml"], "nowhere.toml cannot be read"),
        (["--set", "model.backbone=resnet51"], "did you mean resnet50"),
        (["--set", "model.backbone=vit_b_16"], "vit_b_16"),
        (["--set", "data.template_size=100", "--set", "data.template_split=30"], "multiples of 32"),
        (["--device", "cuda"], "shows no GPU"),
        (["--set", "optim.micro_batch=3"], "optim.micro_batch = 3 does not divide the 4 jigsaws"),
        (["--set", "run.precision=fp8"], "fp32, bf16, fp16"),
        (["--set", "model.init=nowhere.pth"], "nowhere.pth is missing"),
        (["--val-every", "2"], "--val-every 2 has nothing to validate on: name a dataset with --val-data"),
        (["--set", "model.backbone=nowhere:build"], "nowhere.build() fails (ModuleNotFoundError"),
    ],
)
def test_mistakes_get_one_line(data: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    result = call("pretrain", "--data", data, "--run", tmp_path / "run", *BASE, *arguments)
    assert result.exit_code == 2
    assert (
        f"\n{result.output}".count("\nError: ") == 1 and message in result.output and "Traceback" not in result.output
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.slow(seconds=7)
def test_torchruns_restart_continues_with_the_same_command(
    data: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("pretrain", "--data", data, "--run", tmp_path / "run", "--workers", 0, "--no-page", *BASE)
    assert call(*command, "--stop-after", 2).exit_code == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    again = call(*command)
    assert again.exit_code == 0 and "steps 2 to 4 of 4" in again.output
    contents = [read_checkpoint(list_checkpoints(one / "checkpoints")[-1][1]) for one in (finished, tmp_path / "run")]
    assert same(*contents)


def test_a_folder_without_data_or_run_is_named(data: Path, finished: Path, tmp_path: Path) -> None:
    missing = call("pretrain", "--data", tmp_path, "--run", tmp_path / "run", *BASE)
    assert missing.exit_code == 2 and "dataset.json is missing" in missing.output
    taken = call("pretrain", "--data", data, "--run", finished, *BASE)
    assert taken.exit_code == 2 and "already holds a run: add --resume" in taken.output
    before = tree(data)
    dataset = call("pretrain", "--data", data, "--run", data, *BASE)
    assert dataset.exit_code == 2 and "holds a dataset (manifests/dataset.json)" in dataset.output
    assert tree(data) == before
    none = call("export", "--run", tmp_path, "--to", "torchvision", "--out", tmp_path / "x")
    assert none.exit_code == 2 and "holds no run" in none.output


@pytest.mark.slow(seconds=4)
def test_the_first_versions_dataset_trains(tmp_path: Path) -> None:
    settings = [part for one in (*SMALL, "optim.steps=2") for part in ("--set", one)]
    arguments = [
        "pretrain",
        "--data",
        str(FIRST_VERSION),
        "--run",
        str(tmp_path / "run"),
        "--workers",
        "0",
        "--no-page",
        *settings,
    ]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "run" / "backbone.pth").exists()
