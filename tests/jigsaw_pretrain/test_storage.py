"""Files that appear whole or not at all, temporary files of the dead, retries, and URLs without their secrets."""

import contextlib
import gc
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from weakref import finalize, ref

import pytest
from fsspec.asyn import get_loop
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st

from jigsaw_pretrain.errors import UserError, redacted
from jigsaw_pretrain.storage import drivers, files, retries
from jigsaw_pretrain.storage.drivers import driver_options
from jigsaw_pretrain.storage.fetcher import Fetcher
from jigsaw_pretrain.storage.files import atomic_write, inside, sweep, temporary_beside
from jigsaw_pretrain.storage.retries import StoreError, TooLong, with_retries
from jigsaw_pretrain.storage.store import Storage, _watch_forks, map_ahead
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


@pytest.mark.parametrize("url", ["reference://x", "dir://x", "generic://x", "dbfs://x", "jupyter://x"])
def test_a_url_that_its_driver_does_not_take_is_named(url: str) -> None:
    with pytest.raises(UserError, match=url):
        Storage(url)


def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    tried: list[int] = []

    def fail() -> None:
        tried.append(1)
        raise ConnectionError("http://me:pass@host/x?sig=secret refused")

    with pytest.raises(StoreError) as caught:
        with_retries(fail, "s3://bucket/x?sig=secret")
    assert len(tried) == retries.TRIES and len(waits) == retries.TRIES - 1 and max(waits) <= retries.LONGEST_WAIT
    assert "secret" not in str(caught.value) and "pass" not in str(caught.value)
    with pytest.raises(FileNotFoundError):
        with_retries(lambda: (_ for _ in ()).throw(FileNotFoundError()), "x")


def test_redaction() -> None:
    assert redacted("https://user:pass@host/a.json?sig=1 (x)") == "https://host/a.json?... (x)"
    assert redacted("s3://bucket/a b") == "s3://bucket/a b"
    assert redacted("did you mean resnet50? see x") == "did you mean resnet50? see x"


PLACES = ("user:{}@", "{}@", "?X-Amz-Signature={}", "?a=1&token={}", "#{}")


@given(st.text("abcXYZ019:@.-_", min_size=6), st.sampled_from(PLACES))
def test_no_secret_is_left_of_a_url(secret: str, place: str) -> None:
    told = place.format(f"k{secret}k")
    url = f"s3://{told}bucket/x" if told.endswith("@") else f"https://bucket/x{told}"
    said = redacted(f"{url}: refused ({url}) '{url}'")
    assert f"k{secret}k" not in said and said.count("bucket/x") == 3


@given(st.text("ab./\\:\0", max_size=8))
def test_a_name_stays_inside(name: str) -> None:
    root = Path("/a/b")
    try:
        path = inside(root, name)
    except UserError:
        return
    assert os.path.normpath(path) == str(path) and path.is_relative_to(root) and path != root


class Answering(BaseHTTPRequestHandler):
    """Answers every request as its server says: status, headers, body; nothing at all where it is to be silent."""

    def do_GET(self) -> None:  # noqa: N802
        answer = self.server.answer  # type: ignore[attr-defined]
        if answer is None:
            self.server.leave.wait(30)  # type: ignore[attr-defined]
            return
        status, headers, body = answer
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if self.command != "HEAD" else b"")

    do_HEAD = do_PUT = do_GET  # noqa: N815

    def log_message(self, *arguments: Any) -> None:
        pass


@contextlib.contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def answering(answer: tuple[int, dict[str, str], bytes] | None) -> Iterator[str]:
    with serving(Answering) as server:
        server.answer, server.leave = answer, threading.Event()  # type: ignore[attr-defined]
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.leave.set()  # type: ignore[attr-defined]


def at(url: str, kind: str) -> Storage:
    """A storage that is told of a server by its driver's options, in two tries of 0.3 s."""
    if kind == "http":
        return Storage(url, driver_options(url, 0.3, 0.3), tries=2)
    options = driver_options("s3://bucket", 0.3, 0.3)
    endpoint = {"endpoint_url": url, "region_name": "us-east-1"}
    return Storage("s3://bucket", options | {"key": "k", "secret": "s", "client_kwargs": endpoint}, tries=2)


@pytest.mark.parametrize("kind", ["http", "s3"])
def test_a_silent_store_is_told_of_soon(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.01)
    with answering(None) as url:
        store = at(url, kind)
        # The driver takes any failure of a web server's for a missing file, except when it reads.
        others: tuple[Callable[[], object], ...] = (lambda: store.entries("x"), lambda: store.size("x"))
        for ask in (lambda: store.read("x"), *(others if kind == "s3" else ())):
            begun = time.monotonic()
            with pytest.raises(OSError):
                ask()
            assert time.monotonic() - begun < 5


def fault(code: str) -> bytes:
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>m</Message></Error>".encode()


@pytest.mark.parametrize(
    ("kind", "answer", "said"),
    [
        ("s3", (400, {}, fault("ExpiredToken")), "expired"),
        ("s3", (301, {}, fault("PermanentRedirect")), "redirect"),
        ("s3", (403, {}, fault("SignatureDoesNotMatch")), "credentials"),
        ("http", (403, {}, b""), "expired"),
        ("http", (302, {"Location": "/again"}, b""), "redirect"),
        ("http", (302, {"Location": "file:///etc/passwd"}, b""), "redirect"),
        ("s3", (302, {"Location": "file:///etc/passwd"}, b""), "redirect"),
    ],
)
def test_what_a_refusal_means_is_told(kind: str, answer: tuple[int, dict[str, str], bytes], said: str) -> None:
    with answering(answer) as url, pytest.raises(UserError) as caught:
        at(url, kind).read("x")
    assert said in caught.value.message


def test_damage_of_this_machine_is_no_fault_of_the_store(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "x.bin").write_bytes(b"content")
    with file_server(tmp_path / "there") as url:
        fetcher, folder = Fetcher(url, retries=3), tmp_path / "x.bin"
        folder.mkdir()
        with pytest.raises(UserError) as caught:
            fetcher.fetch("x.bin", folder, lambda fetched: None, 100)
        assert "network" not in caught.value.message and str(folder) in caught.value.message


@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "large"])
def test_what_is_no_file_is_named_and_not_waited_for(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with path.open("wb") as file:
            file.truncate(1 << 40)
    with pytest.raises(OSError) as caught:
        Storage(tmp_path).read("x", 1 << 20)
    assert caught.value.filename == str(path)


def test_a_lock_is_shared_or_alone_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LOCK_SECONDS", 0.2)
    first, second = Storage(tmp_path), Storage(tmp_path)
    with first.locked(exclusive=True) as share:
        with pytest.raises(UserError, match=str(tmp_path)), second.locked(exclusive=False):
            pass
        share()
        with second.locked(exclusive=False):
            pass
        with pytest.raises(UserError), second.locked(exclusive=True):
            pass
    with second.locked(exclusive=True):
        pass
    assert tree(tmp_path) == {}


FORKS = multiprocessing.get_context("forkserver")


def hold_open(path: str, ready: Any, leave: Any) -> None:
    with open(path, "xb") as file:
        files._lock(file.fileno())
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


def test_a_forked_child_finalises_no_driver_of_its_parent(tmp_path: Path) -> None:
    class Driver(MemoryFileSystem):
        protocol = "of-this-test"

    _watch_forks()
    driver = Driver()
    finalised = tmp_path / "finalised"
    finalize(driver, finalised.touch).atexit = False
    watched = ref(driver)
    del driver
    child = os.fork()
    if not child:
        gc.collect()
        os._exit(0)
    os.waitpid(child, 0)
    assert watched() is not None and not finalised.exists()
    Driver.clear_instance_cache()
    gc.collect()
    assert watched() is None and finalised.exists()


def test_a_writer_whose_file_is_swept_writes_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The moment between opening and locking, made long: a sweep takes the file for litter.
    swept: list[int] = []

    def late(descriptor: int) -> None:
        if not swept:
            swept.append(sweep(tmp_path))

    monkeypatch.setattr(files, "_lock", late)
    Storage(str(tmp_path)).publish("a", b"whole")
    assert swept == [1] and tree(tmp_path) == {"a": b"whole"}


def test_a_file_whose_first_byte_is_slow_is_not_taken_for_a_missing_one(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "x.bin").write_bytes(b"content")
    with file_server(tmp_path / "there") as url, FaultyProxy(url, latency=0.6) as proxy:
        fetcher, path = Fetcher(proxy.url, retries=0), tmp_path / "x.bin"
        fetcher.fetch("x.bin", path, lambda fetched: None, 100)
        assert path.read_bytes() == b"content"
        with pytest.raises(FileNotFoundError):
            fetcher.fetch("y.bin", tmp_path / "y.bin", lambda fetched: None, 100)


def test_a_driver_that_hangs_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "FIRST_PAUSE", 0.01)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "x.bin").write_bytes(b"content")
    go_on = threading.Event()
    with file_server(tmp_path / "there") as url:
        fetcher, path = Fetcher(url, retries=1, timeout=0.3), tmp_path / "x.bin"
        # The event loop that all drivers of a process share.
        get_loop().call_soon_threadsafe(go_on.wait)
        try:
            fetcher.fetch("x.bin", path, lambda fetched: None, 100)
        finally:
            go_on.set()
        assert path.read_bytes() == b"content"


@pytest.mark.parametrize("ranges", [True, False])
def test_a_file_of_a_web_server_has_a_most(ranges: bool, tmp_path: Path) -> None:
    (tmp_path / "ten").write_bytes(b"0123456789")
    (tmp_path / "empty").write_bytes(b"")
    with file_server(tmp_path, ranges=ranges) as url:
        store = Storage(url)
        assert store.read("ten", 10) == b"0123456789" and store.read("empty", 10) == b""
        with pytest.raises(OSError, match="9 bytes"):
            store.read("ten", 9)
        with pytest.raises(TooLong):
            Fetcher(url, retries=3).fetch("ten", tmp_path / "fetched", lambda fetched: None, 9)


class Endless(BaseHTTPRequestHandler):
    """Answers every request with bytes that do not end."""

    piece, pause = bytes(1 << 20), 0.0

    def do_GET(self) -> None:  # noqa: N802
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(OSError):
            while True:
                self.wfile.write(self.piece)
                time.sleep(self.pause)

    def log_message(self, *arguments: Any) -> None:
        pass


class Dripping(Endless):
    """Sends a byte now and then, and never an end."""

    piece, pause = b"x", 0.05


def test_a_server_that_drips_is_as_good_as_silent(tmp_path: Path) -> None:
    with serving(Dripping) as server:
        url = f"http://127.0.0.1:{server.server_address[1]}"
        begun = time.monotonic()
        with pytest.raises(UserError):
            Fetcher(url, retries=0, timeout=0.3).fetch("x", tmp_path / "x", lambda fetched: None, 1 << 21)
        assert time.monotonic() - begun < 3


def test_what_a_server_sends_is_not_held_in_memory_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(drivers, "MOST_ANSWER", 1 << 21)
    monkeypatch.setattr(drivers, "SILENCE_SECONDS", 0.2)
    with serving(Endless) as server:
        url = f"http://127.0.0.1:{server.server_address[1]}"
        with pytest.raises(OSError, match="more than"):
            at(url, "s3").read("x", 1 << 21)
        assert at(url, "s3").read_range("x", 0, 10) == bytes(10)
        # Lists of files.
        for listed in (Storage(url, tries=1), at(url, "s3")):
            for ask in (listed.find, lambda listed=listed: listed.entries("x")):
                with pytest.raises(OSError, match="more than"):
                    ask()
    with serving(Dripping) as server:
        url = f"http://127.0.0.1:{server.server_address[1]}"
        for store in (Storage(url, tries=1), at(url, "s3")):
            begun = time.monotonic()
            with pytest.raises(OSError):
                store.read("x", 1 << 21)
            assert time.monotonic() - begun < 3


class Listing(BaseHTTPRequestHandler):
    """An S3 server whose listing has no end: each page has ``server.names`` new names, or the same ones again."""

    def do_GET(self) -> None:  # noqa: N802
        server: Any = self.server
        server.pages += 1
        number = 0 if server.repeats else server.pages
        names = "".join(f"<Contents><Key>x/{number}-{k}</Key><Size>1</Size></Contents>" for k in range(server.names))
        body = (
            f"<?xml version='1.0'?><ListBucketResult><IsTruncated>true</IsTruncated>{names}"
            f"<NextContinuationToken>t{number}</NextContinuationToken></ListBucketResult>"
        ).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.mark.parametrize(("repeats", "names"), [(True, 1), (False, 0), (False, 1), (False, 1000)])
def test_a_listing_without_end_is_left(repeats: bool, names: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(drivers, "SILENCE_SECONDS", 0.2)
    # More names than the pages of one name bring before they count as silence.
    monkeypatch.setattr(drivers, "LEAST_NAMES", 1e4)
    monkeypatch.setattr(Storage._call, "__kwdefaults__", {"seconds": 0.5})
    with serving(Listing) as server:
        server.pages, server.repeats, server.names = 0, repeats, names  # type: ignore[attr-defined]
        store = at(f"http://127.0.0.1:{server.server_address[1]}", "s3")
        for ask in (lambda: store.find(most=10_000), lambda: store.entries("x")):
            begun = time.monotonic()
            with pytest.raises((UserError, OSError)):
                ask()
            assert time.monotonic() - begun < 5


def test_a_driver_without_event_loop_sends_no_more_than_its_most(tmp_path: Path) -> None:
    store = MemoryFileSystem.store
    store["/endless/x"] = MemoryFile(MemoryFileSystem(), "/endless/x", bytes(5 << 20))
    fetcher = Fetcher("memory://endless", retries=3)
    with pytest.raises(TooLong):
        fetcher.fetch("x", tmp_path / "x", lambda fetched: None, 1000)
    assert (tmp_path / "x").stat().st_size <= 2 << 20
    fetcher.fetch("x", tmp_path / "x", lambda fetched: None, 5 << 20)
    assert (tmp_path / "x").read_bytes() == bytes(5 << 20)


def test_a_file_without_end_is_left_after_its_most(tmp_path: Path) -> None:
    with serving(Endless) as server:
        url = f"http://127.0.0.1:{server.server_address[1]}"
        store = Storage(url)
        assert store.exists("x") and store.read_range("x", 0, 10) == bytes(10)
        with pytest.raises(OSError, match="more than"):
            store.read("x", 1 << 21)
        with pytest.raises(UserError, match="parts of files"):
            store.read_range("x", 5, 10)
        with pytest.raises(TooLong):
            Fetcher(url, retries=3).fetch("x", tmp_path / "x", lambda fetched: None, 1 << 21)
        assert (tmp_path / "x").stat().st_size < 1 << 31


def test_a_folder_that_takes_no_file_is_told_by_the_file_that_was_meant(tmp_path: Path) -> None:
    final = tmp_path / "ours" / "x.json"
    final.parent.mkdir()
    # Root may write anywhere but to a folder that is gone.
    with pytest.raises(FileNotFoundError) as caught, atomic_write(final) as file:
        file.write(b"x")
        shutil.rmtree(final.parent)
    assert caught.value.filename == str(final)


def test_nothing_is_begun_after_a_failure() -> None:
    begun: list[int] = []

    def slow(item: int) -> int:
        begun.append(item)
        time.sleep(0.2)
        raise ValueError(str(item))

    with pytest.raises(ValueError, match="0"):
        list(map_ahead(slow, range(100), 4))
    time.sleep(0.5)
    assert sorted(begun) == [0, 1, 2, 3]
