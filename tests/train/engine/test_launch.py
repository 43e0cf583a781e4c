"""Ranks' ends as the launcher tells them."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = [sys.executable, "-m", "jigsaw_pretrain.train.engine.launch", "--standalone", "--nproc-per-node", "1"]
STOPPED = """
import signal, sys, time
def stop(*_):
    print("stopped on SIGINT: continue with --resume", file=sys.stderr)
    sys.exit(3)
signal.signal(signal.SIGINT, stop)
print("begun", flush=True)
time.sleep(60)
"""


@pytest.mark.slow(seconds=5)
def test_ctrl_c_of_all_ranks_ends_in_the_ranks_line_and_status_3(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(STOPPED)
    with subprocess.Popen([*LAUNCH, str(script)], stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (3, "stopped on SIGINT: continue with --resume\n")


@pytest.mark.slow(seconds=9)
@pytest.mark.parametrize(("end", "status"), [("sys.exit('Error: x is missing')", 1), ("os.kill(os.getpid(), 9)", 1)])
def test_a_rank_that_fails_is_one_line(tmp_path: Path, end: str, status: int) -> None:
    script = tmp_path / "rank.py"
    script.write_text(f"import os, sys\n{end}\n")
    done = subprocess.run([*LAUNCH, str(script)], capture_output=True, text=True, timeout=60)
    (line,) = done.stderr.splitlines()
    assert done.returncode == status and ("x is missing" in line or "SIGKILL" in line)
