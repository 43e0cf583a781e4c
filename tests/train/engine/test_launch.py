"""Ranks' ends as the launcher tells them."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.launcher.api import LaunchConfig

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


@pytest.mark.slow(seconds=6)
def test_ranks_that_fail_are_one_line_each_and_their_status(tmp_path: Path) -> None:
    ends = {
        "refuses.py": "print('Error: x is missing', file=sys.stderr); sys.exit(2)",
        "dies.py": "os.kill(os.getpid(), 9)",
    }
    for name, end in ends.items():
        (tmp_path / name).write_text(f"import os, sys\n{end}\n")
    calls = [f"print(main([*{LAUNCH[3:]}, {str(tmp_path / name)!r}]))" for name in ends]
    script = "\n".join(["from jigsaw_pretrain.train.engine.launch import main", *calls])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    refused, died = done.stderr.splitlines()
    assert done.stdout.split() == ["2", "1"]
    assert refused == "Error: x is missing" and "SIGKILL" in died and "--resume" in died


@pytest.mark.skipif(not hasattr(LaunchConfig, "shutdown_timeout"), reason="torch before 2.12 has no such time")
@pytest.mark.parametrize(("given", "seconds"), [([], "110"), (["--shutdown-timeout", "60"], "60")])
def test_ranks_have_longer_to_save_than_torch_gives(given: list[str], seconds: str) -> None:
    lines = [
        "import torch.distributed.run as torchrun",
        "from jigsaw_pretrain.train.engine.launch import main",
        "torchrun.run = lambda own: print(torchrun.config_from_args(own)[0].shutdown_timeout)",
        f"main([*{given}, 'rank.py'])",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == [seconds]
