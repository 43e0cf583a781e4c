"""The estimate command."""

import json
from pathlib import Path

import pytest

from tests.helpers.commands import call
from tests.helpers.jobs import BASE


@pytest.mark.slow(seconds=8)
def test_an_estimate_says_what_a_recipe_costs(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "estimate.json"
    options = ("--data", data, "--workers", 0, "--steps", 2, "--json", file, *BASE, "--set", "optim.steps=64000")
    result = call("estimate", *options)
    assert result.exit_code == 0, result.output
    assert "the full recipe: 64,000 steps of 4 on 1 CPU process: " in result.output and "limited by " in result.output
    found = json.loads(file.read_text())
    costs = found["costs"]
    assert found["images_per_second"] == pytest.approx(4 / costs["step"])
    assert found["device_days"] == pytest.approx(found["hours"] / 24)
    assert [path.name for path in tmp_path.iterdir()] == ["estimate.json"]


def test_a_forecast_is_the_sum_of_what_a_run_does() -> None:
    from jigsaw_pretrain.train.estimate import Costs, forecast
    from jigsaw_pretrain.train.recipe import Recipe

    recipe = Recipe.load(None, ["optim.steps=10001"])
    found = forecast(recipe, Costs(start=60, step=0.5, wait=0.1, copy=0.01, refresh=20, save=3), world=8)
    seconds = 60 + 10_001 * 0.5 + 3 * 20 + 11 * 3
    assert found.hours == pytest.approx(seconds / 3600) and found.device_days == pytest.approx(seconds * 8 / 86400)
    assert (found.images_per_second, found.limit) == (1024, "data")
    assert forecast(recipe, Costs(0, 0.5, 0.1, 0.3, 0, 0), 1).limit == "copies"
    # A copy that is hidden limits nothing.
    assert forecast(recipe, Costs(0, 0.5, 0.01, 0.3, 0, 0), 1).limit == "compute"
