"""Lines on the terminal, and TensorBoard."""

import io
import logging
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from jigsaw_pretrain.cli import show_log
from jigsaw_pretrain.train.cli import main
from jigsaw_pretrain.train.engine.loggers import ProgressLine, figures
from jigsaw_pretrain.train.engine.pretraining import execute
from tests.helpers.jobs import SMALL, metrics_row, small_job, synthetic
from tests.helpers.tiny import make_dataset


@pytest.mark.slow(seconds=9)
def test_tensorboard_holds_scalars_and_pictures_and_resumes(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    make_dataset(tmp_path / "data", {"S": [20], "T": [8], "W": [8]})
    settings = [part for setting in (*SMALL, "optim.steps=4", "loss.erf_every=2") for part in ("--set", setting)]
    arguments = ["pretrain", "--data", str(tmp_path / "data"), "--run", str(tmp_path / "run"), "--workers", "0"]
    for more in (["--stop-after", "2"], ["--resume"]):
        result = CliRunner().invoke(main, [*arguments, *settings, *more])
        assert result.exit_code == 0, result.output
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [0, 1, 2, 3]
    assert {"lr", "accuracy/W", "images_per_second", "data_wait"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Images("erf")] == [0, 2]
    assert [event.step for event in events.Images("jigsaws")] == [1, 3]


def test_a_logger_that_is_not_installed_is_refused_before_the_run_begins(tmp_path: Path) -> None:
    make_dataset(tmp_path / "data", {"S": [20]})
    arguments = ["pretrain", "--data", str(tmp_path / "data"), "--run", str(tmp_path / "run"), "--log", "mlflow"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert "pip install mlflow" in result.output
    assert not (tmp_path / "run").exists()


def test_plain_lines_come_at_the_end_and_now_and_then(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ProgressLine(0, 3, True) as progress:
        progress.show([metrics_row(0)])
        progress.show([])
        progress.show([metrics_row(1), metrics_row(2, loss=2.0)])
    assert caplog.messages == [f"step 3/3  {figures([metrics_row(1), metrics_row(2, loss=2.0)])}"]
    assert figures([metrics_row(1), metrics_row(2, loss=2.0)]) == (
        "loss 1.500  accuracy 50.0%  12.3 images/s  data wait 25%  lr 0.1"
    )
    with ProgressLine(0, 3, False) as progress:
        progress.show([metrics_row(2)])
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("width", [80, 140])
def test_a_terminal_of_80_columns_shows_step_time_left_and_loss_on_one_line(
    monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=width, color_system=None)
    monkeypatch.setattr("jigsaw_pretrain.train.engine.loggers.Console", lambda: console)
    with ProgressLine(0, 64_000, True, "pretrain") as progress:
        progress.show([metrics_row(11_999)])
    (line,) = {
        re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", line).rstrip()
        for line in screen.getvalue().splitlines()
        if "12,000" in line
    }
    places = [line.index(part) for part in ("pretrain", "step 12,000/64,000", "left", "loss 1.000", "accuracy")]
    assert places == sorted(places) and len(line) <= width


@pytest.mark.parametrize("width", [80, 140])
def test_what_keeps_a_run_from_its_next_step_is_said_beside_the_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, width: int
) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=width, color_system=None)
    monkeypatch.setattr("jigsaw_pretrain.train.engine.loggers.Console", lambda: console)
    job = small_job(tmp_path, "optim.steps=2", "run.checkpoint_every=1")
    execute(replace(job, title="pretrain", validate=lambda *_: {"loss": 1.0}, val_every=2), synthetic(job))
    text = re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", screen.getvalue())
    for step, what in ((0, "measuring"), (1, "checkpointing"), (2, "validating"), (2, "drawing")):
        assert any(line.startswith(f"pretrain step {step}/2, {what}") for line in re.split(r"[\r\n]", text)), what
    assert max(map(len, re.split(r"[\r\n]", text))) <= width
    assert re.split(r"[\r\n]", text.rstrip())[-1].startswith("pretrain step 2/2  loss")


def test_what_is_logged_beside_the_bar_has_a_line_of_its_own(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    screen = io.TextIOWrapper(io.BytesIO(), write_through=True)
    console = Console(file=screen, force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr("jigsaw_pretrain.train.engine.loggers.Console", lambda: console)
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    show_log()
    with ProgressLine(0, 3, True, "pretrain"):
        logging.getLogger("jigsaw_pretrain.train").warning("crops are few")
    assert isinstance(screen.buffer, io.BytesIO)
    written = re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", screen.buffer.getvalue().decode())
    assert "warning: crops are few" in re.split(r"[\r\n]", written)
