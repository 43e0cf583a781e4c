"""What the drivers of object stores and web servers are told, so that all keep to the same timeouts and none retries.

Retries are those of retries.py alone: a driver's own come on top of these, and a store that is down would be reported
after minutes. What a driver does not take as an option is set on it once it is made; a version of it that has no such
thing keeps its own way, which costs time and no more (tests/jigsaw_pretrain/test_drivers.py tries each on a closed
port).
"""

import contextlib
import functools
import inspect
import math
import time
from typing import Any

import fsspec.config
from fsspec import AbstractFileSystem

CONNECT_SECONDS, SILENCE_SECONDS = 5.0, 12.0
"""How long a store may take to be reached, and to go on, before the request is made again."""

LEAST_RATE = 1024.0
"""Bytes a second below which a store counts as silent."""

LEAST_NAMES = 50.0
"""The same of a long listing, in names: a page of a thousand takes well under a second."""

MOST_NAMES = 10_000_000
"""The most names that a listing may have: more than a gigabyte of memory."""

MOST_ANSWER = 64 << 20
"""The most bytes of an answer that is read at once: of a web server's, or of a page of S3's listing."""

_PIECE = 1 << 20

CONNECTIONS = 16
"""Connections of one driver at the same time."""

_WEB = ("http", "https")
_GOOGLE = ("gs", "gcs")
_AZURE = ("az", "abfs", "abfss")
_S3 = ("s3", "s3a")


class NoRanges(Exception):
    """A web server that serves whole files only was asked for a part that lies behind others."""


class EndlessListing(Exception):
    """A store's listing repeats itself, or goes on and on; the message says what to do."""


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
            client = {"timeout": timeout, "response_class": _bounded_response()}
            options |= {"client_kwargs": client} if scheme in _WEB else {"requests_timeout": timeout}
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
            "config_kwargs": own | settings | _bounded_session() | {"max_pool_connections": connections},
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
                setattr(fs, name, functools.partial(once, fs))
    if fs.protocol[0] in _AZURE:
        with contextlib.suppress(AttributeError):
            client, waits = fs.service_client, fs._timeout_kwargs
            policy, connection = client._config.retry_policy, client._pipeline._transport.connection_config
            policy.total_retries = 0
            # Of listings, which the driver's options leave out.
            connection.timeout, connection.read_timeout = waits["connection_timeout"], waits["read_timeout"]


def is_s3(url: str) -> bool:
    """Whether a URL is of a store that speaks S3."""
    return url.partition("://")[0] in _S3


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
        return await _read(answer.content, size)


async def part_of_s3_file(fs: Any, path: str, offset: int, size: int) -> bytes:
    """At most ``size`` bytes of an object from ``offset`` on, whatever the server sends; raises as the driver does."""
    bucket, key, version = fs.split_path(path)
    wanted = {"Bucket": bucket, "Key": key, "Range": f"bytes={offset}-{offset + size - 1}"}
    if version is not None:
        wanted["VersionId"] = version
    answer = await fs._call_s3("get_object", **wanted)
    try:
        return await _read(answer["Body"], size)
    finally:
        answer["Body"].close()


async def names_in_s3(fs: Any, path: str, most: int = MOST_NAMES) -> list[str]:
    """The keys of all objects below a folder, ``most`` at most, relative to it, without what stands for folders.

    Raises EndlessListing, TimeoutError where a listing hardly goes on, and as the driver does. The driver's own
    ``find`` keeps a kilobyte of each object, and follows a listing that has no end.
    """
    bucket, key, _ = fs.split_path(path)
    prefix = f"{key.rstrip('/')}/" if key else ""
    asked, names, seen, begun = {"Bucket": bucket, "Prefix": prefix}, [], set(), time.monotonic()
    while True:
        page = await fs._call_s3("list_objects_v2", **asked, **fs.req_kw)
        keys = (one["Key"] for one in page.get("Contents", []))
        names += [name.removeprefix(prefix) for name in keys if not name.endswith("/")]
        if not page.get("IsTruncated"):
            return names
        token = asked["ContinuationToken"] = page.get("NextContinuationToken")
        if token is None or token in seen or len(names) > most:
            raise EndlessListing(f"its listing has no end within {most:,} files: name a folder below it")
        seen.add(token)
        elapsed = time.monotonic() - begun
        if elapsed > SILENCE_SECONDS and len(names) < LEAST_NAMES * elapsed:
            raise TimeoutError(f"{len(names):,} names in {elapsed:.0f} s")


async def _read(stream: Any, size: int) -> bytes:
    """At most ``size`` bytes of a stream; raises TimeoutError for one that sends a byte now and then."""
    pieces, left, begun = [], size, time.monotonic()
    while left > 0 and (piece := await stream.read(min(left, _PIECE))):
        pieces.append(piece)
        left -= len(piece)
        elapsed = time.monotonic() - begun
        if elapsed > SILENCE_SECONDS and size - left < LEAST_RATE * elapsed:
            raise TimeoutError(f"{size - left:,} bytes in {elapsed:.0f} s")
    return b"".join(pieces)


@functools.cache
def _bounded_response() -> Any:
    """A class of aiohttp's whose answers are read whole (lists of files, blocks of archives) up to MOST_ANSWER only."""
    from aiohttp import ClientResponse

    class BoundedResponse(ClientResponse):
        async def read(self) -> bytes:
            if self._body is None:
                found = await _read(self.content, MOST_ANSWER + 1)
                if len(found) > MOST_ANSWER:
                    self.close()
                    # No error of the library's, which S3's driver would tell in words of its own.
                    raise ValueError(f"its answer has more than {MOST_ANSWER:,} bytes")
                self._body = found
            return self._body

    return BoundedResponse


@functools.cache
def _bounded_session() -> dict[str, Any]:
    """The setting of S3's driver by which its answers are bounded too; none where its version has no such setting."""
    try:
        from aiobotocore.config import AioConfig
        from aiobotocore.httpsession import AIOHTTPSession
    except ImportError:
        return {}
    if "http_session_cls" not in inspect.signature(AioConfig).parameters:
        return {}

    class BoundedSession(AIOHTTPSession):
        async def _get_session(self, proxy_url: Any) -> Any:
            session = await super()._get_session(proxy_url)
            session._response_class = _bounded_response()
            return session

    return {"http_session_cls": BoundedSession}
