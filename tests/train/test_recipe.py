"""Recipes: keys, types and choices, and what a dataset resolves."""

from pathlib import Path

import pytest

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.pixels import named
from jigsaw_pretrain.train.recipe import Recipe, load_recipe, recipe_from, scaled_rate
from tests.helpers.settings import REPOSITORY

RECIPES = REPOSITORY / "recipes"


def test_no_recipe_is_the_papers_and_so_is_the_papers_file() -> None:
    assert load_recipe(None) == Recipe()
    # The file adds how many jigsaws a GPU of the paper's took, which a run on other machines has to keep.
    assert load_recipe(RECIPES / "paper-r50.toml") == Recipe(micro_batch=64)
    recipe = Recipe()
    assert (recipe.backbone, recipe.batch, recipe.steps) == ("resnet50", 512, 64_000)
    assert recipe.rates == (0.2, 0.8)
    assert (recipe.warmup_steps, recipe.momentum, recipe.weight_decay) == (1_250, 0.9, 1e-4)
    assert (recipe.tau, recipe.erf_every, recipe.template_size, recipe.template_split) == (0.7, 5_000, 224, 64)
    assert recipe.resolved().lanes == 64


def test_the_sample_recipe_fits_its_template_to_its_backbone() -> None:
    recipe = load_recipe(RECIPES / "sample.toml")
    assert (recipe.backbone, recipe.template_size, recipe.template_split, recipe.batch) == ("resnet18", 128, 32, 16)


def test_other_batches_scale_the_rate_linearly() -> None:
    assert load_recipe(None, ["batch=64"]).rates == pytest.approx((0.025, 0.1))


def test_settings_are_laid_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text('backbone = "vgg11"\nsteps = 10\nmean = [0.5, 0.5, 1]\n')
    recipe = load_recipe(file, ["steps=20", "backbone=resnet18", "tau=1", "lanes=none", "std = [1, 1, 0.5]"])
    assert (recipe.steps, recipe.backbone, recipe.tau, recipe.lanes) == (20, "resnet18", 1.0, None)
    assert recipe.mean == (0.5, 0.5, 1.0) and recipe.std == (1.0, 1.0, 0.5)
    assert isinstance(recipe.tau, float)


def test_a_recipe_survives_its_toml_and_its_json(tmp_path: Path) -> None:
    recipe = load_recipe(None, ['backbone="vgg11"', "weight_decay=0.00001", "seed=3"]).resolved()
    file = tmp_path / "again.toml"
    file.write_text(recipe.to_toml())
    assert load_recipe(file) == recipe == recipe_from(recipe.to_dict(), "run.json")
    assert Recipe(tau=0.5).differences(Recipe()) == ["tau = 0.5, was 0.7"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("stepz=3", "unknown key stepz; did you mean steps?"),
        ("qqqqqq=3", "the known ones are backbone"),
        ("steps", "write it as key=value"),
        ("steps=many", "steps must be a whole number, not 'many'"),
        ("steps=1.5", "steps must be a whole number"),
        ("steps=true", "steps must be a whole number"),
        ("tau=high", "tau must be a number"),
        ("tau=nan", "tau must be a finite number"),
        ("backbone=50", "backbone must be a string"),
        ("mean=0.5", "mean must be a list"),
        ("mean=[]", "mean = .* must be a number for each channel, for RGB three numbers"),
        ("std=[0, 1, 1]", "std = .* positive"),
        ("steps=0", "steps = 0 must be at least 1"),
        ("tau=1.2", "tau = 1.2 must be above 0"),
        ("tau=0", "tau = 0.0 must be above 0"),
        ("momentum=1", "momentum"),
        ("lr_peak=-1", "lr_peak = -1.0 must be not negative"),
        ("strategy=dense", "strategy = dense must be one of erf-adaptive"),
        ("fit=squeeze", "fit 'squeeze' is not one of"),
        ("lanes=7", "not divisible by 7 lanes"),
        ("template_split=300", "must lie inside"),
    ],
)
def test_bad_settings_are_refused_by_name(setting: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe(None, [setting])


def test_bad_files_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="missing.toml cannot be read"):
        load_recipe(tmp_path / "missing.toml")
    file = tmp_path / "bad.toml"
    file.write_text("steps = = 3")
    with pytest.raises(UserError, match="bad.toml is not valid TOML"):
        load_recipe(file)
    file.write_text("bacth = 3")
    with pytest.raises(UserError, match="bad.toml: unknown key bacth; did you mean batch?"):
        load_recipe(file)
    file.write_text("[data]\nbatch = 3")
    with pytest.raises(UserError, match="bad.toml: unknown key data"):
        load_recipe(file)


def test_a_channel_that_never_changes_is_divided_by_one() -> None:
    class Flat:
        pixels, measured = named("2xuint16"), ((0.5, 0.25), (0.0, 0.125))

    assert Recipe().resolved(Flat()).std == (1.0, 0.125)  # type: ignore[arg-type]


def test_rates_scale_with_the_batch() -> None:
    assert scaled_rate(0.8, 256, 512) == 0.4
