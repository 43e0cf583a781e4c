"""What a machine gives too little of, and what killed processes leave there."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from jigsaw_pretrain.detect.cli import main as detect
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.process import SHARED_MEMORY, TORCH, check_address_space, own_semaphores
from jigsaw_pretrain.train.cli import main as train

LEAVES = """
import multiprocessing, sys, time
from jigsaw_pretrain.process import own_semaphores
own_semaphores()
kept = multiprocessing.get_context("spawn").Semaphore()
print("made", flush=True)
time.sleep(60)
"""


def test_too_few_addresses_are_a_line_before_a_library_fails() -> None:
    """In a process of its own, where importing a library fails in C."""
    done = subprocess.run(
        [sys.executable, "-m", "jigsaw_pretrain.prep", "status", "--out", "/none"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (250 << 20,) * 2),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "ulimit -v allows 0.24 GiB" in done.stderr and "ulimit -v unlimited" in done.stderr


def test_commands_that_load_torch_need_more_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (TORCH - 1, resource.RLIM_INFINITY))
    for group in (train, detect):
        for name in group.list_commands(None):  # type: ignore[arg-type]
            result = CliRunner().invoke(group, [name, "--help"])
            light = name == "subset"
            assert (result.exit_code == 0) == light and ("ulimit -v" in result.output) != light, result.output
    for limit in (TORCH, resource.RLIM_INFINITY):
        monkeypatch.setattr(resource, "getrlimit", lambda kind, limit=limit: (limit, limit))
        check_address_space(TORCH)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1000, 1000))
    with pytest.raises(UserError, match="GiB"):
        check_address_space(2000)


@pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="semaphores are files on Linux")
def test_what_a_killed_group_left_goes_with_the_next_command() -> None:
    def left(process: int) -> list[Path]:
        return list(SHARED_MEMORY.glob(f"sem.jigsaw-*-{process}-*"))

    groups = []
    for _ in range(2):
        group = subprocess.Popen([sys.executable, "-c", LEAVES], stdout=subprocess.PIPE, start_new_session=True)
        assert group.stdout is not None and group.stdout.readline() == b"made\n"
        groups.append(group)
    killed, alive = groups
    try:
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait()
        assert left(killed.pid) and left(alive.pid)
        own_semaphores()
        assert not left(killed.pid) and left(alive.pid)
    finally:
        os.killpg(alive.pid, signal.SIGKILL)
        alive.wait()
        own_semaphores()
    assert not left(alive.pid)
