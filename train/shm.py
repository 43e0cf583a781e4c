"""Shared memory: whether /dev/shm holds the batches in flight, found out before a worker dies of it.

Containers give it 64 MB unless told otherwise, and what does not fit ends a worker by SIGBUS, which names nothing.
"""

import os
import shutil
from pathlib import Path

from formats.errors import UserError

SHARED_MEMORY = Path("/dev/shm")

IN_FLIGHT = 3
"""Batches of a rank in shared memory: the two that its workers work ahead, and the one that is being copied."""


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
