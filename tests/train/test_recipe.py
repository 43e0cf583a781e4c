"""The pre-training recipe: the paper's values, what goes together, and what a dataset resolves."""

import subprocess
import sys
from pathlib import Path

import pytest

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.pixels import named
from jigsaw_pretrain.train.recipe import DataOptions, Recipe, scaled_rate
from tests.helpers.settings import REPOSITORY

RECIPES = REPOSITORY / "recipes"


def test_no_recipe_is_the_papers_and_so_is_the_papers_file() -> None:
    recipe = Recipe()
    assert Recipe.load() == recipe
    # The file adds how many jigsaws a GPU of the paper's took, which a run on other machines has to keep.
    assert Recipe.load(RECIPES / "paper-r50.toml") == recipe.updated("optim.micro_batch=64")
    assert Recipe.load("paper-r50-bf16") == Recipe.load("paper-r50").updated("run.precision=bf16")
    data, optim = recipe.data, recipe.optim
    assert (recipe.model.backbone, data.batch, optim.steps, recipe.rates) == ("resnet50", 512, 64_000, (0.2, 0.8))
    assert (optim.warmup_steps, optim.momentum, optim.weight_decay) == (1_250, 0.9, 1e-4)
    assert (recipe.loss.tau, recipe.loss.erf_every, data.template_size, data.template_split) == (0.7, 5_000, 224, 64)
    assert recipe.resolved().data.lanes == 64


def test_the_sample_recipe_fits_its_template_to_its_backbone() -> None:
    recipe = Recipe.load(RECIPES / "sample.toml")
    assert recipe.model.backbone == "resnet18"
    assert (recipe.data.template_size, recipe.data.template_split, recipe.data.batch) == (128, 32, 16)


def test_other_batches_scale_the_rate_linearly() -> None:
    assert Recipe.load(None, ["data.batch=64"]).rates == pytest.approx((0.025, 0.1))
    assert scaled_rate(0.8, 256, 512) == 0.4


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ("data.lanes=7", "data.lanes"),
        ("data.resize_low=2", "data.resize_low"),
        ("data.template_split=300", "template split 300"),
        ("data.std=[0, 1, 1]", "data.std"),
        ("loss.tau=0", "loss.tau"),
        ("optim.momentum=1", "optim.momentum"),
        ("optim.lr_peak=-1", "optim.lr_peak"),
        ("optim.lr_peak=inf", "optim.lr_peak"),
    ],
)
def test_values_that_cannot_be_trained_with_are_refused_by_key(setting: str, key: str) -> None:
    with pytest.raises(UserError, match=f"--set {setting.replace('[', '.')[:9]}.*{key}"):
        Recipe.load(None, [setting])


def test_the_lanes_that_a_batch_may_have_are_named() -> None:
    with pytest.raises(UserError, match=r"\[1, 2, 4, 8\]"):
        DataOptions(batch=8, lanes=3)


def test_means_and_deviations_are_of_as_many_channels() -> None:
    with pytest.raises(UserError, match="data.mean"):
        Recipe.load(None, ["data.mean=[0.5, 0.5]", "data.std=[1, 1, 1]"])
    with pytest.raises(UserError, match="data.mean .* 3 numbers"):
        Recipe.load(None, ["data.mean=[0.5, 0.5]"]).resolved()


def test_a_channel_that_never_changes_is_divided_by_one() -> None:
    class Flat:
        pixels, measured = named("2xuint16"), ((0.5, 0.25), (0.0, 0.125))

    assert Recipe().resolved(Flat()).data.std == (1.0, 0.125)  # type: ignore[arg-type]


def test_reading_a_recipe_costs_no_torch(tmp_path: Path) -> None:
    code = "import sys, jigsaw_pretrain.train.recipe, jigsaw_pretrain.detect.recipe; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, timeout=60)
