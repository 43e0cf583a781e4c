"""Running the trainings of a comparison."""

import re
from datetime import timedelta
from pathlib import Path

import pytest

from jigsaw_pretrain.detect.comparison import runner
from jigsaw_pretrain.detect.comparison.runner import OutOfTime, Task, TaskRunner
from jigsaw_pretrain.errors import UserError


def test_a_campaign_stops_a_training_in_time_and_reports_one_that_fails(tmp_path: Path) -> None:
    task = Task("slow", "http.server", ("0",), tmp_path / "slow", "done")
    with pytest.raises(OutOfTime):
        TaskRunner(0.5, 1).run(task)
    with pytest.raises(UserError, match="broken failed"):
        TaskRunner(None, 1).run(Task("broken", "detect", ("no-command",), tmp_path / "broken", "done"))


def test_how_long_all_trainings_will_take_is_told_beside_the_arm_and_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    steps = "for step in (1, 2, 3): print(f'step {step}/3, 0:00:01 left  loss 1.0', flush=True); time.sleep(0.5)"
    (tmp_path / "counts.py").write_text(f"import pathlib, sys, time\n{steps}\npathlib.Path(sys.argv[1]).touch()\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(runner, "TOLD_EVERY", 0.0)
    caplog.set_level("INFO")
    trainings = TaskRunner(None, 1, total=100)
    trainings.run(Task("jigsaw, seed 0", "counts", (str(tmp_path / "run" / "done"),), tmp_path / "run", "done"))
    told = [line for line in caplog.messages if line.startswith("jigsaw, seed 0 (all: about ")]
    assert all(re.search(r"left\): step [23]/3, ", line) for line in told)
    hours, minutes, seconds = map(int, told[-1].split("about ")[1].split(" left")[0].split(":"))
    # 99 more trainings of 1.5 seconds each, on cores that may be busy.
    assert 100 < timedelta(hours=hours, minutes=minutes, seconds=seconds).total_seconds() < 1500
