"""A disk that fills up: a plain message, and the rerun with space completes."""

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.prepped import Small, tree


def prep(small: Small, out: Path, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, whose files may not become longer than ``limit`` bytes."""

    def lower() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, "-m", "prep", "shards", *small.arguments(out, "--workers", "2")]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, preexec_fn=lower)


def check(result: subprocess.CompletedProcess[str], said: str) -> None:
    assert result.returncode == 2, result.stderr
    assert said in result.stderr and "Traceback" not in result.stderr
    assert "same command again" in result.stderr


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow(seconds=9)
def test_a_full_disk(small: Small, disk: Path) -> None:
    result = prep(small, disk / "out")
    check(result, "No space left on device")
    left = [name for name in tree(disk / "out") if name.endswith(".tmp")]
    assert not left and not (disk / "out" / "manifests" / "dataset.json").exists()
    subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
    assert prep(small, disk / "out").returncode == 0
    assert tree(disk / "out") == small.tree


@pytest.mark.slow(seconds=3)
def test_files_that_may_not_grow(small: Small, tmp_path: Path) -> None:
    sizes = sorted(len(data) for name, data in small.tree.items() if name.endswith(".tar"))
    check(prep(small, tmp_path / "out", limit=sizes[len(sizes) // 2]), "File too large")
    assert small.run(tmp_path / "out").exit_code == 0
    assert tree(tmp_path / "out") == small.tree
