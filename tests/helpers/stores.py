"""Tiny datasets in an S3 server on loopback, for tests of streaming."""

import contextlib
import faulthandler
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
import s3fs

from jigsaw_pretrain.formats.dataset.dataset import Dataset
from jigsaw_pretrain.train.data.loader import digest
from jigsaw_pretrain.train.data.remote import ReadOptions
from jigsaw_pretrain.train.recipe import DataOptions
from tests.helpers.servers import FaultyProxy, Store, s3_server
from tests.helpers.sources import small_data

OPTIONS = small_data(batch=16, lanes=8)


def upload(store: Store, folder: Path, prefix: str) -> str:
    """Copy a local dataset into the store, by hand; its URL there."""
    files = s3fs.S3FileSystem(**store.options(), skip_instance_cache=True)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            files.pipe_file(f"{store.bucket}/{prefix}/{path.relative_to(folder)}", path.read_bytes())
    return f"s3://{store.bucket}/{prefix}"


@contextlib.contextmanager
def proxied_store() -> Iterator[tuple[Store, FaultyProxy]]:
    """An S3 server behind a proxy, which is where this process's drivers look while it is open."""
    with s3_server() as store, FaultyProxy(store.endpoint) as proxy, pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment(proxy.url).items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        yield store, proxy


def gets(proxy: FaultyProxy, what: str = "/shards/") -> list[str]:
    """The paths of the honest GETs of shards, in order."""
    return [entry.path for entry in proxy.log if entry.method == "GET" and what in entry.path and not entry.fault]


def lines(
    dataset: Dataset,
    access: ReadOptions | None = None,
    *,
    world: int = 1,
    workers: int = 0,
    first: int = 0,
    steps: int = 5,
    start_method: str | None = None,
    options: DataOptions = OPTIONS,
) -> list[str]:
    """What `digest` prints for a dataset; where that fails, the error says too what slow forked workers were doing."""
    with _telling_of_slow_forks():
        found = digest(
            dataset,
            options,
            world=world,
            workers=workers,
            first=first,
            steps=steps,
            start_method=start_method,
            access=access,
        )
        return list(found)


SLOW_SECONDS = 20
"""A forked worker that lives so long is waiting for something: less than a request's patience."""

_stacks: list[IO[str]] = []


def _watch_child() -> None:
    if _stacks:
        # By a signal: faulthandler's own timer, which pytest sets, would wait here for a thread that no fork copies.
        faulthandler.register(signal.SIGALRM, file=_stacks[0])
        signal.alarm(SLOW_SECONDS)


os.register_at_fork(after_in_child=_watch_child)


@contextlib.contextmanager
def _telling_of_slow_forks() -> Iterator[None]:
    with tempfile.TemporaryFile("w+") as file:
        _stacks.append(file)
        try:
            yield
        except Exception as error:
            file.seek(0)
            error.add_note(file.read())
            raise
        finally:
            _stacks.clear()
