"""A machine that lacks something: one line, whatever it is, and what is there stays whole.

Commands run in forks of this process, under limits of their own: importing torch anew takes seconds.
"""

import os
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from jigsaw_pretrain.cli import DEBUG
from jigsaw_pretrain.process import TORCH
from jigsaw_pretrain.train.cli import main
from tests.helpers.jobs import BASE


def forked(arguments: tuple[object, ...], prepare: Callable[[], object], **environment: str) -> tuple[int, str]:
    """Exit status and output of one of train's commands in a fork that prepared itself."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        status = 99
        try:
            os.dup2(writing, 1)
            os.dup2(writing, 2)
            sys.stdout, sys.stderr = (open(one, "w", closefd=False) for one in (1, 2))  # noqa: SIM115
            os.environ.pop(DEBUG, None)
            os.environ.update(environment)
            prepare()
            main.main([str(one) for one in arguments])
            status = 0
        except SystemExit as ended:
            status = int(ended.code or 0)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading, errors="replace") as output:
        said = output.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


def limited(kind: int, most: int) -> Callable[[], None]:
    """Prepares a process that may have so much of something; too large a file is an error, as a full disk is."""

    def prepare() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(kind, (most, most))

    return prepare


def resident() -> int:
    """Bytes of address space of this process."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


EXPORT = ("export", "--to", "torchvision", "--out", "OUT/x.pth", "--run", "RUN")
PRETRAIN = ("pretrain", "--data", "DATA", "--run", "OUT/run", "--no-page", "--log", "none", "--workers", "0", *BASE)

CASES: Mapping[str, tuple[tuple[str, ...], Callable[[], object], str]] = {
    "a checkpoint on a full disk": (PRETRAIN, limited(resource.RLIMIT_FSIZE, 200_000), "OUT/run/checkpoints"),
    "an export on a full disk": (EXPORT, limited(resource.RLIMIT_FSIZE, 1_000), "OUT/x.pth"),
    "a report on a full disk": (
        ("report", "--run", "RUN", "--out", "OUT/x.html"),
        limited(resource.RLIMIT_FSIZE, 100),
        "OUT/x.html",
    ),
    "few files": (PRETRAIN, limited(resource.RLIMIT_NOFILE, 6), "ulimit -n"),
    "little memory": (
        (*PRETRAIN, "--set", "data.batch=4096", "--set", "data.template_size=512"),
        lambda: limited(resource.RLIMIT_AS, max(TORCH, resident() + (200 << 20)))(),
        "memory",
    ),
    "few addresses": (PRETRAIN, limited(resource.RLIMIT_AS, TORCH - 1), "ulimit -v"),
}


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits of a process are Linux's")
@pytest.mark.parametrize("name", CASES)
def test_what_a_machine_lacks_costs_a_line(name: str, data: Path, finished: Path, tmp_path: Path) -> None:
    words, prepare, named = CASES[name]
    places = {"OUT": str(tmp_path), "RUN": str(finished), "DATA": str(data)}

    def placed(word: str) -> str:
        head, slash, rest = word.partition("/")
        return places.get(head, head) + slash + rest

    status, said = forked(tuple(placed(word) for word in words), prepare)
    errors = [line for line in said.splitlines() if line.startswith("Error: ")]
    assert status == 2 and len(errors) == 1 and "Traceback" not in said, said
    assert placed(named) in errors[0]
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith((".tmp", ".pth", ".html", ".pt"))]


@pytest.mark.parametrize("url", [True, False])
def test_a_home_that_cannot_be_written_costs_a_line_or_nothing(url: bool, finished: Path, tmp_path: Path) -> None:
    run = f"file://{finished}" if url else str(finished)
    home = {"HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null/cache"}
    arguments = ("export", "--to", "torchvision", "--out", tmp_path / "x.pth", "--run", run)
    assert forked(arguments, lambda: None, **home)[0] == 0
    if url:
        status, said = forked(("pretrain", "--data", tmp_path, "--run", run, "--resume"), lambda: None, **home)
        assert status == 2 and said.count("\n") == 1, said
