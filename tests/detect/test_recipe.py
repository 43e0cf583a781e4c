"""A detector's recipe and its fit to a dataset."""

from pathlib import Path

import pytest

from jigsaw_pretrain.detect.recipe import (
    COCO_IMAGES,
    DetectorRecipe,
    ScaledRecipe,
    fit_to_dataset,
    learning_rate,
)
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.train.recipe import Recipe
from tests.helpers.settings import REPOSITORY

BOTH = (Recipe(), DetectorRecipe())


def test_the_papers_recipe_is_itself_on_coco() -> None:
    plan = fit_to_dataset(DetectorRecipe(), COCO_IMAGES, 480)
    assert (plan.steps, plan.lr, plan.short_side, plan.long_side, plan.anchor_scale) == (96_108, 0.02, 800, 1333, 1)
    assert plan.drops == (66_536, 88_715) and plan.warmup_steps == 500 and plan.epochs == pytest.approx(13, abs=1e-3)
    double = fit_to_dataset(DetectorRecipe.load(None, ["optim.schedule=2x"]), COCO_IMAGES, 480)
    assert double.steps == 192_216 and double.drops == (133_073, 177_430)
    assert fit_to_dataset(DetectorRecipe.load(None, ["data.batch=8"]), COCO_IMAGES, 480).lr == 0.01


def test_the_scratch_papers_drops_stay_before_the_end() -> None:
    recipe = DetectorRecipe.load(REPOSITORY / "recipes" / "detect-scratch.toml")
    plan = fit_to_dataset(recipe, COCO_IMAGES, 480)
    assert plan.steps == 540_000 and plan.drops == (480_000, 520_000)


def test_the_rule_for_small_datasets() -> None:
    plan = fit_to_dataset(DetectorRecipe(), 3_712, 168)
    assert plan.epochs == pytest.approx(13 * (COCO_IMAGES / 3_712) ** 0.5, rel=1e-3)
    assert (plan.short_side, plan.long_side) == (280, 467) and plan.anchor_scale == pytest.approx(0.35)
    assert plan.drops[0] / plan.steps == pytest.approx(9 / 13, abs=1e-3)
    jittered = fit_to_dataset(DetectorRecipe.load(None, ["data.jitter_low=0.1", "data.jitter_high=2.0"]), 3_712, 168)
    assert jittered.short_side == jittered.long_side == 352
    overruled = fit_to_dataset(DetectorRecipe.load(None, ["optim.steps=60", "data.short_side=128"]), 3_712, 168)
    assert overruled.steps == 60 and overruled.warmup_steps == 6 and overruled.drops == (42, 55)
    assert overruled.short_side == 128 and overruled.anchor_scale == 0.16


def test_rate_warms_up_and_drops() -> None:
    plan = ScaledRecipe(100, 10, (50, 80), 1.0, 80, 133, 0.1, 1.0)
    assert learning_rate(plan, 0, 0.001, 0.1) == 0.001 and learning_rate(plan, 5, 0.0, 0.1) == 0.5
    assert [learning_rate(plan, step, 0.001, 0.1) for step in (10, 49, 50, 80)] == pytest.approx([1, 1, 0.1, 0.01])


@pytest.mark.parametrize("path", sorted((REPOSITORY / "recipes").glob("detect-*.toml")), ids=lambda one: one.stem)
def test_recipes_are_read_and_say_what_to_expect(path: Path) -> None:
    DetectorRecipe.load(path)
    head = path.read_text().split("\n\n")[0].lower()
    assert all(word in head for word in ("result", "time", "hardware", "command"))


def test_recipe_refuses_unknown_keys_types_and_choices() -> None:
    found = DetectorRecipe.load(
        None, ["optim.lr=1", "optim.drops=[1, 2.5]", "optim.steps=none", "model.name=retinanet"]
    )
    assert found.optim.drops == (1.0, 2.5)
    for setting, match in (
        ("data.bacth=1", "did you mean data.batch"),
        ("model.norm=bn", "frozen-bn, sync-bn, gn"),
        ("data.jitter_high=2", "data.jitter_low"),
        ("model.head=2fc", "model.head"),
        ("data.long_side=100", "data.short_side"),
    ):
        with pytest.raises(UserError, match=match):
            DetectorRecipe.load(None, [setting])


def test_both_recipes_call_the_same_thing_by_the_same_key() -> None:
    """A key that occurs in both recipes stands in the same section."""
    places = [{key: section for section, keys in one.to_dict().items() for key in keys} for one in BOTH]
    shared = places[0].keys() & places[1].keys()
    assert {"batch", "seed", "norm", "clip_norm", "precision", "checkpoint_every", "neck_channels"} <= shared
    assert all(places[0][key] == places[1][key] for key in shared)


def test_a_subset_has_its_own_schedule_or_that_of_all_images() -> None:
    recipe = DetectorRecipe.load(None, ["data.train_short_sides=[640, 800]"])
    own, whole = fit_to_dataset(recipe, 10_000, 480), fit_to_dataset(recipe, 118_287, 480, 10_000)
    assert whole.steps == fit_to_dataset(recipe, 118_287, 480).steps > own.steps
    assert whole.epochs == pytest.approx(whole.steps * 16 / 10_000) and own.train_short_sides == (640, 800)
    assert fit_to_dataset(recipe, 500, 240).train_short_sides == (320, 400)
    with pytest.raises(UserError, match="set one"):
        recipe.updated("data.jitter_low=0.1", "data.jitter_high=2.0")


@pytest.mark.parametrize("file", sorted((REPOSITORY / "recipes").glob("detect-*.toml")), ids=lambda file: file.stem)
def test_every_recipe_is_read_and_fits_cocos_images(file: Path) -> None:
    recipe = DetectorRecipe.load(file)
    plan = fit_to_dataset(recipe, 118_287, 480)
    assert list(plan.drops) == sorted(plan.drops) and all(0 < drop < plan.steps for drop in plan.drops[:1])
    if file.stem == "detect-frozen-published":
        # 1,848 steps of 64 images are an epoch there, with drops after 48 and 68 of 72, at a rate of 0.16.
        assert plan.steps == pytest.approx(72 * 1848, rel=1e-3) and plan.lr == pytest.approx(0.16)
        assert plan.drops == pytest.approx((88_704, 125_664), rel=1e-3)
