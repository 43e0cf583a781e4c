"""Every page the project writes, opened in a real browser."""

import json
import re
import runpy
from pathlib import Path

import pytest
import torch

from jigsaw_pretrain.prep.cli import main as prep_main
from jigsaw_pretrain.train.cli import main as train_main
from tests.helpers.browser import check_page
from tests.helpers.commands import run_command
from tests.helpers.detection import TINY
from tests.helpers.jobs import SMALL
from tests.helpers.prepped import Drawn
from tests.helpers.settings import REPOSITORY, sets

NASTY = "<script>alert(1)</script>"
CHOSEN = (*SMALL, "optim.steps=4", "loss.erf_every=2")
SETTINGS = [part for setting in CHOSEN for part in ("--set", setting)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepped dataset with a class whose name is markup, a name of other script, and skipped things."""
    folder = tmp_path_factory.mktemp("pages")
    names = [NASTY, "クラス", "a name so long that it must be folded somewhere " * 2]
    drawn = Drawn(folder, categories=[{"id": i + 1, "name": name} for i, name in enumerate(names)])
    for i in range(6):
        number = drawn.add(f"{NASTY.replace('/', '')}{i}.jpg", (200, 160))
        drawn.box(number, [10, 10, 40, 40], category=1)
        drawn.box(number, [70, 10, 15, 60], category=2)
        drawn.box(number, [100, 90, 80, 25], category=3)
    drawn.box(1, [5, 5, 0, 10], category=1)
    file = drawn.write()
    out = folder / "out"
    result = run_command(
        *(prep_main, "shards", "--annotations", file, "--images", folder / "images", "--out", out, "--workers", 1),
        *("--max-skipped", "10%"),
    )
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four steps, with its page."""
    folder = tmp_path_factory.mktemp("run") / NASTY.replace("/", "")
    result = run_command(train_main, "pretrain", "--data", data, "--run", folder, "--workers", 0, *SETTINGS)
    assert result.exit_code == 0, result.output
    return folder


@pytest.mark.slow(seconds=6)
def test_the_datasets_page(data: Path) -> None:
    result = run_command(prep_main, "report", "--out", data)
    assert result.exit_code == 0
    check_page(data / "report.html", NASTY, "クラス", "S (square)", "box has no area")


def test_an_unfinished_dataset_has_a_page_too(tmp_path: Path) -> None:
    refused = run_command(prep_main, "report", "--out", tmp_path)
    assert refused.exit_code == 2 and "is no dataset" in refused.output and not (tmp_path / "report.html").exists()
    (tmp_path / "manifests").mkdir()
    (tmp_path / "manifests" / "plan.json").write_text("{}")
    result = run_command(prep_main, "report", "--out", tmp_path)
    # There is nothing to train on yet.
    assert result.exit_code == 0 and "pretrain" not in result.output
    text = (tmp_path / "report.html").read_text()
    assert "no dataset has been finished" in text


@pytest.mark.slow(seconds=10)
def test_the_runs_page(run: Path) -> None:
    check_page(run / "report.html", NASTY, "Refreshed 2 times", "step 4 of 4", "Accuracy by class")


@pytest.mark.slow(seconds=2)
def test_the_readmes_pictures_are_drawn_of_any_run(data: Path, run: Path) -> None:
    drawn = runpy.run_path(str(REPOSITORY / "docs" / "pictures.py"))
    assert drawn["jigsaws"](str(data), run).width > 600
    assert drawn["crops"](str(data)).height > 3 * 132
    assert drawn["fields"](run).startswith(b"\x89PNG")


@pytest.mark.slow(seconds=2)
def test_several_runs_side_by_side(run: Path, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    begun.mkdir()
    for name in ("run.json", "metrics.jsonl"):
        (begun / name).write_bytes((run / name).read_bytes())
    lines = (begun / "metrics.jsonl").read_text().splitlines(keepends=True)
    (begun / "metrics.jsonl").write_text("".join(lines[:2]) + lines[2][:20])
    page = tmp_path / "both.html"
    assert run_command(train_main, "report", "--run", run, "--run", begun, "--out", page).exit_code == 0
    text = page.read_text()
    assert "step 2 of 4" in text
    assert "begun: No checkpoint has been written yet" in text
    # One section of each kind, and one table of settings with a column for each run.
    assert text.count("<h2>Jigsaws and what they were taken for</h2>") == text.count("<h2>Configuration</h2>") == 1
    heads = re.findall(r"<th[^>]*>([^<]*)</th>", text.split("<h2>Figures</h2>")[1].split("</thead>")[0])
    assert len(heads) == 3 and heads[2] == "begun" and "loss, nats" in text
    assert "<th>setting</th><th>" in text and "<th>begun</th><th>the paper&#39;s</th>" in text


@pytest.mark.slow(seconds=3)
def test_a_run_that_never_took_a_step_has_a_page(tmp_path: Path) -> None:
    run = tmp_path / "empty"
    run.mkdir()
    assert run_command(train_main, "report", "--run", run).exit_code == 2
    (run / "metrics.jsonl").touch()
    assert run_command(train_main, "report", "--run", run).exit_code == 0
    check_page(run / "report.html", "no step was taken", "metrics.jsonl has no row yet")
    result = run_command(train_main, "report", "--run", tmp_path / "nowhere")
    assert result.exit_code == 2
    assert "nowhere is no folder" in result.output


@pytest.mark.slow(seconds=6)
def test_fields_of_weights_side_by_side(data: Path, run: Path, tmp_path: Path) -> None:
    page, figures = tmp_path / "erf.html", tmp_path / "erf.json"
    size = ("data.template_size=64", "data.template_split=32", "data.batch=4")
    common = ("--data", data, "--count", 4, *sets(f"model.backbone={TINY}", *size))
    weights = ("--weights", "random", "--weights", run / "backbone.pth")
    result = run_command(train_main, "erf", *common, *weights, "--out", page, "--json", figures)
    assert result.exit_code == 0, result.output
    found = json.loads(figures.read_text())
    assert list(found) == ["random", str(run / "backbone.pth")]
    assert found["random"] != found[str(run / "backbone.pth")]
    sides = list(found["random"]["sides"].values())
    assert sides == sorted(sides) and sides[0] > 0
    check_page(page, "RMS radius")
    # Weights that do not say what they are of are the recipe's backbone's, or refused.
    silent = tmp_path / "silent.pth"
    torch.save(dict(torch.load(run / "backbone.pth", weights_only=True)), silent)
    settings = sets("model.backbone=resnet18", *size)
    wrong = run_command(train_main, "erf", *common[:2], *settings, "--weights", silent, "--out", page)
    assert wrong.exit_code == 2
    assert "resnet18" in wrong.output
