"""What the drivers of object stores and web servers are told, so that all keep to the same timeouts and none retries.

Retries are storage.py's alone: a driver's own come on top of these, and a store that is down would be told of after
minutes. What a driver does not take as an option is set on it once it is made; a version of it that has no such thing
keeps its own way, which costs time and no more (tests/jigsaw_pretrain/test_drivers.py tries each on a closed port).
"""

import contextlib
import math
from functools import partial
from typing import Any

import fsspec.config
from fsspec import AbstractFileSystem

CONNECT_SECONDS, SILENCE_SECONDS = 5.0, 12.0
"""How long a store may take to be reached, and to go on, before the request is made again."""

CONNECTIONS = 16
"""Of one driver at the same time."""

_WEB = ("http", "https")
_GOOGLE = ("gs", "gcs")
_AZURE = ("az", "abfs", "abfss")
_S3 = ("s3", "s3a")


class NoRanges(Exception):
    """A web server that serves whole files only was asked for a part that lies behind others."""


def driver_options(
    url: str, connect: float = CONNECT_SECONDS, silence: float = SILENCE_SECONDS, connections: int = CONNECTIONS
) -> dict[str, Any]:
    """What a store's driver is told: to list afresh, not to wait for ever, and to leave retries to its caller."""
    scheme = url.partition("://")[0]
    if "://" not in url or scheme in ("file", "local"):
        return {}
    options: dict[str, Any] = {"use_listings_cache": False}
    if scheme in (*_WEB, *_GOOGLE):
        with contextlib.suppress(ImportError):
            from aiohttp import ClientTimeout

            timeout = ClientTimeout(total=None, sock_connect=connect, sock_read=silence)
            options |= {"client_kwargs": {"timeout": timeout}} if scheme in _WEB else {"requests_timeout": timeout}
    if scheme in _GOOGLE:
        # Of the question what kind of bucket it is, which takes a minute by default.
        options["retry_timeout"] = connect
    if scheme in _AZURE:
        # Of transfers; the driver has whole seconds only.
        options |= {"connection_timeout": math.ceil(connect), "read_timeout": math.ceil(silence)}
    if scheme in _S3:
        own = dict(fsspec.config.conf.get("s3", {}).get("config_kwargs", {}))
        settings = {"connect_timeout": connect, "read_timeout": silence, "retries": {"max_attempts": 0}}
        # By default a file above 50 MB is several ranged GETs.
        options |= {
            "config_kwargs": own | settings | {"max_pool_connections": connections},
            "max_concurrency": 1,
        }
    return options


def leave_retries(fs: AbstractFileSystem) -> None:
    """Have a driver make each request once, and wait as ``driver_options`` told it, where no option says that."""
    if hasattr(fs, "retries"):
        fs.retries = 1
    if fs.protocol[0] in _GOOGLE:
        # Each is wrapped in six tries, with pauses of half a minute in all.
        for name in ("_request", "_get_file_request", "_get_file_concurrent"):
            once = getattr(getattr(type(fs), name, None), "__wrapped__", None)
            if once is not None:
                setattr(fs, name, partial(once, fs))
    if fs.protocol[0] in _AZURE:
        with contextlib.suppress(AttributeError):
            client, waits = fs.service_client, fs._timeout_kwargs
            policy, connection = client._config.retry_policy, client._pipeline._transport.connection_config
            policy.total_retries = 0
            # Of listings, which the driver's options leave out.
            connection.timeout, connection.read_timeout = waits["connection_timeout"], waits["read_timeout"]


def is_web(url: str) -> bool:
    """Whether a URL is of a plain web server."""
    return url.partition("://")[0] in _WEB


async def part_of_web_file(fs: Any, url: str, offset: int, size: int) -> bytes:
    """At most ``size`` bytes of a web server's file from ``offset`` on, none behind its end.

    No more is read, whatever the server sends. Raises NoRanges where it sends the file from its begin, and as the
    driver does.
    """
    settings = dict(fs.kwargs)
    headers = {**settings.pop("headers", {}), "Range": f"bytes={offset}-{offset + size - 1}"}
    session = await fs.set_session()
    async with session.get(fs.encode_url(url), headers=headers, **settings) as answer:
        if answer.status == 416:
            return b""
        fs._raise_not_found_for_status(answer, url)
        if answer.status != 206 and offset:
            raise NoRanges(url)
        pieces, left = [], size
        while left > 0 and (piece := await answer.content.read(left)):
            pieces.append(piece)
            left -= len(piece)
        return b"".join(pieces)
