"""A neck in pre-training: levels, tables, steps, checkpoints, what a run leaves, and what has no stages."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.train.engine.checkpoint import list_checkpoints, pyramid_state, read_checkpoint, save_checkpoint
from jigsaw_pretrain.train.engine.distributed import Ranks
from jigsaw_pretrain.train.engine.optim import autocast
from jigsaw_pretrain.train.engine.pretraining import PretrainingTask, TrainingJob, execute, trainer_of
from jigsaw_pretrain.train.engine.run_folder import Origin, RunFolder, describe_run, read_description
from jigsaw_pretrain.train.engine.state import State, build_model, build_state, region_maps
from jigsaw_pretrain.train.engine.trainer import Trainer
from jigsaw_pretrain.train.models import backbones
from jigsaw_pretrain.train.recipe import Recipe
from tests.helpers.commands import call
from tests.helpers.detection import TINY
from tests.helpers.exports import CLASSES, exported, normalised, picture, run_in
from tests.helpers.jobs import rows, same, small_job, synthetic, untimed
from tests.helpers.references import erf_adaptive_by_hand, weights_by_hand

FPN = (
    f"model.backbone={TINY}",
    "model.neck=fpn",
    "model.neck_channels=8",
    "data.batch=2",
    "data.lanes=2",
    "run.log_every=1",
)


def begun(folder: Path, *settings: str) -> tuple[TrainingJob, Trainer[PretrainingTask], State]:
    job = small_job(folder, *FPN, *settings)
    state = build_state(job.recipe, len(job.origin.classes) + 1, Ranks())
    return job, trainer_of(job, state), state


def test_stages_are_the_ends_of_the_four_scales() -> None:
    # A bottleneck halves the map in its second convolution; the first is no stage, though it is of the finer stride.
    for name, channels in (("tinybottleneck", (32, 64, 128, 256)), (TINY, (8, 16, 32, 64))):
        found = backbones.build(name, multi_level=True)
        assert [(one.level, one.stride) for one in found.maps] == [("P2", 4), ("P3", 8), ("P4", 16), ("P5", 32)]
        assert tuple(one.channels for one in found.maps) == channels
        plain = backbones.build(name)
        assert list(found.module.state_dict()) == list(plain.module.state_dict())
        images = torch.rand(1, 3, 64, 64)
        for mode in (True, False):
            maps = found.module.train(mode)(images)
            assert [tuple(one.shape[1:]) for one in maps] == [
                (c, 64 // s, 64 // s) for c, s in zip(channels, (4, 8, 16, 32), strict=True)
            ]
        plain.module.load_state_dict(found.module.state_dict())
        assert torch.equal(maps[-1], plain.module.eval()(images))


def test_every_level_has_a_table_that_sums_to_one_and_its_own_share_of_the_loss(tmp_path: Path) -> None:
    job, trainer, state = begun(tmp_path)
    batch = next(iter(synthetic(job)(0, 1)))
    state.model.eval()
    with torch.no_grad():
        logits = state.model(batch.images)
    state.model.train()
    trainer.step(batch, 0.0)
    assert [tuple(one.weights.shape) for one in state.tables] == [(4, n, n) for n in (16, 8, 4, 2)]
    maps = region_maps(job.recipe, state.backbone, torch.device("cpu"))
    for table, region_map, level in zip(state.tables, maps, logits, strict=True):
        assert torch.allclose(table.weights.sum(dim=0), torch.ones(region_map.shape), atol=1e-6)
        own = table.weights.gather(0, region_map[None])
        assert (own >= job.recipe.loss.tau - 1e-6).all()
        expected = weights_by_hand(table.masses.double().numpy(), region_map.numpy(), job.recipe.loss.tau)
        np.testing.assert_allclose(table.weights.numpy(), expected, atol=1e-5)
        assert level.shape[2:] == region_map.shape
    row = trainer.flush()[0]
    assert list(row["loss_by_level"]) == ["P2", "P3", "P4", "P5"]
    assert row["loss"] == pytest.approx(sum(row["loss_by_level"].values()) / 4)
    # Nothing is left untrained, so DDP waits for no gradient.
    assert all(parameter.grad is not None for parameter in state.model.parameters())


def test_the_loss_is_the_mean_of_equation_1_over_the_levels(tmp_path: Path) -> None:
    # In eval mode, for the reference sees one batch norm's statistics and the step another's otherwise.
    job, trainer, state = begun(tmp_path)
    batch = next(iter(synthetic(job)(0, 1)))
    stepper = trainer.task.stepper
    trainer.task.refresh(batch.images)
    state.model.eval()
    with torch.no_grad(), autocast("fp32", torch.device("cpu")):
        logits = state.model(batch.images)
    maps = region_maps(job.recipe, state.backbone, torch.device("cpu"))
    expected = [
        erf_adaptive_by_hand(
            one.double().numpy(), batch.labels.numpy(), table.weights.double().numpy(), regions.numpy()
        )
        for one, table, regions in zip(logits, state.tables, maps, strict=True)
    ]
    found = stepper.take(batch.images, batch.labels).losses
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)


def test_a_neck_run_resumes_bit_for_bit_and_leaves_backbone_and_pyramid(tmp_path: Path) -> None:
    settings = (*FPN, "optim.steps=4", "loss.erf_every=3", "run.checkpoint_every=2", "optim.ema=0.5")
    whole, halves = small_job(tmp_path / "whole", *settings), small_job(tmp_path / "halves", *settings)
    execute(whole, synthetic(whole))
    execute(halves, synthetic(halves), stop_after=2)
    execute(halves, synthetic(halves))
    contents = [read_checkpoint(list_checkpoints(job.folder.checkpoints)[-1][1]) for job in (whole, halves)]
    for key in ("model", "optimizer", "average", "erf"):
        assert same(contents[0][key], contents[1][key]), key
    assert untimed(tmp_path / "whole") == untimed(tmp_path / "halves")
    assert set(rows(tmp_path / "whole")[0]["loss_by_level"]) == {"P2", "P3", "P4", "P5"}
    about = read_description(whole.folder)["backbone"]["neck"]
    assert about == {"name": "fpn", "channels": 8, "levels": {"P2": 4, "P3": 8, "P4": 16, "P5": 32}}
    own = torch.load(whole.folder.backbone, weights_only=True)
    backbones.build(TINY).module.load_state_dict(own)
    both = torch.load(whole.folder.pyramid, weights_only=True)
    assert same(both, pyramid_state(contents[0]["average"]))
    assert {name.split(".")[0] for name in both} == {"body", "fpn"}
    assert same(own, {name[5:]: value for name, value in both.items() if name.startswith("body.")})


@pytest.mark.parametrize("strategy", ["block-wise", "global"])
def test_the_other_strategies_train_every_level(tmp_path: Path, strategy: str) -> None:
    job, trainer, state = begun(tmp_path, f"loss.strategy={strategy}", "model.norm=gn")
    trainer.step(next(iter(synthetic(job)(0, 1))), 0.0)
    assert state.tables == () and len(trainer.flush()[0]["loss_by_level"]) == 4
    assert any(isinstance(part, nn.GroupNorm) for part in state.model.get_submodule("neck").modules())


def test_what_has_no_stages_is_refused() -> None:
    with pytest.raises(UserError, match="maps of strides 4, 8 and does not show the stages of strides 4, 8, 16 and 32"):
        backbones.build("tests.helpers.own:takes_any", multi_level=True)
    with pytest.raises(UserError, match="model.neck must be one of none, fpn"):
        Recipe.load(None, ["model.neck=fpm"])
    assert Recipe.load(None, ["model.neck=none"]).model.neck == "none"


def make_run(folder: Path, *settings: str) -> Any:
    """A neck run's folder with a checkpoint; its model."""
    recipe = small_job(folder, *settings).recipe
    torch.manual_seed(0)
    _, model = build_model(recipe, len(CLASSES) + 1)
    describe_run(RunFolder(folder), recipe, Origin(CLASSES, "0" * 64), {"name": recipe.model.backbone})
    save_checkpoint(RunFolder(folder).checkpoints, 3, {"model": model.state_dict(), "recipe": recipe.to_dict()}, 1)
    return model.eval()


@pytest.mark.slow(seconds=9)
@pytest.mark.parametrize("norm", ["bn", "gn"])
def test_the_exported_neck_loads_strictly_into_torchvisions_detectors(tmp_path: Path, norm: str) -> None:
    mean, std = "data.mean=[0.4, 0.5, 0.6]", "data.std=[0.2, 0.25, 0.3]"
    backbone, width = ("resnet50", 256) if norm == "bn" else ("resnet18", 64)
    model = make_run(
        tmp_path / "run",
        f"model.backbone={backbone}",
        "model.neck=fpn",
        f"model.neck_channels={width}",
        f"model.norm={norm}",
        mean,
        std,
    )
    code = exported(tmp_path / "run", "torchvision-fpn", tmp_path / "fpn.pth")
    found = run_in(tmp_path, code)["detector"].backbone.double().eval()
    image = normalised(picture())
    with torch.no_grad():
        expected = model.neck.double()(model.backbone.double()(image))
        maps = found(image)
    for level, one in enumerate(expected):
        torch.testing.assert_close(maps[str(level)], one, rtol=0, atol=1e-5 * float(one.abs().max()))
    if norm == "bn":
        detector = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
        detector.backbone.load_state_dict(torch.load(tmp_path / "fpn.pth", weights_only=True), strict=True)


@pytest.mark.slow(seconds=3)
def test_a_plain_backbone_is_exported_from_a_neck_run_and_no_neck_from_a_plain_one(tmp_path: Path) -> None:
    make_run(tmp_path / "neck", f"model.backbone={TINY}", "model.neck=fpn", "model.neck_channels=8")
    said = call("export", "--run", tmp_path / "neck", "--to", "torchvision", "--out", tmp_path / "b.pth").output
    assert "--to torchvision-fpn has the neck's weights too" in said
    state = torch.load(tmp_path / "b.pth", weights_only=True)
    assert all(name.startswith(("conv1", "bn1", "layer")) for name in state)
    make_run(tmp_path / "plain", f"model.backbone={TINY}")
    refused = call("export", "--run", tmp_path / "plain", "--to", "torchvision-fpn", "--out", tmp_path / "f.pth")
    assert refused.exit_code == 2 and "has no neck" in refused.output and not (tmp_path / "f.pth").exists()
    make_run(tmp_path / "other", "model.backbone=shufflenet_v2_x0_5", "model.neck=fpn", "model.neck_channels=8")
    refused = call("export", "--run", tmp_path / "other", "--to", "torchvision-fpn", "--out", tmp_path / "f.pth")
    assert refused.exit_code == 2 and "feature pyramids on ResNets" in refused.output


@pytest.mark.slow(seconds=4)
def test_the_commands_take_a_neck_run(tmp_path: Path) -> None:
    from tests.helpers.tiny import make_dataset

    make_dataset(tmp_path / "data", {"S": [12], "T": [6], "W": [6]})
    make_dataset(tmp_path / "held", {"S": [12], "T": [6], "W": [6]}, seed=1)
    data, run = tmp_path / "data", tmp_path / "run"
    sets = (
        f"model.backbone={TINY}",
        "model.neck_channels=8",
        "data.template_size=64",
        "data.template_split=32",
        "data.batch=4",
        "optim.steps=2",
    )
    settings = [part for one in (*sets, "optim.lr_peak=0.1", "optim.warmup_steps=1") for part in ("--set", one)]
    options = ("--workers", 0, "--device", "cpu")
    begin = ("pretrain", "--data", data, "--run", run, "--neck", "fpn", *options, *settings, "--log", "none")
    said = call(*begin, "--val-data", tmp_path / "held", "--val-every", 1)
    assert said.exit_code == 0, said.output
    assert "with a neck (fpn, P2 to P5 of 8)" in said.output and "backbone-fpn.pth has the neck too" in said.output
    assert "neck" in (run / "report.html").read_text()
    for command in (
        ("evaluate", "--run", run, "--data", tmp_path / "held", "--json", tmp_path / "e.json", *options),
        ("probe", "--run", run, "--data", tmp_path / "held", "--device", "cpu", "--side", 32),
    ):
        result = call(*command)
        assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "e.json").read_text())["jigsaws"] > 0
    other = call(*begin, "--neck", "none", "--resume")
    assert other.exit_code == 2 and "another recipe" in other.output
