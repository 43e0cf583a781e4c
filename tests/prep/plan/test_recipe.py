"""The recipe that prep fits to a dataset: training reads it, it does what it says, and nobody's changes are lost."""

import tomllib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jigsaw_pretrain.config import Config
from jigsaw_pretrain.detect.recipe import DetectorRecipe
from jigsaw_pretrain.formats.jigsaw import Template, aspect_groups
from jigsaw_pretrain.prep.commands.verify import verify
from jigsaw_pretrain.prep.plan import recipe as fitting
from jigsaw_pretrain.prep.plan.forecast import COCO_FILL, NEAR, PAPER_RATIOS, CropSizes, Summary, count_crops
from jigsaw_pretrain.prep.plan.recipe import MachineMemory, fitted_detector, fitted_recipe
from jigsaw_pretrain.train.engine.step import micro_batch_of
from jigsaw_pretrain.train.recipe import Recipe
from tests.helpers.prepped import Drawn, Run, invoke, run_shards
from tests.helpers.settings import REPOSITORY

GPU, CPU = MachineMemory(64 << 30, 16 << 30), MachineMemory(8 << 30)


def summary_of(sides: np.ndarray, classes: int = 2, times: int = 1) -> Summary:
    """The summary of crops of these sides: square, tall and wide, all classes and background alike."""
    wide = np.concatenate([sides, sides, 3 * sides])
    high = np.concatenate([sides, 3 * sides, sides])
    groups = aspect_groups(wide, high)
    labels = np.arange(len(wide)) % (classes + 1)
    counts = count_crops(labels, groups, classes) * times
    sizes = CropSizes(wide, high, groups)
    return Summary(
        [f"c{one}" for one in range(classes)], counts, 1, 1, 0, 1, 3, 1, {}, sizes.jigsaw(Template()).slots, sizes
    )


def read(summary: Summary, machine: MachineMemory, folder: Path) -> Recipe:
    file = folder / "recipe.toml"
    file.write_text(fitted_recipe(summary, machine).to_toml())
    return Recipe.load(file)


SIDES = np.geomspace(20, 160, 40).astype(np.int64)


@given(st.integers(4, 3000), st.integers(1, 30_000), st.integers(0, 80), st.integers(1, 600))
def test_training_takes_whatever_is_fitted(side: int, times: int, gigabytes: int, host: int) -> None:
    sides = np.array([side, side + 3, 2 * side])
    found = fitted_recipe(summary_of(sides, 1, times), MachineMemory(host << 30, gigabytes << 30))
    recipe = Recipe.from_dict(tomllib.loads(found.to_toml()), "recipe.toml")
    recipe.data.template.region_map(32)
    assert micro_batch_of(recipe, 1) == recipe.optim.micro_batch and recipe.data.batch <= 512
    assert 0 < recipe.optim.steps <= 64_000 and recipe.optim.warmup_steps < recipe.optim.steps
    assert all(key.why for key in found.keys if key.name in ("template_size", "resize_low", "batch", "norm", "steps"))


def test_the_papers_numbers_are_trainings_own() -> None:
    paper = Recipe()
    assert (paper.optim.steps, paper.data.batch, paper.optim.warmup_steps, paper.loss.erf_every) == (
        fitting.PAPER_STEPS,
        fitting.PAPER_BATCH,
        fitting.PAPER_WARMUP,
        fitting.PAPER_ERF,
    )


def test_steps_draw_every_crop_as_often_as_the_paper_up_to_a_cap_that_is_told(tmp_path: Path) -> None:
    for times in (1, 20, 200):
        summary = summary_of(SIDES, times=times)
        recipe = read(summary, GPU, tmp_path)
        drawn = 4 * recipe.data.batch * recipe.optim.steps / summary.crops
        assert drawn == pytest.approx(138, rel=0.01)
        assert recipe.data.batch == 16 or recipe.optim.steps >= 1000
    many = summary_of(SIDES, times=30_000)
    found = fitted_recipe(many, GPU)
    assert read(many, GPU, tmp_path).optim.steps == 64_000
    (why,) = [key.why for key in found.keys if key.name == "steps"]
    assert f"{4 * 512 * 64_000 / many.crops:.3g} times" in why and "138" in why
    assert read(many, CPU, tmp_path).optim.steps == 2_000


def test_crops_fill_the_large_slot_as_cocos_do_whatever_their_size() -> None:
    for factor in (0.3, 1, 4, 9):
        sizes = summary_of((factor * SIDES).astype(np.int64)).sizes
        for template in (Template(), Template(128, 32)):
            fit = sizes.fit(template)
            large = fit.slots[-1]
            enlarged = fit.ratios[0] > 1.9 * PAPER_RATIOS[0]
            assert abs(large.fill - COCO_FILL) <= NEAR + 0.02 or (enlarged and large.fill < COCO_FILL)
            assert fit.ratios[1] / fit.ratios[0] == pytest.approx(1.5 / 0.8, rel=0.1)


def test_small_objects_and_no_gpu_take_the_smaller_template(tmp_path: Path) -> None:
    assert read(summary_of(3 * SIDES), GPU, tmp_path).data.template == Template()
    assert read(summary_of(SIDES // 4), GPU, tmp_path).data.template == Template(128, 32)
    assert read(summary_of(3 * SIDES), CPU, tmp_path).data.template == Template(128, 32)


def test_memory_decides_the_micro_batch_alone(tmp_path: Path) -> None:
    many = summary_of(3 * SIDES, times=300)
    small, large = (read(many, MachineMemory(1 << 36, gigabytes << 30), tmp_path) for gigabytes in (16, 80))
    assert (small.optim.micro_batch, large.optim.micro_batch) == (64, 256)
    assert small.updated("optim.micro_batch=none") == large.updated("optim.micro_batch=none")


def test_one_label_that_is_nearly_all_is_balanced(tmp_path: Path) -> None:
    summary = summary_of(SIDES)
    assert read(summary, GPU, tmp_path).data.balance == "none"
    summary.counts[0] *= 50
    found = read(summary, GPU, tmp_path)
    assert found.data.balance == "sqrt" and found.data.batch % found.data.lane_count == 0
    # A lane with a few crops has nothing to balance.
    assert min(summary.by_group) >= 32 * found.data.lane_count or found.data.lanes == 1
    assert read(summary_of(SIDES), GPU, tmp_path).data.lanes is None


def test_a_recipe_and_its_detectors_have_one_norm_and_backbone(tmp_path: Path) -> None:
    for machine in (GPU, CPU):
        recipe = read(summary_of(SIDES), machine, tmp_path)
        text = fitted_detector(machine).to_toml()
        detector = DetectorRecipe.from_dict(tomllib.loads(text), "detect.toml")
        assert (recipe.model.norm, recipe.model.backbone) == (detector.model.norm, detector.model.backbone)
    recipes = REPOSITORY / "recipes"
    samples = Recipe.load(recipes / "sample.toml"), DetectorRecipe.load(recipes / "detect-sample.toml")
    assert samples[0].model.norm == samples[1].model.norm and samples[0].model.backbone == samples[1].model.backbone


def test_shards_writes_it_once_and_a_person_may_change_it(drawn: Drawn, prepped: Run) -> None:
    for number in range(4):
        drawn.add(f"{number}.jpg", (200, 160), [[10, 10, 80, 90], [20, 20, 30, 120]])
    out, file = drawn.folder / "out", drawn.folder / "out" / "recipe.toml"
    shown = prepped("--dry-run").output
    assert not out.exists()
    prepped()
    recipe = Recipe.load(file)
    for key in ("steps", "batch", "template_size"):
        section = recipe.optim if key == "steps" else recipe.data
        assert str(getattr(section, key)) in shown and f".{key} " in shown
    assert invoke(verify, "--out", str(out), "--workers", "1").exit_code == 0
    written = file.read_text()
    prepped("--overwrite", "--negatives-per-positive", "2")
    assert file.read_text() != written
    file.write_text(file.read_text().replace("steps = ", "steps = 1"))
    changed = file.read_text()
    prepped("--overwrite")
    assert file.read_text() == changed


def test_the_table_of_slots_is_of_the_recipe_that_training_will_use(drawn: Drawn, prepped: Run) -> None:
    drawn.add("0.jpg", (200, 160), [[10, 10, 80, 90]])
    shown = " ".join(prepped("--dry-run", "--recipe", "paper-r50").output.split())
    assert "224 x 224 pixels" in shown and "160 x 160" in shown
    assert "96 x 96" in prepped("--dry-run", "--recipe", "sample").output
    images = drawn.folder / "images"
    refused = run_shards(drawn.write(), images, drawn.folder / "new", "--recipe", "nowhere.toml")
    assert refused.exit_code == 2 and "nowhere.toml" in refused.output and not (drawn.folder / "new").exists()


def test_a_recipe_at_a_url_is_read() -> None:
    import fsspec

    with fsspec.open("memory://crops/recipe.toml", "w") as file:
        file.write("[optim]\nsteps = 7\n")
    recipe: Config = Recipe.load("memory://crops/recipe.toml")
    assert isinstance(recipe, Recipe) and recipe.optim.steps == 7
