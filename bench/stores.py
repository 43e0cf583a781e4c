"""S3 servers for measurements, in processes of their own, behind a relay that can make every request late.

rclone's server where it is installed (compiled, serves the folder as it lies), else moto (Python, copies the folder
into its memory first). The relay holds back what the client sends, not what it receives, so it adds its latency once
per request, however long the answer, and reads nothing of what it passes on.
"""

import contextlib
import logging
import multiprocessing
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from urllib.parse import urlsplit

from tests.helpers.servers import Store, s3_server
from tests.helpers.stores import upload

SERVERS = ("rclone", "moto")


def found_server() -> str:
    """rclone where the command is there, else moto."""
    return "rclone" if shutil.which("rclone") else "moto"


class Relay:
    """Passes connections on to an http:// URL, each piece from the client ``latency`` seconds late."""

    def __init__(self, target: str) -> None:
        where = urlsplit(target)
        self._target = (str(where.hostname), int(where.port or 80))
        self.latency = 0.0
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self._socket.accept()
            server = socket.create_connection(self._target)
            for one in (client, server):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._pass_on, args=(client, server, True), daemon=True).start()
            threading.Thread(target=self._pass_on, args=(server, client, False), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, late: bool) -> None:
        buffer = bytearray(2**20)
        view = memoryview(buffer)
        with contextlib.suppress(OSError):
            while size := source.recv_into(buffer):
                if late and self.latency:
                    time.sleep(self.latency)
                sink.sendall(view[:size])
            sink.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def rclone_server(folder: Path) -> Iterator[Store]:
    """rclone's S3 server; its bucket holds ``folder`` as ``set``."""
    with tempfile.TemporaryDirectory() as root, socket.create_server(("127.0.0.1", 0)) as free:
        store = Store(f"http://127.0.0.1:{free.getsockname()[1]}", "bucket")
        (Path(root) / store.bucket).mkdir()
        (Path(root) / store.bucket / "set").symlink_to(folder.resolve())
        secrets = store.environment()
        key = f"{secrets['AWS_ACCESS_KEY_ID']},{secrets['AWS_SECRET_ACCESS_KEY']}"
        free.close()
        command = ["rclone", "serve", "s3", root, "--copy-links", "--read-only", "--auth-key", key]
        command += ["--addr", store.endpoint.removeprefix("http://"), "--config", os.devnull, "--log-level", "ERROR"]
        process = subprocess.Popen(command)
        try:
            _wait_for(store.endpoint)
            yield store
        finally:
            process.terminate()
            process.wait()


@contextlib.contextmanager
def moto_server(folder: Path) -> Iterator[Store]:
    """moto's S3 server; its bucket holds a copy of ``folder`` as ``set``."""
    with s3_server() as store:
        upload(store, folder, "set")
        yield store


def _wait_for(url: str, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(url).close()
        except urllib.request.HTTPError:
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return


def _serve(kind: str, folder: str, pipe: Connection) -> None:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = rclone_server if kind == "rclone" else moto_server
    with server(Path(folder)) as store:
        relay = Relay(store.endpoint)
        pipe.send((store.bucket, store.environment(relay.url)))
        while (latency := pipe.recv()) is not None:
            relay.latency = latency
            pipe.send(None)


@dataclass(frozen=True)
class Served:
    """A dataset served in another process: its URL and the environment in which drivers find it."""

    url: str
    environment: dict[str, str]
    pipe: Connection

    def set_latency(self, seconds: float) -> None:
        """Make every request so late from now on."""
        self.pipe.send(seconds)
        self.pipe.recv()


@contextlib.contextmanager
def served(kind: str, folder: Path) -> Iterator[Served]:
    """Serve a dataset's folder until the end of the block."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(kind, str(folder), theirs))
    process.start()
    theirs.close()
    try:
        bucket, environment = ours.recv()
        yield Served(f"s3://{bucket}/set", environment, ours)
    finally:
        with contextlib.suppress(OSError):
            ours.send(None)
        process.join()
