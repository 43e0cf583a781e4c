"""What a command needs of its machine before it loads anything, what killed ones left there, and how a rank ends.

A module of its own, as it runs before every import of a library: where these find too little room, no Python is left to
say so.
"""

import atexit
import contextlib
import multiprocessing.process
import os
import sys
import threading
from pathlib import Path
from typing import NoReturn

from jigsaw_pretrain.errors import UserError

try:
    import resource
except ImportError:  # pragma: no cover - not on Windows
    resource = None  # type: ignore[assignment]

LIBRARIES, TORCH = 5 * 2**28, 6 * 2**30
"""Bytes of address space (``ulimit -v``) below which commands are refused: those without torch, and those that load it.

Measured on two cores: a small prep passes with 1.05 GiB and crashes with 0.93. A training of the smallest kind with two
workers reserves 5.46 GiB and passes with 5.53; with less it ends in C++'s bad_alloc, in a segmentation fault, or calls
a small network too large.
"""

SHARED_MEMORY = Path("/dev/shm")


def check_address_space(needed: int) -> None:
    """Refuse a limit on addresses that is below what the libraries reserve; raises UserError with the figure."""
    if resource is None:  # pragma: no cover - not on Windows
        return
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY and limit < needed:
        raise UserError(
            f"ulimit -v allows {limit / 2**30:.2f} GiB of address space, and this command needs "
            f"{needed / 2**30:.2f} GiB: its libraries reserve more memory than they use. Run `ulimit -v unlimited` "
            "first; memory that is used is limited by a cgroup (systemd-run -p MemoryMax=..., docker run --memory)"
        )


def own_semaphores(folder: Path = SHARED_MEMORY) -> None:
    """Name this process's semaphores after it, and remove those of processes that have ended.

    Processes that are spawned share semaphores by names in /dev/shm. Python has a process that removes them in the end,
    but SIGKILL of the whole group (a lost job, Slurm's or a container's end) ends that too.
    """
    space = Path("/proc/self/ns/pid")
    if not folder.is_dir() or not space.exists():
        return
    # Containers may share the folder: a number means a process only among those that see each other.
    prefix = f"jigsaw-{space.stat().st_ino}-"
    # Python has no other way to name them.
    multiprocessing.process.current_process()._config["semprefix"] = f"/{prefix}{os.getpid()}"  # type: ignore[attr-defined]
    # A file of another user's, too many open files, another command that was faster: no trouble of this command.
    with contextlib.suppress(OSError):
        for path in folder.glob(f"sem.{prefix}*"):
            owner = path.name.removeprefix(f"sem.{prefix}").partition("-")[0]
            if owner.isdecimal() and not Path("/proc", owner).exists():
                with contextlib.suppress(OSError):
                    path.unlink()


def end_at_once(status: int) -> NoReturn:
    """End this process as Python's own end would, its modules and objects being left as they are.

    What is registered for the end is done, threads that it waits for are waited for, and what was printed is written.
    """
    # As multiprocessing ends its processes.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.flush()
    os._exit(status)
