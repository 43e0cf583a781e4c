"""Files that appear whole or not at all, temporary files of the dead, retries, and URLs without their secrets."""

import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest

from jigsaw_pretrain import storage
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.storage import (
    Fetcher,
    Storage,
    StoreError,
    atomic_write,
    redacted,
    sweep,
    temporary_beside,
    with_retries,
)
from tests.helpers.prepped import tree
from tests.helpers.servers import FaultyProxy, file_server


def test_publish_replaces_whole_files_and_leaves_no_litter(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    storage.publish("a/b.bin", b"one")
    storage.publish("a/b.bin", b"two")
    assert storage.read("a/b.bin") == b"two"
    assert os.listdir(tmp_path / "a") == ["b.bin"]
    assert storage.list("a") == ["b.bin"]
    assert storage.list("nowhere") == []
    storage.remove("a/b.bin")
    storage.remove("a/b.bin")
    assert not storage.exists("a/b.bin")


def test_failed_publish_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(tmp_path)
    storage.publish("x", b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        storage.publish("x", b"new")
    assert storage.read("x") == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_a_file_written_atomically_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x"
    with atomic_write(path) as file:
        file.write(b"old")
        assert not path.exists()
    with pytest.raises(RuntimeError), atomic_write(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"old" and os.listdir(path.parent) == ["x"]


def test_retries_end_where_the_caller_says(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    seen: list[tuple[str, bool]] = []

    def failure(error: Exception, what: str, is_last: bool) -> Exception | None:
        seen.append((what, is_last))
        return KeyError("gone") if is_last else None

    def fail() -> None:
        raise OSError("down")

    with pytest.raises(KeyError, match="gone"):
        with_retries(fail, "x", 4, waits=(1.0, 2.0, 0.5), failure=failure)
    assert seen == [("x", False), ("x", False), ("x", False), ("x", True)]
    assert [low <= wait <= 2 * low for low, wait in zip((0.5, 1.0, 1.0), waits, strict=True)] == [True] * 3


def test_unknown_scheme_names_the_remedy() -> None:
    with pytest.raises(UserError, match="no driver for nope"):
        Storage("nope://bucket/x")


def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    tried: list[int] = []

    def fail() -> None:
        tried.append(1)
        raise ConnectionError("http://me:pass@host/x?sig=secret refused")

    with pytest.raises(StoreError) as caught:
        with_retries(fail, "s3://bucket/x?sig=secret")
    assert len(tried) == storage.TRIES and len(waits) == storage.TRIES - 1 and max(waits) <= storage.LONGEST_WAIT
    assert "secret" not in str(caught.value) and "pass" not in str(caught.value)
    with pytest.raises(FileNotFoundError):
        with_retries(lambda: (_ for _ in ()).throw(FileNotFoundError()), "x")


def test_redaction() -> None:
    assert redacted("https://user:pass@host/a.json?sig=1 (x)") == "https://host/a.json?... (x)"
    assert redacted("s3://bucket/a b") == "s3://bucket/a b"


FORKS = multiprocessing.get_context("forkserver")


def hold_open(path: str, ready: Any, leave: Any) -> None:
    with open(path, "xb") as file:
        storage._lock(file.fileno())
        ready.set()
        leave.wait()


def test_a_lock_tells_a_writer_from_litter(tmp_path: Path) -> None:
    path = temporary_beside(tmp_path / "x")
    ready, leave = FORKS.Event(), FORKS.Event()
    process = FORKS.Process(target=hold_open, args=(str(path), ready, leave))
    process.start()
    assert ready.wait(60)
    assert sweep(tmp_path) == 0 and path.exists()
    process.kill()
    process.join()
    assert sweep(tmp_path) == 1 and not path.exists()


def test_a_writer_whose_file_is_swept_writes_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The moment between opening and locking, made long: a sweep takes the file for litter.
    swept: list[int] = []

    def late(descriptor: int) -> None:
        if not swept:
            swept.append(sweep(tmp_path))

    monkeypatch.setattr(storage, "_lock", late)
    Storage(str(tmp_path)).publish("a", b"whole")
    assert swept == [1] and tree(tmp_path) == {"a": b"whole"}


def test_a_file_whose_first_byte_is_slow_is_not_taken_for_a_missing_one(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "x.bin").write_bytes(b"content")
    with file_server(tmp_path / "there") as url, FaultyProxy(url, latency=0.6) as proxy:
        fetcher, path = Fetcher(proxy.url, retries=0), tmp_path / "x.bin"
        fetcher.fetch("x.bin", path, lambda fetched: None)
        assert path.read_bytes() == b"content"
        with pytest.raises(FileNotFoundError):
            fetcher.fetch("y.bin", tmp_path / "y.bin", lambda fetched: None)
