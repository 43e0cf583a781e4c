"""Object stores and bad networks for tests: an S3 server, a plain file server, and a proxy that misbehaves on purpose.

All are real HTTP servers on loopback. ``with s3_server() as s3: with FaultyProxy(s3.endpoint, share(0.05)) as proxy:``
gives ``proxy.url`` to use in place of ``s3.endpoint``. The proxy keeps a log of what was asked for and what it did.
"""

import contextlib
import http.client
import os
import random
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

FAULTS = ("500", "503", "reset", "lost", "short", "stall")
"""Answers with a status; a connection reset before, or after, the request was served; half a body; silence."""

Faults = Callable[[int, str, str], str | None]
"""From the request's number (from 0), method and path to one of FAULTS, or None for an honest answer."""


@dataclass(frozen=True)
class Store:
    """An S3 server: its endpoint URL, and an empty bucket in it."""

    endpoint: str
    bucket: str

    def environment(self, endpoint: str | None = None) -> dict[str, str]:
        """The variables from which drivers take endpoint and credentials; ``endpoint`` for one by way of a proxy."""
        return {
            "AWS_ENDPOINT_URL": endpoint or self.endpoint,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "a-secret-that-must-not-be-written",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def options(self, endpoint: str | None = None) -> dict[str, Any]:
        """The same as options of s3fs."""
        values = self.environment(endpoint)
        return {
            "key": values["AWS_ACCESS_KEY_ID"],
            "secret": values["AWS_SECRET_ACCESS_KEY"],
            "client_kwargs": {"endpoint_url": values["AWS_ENDPOINT_URL"], "region_name": "us-east-1"},
        }


@contextlib.contextmanager
def s3_server(bucket: str = "bucket") -> Iterator[Store]:
    """moto's S3 server in a thread, with one empty bucket; what other servers of this process hold is forgotten."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for method, path in (("POST", "/moto-api/reset"), ("PUT", f"/{bucket}")):
            connection = http.client.HTTPConnection(host, port)
            connection.request(method, path)
            answer = connection.getresponse()
            answer.read()
            assert answer.status == 200, (method, path, answer.status)
            connection.close()
        yield Store(f"http://{host}:{port}", bucket)
    finally:
        server.stop()


@contextlib.contextmanager
def file_server(folder: Path, ranges: bool = True) -> Iterator[str]:
    """A plain web server over a folder; yields its URL. ranges: whether it knows requests for a part of a file."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            pass

        def do_GET(self) -> None:  # noqa: N802
            path = Path(self.translate_path(self.path))
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if ranges else None
            if asked is None or not path.is_file():
                super().do_GET()
                return
            size, first = path.stat().st_size, int(asked[1])
            last = min(int(asked[2] or size), size - 1)
            with path.open("rb") as file:
                file.seek(first)
                data = file.read(max(0, last - first + 1))
            self.send_response(206 if data else 416)
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}" if data else f"bytes */{size}")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=os.fspath(folder)))
    with _serving(server):
        yield f"http://127.0.0.1:{server.server_address[1]}"


def share(part: float, kinds: tuple[str, ...] = ("500", "reset"), seed: int = 0) -> Faults:
    """Faults for a share of all requests, drawn by seed and request number."""

    def decide(number: int, method: str, path: str) -> str | None:
        drawn = random.Random(seed * 1_000_003 + number)
        return drawn.choice(kinds) if drawn.random() < part else None

    return decide


@dataclass(frozen=True)
class Request:
    """A request as the proxy saw it: times in seconds from the proxy's start, bytes of the answer's body."""

    number: int
    method: str
    path: str
    headers: dict[str, str]
    fault: str | None
    status: int
    begun: float
    ended: float
    bytes: int


class FaultyProxy:
    """A reverse proxy to ``target`` (an http:// URL) that answers some requests badly, all of them ``latency`` late.

    faults: see Faults; may be replaced while it runs. stall: seconds of silence before a stalled connection is closed.
    log: every request, in the order of their ends. Use it as a context manager.
    """

    def __init__(self, target: str, faults: Faults | None = None, latency: float = 0.0, stall: float = 60.0) -> None:
        where = urlsplit(target)
        assert where.hostname is not None and where.port is not None
        self.target = (where.hostname, where.port)
        self.faults, self.latency, self.stall = faults, latency, stall
        self.log: list[Request] = []
        self.closing = threading.Event()
        self._count = 0
        self._lock = threading.Lock()
        self._stack = contextlib.ExitStack()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.started = time.monotonic()

    def __enter__(self) -> "FaultyProxy":
        self._stack.enter_context(_serving(self._server))
        return self

    def __exit__(self, *exception: object) -> None:
        self.closing.set()
        self._stack.close()

    def next_number(self) -> int:
        """Count a request in."""
        with self._lock:
            self._count += 1
            return self._count - 1

    @property
    def most_at_once(self) -> int:
        """The most requests that were open at the same time."""
        moments = sorted((time, step) for entry in self.log for time, step in ((entry.begun, 1), (entry.ended, -1)))
        open_now = most = 0
        for _, step in moments:
            open_now += step
            most = max(most, open_now)
        return most


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def __init__(self, proxy: FaultyProxy, *arguments: Any) -> None:
        self.proxy = proxy
        super().__init__(*arguments)

    def log_message(self, *arguments: Any) -> None:
        pass

    def _pass_on(self) -> None:
        proxy, begun = self.proxy, time.monotonic()
        number = proxy.next_number()
        body = self._body()
        fault = proxy.faults(number, self.command, self.path) if proxy.faults else None
        if proxy.latency:
            time.sleep(proxy.latency)
        status, sent = 0, 0
        try:
            if fault in ("500", "503"):
                status, sent = int(fault), self._answer(int(fault), [("Content-Type", "text/plain")], b"out of order")
            elif fault == "reset":
                self._reset()
            elif fault == "stall":
                proxy.closing.wait(proxy.stall)
                self._reset()
            else:
                status, answered, data = self._ask(body)
                if fault == "lost":
                    self._reset()
                else:
                    sent = self._answer(status, answered, data, short=fault == "short")
        finally:
            headers, times = dict(self.headers.items()), (begun - proxy.started, time.monotonic() - proxy.started)
            entry = Request(number, self.command, self.path, headers, fault, status, *times, sent)
            proxy.log.append(entry)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on  # noqa: N815

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            pieces = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        hidden = {"transfer-encoding", "content-length", "connection", "expect", "keep-alive"}
        headers = {name: value for name, value in self.headers.items() if name.lower() not in hidden}
        connection = http.client.HTTPConnection(*self.proxy.target)
        try:
            if body or self.command in ("PUT", "POST"):
                headers["Content-Length"] = str(len(body))
            connection.request(self.command, self.path, body or None, headers)
            answer = connection.getresponse()
            data = answer.read()
            kept = [(name, value) for name, value in answer.getheaders() if name.lower() not in hidden]
            if self.command == "HEAD" and answer.getheader("Content-Length"):
                kept.append(("Content-Length", str(answer.getheader("Content-Length"))))
            return answer.status, kept, data
        finally:
            connection.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes, short: bool = False) -> int:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        if self.command != "HEAD" and status not in (204, 304):
            self.send_header("Content-Length", str(len(data)))
        elif not any(name.lower() == "content-length" for name, _ in headers) and status not in (204, 304):
            self.send_header("Content-Length", "0")
        self.end_headers()
        if self.command == "HEAD":
            return 0
        part = data[: len(data) // 2] if short else data
        self.wfile.write(part)
        if short:
            self.wfile.flush()
            self.close_connection = True
        return len(part)

    def _reset(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            # Lingering for zero seconds makes the kernel send a reset instead of an orderly end.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        self.wfile = _Nowhere()  # type: ignore[assignment]


class _Nowhere:
    """Takes what is written after a reset."""

    closed = True

    def write(self, data: bytes) -> int:
        return len(data)

    def flush(self) -> None:
        pass


@contextlib.contextmanager
def _serving(server: ThreadingHTTPServer) -> Iterator[None]:
    server.daemon_threads = True
    server.handle_error = lambda *arguments: None  # type: ignore[method-assign]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
