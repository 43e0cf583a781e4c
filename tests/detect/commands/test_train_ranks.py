"""Two ranks train a detector as one."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.detection import SETTINGS, TINY, set_options
from tests.helpers.settings import REPOSITORY


def launch(data: Path, run: Path, **sets: Any) -> subprocess.Popen[str]:
    options = {
        "annotations": data / "train" / "annotations.json",
        "images": data / "train" / "images",
        "val-annotations": data / "val" / "annotations.json",
        "val-images": data / "val" / "images",
        "run": run,
        "backbone": TINY,
        "model": "retinanet",
        "norm": "sync-bn",
        "device": "cpu",
        "workers": 2,
    }
    command = [sys.executable, "-m", "tests.helpers.launch"]
    command += [part for key, value in options.items() for part in (f"--{key}", str(value))]
    command += set_options(**{**SETTINGS, **sets})
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.slow(seconds=30)
def test_two_ranks_train_as_one_and_stop_together(
    tmp_path: Path, tiny_data: Path, detect: Callable[..., Any], plain_runs: None
) -> None:
    process = launch(tiny_data, tmp_path / "two", steps=2000, checkpoint_every=4)
    try:
        deadline = time.monotonic() + 120
        while not ((tmp_path / "two" / "metrics.jsonl").exists() and len(losses(tmp_path / "two")) >= 5):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        # As torchrun and schedulers do: to the whole group, the four loader workers included.
        os.killpg(process.pid, signal.SIGTERM)
        said, _ = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    found = re.search(r"stopped on SIGTERM after step (\d+)", said)
    assert found and said.count("stopped on") == 1 and "broadcast_buffers" not in said, said
    step = int(found[1])
    assert process.returncode
    assert (tmp_path / "two" / "checkpoints" / f"step-{step:08d}.pt").exists() and len(losses(tmp_path / "two")) == step
    # RetinaNet samples nothing at random, so one rank has the same losses (the third batch mixes orientations: pads).
    detect(tmp_path / "one", "--stop-after", "2", model="retinanet", norm="sync-bn", steps=2000)
    assert losses(tmp_path / "one")[:2] == pytest.approx(losses(tmp_path / "two")[:2], rel=1e-4)
