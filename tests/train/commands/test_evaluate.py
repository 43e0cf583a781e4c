"""The evaluate command."""

import json
from pathlib import Path

import pytest

from jigsaw_pretrain.storage.store import Storage
from jigsaw_pretrain.train.commands.evaluate import show, verdict
from jigsaw_pretrain.train.engine.pretraining import NO_BETTER
from tests.helpers.commands import call
from tests.helpers.tiny import CLASSES, make_dataset


@pytest.mark.slow(seconds=6)
def test_evaluate_reports_by_region_group_and_class(data: Path, finished: Path, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    result = call("evaluate", "--run", finished, "--data", data, "--workers", 0, "--json", file, "--batch", 4)
    assert result.exit_code == 0, result.output
    assert (
        "majority share" in result.output and "small square region" in result.output and "tall crops" in result.output
    )
    assert "verdict: " in result.output
    report = json.loads(file.read_text())
    # These are the crops that the run was trained on.
    assert report["trained_on"] and "trained on" in result.output and 0 <= report["overall"]["balanced_accuracy"] <= 1
    assert report["step"] == 4 and report["jigsaws"] == 16
    assert report["overall"]["count"] == 64
    assert list(report["regions"]) == ["S-small", "W", "T", "S-large"]
    assert [one["class"] for one in report["classes"]] == [*CLASSES, "background"]
    assert sum(one["count"] for one in report["classes"]) == 64
    again = tmp_path / "again.json"
    call("evaluate", "--run", finished, "--data", data, "--workers", 2, "--json", again, "--batch", 4)
    assert json.loads(again.read_text()) == report


def test_names_are_shown_as_they_are_written(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["screw [/M3]", "lego [red]", "lego [blue]", ":car:", "a\x1b[2J"]
    share = {"count": 1, "accuracy": 0.5, "majority_share": 0.5}
    show(
        {
            "backbone": "own:[red]net",
            "step": 1,
            "jigsaws": 4,
            "trained_on": False,
            "overall": {**share, "balanced_accuracy": 0.5},
            "regions": {},
            "groups": {},
            "classes": [{"class": name, "count": 1, "accuracy": 0.5} for name in names],
        }
    )
    shown = capsys.readouterr().out
    assert all(f"class {name} " in shown for name in names[:-1]) and "class a?[2J" in shown and "own:[red]net" in shown


def test_the_verdict_compares_with_always_naming_the_commonest_class() -> None:
    # Nine of ten crops are of one class: what names it always is right as often, and at half of the classes.
    def of(accuracy: float, balanced: float) -> str:
        overall = {"accuracy": accuracy, "majority_share": 0.9, "balanced_accuracy": balanced}
        return verdict({"overall": overall, "classes": [{"count": 9}, {"count": 1}, {"count": 0}]})

    assert of(0.9, 0.5).count("no better") == 2 and "90.0% against 90.0%" in of(0.9, 0.5)
    # As a run's own verdict: less than a point above it may be chance.
    assert of(0.9 + NO_BETTER / 2, 0.5 + NO_BETTER / 2).count("no better") == 2
    assert of(0.85, 0.7).count("no better") == 1 and "70.0% against 50.0%" in of(0.85, 0.7)
    assert "no better" not in of(0.95, 0.8)


def test_evaluate_refuses_other_classes(finished: Path, tmp_path: Path) -> None:

    make_dataset(tmp_path, {"S": [4]})
    file = tmp_path / "manifests" / "dataset.json"
    Storage(str(tmp_path)).publish("manifests/dataset.json", file.read_bytes().replace(b'"bee"', b'"wasp"'))
    result = call("evaluate", "--run", finished, "--data", tmp_path, "--workers", 0)
    assert result.exit_code == 2 and "label 1 is 'bee' there and 'wasp' here" in result.output
