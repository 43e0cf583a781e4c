"""The compare command: every arm from end to end, and comparisons that go on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from jigsaw_pretrain.detect.cli import main
from jigsaw_pretrain.detect.comparison.arms import ARMS
from jigsaw_pretrain.detect.evaluation import evaluate
from jigsaw_pretrain.detect.run import read_config
from jigsaw_pretrain.formats.annotations.read import Reading
from tests.helpers.browser import check_page
from tests.helpers.comparisons import InProcess, comparison
from tests.helpers.detection import SETTINGS
from tests.helpers.prepped import Drawn
from tests.helpers.writers import write_voc

GN_FPN = {"name": "faster-rcnn-fpn", "norm": "gn", "val_every": 2}
"""What these comparisons' detectors are, beside tiny."""


@pytest.mark.slow(seconds=45)
def test_every_arm_runs_end_to_end_and_is_tabulated(
    tmp_path: Path, tiny_data: Path, shards: Path, tiny_weights: Path, in_process: type[InProcess], plain_runs: None
) -> None:
    # The arms of tau differ in one number: two of them will do.
    chosen = [name for name in ARMS if name not in ("tau-0.6", "tau-0.7", "tau-0.8", "tau-0.9")]
    names = ",".join(chosen)
    command = comparison(
        tiny_data, shards, tmp_path / "out", GN_FPN, "--arms", names, "--seeds", "1", "--rates", "0.02"
    )
    reading = ("--ignored", "use", "--imagenet", str(tiny_weights))
    result = CliRunner().invoke(main, [*command, *reading], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    # How annotations are read says nothing of the arm.
    assert "scratch, seed 0, lr 0.02" in in_process.ran
    report = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert {run["arm"] for run in report["runs"]} == {*chosen, "scratch-equal-cost"}
    by_arm = {run["arm"]: run for run in report["runs"]}
    assert by_arm["jigsaw"]["pretrain_seconds"] > 0 and by_arm["scratch"]["pretrain_seconds"] == 0
    scratch, longer, jigsaw = (by_arm[name] for name in ("scratch", "scratch-equal-cost", "jigsaw"))
    grown = scratch["steps"] * (1 + jigsaw["pretrain_seconds"] / scratch["detect_seconds"])
    assert longer["steps"] == round(grown) and longer["curve"][-1][1] == longer["ap"]["AP"]
    assert len([name for name in in_process.ran if name.startswith("pre-train jigsaw")]) == 1
    assert "report.html" in {path.name for path in (tmp_path / "out").iterdir()}
    taus = {
        name: json.loads((tmp_path / "out" / "pretrain" / name / "seed-0" / "run.json").read_text())
        for name in ("tau-0.5", "warp", "global")
    }
    assert taus["tau-0.5"]["recipe"]["loss"]["tau"] == 0.5 and taus["warp"]["recipe"]["data"]["fit"] == "warp"
    assert taus["global"]["recipe"]["loss"]["strategy"] == "global"
    # Both arms with a neck start from one pre-training, whose neck is of the detector's width.
    assert [name for name in in_process.ran if name.startswith("pre-train neck")] == ["pre-train neck, seed 0"]
    recipe = json.loads((tmp_path / "out" / "pretrain" / "neck" / "seed-0" / "run.json").read_text())["recipe"]
    assert (recipe["model"]["neck"], recipe["model"]["neck_channels"]) == ("fpn", SETTINGS["neck_channels"])
    with_neck, without = (
        json.loads((tmp_path / "out" / "detect" / name / "seed-0" / "config.json").read_text())
        for name in ("neck", "neck-backbone-only")
    )
    assert with_neck["init"] == without["init"] and with_neck["neck"]["matched"] and without["neck"] is None


@pytest.mark.slow(seconds=11)
def test_a_comparison_is_continued_and_sweeps_on_a_seed_of_its_own(
    tmp_path: Path,
    tiny_data: Path,
    shards: Path,
    in_process: type[InProcess],
    plain_runs: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = comparison(tiny_data, shards, tmp_path / "out", GN_FPN, "--seeds", "2", "--rates", "0.01,0.02")
    monkeypatch.setattr(in_process, "most", 5)
    result = CliRunner().invoke(main, command, catch_exceptions=False)
    assert "continues" in result.output and "scratch" in result.output
    monkeypatch.setattr(in_process, "most", None)
    result = CliRunner().invoke(main, command, catch_exceptions=False)
    assert "continues" not in result.output
    assert len(in_process.ran) == len(set(in_process.ran)) == 12
    swept = json.loads((tmp_path / "out" / "detect" / "jigsaw" / "sweep-0.01" / "config.json").read_text())
    assert swept["recipe"]["data"]["seed"] == 1000 and swept["recipe"]["optim"]["lr"] == 0.01
    runs = sorted(str(path) for path in (tmp_path / "out" / "detect").glob("*/seed-*"))
    result = CliRunner().invoke(main, ["compare", *runs], catch_exceptions=False)
    # How many steps cost as much was measured, and may be as many.
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())["runs"]
    alike = {run["steps"] for run in found if run["arm"].startswith("scratch")} == {2}
    row = "| scratch | 4 |" if alike else "| scratch, 2 steps | 2 |"
    assert result.exit_code == 0 and row in result.output, result.output
    changed = CliRunner().invoke(main, [*command, "--set", "data.flip=0.1"])
    assert changed.exit_code == 2 and "holds a comparison with sets" in changed.output


def test_compare_refuses_runs_that_have_not_finished(
    tmp_path: Path, detect: Callable[..., Any], plain_runs: None
) -> None:
    detect(tmp_path / "run", "--stop-after", "1", model="retinanet", norm="gn")
    result = CliRunner().invoke(main, ["compare", str(tmp_path / "run")])
    assert result.exit_code == 2 and "has not finished" in result.output
    assert CliRunner().invoke(main, ["compare"]).exit_code == 2


@pytest.mark.slow(seconds=6)
def test_arms_of_ones_own_have_their_own_norm_data_context_and_steps(
    tmp_path: Path, tiny_data: Path, shards: Path, in_process: type[InProcess], plain_runs: None
) -> None:
    other = tmp_path / "other"
    shutil.copytree(shards, other)
    file = tmp_path / "mine.toml"
    file.write_text(
        f'[longer]\npretrain = []\npretrain_steps = 2.0\ndata = "{other}"\ndetect = ["optim.steps=2"]\n'
        '[frozen-bn]\npretrain = ["data.pad=centre"]\n'
        'detect = ["model.norm=frozen-bn", "model.deform=true", "model.name=mask-rcnn-fpn", "model.neck=nas-fpn"]\n'
        '[scratch-half]\ndetect = ["data.images_limit=3"]\n'
    )
    command = comparison(tiny_data, shards, tmp_path / "out", {**GN_FPN, "steps": 3}, "--arms", str(file))
    command += ["--seeds", "1", "--rates", "0.02"]
    result = CliRunner().invoke(main, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    runs = {run["arm"]: run for run in json.loads((tmp_path / "out" / "comparison.json").read_text())["runs"]}
    assert {name: run["steps"] for name, run in runs.items()} == {"longer": 2, "frozen-bn": 3, "scratch-half": 3}
    pretrained = json.loads((tmp_path / "out" / "pretrain" / "longer" / "seed-0" / "run.json").read_text())
    assert pretrained["recipe"]["optim"]["steps"] == 4
    assert [step for step, _ in runs["longer"]["by_step"]] == [2] and runs["longer"]["flops"] > 0
    report = (tmp_path / "out" / "comparison.md").read_text()
    assert "| APs | APm | APl | mask AP |" in report and "mask_AP" in runs["frozen-bn"]["ap"]
    assert (tmp_path / "out" / "report.html").read_text().count('<svg role="img"') == 2
    file.write_text(file.read_text().replace("pretrain_steps = 2.0", "pretrain_steps = 3.0"))
    changed = CliRunner().invoke(main, command)
    assert changed.exit_code == 2 and "another arm longer" in changed.output
    # Last: without a browser the rest of the test is skipped.
    check_page(tmp_path / "out" / "report.html", "scratch-half", "AP minus", "small, medium and large objects")


@pytest.mark.slow(seconds=2)
def test_a_comparison_reads_its_data_as_prep_and_train_do(
    tmp_path: Path, drawn: Drawn, tiny_data: Path, shards: Path, in_process: type[InProcess], plain_runs: None
) -> None:
    drawn.categories = [{"id": 1, "name": "ant"}]
    for number in range(3):
        image = drawn.add(f"{number}.png", (96, 72))
        drawn.box(image, [10, 10, 30, 40], category=1)
    write_voc(drawn, drawn.folder / "Annotations", origin=1)
    lists = drawn.folder / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("0\n1\n")
    (lists / "val.txt").write_text("2\n")
    command = comparison(tiny_data, shards, tmp_path / "out", {**GN_FPN, "steps": 1}, "--arms", "scratch")
    for option in ("annotations", "val-annotations"):
        command += [f"--{option}", str(drawn.folder)]
    command += ["--images", str(drawn.folder / "images"), "--val-images", str(drawn.folder / "images")]
    command += ["--seeds", "1", "--rates", "0.02", "--voc-origin", "1"]
    split = ["--split", "train", "--val-split", "val"]
    result = CliRunner().invoke(main, [*command, *split], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    run = tmp_path / "out" / "detect" / "scratch" / "seed-0"
    config = read_config(run)
    assert config.reading == Reading(split="train", voc_origin=1) and config.boxes == (2,)
    found = evaluate(run, workers=0, out=tmp_path / "ap")
    assert [one["boxes"] for one in found.boxes.classes.values()] == [1]
    other = CliRunner().invoke(main, command)
    assert other.exit_code == 2 and "holds a comparison with" in other.output


@pytest.mark.parametrize(
    "wrong",
    [
        ("--rates", "1e400"),
        ("--rates", "nan"),
        ("--rates", "0.1,inf"),
        ("--budget", "nan"),
        ("--budget", "inf"),
        ("--arms", ","),
    ],
)
def test_numbers_that_are_none_and_no_arms_are_refused_at_once(
    tmp_path: Path, tiny_data: Path, shards: Path, in_process: type[InProcess], wrong: tuple[str, str]
) -> None:
    result = CliRunner().invoke(main, [*comparison(tiny_data, shards, tmp_path / "out", GN_FPN), *wrong])
    told = result.output.splitlines()[-1]
    assert result.exit_code == 2 and told.startswith("Error: ") and wrong[0] in told and not (tmp_path / "out").exists()
