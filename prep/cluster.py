"""A Dask cluster as an executor: ``--scheduler tcp://host:port``.

The cluster's workers must have this package and its lock installed (a part refuses other versions, naming them), and
reach images and output under the same names. docs/cluster.md shows how clusters are started on Slurm, PBS and
Kubernetes. Local processes do for one machine.
"""

from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager

from jigsaw_pretrain.errors import UserError

PATIENCE = "30s"
RETRIES = 3
"""How often Dask gives a part to another worker after its own was lost."""


@contextmanager
def dask_executor(address: str) -> Iterator[tuple[Executor, int]]:
    """An executor over a running cluster, and how many tasks keep it busy; raises UserError."""
    try:
        from distributed import Client, KilledWorker
    except ImportError as error:
        raise UserError("--scheduler needs Dask. Install it: pip install 'jigsaw-pretrain[dask]'.") from error
    try:
        client = Client(address, timeout=PATIENCE, set_as_default=False)
    except (OSError, ValueError) as error:
        raise UserError(f"--scheduler {address}: no Dask scheduler answers there ({error}).") from error
    try:
        threads = sum(client.nthreads().values())
        executor = client.get_executor(pure=False, retries=RETRIES)
        try:
            yield executor, 2 * max(1, threads)
        finally:
            executor.shutdown(wait=True)
    except KilledWorker as error:
        raise UserError(
            "A part was given to several Dask workers and each of them died, most likely for want of memory. Give them "
            "more, or fewer threads each, and run the same command again: it goes on where it stopped."
        ) from error
    finally:
        client.close()
