"""The processes of a run: one alone, or several under torchrun (gloo on CPUs, NCCL between GPUs).

All that differs between one rank and many is here: set-up, sums, speaking once, and failing together. Small agreements
(a signal, an error, a row of metrics) travel by gloo in host memory, so they never make the host wait for the GPU.
Gradients are the business of torch's DistributedDataParallel.

SIGTERM and SIGINT are requests: noted when they come, served by the trainer between two steps. A scheduler's SIGTERM
and a person's Ctrl-C then cost nothing but the step in flight. torchrun forwards both and waits 30 seconds before it
kills, so later ones are only noted again and no harm is done; SIGQUIT ends at once. The first one is answered in the
log at once.
"""

import contextlib
import inspect
import logging
import os
import re
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import FrameType, TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from jigsaw_pretrain.config import checked
from jigsaw_pretrain.errors import Interrupted, UserError
from jigsaw_pretrain.train.data.device import CudaStreams, DeviceStreams
from jigsaw_pretrain.train.recipe import Device

T = TypeVar("T")

log = logging.getLogger(__name__)

_LOST = re.compile(
    r"closed by peer|reset by peer|timed out|broken pipe|connection refused|remote process", re.IGNORECASE
)
"""What gloo and NCCL say where a rank has died."""

_SYNC = "forward_sync_buffers"
"""The name that torch 2.13 gives what was broadcast_buffers, which it warns of."""

_KNOWN = _SYNC in inspect.signature(DistributedDataParallel).parameters

_NO_BUFFERS: dict[str, Any] = {_SYNC if _KNOWN else "broadcast_buffers": False}
"""Running statistics are rank 0's wherever they count (ERF, checkpoint), so they need no broadcast per step."""


@dataclass(frozen=True)
class Ranks:
    """A process's place among the run's ``world`` processes, its device, and a GPU's streams."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")
    streams: DeviceStreams | None = field(default=None, compare=False)

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which speaks and writes."""
        return self.rank == 0

    def log_rank_zero(self, text: str, level: int = logging.INFO) -> None:
        """Log one line on rank 0."""
        if self.first:
            log.log(level, "%s", text)

    def log_alone(self, text: str) -> None:
        """Log an error that the other ranks may never hear of, from a rank other than 0; rank 0's own is reported."""
        if not self.first:
            log.error("rank %d: %s", self.rank, text)

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, on whatever device it lies; the argument is left as it is."""
        if self.world == 1:
            return values
        result = values.clone()
        dist.all_reduce(result)
        return result

    def all_reduce_max(self, value: int) -> int:
        """The largest of the ranks' small integers: how all agree on a signal or an error."""
        if self.world == 1:
            return value
        agreed = torch.tensor([value])
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
        return int(agreed.item())

    def all_gather(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on all ranks."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on rank 0; none elsewhere."""
        if self.world == 1:
            return [value]
        values: list[Any] | None = [None] * self.world if self.first else None
        dist.gather_object(value, values)
        return values or []

    def joined(self, module: nn.Module) -> nn.Module:
        """The module as one of several ranks' trains it; alone it stays as it is."""
        if self.world == 1:
            return module
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=devices, **_NO_BUFFERS)

    def broadcast_buffers(self, module: nn.Module) -> None:
        """Overwrite the module's buffers (running statistics) with rank 0's."""
        if self.world > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0)

    def run_on_all(self, action: Callable[[], T]) -> T:
        """Run ``action`` on every rank; where it fails on any, all raise (rank 0 a UserError that says why)."""
        result, error = _attempt(action)
        failures = [text for text in self.all_gather(error and _reason(error, self)) if text]
        if error is not None and not isinstance(error, UserError):
            raise error
        if failures:
            raise UserError(failures[0])
        return result  # type: ignore[return-value]

    def run_on_rank_zero(self, action: Callable[[], T]) -> T:
        """Run ``action`` on rank 0 alone; all ranks return its (small, picklable) result or raise its error."""
        result: T | None = None

        def first_only() -> None:
            nonlocal result
            if self.first:
                result = action()

        self.run_on_all(first_only)
        return self.all_gather(result)[0]  # type: ignore[return-value]


def start(device: str = "auto") -> Ranks:
    """Join the other ranks as torchrun's environment says; alone without it.

    device: auto takes this process's GPU where there is one. Raises UserError for cuda without a GPU for this rank, and
    for another word.
    """
    checked(device, Device, "device")
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    gpus = 0 if device == "cpu" else torch.cuda.device_count()
    if device == "cuda" and gpus == 0:
        raise UserError("--device cuda: this machine shows no GPU (see CUDA_VISIBLE_DEVICES); use --device cpu")
    if gpus and local_rank >= gpus:
        raise UserError(
            f"rank {rank} is process {local_rank} of its machine, which has {gpus} GPUs: use "
            f"torchrun --nproc-per-node {gpus}"
        )
    if device == "auto" and not gpus and rank == 0:
        _tell_of_no_gpu()
    chosen = torch.device("cuda", local_rank) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(chosen)
    if world > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
        dist.init_process_group(backend, store=_own_store(rank, world), rank=rank, world_size=world)
    return Ranks(rank, world, chosen, CudaStreams(chosen) if gpus else None)


@cache
def _tell_of_no_gpu() -> None:
    """Say it once in a process: a command that calls others joins the ranks again."""
    log.warning("this machine shows no GPU: this runs on the CPU, many times slower (--device cpu asks for it)")


def _own_store(rank: int, world: int, patience: float = 300.0) -> dist.Store:
    """The launcher's store below a prefix that no earlier start of this run has used.

    torchrun (2.15) keeps one store for all restarts, and gloo would take the addresses of the dead for the living's.
    Counts of restarts differ between hosts, so rank 0 draws the prefix and every other rank asks for it under a word
    of its own, which tells the answer from an older one.
    """
    store, _, _ = next(dist.rendezvous("env://", rank, world))
    word, until = secrets.token_hex(8), time.monotonic() + patience
    absent = set(range(1, world)) if rank == 0 else set()
    prefix = word if rank == 0 else None
    if rank:
        store.set(f"asked/{rank}", word)
    while absent or prefix is None:
        if time.monotonic() > until:
            raise UserError(f"rank {rank}: not all {world} ranks came within {patience:g} s; see the others' output")
        for other in sorted(absent):
            if store.check([f"asked/{other}"]):
                store.set(f"answer/{other}", f"{store.get(f'asked/{other}').decode()} {word}")
            if store.check([f"{word}/{other}"]):
                absent.discard(other)
        if rank and store.check([f"answer/{rank}"]):
            asked, answer = store.get(f"answer/{rank}").decode().split()
            if asked == word:
                prefix = answer
                store.set(f"{prefix}/{rank}", "here")
        time.sleep(0.02)
    assert prefix is not None
    return dist.PrefixStore(prefix, store)


def finish() -> None:
    """Leave the group, if one was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def rank_zero_errors() -> Iterator[None]:
    """Report a UserError on rank 0 only; other ranks exit silently with the same status."""
    try:
        yield
    except UserError as error:
        finish()
        if int(os.environ.get("RANK", "0")) == 0:
            raise
        sys.exit(error.exit_code)
    except Interrupted:
        finish()
        raise
    except RuntimeError as error:
        if not (dist.is_initialized() and _LOST.search(str(error))):
            raise
        # Leaving in good order, or the interpreter's own end, could wait for the dead; all that is kept is on disk.
        reason = str(error).strip().splitlines()[0][:200]
        log.error(
            "rank %s: a rank is gone (%s); its output or its machine's log says why: continue with --resume",
            os.environ.get("RANK"),
            reason,
        )
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    # After any other exception the group is left as it is: leaving it in good order could wait for the others for ever.
    finish()


def _attempt(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return action(), None
    except Exception as error:
        return None, error


def _reason(error: Exception, ranks: Ranks) -> str:
    if isinstance(error, UserError):
        return error.message
    return f"rank {ranks.rank} failed: {type(error).__name__}: {error}"


class StopRequest:
    """A context manager that catches the two signals; ``name`` is the one that came, or None.

    answer: what is logged when the first one comes.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, answer: str) -> None:
        self.name: str | None = None
        self._answer = answer
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        # Only the main thread may install handlers; elsewhere (a notebook's thread) signals stay as they are.
        if threading.current_thread() is threading.main_thread():
            self._former = {one: signal.signal(one, self._note) for one in self.SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for one, handler in self._former.items():
            signal.signal(one, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        first, self.name = self.name is None, signal.Signals(number).name
        if first:
            # The signal may have come in the middle of a line that is being written.
            with contextlib.suppress(RuntimeError):
                log.info("%s: %s", self.name, self._answer)
