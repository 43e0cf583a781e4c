"""The papers' experiments by the commands that their files state, at toy size."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from jigsaw_pretrain.detect.cli import main
from jigsaw_pretrain.detect.comparison.arms import read_arms
from jigsaw_pretrain.detect.run import read_config
from tests.helpers.comparisons import InProcess, comparison
from tests.helpers.settings import REPOSITORY, SOAK

ARMS = sorted((REPOSITORY / "recipes" / "arms").glob("*.toml"))
RECIPES = sorted((REPOSITORY / "recipes").glob("detect-*.toml"))


def stated(file: Path) -> list[str]:
    """The options of the command in a file's head, up to the dots that stand for the user's own."""
    head = file.read_text().split("\n\n")[0].replace("\n#", " ")
    words = shlex.split(head.split("Command: jigsaw-detect ")[1].split("...")[0])
    # Where the crops lie is the user's own.
    return [word for word, before in zip(words, ["", *words], strict=False) if "--data" not in (word, before)]


@pytest.mark.slow(seconds=9)
@pytest.mark.parametrize("file", ARMS, ids=lambda file: file.stem)
def test_the_arms_of_every_experiment_are_pretrained_fine_tuned_and_tabulated(
    file: Path,
    tmp_path: Path,
    tiny_data: Path,
    shards: Path,
    in_process: type[InProcess],
    plain_runs: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "recipes").symlink_to(REPOSITORY / "recipes")
    for folder in ("crops-35k", "crops-10k", "crops-context-1.0"):
        (tmp_path / folder).symlink_to(shards)
    monkeypatch.chdir(tmp_path)
    command, *options = stated(file)
    assert command == "compare" and options[0] == "--arms"
    if not SOAK:
        # The first two trainings of the file's own arms take a second.
        options[1] = f"recipes/arms/{file.name}"
        monkeypatch.setattr(in_process, "most", 2)
    arguments = comparison(tiny_data, shards, tmp_path / "out", {"steps": 1}, "--seeds", "1", "--rates", "0.02")
    result = CliRunner().invoke(main, [*arguments, *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "comparison.json").read_text())
    arms = [arm.name for arm in read_arms(str(file))]
    found = {run["arm"] for run in report["runs"]}
    assert found and (not SOAK or set(arms) <= found)
    for arm in read_arms(str(file)):
        if arm.name not in found:
            continue
        run = tmp_path / "out" / "detect" / arm.name / "seed-0"
        assert (read_config(run).init == "scratch") == (arm.pretrain is None)
        own = read_config(run).recipe
        assert own == own.updated(*arm.detect)


@pytest.mark.slow(seconds=4)
@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_recipe_of_a_detector_trains_and_is_evaluated(
    file: Path, tmp_path: Path, detect: Callable[..., Any], tiny_weights: Path, plain_runs: None
) -> None:
    pasted = {"copy_paste": 0.5} if "--set data.copy_paste=0.5" in file.read_text() else {}
    detect(tmp_path / "run", recipe=file, init=tiny_weights, steps=1, **pasted)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 1 and 0 <= summary["AP"]["AP"] <= 1
