"""The commands as a user runs them, on a tiny dataset of the agreed layout."""

import json
from pathlib import Path

import pytest
import torch
import torchvision

from jigsaw_pretrain.train.engine.checkpoint import list_checkpoints, read_checkpoint
from tests.helpers.commands import call
from tests.helpers.jobs import SMALL, rows, same, untimed
from tests.helpers.tiny import CLASSES, make_dataset

BASE = [part for setting in (*SMALL, "steps=4", "erf_every=3") for part in ("--set", setting)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_dataset(folder, {"S": [30], "T": [10], "W": [12]})
    return folder


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps without workers."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert call("pretrain", "--data", data, "--run", run, "--workers", 0, "--log-digest", *BASE).exit_code == 0
    return run


def test_a_run_in_two_parts_with_other_workers_is_the_same(data: Path, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    start = ("pretrain", "--data", data, "--run", run, "--log-digest")
    first = call(*start, *BASE, "--workers", 1, "--stop-after", 2)
    assert first.exit_code == 0 and "stopped after step 2 of 4: continue with --resume" in first.output
    second = call(*start, "--workers", 3, "--resume")
    assert second.exit_code == 0, second.output
    contents = [read_checkpoint(list_checkpoints(one / "checkpoints")[-1][1]) for one in (finished, run)]
    assert same(*contents)
    assert untimed(finished) == untimed(run)
    assert (finished / "digest.txt").read_text() == (run / "digest.txt").read_text()


def test_the_run_folder_says_what_was_run(finished: Path) -> None:
    description = json.loads((finished / "run.json").read_text())
    assert description["classes"] == CLASSES
    assert description["recipe"]["lanes"] == 4 and description["recipe"]["tau"] == 0.7
    assert description["backbone"] == {"name": "shufflenet_v2_x0_5", "channels": 1024, "stride": 32}
    assert set(description["versions"]) == {"python", "jigsaw-pretrain", "torch", "torchvision", "numpy"}
    assert "steps = 4" in (finished / "recipe.toml").read_text()
    assert len(rows(finished)) == 4


def test_the_digest_of_a_run_is_that_of_the_command(data: Path, finished: Path) -> None:
    printed = call("digest", "--data", data, "--batch", 4, "--lanes", 4, "--size", 64, "--split", 32, "--steps", 4)
    assert (finished / "digest.txt").read_text() in printed.output


def test_an_export_loads_into_torchvision(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "backbone.pth"
    result = call("export", "--run", finished, "--to", "torchvision", "--out", out)
    assert result.exit_code == 0 and "4 of 4 steps" in result.output
    state = torch.load(out, weights_only=True)
    target = torchvision.models.shufflenet_v2_x0_5()
    loaded = target.load_state_dict(state, strict=False)
    assert loaded.missing_keys == ["fc.weight", "fc.bias"] and loaded.unexpected_keys == []
    assert same(state, torch.load(finished / "backbone.pth", weights_only=True))
    assert same(state["conv1.0.weight"], target.conv1[0].weight.data)


def test_export_refuses_another_backbones_weights(finished: Path, tmp_path: Path) -> None:
    from jigsaw_pretrain.errors import UserError
    from jigsaw_pretrain.train.export.targets import check_own

    state = torch.load(finished / "backbone.pth", weights_only=True)
    with pytest.raises(UserError, match="not of resnet18"):
        check_own("resnet18", state)
    with pytest.raises(UserError, match="not of shufflenet_v2_x1_0"):
        check_own("shufflenet_v2_x1_0", state)
    del state["conv1.0.weight"]
    with pytest.raises(UserError, match="not of shufflenet_v2_x0_5"):
        check_own("shufflenet_v2_x0_5", state)


def test_evaluate_reports_by_region_group_and_class(data: Path, finished: Path, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    result = call("evaluate", "--run", finished, "--data", data, "--workers", 0, "--json", file, "--batch", 4)
    assert result.exit_code == 0, result.output
    assert "majority share" in result.output and "region S-small" in result.output
    report = json.loads(file.read_text())
    assert report["step"] == 4 and report["jigsaws"] == 16
    assert report["overall"]["count"] == 64
    assert list(report["regions"]) == ["S-small", "W", "T", "S-large"]
    assert [one["class"] for one in report["classes"]] == [*CLASSES, "background"]
    assert sum(one["count"] for one in report["classes"]) == 64
    again = tmp_path / "again.json"
    call("evaluate", "--run", finished, "--data", data, "--workers", 2, "--json", again, "--batch", 4)
    assert json.loads(again.read_text()) == report


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "stepz=3"], "unknown key stepz; did you mean steps?"),
        (["--recipe", "nowhere.toml"], "nowhere.toml cannot be read"),
        (["--set", "backbone=resnet51"], "did you mean resnet50"),
        (["--set", "backbone=vit_b_16"], "vit_b_16"),
        (["--set", "template_size=100", "--set", "template_split=30"], "multiples of 32"),
        (["--device", "cuda"], "shows no GPU"),
        (["--set", "micro_batch=3"], "micro_batch = 3 does not divide the 4 jigsaws"),
        (["--set", "precision=fp8"], "precision = fp8 must be one of fp32, bf16, fp16"),
        (["--set", "init=nowhere.pth"], "nowhere.pth is missing"),
        (["--set", "backbone=nowhere:build"], "nowhere.build() fails (ModuleNotFoundError"),
    ],
)
def test_mistakes_get_one_line(data: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    result = call("pretrain", "--data", data, "--run", tmp_path / "run", *BASE, *arguments)
    assert result.exit_code == 2
    assert (
        f"\n{result.output}".count("\nError: ") == 1 and message in result.output and "Traceback" not in result.output
    )
    assert not (tmp_path / "run").exists()


def test_torchruns_restart_continues_with_the_same_command(
    data: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("pretrain", "--data", data, "--run", tmp_path / "run", "--workers", 0, *BASE)
    assert call(*command, "--stop-after", 2).exit_code == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    again = call(*command)
    assert again.exit_code == 0 and "steps 2 to 4 of 4" in again.output
    contents = [read_checkpoint(list_checkpoints(one / "checkpoints")[-1][1]) for one in (finished, tmp_path / "run")]
    assert same(*contents)


def test_an_export_with_statistics_measured_anew(data: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "anew.pth"
    options = ("--run", finished, "--to", "torchvision", "--out", out, "--data", data, "--workers", 0)
    result = call("export", *options, "--recalibrate-bn", 8)
    assert result.exit_code == 0, result.output
    before, after = torch.load(finished / "backbone.pth", weights_only=True), torch.load(out, weights_only=True)
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed and {name.rsplit(".", 1)[1] for name in changed} <= {
        "running_mean",
        "running_var",
        "num_batches_tracked",
    }


def test_an_estimate_says_what_a_recipe_costs(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "estimate.json"
    options = ("--data", data, "--workers", 0, "--steps", 2, "--json", file, *BASE, "--set", "steps=64000")
    result = call("estimate", *options)
    assert result.exit_code == 0, result.output
    assert "the full recipe: 64,000 steps of 4 on 1 CPU process: " in result.output and "limited by " in result.output
    found = json.loads(file.read_text())
    costs = found["costs"]
    assert found["images_per_second"] == pytest.approx(4 / costs["step"])
    assert found["device_days"] == pytest.approx(found["hours"] / 24)
    assert [path.name for path in tmp_path.iterdir()] == ["estimate.json"]


def test_a_forecast_is_the_sum_of_what_a_run_does() -> None:
    from jigsaw_pretrain.train.commands.estimate import Costs, forecast
    from jigsaw_pretrain.train.recipe import Recipe

    recipe = Recipe(steps=10_001, erf_every=5_000, checkpoint_every=1_000, batch=512)
    found = forecast(recipe, Costs(start=60, step=0.5, wait=0.1, copy=0.01, refresh=20, save=3), world=8)
    seconds = 60 + 10_001 * 0.5 + 3 * 20 + 11 * 3
    assert found.hours == pytest.approx(seconds / 3600) and found.device_days == pytest.approx(seconds * 8 / 86400)
    assert (found.images_per_second, found.limit) == (1024, "data")
    assert forecast(recipe, Costs(0, 0.5, 0.01, 0.1, 0, 0), 1).limit == "copies"
    assert forecast(recipe, Costs(0, 0.5, 0.01, 0.01, 0, 0), 1).limit == "compute"


def test_a_folder_without_data_or_run_is_named(data: Path, finished: Path, tmp_path: Path) -> None:
    missing = call("pretrain", "--data", tmp_path, "--run", tmp_path / "run", *BASE)
    assert missing.exit_code == 2 and "dataset.json is missing" in missing.output
    taken = call("pretrain", "--data", data, "--run", finished, *BASE)
    assert taken.exit_code == 2 and "already holds a run: add --resume" in taken.output
    none = call("export", "--run", tmp_path, "--to", "torchvision", "--out", tmp_path / "x")
    assert none.exit_code == 2 and "holds no run" in none.output


def test_evaluate_refuses_other_classes(finished: Path, tmp_path: Path) -> None:
    from jigsaw_pretrain.storage import Storage

    make_dataset(tmp_path, {"S": [4]})
    file = tmp_path / "manifests" / "dataset.json"
    Storage(str(tmp_path)).publish("manifests/dataset.json", file.read_bytes().replace(b'"bee"', b'"wasp"'))
    result = call("evaluate", "--run", finished, "--data", tmp_path, "--workers", 0)
    assert result.exit_code == 2 and "label 1 is 'bee' there and 'wasp' here" in result.output
