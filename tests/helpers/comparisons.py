"""Comparisons of tiny detectors: their command line, and their trainings in this process."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from jigsaw_pretrain.detect.cli import main
from jigsaw_pretrain.detect.comparison.runner import OutOfTime, Task, TaskRunner
from jigsaw_pretrain.train.cli import main as train_main
from tests.helpers.detection import SETTINGS, TINY, set_options


class InProcess(TaskRunner):
    """Runs tasks in this process: the tiny network is registered here, and starting Python takes seconds.

    most: how many tasks are begun before time is out.
    """

    ran: list[str] = []
    most: int | None = None

    def run(self, task: Task) -> None:
        if task.done:
            return
        if self.most is not None and len(self.ran) >= self.most:
            raise OutOfTime
        self.ran.append(task.name)
        group = {"jigsaw_pretrain.train": train_main, "jigsaw_pretrain.detect": main}[task.module]
        plain = ["--no-page"] if task.arguments[0] == "pretrain" else []
        result = CliRunner().invoke(group, [*task.arguments, *plain], catch_exceptions=False)
        assert result.exit_code == 0 and task.done, result.output


def comparison(data: Path, shards: Path, out: Path, detector: Mapping[str, Any], *more: str) -> list[str]:
    """The command line of a comparison on the tiny data; detector: keys of the detector's recipe over SETTINGS."""
    found = ["compare", "--out", str(out), "--data", str(shards), "--workers", "0", "--device", "cpu"]
    for prefix, part in (("", "train"), ("val-", "val")):
        found += [f"--{prefix}annotations", str(data / part / "annotations.json")]
        found += [f"--{prefix}images", str(data / part / "images")]
    found += set_options(**{**SETTINGS, "backbone": TINY, **detector})
    pretrain = [f"model.backbone={TINY}", "data.template_size=64", "data.template_split=32", "data.batch=4"]
    pretrain += ["optim.steps=2", "optim.lr_batch=512"]
    found += [part for setting in pretrain for part in ("--pretrain-set", setting)]
    return [*found, *more]
