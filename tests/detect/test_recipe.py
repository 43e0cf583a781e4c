"""A detector's recipe and its fit to a dataset."""

from pathlib import Path

import pytest

from jigsaw_pretrain.detect.recipe import (
    COCO_IMAGES,
    DetectorRecipe,
    ScaledRecipe,
    fit_to_dataset,
    learning_rate,
    read_recipe,
)
from jigsaw_pretrain.errors import UserError
from tests.helpers.settings import REPOSITORY


def test_the_papers_recipe_is_itself_on_coco() -> None:
    plan = fit_to_dataset(DetectorRecipe(), COCO_IMAGES, 480)
    assert (plan.steps, plan.lr, plan.short_side, plan.long_side, plan.anchor_scale) == (96_108, 0.02, 800, 1333, 1)
    assert plan.drops == (66_536, 88_715) and plan.warmup_steps == 500 and plan.epochs == pytest.approx(13, abs=1e-3)
    double = fit_to_dataset(DetectorRecipe(schedule="2x"), COCO_IMAGES, 480)
    assert double.steps == 192_216 and double.drops == (133_073, 177_430)
    assert fit_to_dataset(DetectorRecipe(batch=8), COCO_IMAGES, 480).lr == 0.01


def test_the_scratch_papers_drops_stay_before_the_end() -> None:
    recipe = DetectorRecipe(unit="iterations", length=90_000, drops=(60_000, 20_000), drops_from="end", schedule="6x")
    plan = fit_to_dataset(recipe, COCO_IMAGES, 480)
    assert plan.steps == 540_000 and plan.drops == (480_000, 520_000)


def test_the_rule_for_small_datasets() -> None:
    plan = fit_to_dataset(DetectorRecipe(), 3_712, 168)
    assert plan.epochs == pytest.approx(13 * (COCO_IMAGES / 3_712) ** 0.5, rel=1e-3)
    assert (plan.short_side, plan.long_side) == (280, 467) and plan.anchor_scale == pytest.approx(0.35)
    assert plan.drops[0] / plan.steps == pytest.approx(9 / 13, abs=1e-3)
    jittered = fit_to_dataset(DetectorRecipe(jitter_low=0.1, jitter_high=2.0), 3_712, 168)
    assert jittered.short_side == jittered.long_side == 352
    overruled = fit_to_dataset(DetectorRecipe(steps=60, short_side=128), 3_712, 168)
    assert overruled.steps == 60 and overruled.warmup_steps == 6 and overruled.drops == (42, 55)
    assert overruled.short_side == 128 and overruled.anchor_scale == 0.16


def test_rate_warms_up_and_drops() -> None:
    plan = ScaledRecipe(100, 10, (50, 80), 1.0, 80, 133, 0.1, 1.0)
    assert learning_rate(plan, 0, 0.001, 0.1) == 0.001 and learning_rate(plan, 5, 0.0, 0.1) == 0.5
    assert [learning_rate(plan, step, 0.001, 0.1) for step in (10, 49, 50, 80)] == pytest.approx([1, 1, 0.1, 0.01])


@pytest.mark.parametrize("path", sorted((REPOSITORY / "recipes").glob("detect-*.toml")), ids=lambda one: one.stem)
def test_recipes_are_read_and_say_what_to_expect(path: Path) -> None:
    read_recipe(path)
    head = path.read_text().split("\n\n")[0].lower()
    assert all(word in head for word in ("result", "time", "hardware", "command"))


def test_recipe_refuses_unknown_keys_types_and_choices() -> None:
    assert read_recipe(None, ["lr=1", "drops=[1, 2.5]", "steps=none", "model=retinanet"]).drops == (1.0, 2.5)
    for setting, match in (
        ("bacth=1", "did you mean batch"),
        ("batch=two", "batch"),
        ("batch=0", "batch"),
        ("norm=bn", "frozen-bn, sync-bn, gn"),
        ("partial=1", "bool"),
        ("batch", "key=value"),
    ):
        with pytest.raises(UserError, match=match):
            read_recipe(None, [setting])
