"""Drivers of stores: each keeps to the same timeouts, and none makes a request again by itself."""

import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.images.archive import read_index, read_member
from jigsaw_pretrain.storage import retries
from jigsaw_pretrain.storage.drivers import driver_options
from jigsaw_pretrain.storage.fetcher import Fetcher
from jigsaw_pretrain.storage.retries import StoreError
from jigsaw_pretrain.storage.store import Storage
from tests.helpers.servers import file_server

LIBRARIES = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs", "az": "adlfs"}
"""What each scheme needs."""


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> str:
    """An address of this machine at which nobody listens, where all drivers look for their store."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{held.getsockname()[1]}"
    account = f"DefaultEndpointsProtocol=http;AccountName=a;AccountKey=a2V5;BlobEndpoint=http://{address}/a;"
    for name, value in {
        **{"AWS_ENDPOINT_URL": f"http://{address}", "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"},
        **{"STORAGE_EMULATOR_HOST": f"http://{address}", "AZURE_STORAGE_CONNECTION_STRING": account},
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(retries, "FIRST_PAUSE", 0.01)
    return address


@pytest.mark.parametrize("scheme", LIBRARIES)
def test_every_store_that_is_down_is_told_of_after_the_same_few_tries(
    scheme: str, closed: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip(LIBRARIES[scheme])
    url = f"{scheme}://{closed}/x" if scheme.startswith("http") else f"{scheme}://bucket/x"
    options = driver_options(url, 0.3, 0.3) | ({"token": "anon"} if scheme == "gs" else {})
    store = Storage(url, options, tries=2)
    asked: tuple[Callable[[], object], ...] = (
        lambda: store.read("a"),
        lambda: store.entries(""),
        lambda: store.publish("a", b"x"),
    )
    for ask in asked:
        begun = time.monotonic()
        with pytest.raises(StoreError):
            ask()
        assert time.monotonic() - begun < 3
    begun = time.monotonic()
    with pytest.raises(UserError, match="2 attempts"):
        Fetcher(url, retries=1, timeout=0.3).fetch("a", tmp_path / "a", lambda fetched: None, 100)
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_an_archive_of_a_web_server_that_serves_whole_files_only_is_told_in_a_line(kind: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(os.urandom(1 << 20))
    shutil.make_archive(str(tmp_path / "images"), kind, tmp_path / "in")
    with file_server(tmp_path, ranges=False) as url, pytest.raises(UserError, match="parts of files") as caught:
        store, name = Storage(url), f"images.{kind}"
        read_member(store, name, read_index(store, name)["a.jpg"])
    assert "\n" not in caught.value.message
