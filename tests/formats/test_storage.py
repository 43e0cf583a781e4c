import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.dataset import layout
from jigsaw_pretrain.storage import Storage, atomic_write, with_retries


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


@given(st.sampled_from("STW"), st.integers(0, 2_000_000))
def test_shard_names_round_trip(group: str, part: int) -> None:
    assert layout.parse_shard_name(layout.shard_name(group, part)) == (group, part)


@pytest.mark.parametrize("name", ["S-1.tar", "X-000001.tar", "S-000001.tar.gz", "S-000001", "", "S--00001.tar"])
def test_other_names_are_no_shards(name: str) -> None:
    with pytest.raises(ValueError, match="not a shard"):
        layout.parse_shard_name(name)


def test_identity_is_the_path_without_suffix() -> None:
    assert layout.image_id("train/a.b.jpg") == "train/a.b"
    assert layout.image_id("x\\y.png") == "x/y"
    assert layout.image_id("plain") == "plain"
    key = layout.crop_key("train/a.b", 3, False)
    assert key.endswith("-p00003")
    assert "." not in key
    assert "/" not in key
    assert layout.crop_key("train/a.b", 3, True) == key.replace("-p", "-n")
