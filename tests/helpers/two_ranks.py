"""What test_distributed_torchrun.py lets two ranks do, in one launch: scenes in FOLDER, then a `pretrain` command."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from jigsaw_pretrain.cli import show_log
from jigsaw_pretrain.errors import Interrupted, UserError
from jigsaw_pretrain.train.commands.pretrain import pretrain
from jigsaw_pretrain.train.data.batch import Batch
from jigsaw_pretrain.train.engine import step
from jigsaw_pretrain.train.engine.distributed import Ranks, start
from jigsaw_pretrain.train.engine.pretraining import TrainingJob, execute
from jigsaw_pretrain.train.engine.step import MachineOptions
from jigsaw_pretrain.train.models.classifier import DenseClassifier
from tests.helpers.detection import TINY
from tests.helpers.jobs import crowded_forward, plain_for_vgg11, small_job, synthetic
from tests.helpers.ranks import fork_ranks
from tests.helpers.sources import SyntheticSource

BN_FREE = (
    "model.backbone=vgg11",
    "data.batch=8",
    "data.lanes=4",
    "optim.lr_peak=0.5",
    "optim.steps=8",
    "run.log_every=3",
)


@dataclass
class Troubled(SyntheticSource):
    """One rank alone gets a signal or an error at a step."""

    signal_at: int | None = field(default=None, kw_only=True)

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            if batch.step == self.signal_at:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch


def troubled(job: TrainingJob, rank: int, *, signal_at: int | None = None, fail_at: int | None = None) -> Troubled:
    recipe, ranks = job.recipe, job.ranks
    chosen = ranks.rank == rank
    return Troubled(
        recipe.data.template,
        recipe.data.batch,
        recipe.data.lane_count,
        0,
        recipe.optim.steps,
        ranks.rank,
        ranks.world,
        fail_at=fail_at if chosen else None,
        signal_at=signal_at if chosen else None,
    )


def expect_user_error(ranks: Ranks, folder: Path, action: Callable[[], None]) -> None:
    """Note on every rank which UserError the action raised."""
    try:
        action()
        text = "none"
    except UserError as error:
        text = error.message
    with (folder / f"error-{ranks.rank}.txt").open("a") as file:
        file.write(f"{text}\n")


def scenes(folder: Path) -> None:
    ranks = start("cpu")
    whole = small_job(folder / "two", *BN_FREE, ranks=ranks)
    execute(whole, synthetic(whole))
    cut = small_job(folder / "cut", *BN_FREE, ranks=ranks)
    try:
        execute(cut, lambda first, end: troubled(cut, 1, signal_at=5))
    except Interrupted as error:
        (folder / f"interrupted-{ranks.rank}.txt").write_text(error.message)
    execute(cut, synthetic(cut))
    failing = small_job(folder / "failing", ranks=ranks)
    try:
        execute(failing, lambda first, end: troubled(failing, 1, fail_at=3))
        raise AssertionError("no error")
    except (RuntimeError, UserError) as error:
        (folder / f"failed-{ranks.rank}.txt").write_text(f"{type(error).__name__}: {error}")
    # Batch statistics differ between ranks; those in the checkpoint and the table are rank 0's.
    batch_norm = small_job(folder / "batch-norm", "loss.erf_every=2", ranks=ranks)
    state = execute(batch_norm, synthetic(batch_norm))
    tables = ranks.all_gather(state.tables[0].weights)
    assert torch.equal(*tables)
    assert ranks.gather(f"of {ranks.rank}") == (["of 0", "of 1"] if ranks.first else [])
    # A parameter without a gradient would make the ranks wait for each other for ever.
    neck = small_job(
        folder / "neck",
        f"model.backbone={TINY}",
        "model.neck=fpn",
        "model.neck_channels=8",
        "optim.steps=2",
        ranks=ranks,
    )
    state = execute(neck, synthetic(neck))
    assert all(torch.equal(*ranks.all_gather(table.weights)) for table in state.tables) and len(state.tables) == 4
    accumulated = small_job(
        folder / "accumulated", *BN_FREE, "run.precision=bf16", "optim.micro_batch=1", "optim.ema=0.5", ranks=ranks
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "BACKEND", noting(folder / f"compiled-{ranks.rank}.txt"))
        _execute(replace(accumulated, machine_options=MachineOptions(compile="on")))
    expect_user_error(ranks, folder, lambda: ranks.run_on_rank_zero(lambda: _refuse("rank 0")))
    expect_user_error(ranks, folder, lambda: ranks.run_on_all(lambda: _refuse("rank 1") if ranks.rank == 1 else None))
    # Memory runs out on one of them: all learn of it before they wait for each other.
    crowded = replace(
        small_job(folder / "crowded", *BN_FREE, ranks=ranks), machine_options=MachineOptions(compile="on")
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "BACKEND", "eager")
        if ranks.rank == 1:
            patch.setattr(DenseClassifier, "forward", crowded_forward(2))
        expect_user_error(ranks, folder, lambda: _execute(crowded))


def noting(file: Path) -> Callable[..., Any]:
    """A backend of torch.compile that notes whether it was called from within DistributedDataParallel."""

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        within = DistributedDataParallel._get_active_ddp_module() is not None
        with file.open("a") as notes:
            notes.write(f"{within}\n")
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    return backend


def _execute(job: TrainingJob) -> None:
    execute(job, synthetic(job))


def _refuse(who: str) -> None:
    raise UserError(f"refused by {who}")


def play(folder: Path, command: list[str]) -> None:
    """What one rank does."""
    show_log()
    with plain_for_vgg11():
        scenes(folder)
    # In the same group of ranks: joining one takes longer than all scenes.
    pretrain.main(command, standalone_mode=False)


if __name__ == "__main__":
    fork_ranks(play, Path(sys.argv[1]), sys.argv[2:])
