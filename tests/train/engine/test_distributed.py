"""Ranks in one process: who reports an error, what is said of the device, and how a rank ends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.train.engine import distributed
from jigsaw_pretrain.train.engine.distributed import rank_zero_errors, start
from tests.helpers.commands import call


def test_only_rank_0_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        with rank_zero_errors():
            raise UserError("no")

    with pytest.raises(UserError):
        refuse()
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as ending:
        refuse()
    assert ending.value.code == 2


def test_a_machine_without_a_gpu_is_told_once_and_refused_where_one_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    distributed._tell_of_no_gpu.cache_clear()
    assert start("cpu").device.type == "cpu" and not caplog.records
    for _ in range(2):
        assert start("auto").device.type == "cpu"
    (said,) = caplog.records
    assert said.levelname == "WARNING" and "no GPU" in said.message
    with pytest.raises(UserError, match="--device cuda"):
        start("cuda")


def test_torchruns_own_end_of_a_run_repeats_what_its_rank_has_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    assert call("pretrain", "--data", tmp_path / "nothing", "--run", tmp_path / "run").exit_code == 2
    told = str(ChildFailedError("main", {0: ProcessFailure(0, 1, 2, str(file))}))
    assert "Error: " in told and "nothing" in told and "Traceback" not in told


LATE = """
import atexit, os, sys, time
from pathlib import Path

def keep_interpreter():
    # All that while the collective's thread waits for it.
    ending.touch()
    until = time.monotonic() + 1
    while time.monotonic() < until:
        pass

atexit.register(keep_interpreter)

import click, torch
import torch.distributed as dist
from jigsaw_pretrain.cli import Command
from jigsaw_pretrain.errors import UserError

folder, is_other = Path(sys.argv.pop()), os.fork() == 0
ending = folder / "ending"
dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=int(is_other), world_size=2)
if is_other:
    while not ending.exists():
        time.sleep(0.01)
    dist.all_reduce(torch.ones(1))
    os._exit(0)

class GivesWay:
    def __del__(self, sleep=time.sleep):
        sleep(0.1)

@click.command(cls=Command)
def main():
    sys.setswitchinterval(60)
    dist.all_reduce(torch.ones(1), async_op=True)
    print("printed", end="")
    raise UserError("refused")

gives_way = GivesWay()
main()
"""


def test_a_rank_ends_with_its_own_status_while_a_collective_lets_go_of_its_tensors(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LATE, str(tmp_path)],
        # Alone it would take Python's own end, where 3.11 has torch's thread abort the process.
        env={**os.environ, "WORLD_SIZE": "2"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (2, "printed"), done.stderr
    assert "refused" in done.stderr and (tmp_path / "ending").exists()
