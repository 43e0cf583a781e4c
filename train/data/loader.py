"""Loads one rank's batches of jigsaws: lanes dealt to worker processes, their batches put together in lane order.

Lane ``l`` belongs to rank ``l % world`` and there to worker ``(l // world) % workers``, and global batch ``b`` is, for
every lane in order, its jigsaws ``[b * k, (b + 1) * k)``. So neither the rank nor the worker count decides what a batch
holds, and the whole state of the data is the step. Workers write their lanes' jigsaws where they belong in batches of
shared memory, so the rank's process copies nothing. For a GPU that memory is page-locked; where the system does not let
it, batches are copied to memory that is, by one thread.

Before workers start, /dev/shm is checked to hold the batches in flight: containers give it 64 MB unless told otherwise,
and what does not fit ends a worker by SIGBUS, which names nothing.

Prefer torch's DataLoader over a map-style dataset where every sample is a file of its own and order does not matter.
"""

import contextlib
import logging
import math
import multiprocessing
import os
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.dataset.dataset import Dataset
from jigsaw_pretrain.formats.jigsaw import REGIONS
from jigsaw_pretrain.train.data.batch import Batch, torch_dtype
from jigsaw_pretrain.train.data.device import DeviceStreams
from jigsaw_pretrain.train.data.digest import digest_lines
from jigsaw_pretrain.train.data.jigsaw import Assembler, WorkerBatch
from jigsaw_pretrain.train.data.remote import ReadOptions, check_cache
from jigsaw_pretrain.train.data.sampler import slots_of
from jigsaw_pretrain.train.recipe import DataOptions

logger = logging.getLogger(__name__)

BUFFERS = 3
"""Batches of a rank's own: the one in use, the one being filled, and one whose copy to a device may still be under way.
Those in shared memory are IN_FLIGHT."""

SHARED_MEMORY = Path("/dev/shm")

SPARE = 1.1
"""Room there beside the batches: torch, NCCL and other programs keep some of it too."""

BATCHES_AHEAD = 2
"""Number of steps that a worker may run ahead of the last one that its rank received."""

IN_FLIGHT = BATCHES_AHEAD + 2
"""Batches of a rank in shared memory: those that its workers write, the newest received, and the one before it, which
stays valid while the next is drawn."""


def lanes_of_rank(options: DataOptions, rank: int, world: int) -> list[int]:
    """The lanes of one rank, ascending; raises UserError where the ranks would get different numbers of them."""
    lanes = options.lane_count
    if lanes % world:
        fitting = [n for n in range(1, lanes + 1) if lanes % n == 0]
        multiples = [n for n in range(world, options.batch + 1, world) if options.batch % n == 0]
        remedy = f"run on one of {fitting} processes"
        if multiples:
            remedy += f", or start a new run with data.lanes one of {multiples}"
        raise UserError(f"{lanes} lanes cannot be shared equally by {world} processes: {remedy}")
    if not 0 <= rank < world:
        raise UserError(f"rank {rank} is not one of {world} processes")
    return list(range(rank, lanes, world))


@dataclass(frozen=True)
class _Sent:
    """What a worker sends for a step (its jigsaws are already in shared memory), or why it stopped."""

    worker_batch: WorkerBatch | None = None
    error: str | None = None


class _WorkerBatches(IterableDataset[_Sent]):
    """In each worker, the batches of its lanes from a step on.

    ring: the rank's batches in shared memory, [IN_FLIGHT, lanes, k, size, size, channels]; step s is in s % IN_FLIGHT.
    """

    def __init__(
        self,
        dataset: Dataset,
        options: DataOptions,
        lanes: Sequence[int],
        steps: range,
        ring: torch.Tensor,
        more: dict[str, Any],
    ) -> None:
        self._dataset, self._options = dataset, options
        self._lanes, self._steps, self._ring, self._more = list(lanes), steps, ring, more

    def __iter__(self) -> Iterator[_Sent]:
        worker = get_worker_info()
        assert worker is not None
        lanes = self._lanes[worker.id :: worker.num_workers]
        try:
            assembler = Assembler(self._dataset, self._options, lanes, **self._more)
            for step in self._steps:
                # Asked for two steps ahead (DataLoader's prefetching), so nobody reads what is overwritten here.
                mine = self._ring[step % IN_FLIGHT, worker.id :: worker.num_workers].numpy()
                yield _Sent(assembler.step(step, [jigsaw for lane in mine for jigsaw in lane]))
        except UserError as error:
            # Across processes an exception becomes a traceback as text; a user's mistake stays one line.
            yield _Sent(error=error.message)


def _shared_empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor that travels to another process without a copy, as torch's own collate function makes it."""
    count = math.prod(shape)
    storage = torch.UntypedStorage._new_shared(count * dtype.itemsize)
    return torch.empty(0, dtype=dtype).set_(storage, 0, (count,), (1,)).view(shape)


def leave_signals_to_rank() -> None:
    """Ignore SIGINT and SIGTERM, in a worker process.

    So a signal to the process group ends no worker before its rank has finished its step.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _prepare_worker(_: int) -> None:
    leave_signals_to_rank()
    cv2.setNumThreads(1)


def worker_context(start_method: str | None = None) -> BaseContext:
    """How worker processes are started.

    A fork shares the dataset's index and torch with its rank, begins at once, and asks no ``if __name__ ==
    "__main__"`` of a script, so Linux has it under every Python; Python's own choice from 3.14 on is a forkserver.

    start_method: ``fork``, ``spawn`` or ``forkserver``; None for what the program has set (``set_start_method``), and
    where that is no other than Python's own choice for a fork on Linux.
    """
    if start_method is None and sys.platform == "linux":
        set_by_program = multiprocessing.get_start_method(allow_none=True)
        if set_by_program in (None, multiprocessing.get_all_start_methods()[0]):
            start_method = "fork"
    return multiprocessing.get_context(start_method)


def start_workers(loader: "DataLoader[Any]") -> Iterator[Any]:
    """A DataLoader's iterator; where not all of its workers can be started, those that were are ended.

    They ignore the signal by which Python ends children at its exit, so that would wait for them for ever.
    """
    try:
        return iter(loader)
    except BaseException as error:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            made = frame.f_locals.get("self")
            if isinstance(made, _MultiProcessingDataLoaderIter):
                # Else torch's own ending of what is half made prints a traceback.
                made._shutdown = True
                for process in getattr(made, "_workers", ()):
                    process.kill()
                    process.join()
        raise


def next_from_workers(received: Iterator[Any]) -> Any:
    """The next thing that a DataLoader's workers send; UserError where one of them is dead."""
    try:
        return next(received)
    except (RuntimeError, EOFError, OSError) as error:
        # torch's own word, or what its pipes say where a worker dies in the middle of sending.
        if isinstance(error, RuntimeError) and "worker" not in str(error):
            raise
        reason = f"{type(error).__name__} {error}".splitlines()[0]
        raise UserError(
            f"a loader worker ended unexpectedly ({reason}); the usual cause is too little memory: run with fewer "
            "--workers"
        ) from error


def end_workers(received: Any) -> None:
    """End the workers of a DataLoader's iterator; returns within seconds whatever they are doing."""
    processes = list(getattr(received, "_workers", ()))
    shut_down: Any = getattr(received, "_shutdown_workers", None)
    if shut_down is not None:
        # torch's handler of dead children may raise in the middle of it; whom that leaves alive is ended below.
        with contextlib.suppress(RuntimeError):
            shut_down()
    for process in processes:
        if process.is_alive():
            # They ignore the signal by which torch ends the unwilling.
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
            process.join()


def _as_sent(sent: Any) -> Any:
    """Keep torch from looking into what a worker sends."""
    return sent


class JigsawLoader:
    """One rank's batches (data.batch.BatchSource) of a dataset, from ``start_step`` up to ``stop_step`` exclusive.

    options: a recipe's section ``data``, which decides what the batches hold. workers: processes, at most one a lane; 0
    assembles in this process. with_digests: compute digests as well. streams: of the GPU that batches are for, which
    are then in page-locked memory, for copies that do not wait. start_method: as in ``worker_context``. access: how
    shards are read. rings: loaders of as large batches that will have workers at one time, for which /dev/shm must have
    room. ``notes`` says in plain words what is special about the dataset, ``shares``
    is the share of each group in all crops drawn. Raises UserError for lanes that the ranks cannot share equally, for a
    cache or a /dev/shm too small, and while iterating for damaged or missing shards and for a worker that ended.
    """

    def __init__(
        self,
        dataset: Dataset,
        options: DataOptions,
        *,
        rank: int = 0,
        world: int = 1,
        workers: int = 2,
        start_step: int = 0,
        stop_step: int | None = None,
        with_digests: bool = False,
        streams: DeviceStreams | None = None,
        start_method: str | None = None,
        access: ReadOptions | None = None,
        rings: int = 1,
    ) -> None:
        self._dataset, self._options = dataset, options
        self._lanes = lanes_of_rank(options, rank, world)
        self.lanes_per_rank = len(self._lanes)
        slots = slots_of(dataset, options)
        self.notes, self.shares = tuple(slots.notes()), slots.shares()
        if workers < 0:
            raise UserError(f"workers {workers} must be 0 or more")
        self._workers = min(workers, self.lanes_per_rank)
        self._steps = range(start_step, stop_step if stop_step is not None else 2**62)
        self._with_digests, self._streams, self._start_method = with_digests, streams, start_method
        self._access, self._left_out = access or ReadOptions(), tuple[str, ...]()
        check_cache(dataset, self._access, self.lanes_per_rank)
        pixels = dataset.pixels
        if self._workers:
            batch = self.lanes_per_rank * options.chunk * options.template_size**2 * pixels.channels * pixels.itemsize
            check_shared_memory(rings * IN_FLIGHT * batch)
        self._received: Iterator[_Sent] | None = None
        self._registered: torch.Tensor | None = None

    @property
    def is_registered(self) -> bool:
        """Whether the workers' memory is page-locked where it lies."""
        return self._registered is not None

    def leave_out(self, shards: Sequence[str]) -> None:
        """Leave these shards out (by name), as the run that is continued did; call before iterating."""
        self._left_out = tuple(shards)

    def first(self, count: int) -> Batch:
        """The first ``count`` jigsaws of this rank as one batch; iterating then starts anew."""
        batches: list[Batch] = []
        for batch in self:
            # Its images are overwritten by later batches.
            batches.append(replace(batch, images=batch.images.clone()))
            if sum(len(one.images) for one in batches) >= count:
                break
        self.close()
        images, labels, groups = (
            torch.cat([getattr(one, name) for one in batches])[:count] for name in ("images", "labels", "groups")
        )
        return Batch(step=batches[0].step, images=images, labels=labels, groups=groups)

    def _more(self) -> dict[str, Any]:
        return {"with_digests": self._with_digests, "access": self._access, "left_out": self._left_out}

    def __iter__(self) -> Iterator[Batch]:
        """The batches of this rank; a second iterator starts anew and ends the first one's workers."""
        self.close()
        return self._in_process() if self._workers == 0 else self._from_workers()

    def _buffers(self) -> list[torch.Tensor]:
        """Memory for batches of this process's own."""
        size, pixels = self._options.template_size, self._dataset.pixels
        shape = (self.lanes_per_rank * self._options.chunk, size, size, pixels.channels)
        buffers = [torch.empty(shape, dtype=torch_dtype(pixels)) for _ in range(BUFFERS)]
        return buffers if self._streams is None else [self._streams.pin(one) for one in buffers]

    def _in_process(self) -> Iterator[Batch]:
        ring = self._buffers()
        assembler = Assembler(self._dataset, self._options, self._lanes, **self._more())
        try:
            for step in self._steps:
                images = ring[step % len(ring)]
                worker_batch = assembler.step(step, images.numpy())
                yield self._batch(step, images, [worker_batch])
        finally:
            assembler.close()

    def _from_workers(self) -> Iterator[Batch]:
        """Batches as the workers write them; copied where they are for a GPU and their memory cannot be locked."""
        size, k, pixels = self._options.template_size, self._options.chunk, self._dataset.pixels
        shape = (IN_FLIGHT, self.lanes_per_rank, k, size, size, pixels.channels)
        shared = _shared_empty(shape, torch_dtype(pixels))
        worker_batches = _WorkerBatches(self._dataset, self._options, self._lanes, self._steps, shared, self._more())
        with warnings.catch_warnings():
            # Its guess of the right number of workers knows neither what else runs here nor what they do.
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            received = self._received = start_workers(
                DataLoader(
                    worker_batches,
                    batch_size=None,
                    num_workers=self._workers,
                    prefetch_factor=BATCHES_AHEAD,
                    collate_fn=_as_sent,
                    worker_init_fn=_prepare_worker,
                    # Without one it would draw from the caller's global generator.
                    generator=torch.Generator(),
                    multiprocessing_context=worker_context(self._start_method),
                )
            )
        try:
            ring = []
            if self._streams is not None:
                # Once the workers are there: what they inherit is plain memory.
                if self._streams.register(shared):
                    self._registered = shared
                else:
                    ring = self._buffers()
            for step in self._steps:
                batch = shared[step % IN_FLIGHT]
                images = ring[step % len(ring)] if ring else batch.view(-1, *batch.shape[2:])
                parts = []
                for worker in range(self._workers):
                    sent = self._receive(received)
                    assert sent.worker_batch is not None
                    parts.append(sent.worker_batch)
                    if ring:
                        mine = slice(worker, None, self._workers)
                        # By one thread: torch would take several, from the workers.
                        np.copyto(images.view(batch.shape)[mine].numpy(), batch[mine].numpy())
                yield self._batch(step, images, parts)
        finally:
            if self._received is received:
                self.close()

    def _receive(self, received: Iterator[_Sent]) -> _Sent:
        sent: _Sent = next_from_workers(received)
        if sent.error is not None:
            raise UserError(sent.error)
        return sent

    def _batch(self, step: int, images: torch.Tensor, parts: list[WorkerBatch]) -> Batch:
        """Put labels, groups and digests, which the workers sent, into lane order."""
        k = self._options.chunk
        shape = (self.lanes_per_rank, k, len(REGIONS))
        labels, groups = np.empty(shape, dtype=np.int64), np.empty(shape, dtype=np.uint8)
        digests: list[tuple[bytes, bytes]] | None = [(b"", b"")] * len(images) if self._with_digests else None
        for worker, part in enumerate(parts):
            labels[worker :: len(parts)] = part.labels.reshape(-1, *shape[1:])
            groups[worker :: len(parts)] = part.groups.reshape(-1, *shape[1:])
            if digests is not None and part.digests is not None:
                for nth, lane in enumerate(range(worker, self.lanes_per_rank, len(parts))):
                    digests[lane * k : (lane + 1) * k] = part.digests[nth * k : (nth + 1) * k]
        ordered = torch.from_numpy(labels.reshape(-1, len(REGIONS)))
        return Batch(
            step=step,
            images=images,
            labels=ordered if self._streams is None else self._streams.pin(ordered),
            groups=torch.from_numpy(groups.reshape(-1, len(REGIONS))),
            replaced=sum(part.replaced for part in parts),
            digests=None if digests is None else tuple(digests),
            left_out=tuple(sorted({name: why for part in parts for name, why in part.left_out}.items())),
        )

    def close(self) -> None:
        """End the workers; an iterator under way is finished. Returns within seconds whatever they are doing."""
        received, self._received = self._received, None
        if received is not None:
            end_workers(received)
        registered, self._registered = self._registered, None
        if registered is not None and self._streams is not None:
            self._streams.unregister(registered)


def check_shared_memory(needed: int, folder: Path = SHARED_MEMORY) -> None:
    """Refuse workers whose batches would not fit; ``needed``: bytes of one rank. Raises UserError with the figure."""
    if not folder.is_dir():
        return
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    wanted, free = math.ceil(needed * ranks * SPARE), shutil.disk_usage(folder).free
    if free < wanted:
        raise UserError(
            f"{folder} has {free / 2**20:.0f} MB free, and the loader's workers need up to {wanted / 2**20:.0f} MB for "
            f"batches there: give the container more (docker run --shm-size={-(-wanted // 2**20) + 16}m), or use "
            "--workers 0 or a smaller batch"
        )


def digest(
    dataset: Dataset,
    options: DataOptions,
    *,
    steps: int = 4,
    first: int = 0,
    world: int = 1,
    workers: int = 0,
    start_method: str | None = None,
    access: ReadOptions | None = None,
) -> Iterator[str]:
    """One line per step that says which crops and pixels its batch holds, as ``pretrain --log-digest`` writes them.

    Args:
        dataset: a prepped dataset.
        options: the section ``data`` of a recipe; nothing else of it decides the lines.
        steps: number of lines.
        first: step of the first line.
        world: ranks to simulate in this process; any number gives the same lines.
        workers: worker processes per rank; any number gives the same lines.
        start_method: ``fork``, ``spawn`` or ``forkserver``; None for what the program has set, else a fork on Linux.
        access: how shards at a URL are read and cached.

    Returns:
        An iterator of ``step identity-sha256 pixels-sha256``; its loaders are open once this has returned, and closed
        when it ends.

    Raises:
        UserError: where the dataset cannot be read, or cannot be shared by so many ranks.
    """
    loaders = [
        JigsawLoader(
            dataset,
            options,
            rank=rank,
            world=world,
            workers=workers,
            start_step=first,
            stop_step=first + steps,
            with_digests=True,
            start_method=start_method,
            access=access,
        )
        for rank in range(world)
    ]
    for note in loaders[0].notes:
        logger.info(note)
    return digest_lines(loaders, options)
