"""How a run reaches its shards: cache, retries, what to do about a bad shard. None of it changes a batch.

A dataset in a folder of this machine is mapped where it lies, and only ``on_bad_shard`` matters. One at a URL is read
through the host's cache (cache.py), or with ``--no-cache`` through temporary files of each process, which is for
machines that see every shard once.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import click

from jigsaw_pretrain.cli import ByteCount
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.dataset.dataset import Dataset, open_dataset
from jigsaw_pretrain.storage import Storage, driver_options, open_store, retrying
from jigsaw_pretrain.train.data.cache import Cache, default_folder

BAD_SHARD = ("stop", "skip")

AHEAD = 1
"""Units fetched ahead of each stream."""

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Access:
    """Options of reading shards.

    cache: the cache's folder; None for none. cache_bytes: the most it may hold; None for half of the free disk.
    read_retries: further attempts at a file. read_timeout: seconds of silence that end an attempt. on_bad_shard:
    ``stop``, or ``skip`` to go on without a shard whose bytes are wrong.
    """

    cache: Path | None = field(default_factory=default_folder)
    cache_bytes: int | None = None
    read_retries: int = 5
    read_timeout: float = 30.0
    on_bad_shard: str = "stop"

    def __post_init__(self) -> None:
        """Refuse what is neither stop nor skip."""
        if self.on_bad_shard not in BAD_SHARD:
            raise UserError(f"on-bad-shard {self.on_bad_shard!r} is not one of {', '.join(BAD_SHARD)}")

    def open_dataset(self, url: str) -> Dataset:
        """formats.dataset.open_dataset, tried again where the store fails."""
        options = driver_options(url, self.read_timeout, 16)
        open_store(url, self.read_timeout)
        return retrying(lambda: open_dataset(url, options, tries=1), self.read_retries, f"{url.rstrip('/')}/manifests")


def access_options(command: F) -> F:
    """Give a click command the options of Access, as the keyword arguments that ``access_from`` takes."""
    retries, timeout, bad = click.IntRange(min=0), click.FloatRange(min=0.1), click.Choice(BAD_SHARD)
    options = (
        click.option("--cache", type=click.Path(path_type=Path), help="Folder of the cache of shards, for --data URL."),
        click.option("--cache-bytes", type=ByteCount(), help="Its limit, such as 200G; default half of the free disk."),
        click.option("--no-cache", is_flag=True, help="Fetch each shard to a temporary file of the process."),
        click.option("--read-retries", default=5, show_default=True, type=retries, help="Further attempts at a file."),
        click.option("--read-timeout", default=30.0, show_default=True, type=timeout, help="Seconds of silence."),
        click.option("--on-bad-shard", default="stop", show_default=True, type=bad, help="Or skip it."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def access_from(
    cache: Path | None,
    cache_bytes: int | None,
    no_cache: bool,
    read_retries: int,
    read_timeout: float,
    on_bad_shard: str,
) -> Access:
    """What the options of ``access_options`` say."""
    if no_cache and (cache or cache_bytes):
        raise UserError("--no-cache contradicts --cache and --cache-bytes: leave one out")
    folder = None if no_cache else cache or default_folder()
    return Access(folder, cache_bytes, read_retries, read_timeout, on_bad_shard)


def working_set(dataset: Dataset, lanes: int) -> int:
    """The most bytes of shards that ``lanes`` lanes hold at a time: those open and those fetched ahead."""
    total = 0
    for group in "STW":
        sizes = sorted((shard.bytes for shard in dataset.of_group(group)), reverse=True)
        total += sum(sizes[: lanes * (1 + AHEAD)])
    return total


def check_cache(dataset: Dataset, access: Access, lanes_of_rank: int) -> None:
    """Refuse a cache that this host's lanes would overrun; raises UserError with the figure that would do."""
    if access.cache is None or Storage(dataset.url).is_local:
        return
    lanes = lanes_of_rank * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    needed, limit = working_set(dataset, lanes), Cache(access.cache, access.cache_bytes).limit
    if limit < needed:
        reason = "--cache-bytes" if access.cache_bytes else "half of the free disk"
        raise UserError(
            f"cache {access.cache} may hold {limit:,} bytes ({reason}), but the {lanes} lanes of this host keep up to "
            f"{needed:,} bytes of shards open or on their way: give it --cache-bytes {needed} on a disk with that much "
            "room (--cache), begin the run with fewer lanes, or use --no-cache"
        )
