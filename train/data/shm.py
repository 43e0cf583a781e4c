"""Shared memory: whether /dev/shm holds the batches in flight, found out before a worker dies of it.

Containers give it 64 MB unless told otherwise, and what does not fit ends a worker by SIGBUS, which names nothing.
"""

import os
import shutil
from pathlib import Path

from jigsaw_pretrain.errors import UserError

SHARED_MEMORY = Path("/dev/shm")

AHEAD = 2
"""Steps that a worker may work ahead of the one that its rank has received last."""

IN_FLIGHT = AHEAD + 2
"""Batches of a rank in shared memory: those that its workers write, the newest received, and the one before it, which
stays valid while the next is drawn."""


def check_shared_memory(batch_bytes: int, folder: Path = SHARED_MEMORY) -> None:
    """Refuse workers whose batches would not fit; ``batch_bytes`` is one rank's. Raises UserError with the figure."""
    if not folder.is_dir():
        return
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    needed, free = batch_bytes * IN_FLIGHT * ranks, shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder} has {free / 2**20:.0f} MB free, and the loader's workers keep up to {needed / 2**20:.0f} MB of "
            f"batches there: give the container more (docker run --shm-size={-(-needed // 2**20) + 16}m), or use "
            "--workers 0 or a smaller batch"
        )
