"""Running the trainings of a comparison."""

from pathlib import Path

import pytest

from jigsaw_pretrain.detect.comparison.runner import OutOfTime, Task, TaskRunner
from jigsaw_pretrain.errors import UserError


def test_a_campaign_stops_a_training_in_time_and_reports_one_that_fails(tmp_path: Path) -> None:
    task = Task("slow", "http.server", ("0",), tmp_path / "slow", "done")
    with pytest.raises(OutOfTime):
        TaskRunner(0.5, 1).run(task)
    with pytest.raises(UserError, match="broken failed"):
        TaskRunner(None, 1).run(Task("broken", "detect", ("no-command",), tmp_path / "broken", "done"))
