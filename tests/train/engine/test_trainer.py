"""The training loop: resuming bit for bit, signals, failures, and what is refused."""

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from jigsaw_pretrain.errors import Interrupted, UserError
from jigsaw_pretrain.formats.jigsaw import REGIONS
from jigsaw_pretrain.train.data.batch import Batch
from jigsaw_pretrain.train.engine.callbacks import Callback
from jigsaw_pretrain.train.engine.checkpoint import list_checkpoints, read_checkpoint, save_checkpoint
from jigsaw_pretrain.train.engine.distributed import Ranks
from jigsaw_pretrain.train.engine.loggers import figures
from jigsaw_pretrain.train.engine.metrics import Row
from jigsaw_pretrain.train.engine.pretraining import TrainingJob, _judge, execute, trainer_of
from jigsaw_pretrain.train.engine.run_folder import Origin, choose_recipe
from jigsaw_pretrain.train.engine.state import build_state
from jigsaw_pretrain.train.engine.step import MachineOptions
from jigsaw_pretrain.train.engine.trainer import Stopped
from jigsaw_pretrain.train.recipe import Recipe
from tests.helpers.jobs import ORIGIN, rows, same, small_job, synthetic, untimed
from tests.helpers.settings import REPOSITORY
from tests.helpers.sources import SyntheticSource
from tests.helpers.streams import FakeStreams


def newest(folder: Path) -> dict[str, object]:
    return read_checkpoint(list_checkpoints(folder / "checkpoints")[-1][1])


@pytest.mark.slow(seconds=11)
def test_four_and_four_steps_are_eight_bit_for_bit(tmp_path: Path) -> None:
    # It has batch statistics and stochastic depth.
    settings = ("model.backbone=efficientnet_b0", "optim.steps=8", "run.checkpoint_every=3", "run.log_every=3")
    whole, halves = small_job(tmp_path / "whole", *settings), small_job(tmp_path / "halves", *settings)
    execute(whole, synthetic(whole))
    execute(halves, synthetic(halves), stop_after=4)
    assert [step for step, _ in list_checkpoints(halves.folder.checkpoints)] == [3, 4]
    assert not halves.folder.backbone.exists()
    # What a killed process may have left behind its last checkpoint.
    with halves.folder.metrics.open("a") as file:
        file.write('{"step": 4, "loss": 1.0}\n{"step": 5, "lo')
    (halves.folder.checkpoints / ".step-00000005.pt.1-0123abcd.tmp").write_bytes(b"half")
    torch.manual_seed(123)
    execute(halves, synthetic(halves))
    assert same(newest(whole.folder.path), newest(halves.folder.path))
    weights = [torch.load(job.folder.backbone, weights_only=True) for job in (whole, halves)]
    assert same(*weights)
    assert untimed(whole.folder.path) == untimed(halves.folder.path)
    assert [row["step"] for row in rows(halves.folder.path)] == list(range(8))
    assert not list(halves.folder.checkpoints.glob(".*"))
    erf = newest(whole.folder.path)["erf"]
    assert isinstance(erf, dict) and erf["step"] == 4 and erf["weights"].shape == (4, 2, 2)


@pytest.mark.slow(seconds=18)
def test_a_run_learns_and_its_rows_say_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = (
        "data.batch=16",
        "optim.steps=30",
        "optim.warmup_steps=3",
        "optim.lr_batch=16",
        "optim.lr_peak=0.05",
    )
    job = small_job(tmp_path, *settings)
    state = execute(job, synthetic(job))
    found = rows(tmp_path)
    assert len(found) == 30
    assert list(found[0]) == [
        "step",
        "loss",
        "accuracy",
        "lr",
        "images_per_second",
        "data_wait",
        "replaced",
        "left_out",
        "device_seconds",
        "balanced_accuracy",
        "majority_share",
    ]
    assert list(found[0]["accuracy"]) == ["S-small", "W", "T", "S-large"]
    late = [sum(row["accuracy"].values()) / 4 for row in found[-5:]]
    assert sum(late) / 5 > 0.6  # of six classes
    assert found[3]["lr"] == pytest.approx(0.05) and found[-1]["lr"] < 0.001
    assert all(row["images_per_second"] > 0 and 0 <= row["data_wait"] <= 1 for row in found)
    printed = caplog.text
    assert "stride 32" in printed and "step 30/30" in printed and "done: " in printed
    own = torch.load(job.folder.backbone, weights_only=True)
    assert same(own, {name: value.contiguous() for name, value in state.model.backbone.state_dict().items()})


def test_a_gpus_batches_are_copied_and_its_metrics_fetched_less_often(tmp_path: Path) -> None:
    plain, streams = small_job(tmp_path / "plain", "optim.steps=3"), FakeStreams()
    copied = replace(small_job(tmp_path / "copied", "optim.steps=3"), ranks=Ranks(streams=streams))
    for job in (plain, copied):
        execute(job, synthetic(job))
    assert untimed(tmp_path / "plain") == untimed(tmp_path / "copied")
    # Step by step: the host waits for the batch before, copies, and notes when the batch is there and the step is done.
    order = [call for call in streams.calls if call in ("copy", "wait")]
    assert order[:5] == ["copy", "wait", "copy", "wait", "copy"]
    state = build_state(plain.recipe, 6, Ranks())
    set_by_recipe = small_job(tmp_path / "set", "run.log_every=7", ranks=copied.ranks)
    assert [trainer_of(job, state).options.log_every for job in (plain, copied, set_by_recipe)] == [10, 50, 7]


@pytest.mark.slow(seconds=2)
@pytest.mark.parametrize("strategy", ["block-wise", "global"])
def test_the_other_strategies_train_without_a_table(tmp_path: Path, strategy: str) -> None:
    job = small_job(tmp_path, f"loss.strategy={strategy}", "optim.steps=2", "optim.warmup_steps=1")
    assert execute(job, synthetic(job)).tables == ()
    assert len(rows(tmp_path)) == 2


class Signalled(SyntheticSource):
    """Gets this process a signal while it makes batch 3."""

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            if batch.step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch


def signalled(job: TrainingJob, first: int, end: int) -> Signalled:
    recipe = job.recipe
    return Signalled(recipe.data.template, recipe.data.batch, recipe.data.lane_count, first, end)


@pytest.mark.slow(seconds=4)
def test_a_signal_saves_and_the_resumed_run_is_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole, cut = small_job(tmp_path / "whole"), small_job(tmp_path / "cut")
    execute(whole, synthetic(whole))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="SIGTERM after step 3 of 6"):
        execute(cut, lambda first, end: signalled(cut, first, end))
    # The answer comes with the signal, before the step is done.
    assert "SIGTERM: stopping" in caplog.text
    assert signal.getsignal(signal.SIGTERM) == before
    assert newest(cut.folder.path)["step"] == 3
    execute(cut, synthetic(cut))
    assert same(newest(whole.folder.path), newest(cut.folder.path))


def test_failing_data_is_reported_after_a_checkpoint(tmp_path: Path) -> None:
    job = small_job(tmp_path)
    with pytest.raises(RuntimeError, match="broken at step 4"):
        execute(job, synthetic(job, fail_at=4))
    assert newest(tmp_path)["step"] == 4
    assert [row["step"] for row in rows(tmp_path)] == [0, 1, 2, 3]


def test_a_loss_that_is_not_finite_ends_the_run_without_a_checkpoint(tmp_path: Path) -> None:
    job = small_job(tmp_path, "optim.lr_start=1e9", "optim.lr_peak=1e9", "run.log_every=1", "run.checkpoint_every=1")
    with pytest.raises(UserError, match=r"the loss of step \d is nan.*lower lr_peak"):
        execute(job, synthetic(job))
    content = newest(tmp_path)
    assert content["step"] != 6


@pytest.mark.slow(seconds=3)
def test_a_finished_run_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    job = small_job(tmp_path, "optim.steps=2", "optim.warmup_steps=1")
    execute(job, synthetic(job))
    job.folder.backbone.unlink()
    before = job.folder.metrics.read_text()
    execute(job, synthetic(job))
    assert "nothing is left to do" in caplog.text
    assert job.folder.backbone.exists() and job.folder.metrics.read_text() == before


def test_a_run_stays_on_its_recipe_and_dataset(tmp_path: Path) -> None:
    job = small_job(tmp_path)
    execute(job, synthetic(job), stop_after=1)
    settings = tuple(
        f"{section}.{key}={json.dumps(value)}"
        for section, table in job.recipe.to_dict().items()
        for key, value in table.items()
        if value is not None
    )
    with pytest.raises(UserError, match="already holds a run: add --resume"):
        choose_recipe(job.folder, None, settings, resume=False)
    assert choose_recipe(job.folder, None, (), resume=True) == job.recipe
    assert choose_recipe(job.folder, None, settings, resume=True) == job.recipe
    with pytest.raises(UserError, match="another recipe .*tau = 0.5, was 0.7"):
        choose_recipe(job.folder, None, ("loss.tau=0.5",), resume=True)
    with pytest.raises(UserError, match="another recipe .*backbone = resnet50, was tinyresnet"):
        choose_recipe(job.folder, Recipe.load(REPOSITORY / "recipes" / "paper-r50.toml"), (), resume=True)
    renamed = replace(job, origin=Origin(("other", *ORIGIN.classes[1:]), ORIGIN.fingerprint))
    with pytest.raises(UserError, match="label 0 is 'class 0' there and 'other' here"):
        execute(renamed, synthetic(job))
    moved = replace(job, origin=Origin(ORIGIN.classes, "0" * 64))
    with pytest.raises(UserError, match="another dataset"):
        execute(moved, synthetic(job))


def test_a_template_off_the_grid_is_refused_before_the_run_begins(tmp_path: Path) -> None:
    job = small_job(tmp_path, "data.template_split=40")
    with pytest.raises(UserError, match="off the backbone's grid of stride 32"):
        execute(job, synthetic(job))
    assert not job.folder.begun


def test_a_warm_up_as_long_as_the_run_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    job = small_job(tmp_path, "optim.steps=2", "optim.warmup_steps=10")
    execute(job, synthetic(job))
    assert "the warm-up (10 steps)" in caplog.text
    # What is as usual is not told.
    assert "erf-adaptive" not in caplog.text


class Slow(Callback):
    """Has no checkpoint's writing end before training is two steps on, and notes which are taken in time."""

    def __init__(self) -> None:
        self.steps, self.overtaken = 0, dict[int, bool]()

    def on_step(self, batch: Batch, labels: torch.Tensor, predictions: torch.Tensor) -> None:
        self.steps += 1

    def write(self, step: int) -> None:
        until = time.monotonic() + 20
        while self.steps < min(step + 2, 6) and time.monotonic() < until:
            time.sleep(0.01)
        self.overtaken[step] = self.steps >= min(step + 2, 6)


def test_training_goes_on_while_a_checkpoint_is_written_and_it_holds_its_own_step(tmp_path: Path) -> None:
    settings = ("run.checkpoint_every=2", "run.keep_checkpoints=3")
    plain, slow = small_job(tmp_path / "plain", *settings), small_job(tmp_path / "slow", *settings)
    execute(plain, synthetic(plain))
    callback = Slow()
    execute(replace(slow, callbacks=(callback,)), synthetic(slow))
    assert callback.overtaken == {2: True, 4: True, 6: True}
    for (_, left), (_, right) in zip(
        list_checkpoints(plain.folder.checkpoints), list_checkpoints(slow.folder.checkpoints), strict=True
    ):
        assert same(read_checkpoint(left), read_checkpoint(right))


def test_a_checkpoint_that_cannot_be_written_ends_the_run_with_one_error(tmp_path: Path) -> None:
    job = small_job(tmp_path, "run.checkpoint_every=2", "optim.steps=200")
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(UserError, match=r"checkpoint of step \d+ cannot be written .*make room, then --resume"):
        execute(job, synthetic(job))
    assert len(rows(tmp_path)) < 200


def test_a_run_leaves_torchs_random_state_and_switches_as_they_were(tmp_path: Path) -> None:
    job = small_job(tmp_path, "optim.steps=1", "optim.warmup_steps=1", "run.tf32=false")
    before = torch.get_rng_state(), torch.backends.cudnn.allow_tf32
    execute(replace(job, machine_options=MachineOptions(deterministic=True)), synthetic(job))
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == torch.backends.cudnn.allow_tf32
    assert not torch.are_deterministic_algorithms_enabled()


def test_other_versions_are_warned_of_when_a_run_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    job = small_job(tmp_path, "optim.steps=2", "optim.warmup_steps=1")
    execute(job, synthetic(job), stop_after=1)
    step, path = list_checkpoints(job.folder.checkpoints)[-1]
    content = read_checkpoint(path)
    save_checkpoint(job.folder.checkpoints, step, {**content, "versions": {**content["versions"], "torch": "1.0"}}, 1)
    assert "other versions" not in caplog.text
    execute(job, synthetic(job))
    assert "resuming with other versions (torch 1.0, now" in caplog.text


class Counting:
    """Evaluates every other step; a signal comes in the middle of the first one where told."""

    def __init__(self, key: str | None, interrupted: bool) -> None:
        self.key, self._interrupted = key, interrupted

    def due(self, step: int) -> bool:
        return step % 2 == 0

    def made(self, row: Row) -> bool:
        return "figure" in row or "figure" in row.get(str(self.key), {})

    def __call__(self, stopped: Stopped) -> dict[str, float] | None:
        if self._interrupted:
            os.kill(os.getpid(), signal.SIGTERM)
        return None if stopped() else {"figure": 0.5}


@pytest.mark.slow(seconds=5)
@pytest.mark.parametrize("key", ["validation", None])
def test_an_evaluation_that_a_signal_cut_short_is_made_when_the_run_goes_on(tmp_path: Path, key: str | None) -> None:
    def run(folder: Path, interrupted: bool) -> str | None:
        job = small_job(folder, "optim.steps=3", "optim.warmup_steps=1", "run.log_every=3")
        trainer = trainer_of(job, build_state(job.recipe, len(ORIGIN.classes) + 1, Ranks()), synthetic(job))
        trainer.options = replace(trainer.options, evaluation=Counting(key, interrupted))
        with closing(job.folder):
            trainer.resume()
            return trainer.run(3)

    assert run(tmp_path / "whole", False) is None
    assert run(tmp_path / "cut", True) == "SIGTERM"
    assert [step for step, _ in list_checkpoints(tmp_path / "cut" / "checkpoints")] == [2]
    assert [row["step"] for row in rows(tmp_path / "cut")] == [0, 1]
    assert run(tmp_path / "cut", False) is None
    assert untimed(tmp_path / "cut") == untimed(tmp_path / "whole")
    steps = [row["step"] for row in rows(tmp_path / "cut") if "figure" in str(row)]
    assert steps == [1] and [row["step"] for row in rows(tmp_path / "cut")] == ([0, 1, 2] if key else [0, 1, 1, 2])


@pytest.mark.parametrize(("accuracy", "level"), [(0.932, "WARNING"), (0.97, "INFO")])
def test_the_end_gives_a_verdict_beside_what_one_answer_would_reach(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, accuracy: float, level: str
) -> None:
    job = replace(small_job(tmp_path), commonest=("raccoon", 0.9))
    row = {"step": 0, "accuracy": dict.fromkeys(REGIONS, accuracy), "balanced_accuracy": 0.5, "majority_share": 0.931}
    job.folder.path.mkdir(exist_ok=True)
    job.folder.metrics.write_text("".join(json.dumps({**row, "step": step}) + "\n" for step in range(12)))
    _judge(job)
    (said,) = [record for record in caplog.records if "raccoon" in record.message]
    assert said.levelname == level and all(f"{one:.1%}" in said.message for one in (accuracy, 0.5, 0.931))


def test_rows_tell_what_accuracy_is_to_be_read_beside(tmp_path: Path) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    class Watching(Callback):
        def on_step(self, batch: Batch, labels: Tensor, predictions: Tensor) -> None:
            seen.append((labels.clone(), predictions.clone()))

    job = small_job(tmp_path, "optim.steps=3", "optim.warmup_steps=1")
    name = job.origin.classes[1]
    job = replace(job, callbacks=(Watching(),), commonest=(name, 0.5))
    execute(job, synthetic(job))
    for row, (labels, predictions) in zip(rows(tmp_path), seen, strict=True):
        shares = [(predictions[labels == one] == one).double().mean().item() for one in labels.unique()]
        assert row["balanced_accuracy"] == pytest.approx(sum(shares) / len(shares), abs=1e-4)
        assert row["majority_share"] == pytest.approx((labels == 1).double().mean().item(), abs=1e-4)
    assert "balanced" in figures(rows(tmp_path)) and "majority" in figures(rows(tmp_path))


def test_an_evaluation_comes_after_a_checkpoint_and_one_that_fails_costs_no_step(tmp_path: Path) -> None:
    def fails(state: object, stopped: object) -> dict[str, object]:
        raise UserError("no room for a second ring")

    settings = ("optim.steps=4", "run.checkpoint_every=1000")
    job = replace(small_job(tmp_path, *settings), validate=fails, val_every=3)
    with pytest.raises(UserError, match="second ring"):
        execute(job, synthetic(job))
    assert newest(tmp_path)["step"] == 3
