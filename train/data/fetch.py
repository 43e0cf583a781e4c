"""Fetching whole files from a store that fails now and then: verified, and tried again with growing pauses.

A fetch is one GET into a local file. Tried again: answers 5xx, dropped connections, short bodies, silence beyond the
timeout, and content that is not what the manifest says. Not tried again: a missing file, a refused permission, a full
disk. Pauses grow from 0.25 to 20 s, each cut by up to half at random so that the processes of a run do not come back
together. Build it in the process that uses it. Costs a look at the file four times a second while it fetches.
"""

import hashlib
import os
from pathlib import Path

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.dataset.dataset import ShardRow
from jigsaw_pretrain.storage import WrongContent, _keep_inherited

os.register_at_fork(after_in_child=_keep_inherited)


class BadShard(UserError):
    """A shard that is missing or whose bytes are wrong, however often it is fetched."""


def check_shard(path: Path, shard: ShardRow) -> None:
    """Raise WrongContent where a file is not the shard of the manifest."""
    size = path.stat().st_size
    if size != shard.bytes:
        raise WrongContent(f"has {size:,} bytes where the manifest says {shard.bytes:,}")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != shard.sha256:
        raise WrongContent(f"has sha256 {found[:12]} where the manifest says {shard.sha256[:12]}")
