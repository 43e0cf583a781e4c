"""What the machine options and keys do to steps: accumulation, precision, averages, clipping, compiling, memory."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.train import erf
from jigsaw_pretrain.train.engine import state, step
from jigsaw_pretrain.train.engine.checkpoint import list_checkpoints, read_checkpoint
from jigsaw_pretrain.train.engine.distributed import Ranks
from jigsaw_pretrain.train.engine.metrics import read_rows
from jigsaw_pretrain.train.engine.optim import begin_momentum, make_optimizer
from jigsaw_pretrain.train.engine.pretraining import TrainingJob, announce, execute
from jigsaw_pretrain.train.engine.state import build_state
from jigsaw_pretrain.train.engine.step import MachineOptions, micro_batch_of
from jigsaw_pretrain.train.models.classifier import DenseClassifier
from jigsaw_pretrain.train.recipe import Compile, Recipe
from tests.helpers.jobs import crowded_forward, rows, same, small_job, synthetic

MACHINE = MachineOptions()

PLAIN = ("model.backbone=tests.helpers.own:plain", "optim.steps=6", "run.log_every=2")


def newest(job: TrainingJob) -> dict[str, Any]:
    return read_checkpoint(list_checkpoints(job.folder.checkpoints)[-1][1])


def run(
    folder: Path, *settings: str, machine: MachineOptions = MACHINE, stop_after: int | None = None
) -> dict[str, Any]:
    job = replace(small_job(folder, *PLAIN, *settings), machine_options=machine)
    execute(job, synthetic(job), stop_after=stop_after)
    return newest(job)


def test_accumulated_gradients_are_the_batches(tmp_path: Path) -> None:
    whole, parts = run(tmp_path / "whole"), run(tmp_path / "parts", "optim.micro_batch=1")
    for name, value in whole["model"].items():
        torch.testing.assert_close(value, parts["model"][name], rtol=1e-4, atol=1e-6)
    assert not same(whole["model"], parts["model"])


def test_micro_batches_are_what_batch_statistics_are_of(tmp_path: Path) -> None:
    job = small_job(tmp_path, "optim.steps=3", "optim.micro_batch=2", "optim.warmup_steps=1")
    state = execute(job, synthetic(job)).model.state_dict()
    counters = {int(value) for name, value in state.items() if name.endswith("num_batches_tracked")}
    assert counters == {6}


@pytest.mark.slow(seconds=8)
def test_average_compile_accumulation_and_resume_compose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(step, "BACKEND", "aot_eager")
    settings = ("optim.ema=0.5", "optim.micro_batch=2", "run.precision=bf16", "optim.clip_norm=1.5")
    machine = MachineOptions(compile="on")
    whole = run(tmp_path / "whole", *settings, machine=machine)
    half = run(tmp_path / "halves", *settings, machine=machine, stop_after=3)
    assert half["step"] == 3 and not same(half["model"], half["average"])
    assert same(run(tmp_path / "halves", *settings, machine=machine), whole)
    eager = run(tmp_path / "eager", *settings)
    assert eager["model"].keys() == whole["model"].keys()
    for name, value in eager["model"].items():
        torch.testing.assert_close(value, whole["model"][name], rtol=0.02, atol=0.002)
    exported = torch.load(tmp_path / "whole" / "backbone.pth", weights_only=True)
    assert same(exported, {key[9:]: one for key, one in whole["average"].items() if key.startswith("backbone.")})
    printed = caplog.text
    assert "bf16, 2 micro-batches of 2 per step and process" in printed and "does not work" not in printed


def test_fp16_keeps_its_loss_scale_over_a_restart(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", "run.precision=fp16")
    assert whole["scaler"]["_growth_tracker"] > 0 or whole["scaler"]["scale"] < 65536
    run(tmp_path / "halves", "run.precision=fp16", stop_after=4)
    assert same(run(tmp_path / "halves", "run.precision=fp16"), whole)
    assert run(tmp_path / "plain")["scaler"] == {}


def test_a_clipped_step_is_as_long_as_the_limit(tmp_path: Path) -> None:
    settings = (
        "optim.steps=1",
        "optim.warmup_steps=1",
        "optim.clip_norm=0.001",
        "optim.weight_decay=0",
        "optim.lr_start=0.1",
        "run.log_every=1",
    )
    job = small_job(tmp_path, *PLAIN, *settings)
    before = build_state(job.recipe, 6, Ranks()).model.state_dict()
    after = run(tmp_path, *settings)["model"]
    moved = torch.cat([(after[name] - value).flatten() for name, value in before.items()]).double().norm()
    assert float(moved) == pytest.approx(0.1 * 0.001, rel=1e-2)


def failing_backend(graph: object, inputs: object) -> Callable[..., object]:
    raise RuntimeError("no compiler here\nand a long explanation")


@pytest.mark.slow(seconds=4)
def test_a_failing_compiler_is_said_and_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(step, "BACKEND", failing_backend)
    plain, tried = run(tmp_path / "plain"), run(tmp_path / "tried", machine=MachineOptions(compile="on"))
    assert same(plain["model"], tried["model"])
    printed = caplog.text
    assert printed.count("torch.compile does not work here") == 1 and "going on without it" in printed


@pytest.mark.parametrize("compiling", ["on", "off"])
def test_too_little_memory_names_what_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiling: Compile) -> None:
    monkeypatch.setattr(step, "BACKEND", "eager")
    monkeypatch.setattr(DenseClassifier, "forward", crowded_forward(1))
    with pytest.raises(UserError) as refusal:
        run(tmp_path, machine=MachineOptions(compile=compiling))
    assert "out of memory with 4 jigsaws of 64 x 64 pixels at once: 1 fit" in refusal.value.message
    assert (
        "--set optim.micro_batch=1: 4 micro-batches per step and process keep the batch of 4" in refusal.value.message
    )
    assert not (tmp_path / "run.json").exists()
    assert run(tmp_path, "optim.micro_batch=1", machine=MachineOptions(compile=compiling))["step"] == 6


def test_no_memory_at_all_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DenseClassifier, "forward", crowded_forward(0))
    with pytest.raises(UserError, match="a single one does not fit either"):
        run(tmp_path)


def test_a_rehearsal_leaves_the_model_as_it_was() -> None:
    state = build_state(small_job(Path("x")).recipe, 6, Ranks())
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    random = torch.random.get_rng_state()
    assert step.compile_and_dry_run(state.model, small_job(Path("x")).recipe, Ranks(), 4, compiles=False) is state.model
    assert same(before, dict(state.model.state_dict())) and torch.equal(random, torch.random.get_rng_state())
    assert all(parameter.grad is None for parameter in state.model.parameters())


def test_a_rehearsal_exchanges_no_batch_statistics(tmp_path: Path) -> None:
    job = small_job(tmp_path)
    model = build_state(job.recipe, 6, Ranks()).model
    names = list(model.state_dict())
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert list(model.state_dict()) == names
    synced = [part for part in model.modules() if isinstance(part, nn.SyncBatchNorm)]
    modes: list[bool] = []
    synced[0].register_forward_pre_hook(lambda module, given: modes.append(module.training))
    step.compile_and_dry_run(model, job.recipe, Ranks(), 4, compiles=False)
    assert modes == [False] and all(part.training for part in synced)


def test_what_cannot_be_done_is_refused(tmp_path: Path) -> None:
    recipe = Recipe.load(None, ["data.batch=16", "data.lanes=4", "optim.micro_batch=3"])
    with pytest.raises(UserError, match=r"optim.micro_batch = 3 does not divide the 8 .* choose one of \[1, 2, 4, 8\]"):
        micro_batch_of(recipe, 2)
    assert micro_batch_of(recipe.updated("optim.micro_batch=64"), 2) == 8
    with pytest.raises(UserError, match="model.sync_bn = true: torch shares batch statistics between GPUs only"):
        build_state(small_job(tmp_path, "model.sync_bn=true").recipe, 6, Ranks(0, 2))
    for setting in ("run.precision=fp8", "optim.ema=1", "optim.micro_batch=0", "optim.clip_norm=-1"):
        with pytest.raises(UserError, match=setting.split("=")[0]):
            Recipe.load(None, [setting])


def test_a_recipe_that_names_no_micro_batch_has_nearly_the_papers_and_refuses_no_share() -> None:
    default, named = Recipe(), Recipe.load("paper-r50-bf16")
    assert [micro_batch_of(default, world) for world in (1, 2, 4, 8, 16)] == [64, 64, 64, 64, 32]
    assert all(micro_batch_of(default, world) == micro_batch_of(named, world) for world in (1, 2, 4, 8, 16))
    shares = {1: 1, 48: 48, 64: 64, 65: 65, 96: 48, 100: 50, 127: 127, 128: 64, 134: 67, 192: 64, 1024: 64}
    found = {share: micro_batch_of(default.updated(f"data.batch={share}"), 1) for share in shares}
    assert found == shares


def test_small_shares_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    job = small_job(tmp_path, *PLAIN, "optim.micro_batch=4")
    announce(job, build_state(job.recipe, 6, Ranks()), 6)
    assert "batch statistics" not in caplog.text
    halves = replace(job, ranks=Ranks(0, 2))
    announce(halves, build_state(job.recipe, 6, halves.ranks), 6)
    assert "the recipe's batch statistics are of 4 jigsaws, here of 2" in caplog.text


def test_fp16_goes_on_after_steps_that_its_scaler_skips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Momentum that the fused kernel has not written is what was in memory: here NaN, by torch's own switch."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, enabled=True)
    monkeypatch.setattr(state, "loss_scaler", lambda precision, device: scaler)
    fused = partial(make_optimizer, fused=True)
    monkeypatch.setattr(state, "make_optimizer", lambda *given, **named: fused(*given, **{**named, "fused": True}))
    job = small_job(tmp_path, *PLAIN, "run.precision=fp16", "optim.steps=40", "run.log_every=7")
    job = replace(job, machine_options=MachineOptions(deterministic=True))
    execute(job, synthetic(job))
    found = rows(tmp_path)
    skipped = [row.get("skipped", False) for row in found]
    assert skipped[0] and 5 < sum(skipped) < 40 and not skipped[-1]
    assert all(row["loss"] is None or math.isfinite(row["loss"]) for row in found)
    # A row whose loss is none is no damaged one, to whoever reads it back.
    with job.folder.metrics.open("a") as file:
        file.write(json.dumps({**found[0], "step": len(found), "loss": None}) + "\n")
    assert [row["step"] for row in read_rows(job.folder.metrics)] == list(range(len(found) + 1))
    for weights in (newest(job)["model"], torch.load(job.folder.backbone, weights_only=True)):
        assert all(torch.isfinite(value).all() for value in weights.values())


def test_receptive_fields_are_measured_in_true_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure, seen = erf.region_masses, []

    def noted(*given: Any) -> torch.Tensor:
        seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
        return measure(*given)

    monkeypatch.setattr(erf, "region_masses", noted)
    job = small_job(tmp_path, *PLAIN, "run.tf32=true", "loss.erf_every=2")
    source = synthetic(job)
    during: list[bool] = []

    def open_source(first: int, end: int) -> Any:
        during.append(torch.backends.cudnn.allow_tf32)
        return source(first, end)

    execute(job, open_source)
    assert seen == [(False, False)] * 3 and during == [True]


def test_a_momentum_of_zero_changes_no_step(tmp_path: Path) -> None:
    weights = []
    for begun in (False, True):
        parameter = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
        groups: list[dict[str, Any]] = [{"params": [parameter], "weight_decay": 1e-4}]
        optimizer = make_optimizer(groups, small_job(tmp_path).recipe.optim, lr=0.1)
        if begun:
            begin_momentum(optimizer)
        for nth in range(5):
            parameter.grad = torch.tensor([0.3, -0.1, 0.7]) * (nth + 1)
            optimizer.step()
        weights.append(parameter.detach().clone())
    assert torch.equal(*weights)


def test_a_loss_that_is_not_finite_is_refused_where_nothing_skips_the_step(tmp_path: Path) -> None:
    job = small_job(tmp_path, *PLAIN, "optim.lr_peak=1e9", "optim.lr_start=1e9", "optim.steps=20")
    with pytest.raises(UserError, match="loss of step"):
        execute(job, synthetic(job))
