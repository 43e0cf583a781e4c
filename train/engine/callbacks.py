"""Hooks that the trainer calls as a run goes, and the count of data errors over all ranks.

Pages and pictures listen by a Callback. Data errors (shards left out, crops replaced) are small notes per batch; ranks
compare them when metrics are written (about 0.2 ms), so that all know the same, and the checkpoint says it to whoever
continues the run.
"""

import logging
from collections.abc import Mapping
from typing import Any

import numpy.typing as npt
from torch import Tensor, nn

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.jigsaw import REGIONS
from jigsaw_pretrain.train.data.batch import Batch
from jigsaw_pretrain.train.engine.distributed import Ranks
from jigsaw_pretrain.train.engine.state import ErfTable, State

MOST_REPLACED, REPLACED_FLOOR = 0.001, 10
"""The share of crops that may be undecodable, and how many may be in a run too young for shares to mean much."""


Pictures = Mapping[str, npt.NDArray[Any]]
"""Pictures for the loggers by name, uint8 [height, width, 3]."""


class Callback:
    """Hooks that are called as a run goes, on rank 0 alone; each does nothing unless it is overridden.

    Training neither reads what a callback keeps nor changes by it. All but ``write`` run between steps: their time is
    the run's.
    """

    def on_refresh(self, table: ErfTable, level: nn.Module, images: Tensor, region_map: Tensor) -> Pictures:
        """The ERF table of ``level`` was renewed on these images, normalised, [n, channels, H, W]."""
        return {}

    def on_step(self, batch: Batch, labels: Tensor, predictions: Tensor) -> None:
        """A step was taken on the batch; labels and predictions int [n, 4], on the device."""

    def on_save(self, step: int, last: bool) -> Pictures:
        """A checkpoint of ``step`` is about to be written, ``last`` of this process; take what ``write`` needs."""
        return {}

    def write(self, step: int) -> None:
        """The checkpoint was written. Runs in a thread while training goes on: use only what ``on_save`` took."""

    def on_end(self, step: int) -> None:
        """Training has ended at ``step``, for now or for good; nothing runs beside this."""


class DataErrors:
    """Counts the data errors of a run in its state. Create one per rank."""

    def __init__(self, state: State, ranks: Ranks) -> None:
        self._state, self._ranks = state, ranks
        self._left_out: dict[str, str] = {}

    def note(self, batch: Batch) -> None:
        """Note the shards that a batch was made without."""
        self._left_out.update(batch.left_out)

    def settle(self, replaced: int) -> int:
        """Note crops that were replaced on any rank and say which shards are newly left out; returns how many are."""
        state = self._state
        for name, reason in sorted(
            {pair for found in self._ranks.all_gather(self._left_out) for pair in found.items()}
        ):
            if name not in state.left_out:
                state.left_out = sorted([*state.left_out, name])
                self._ranks.log_rank_zero(f"going on without a shard: {reason}", logging.WARNING)
        state.replaced += replaced
        return len(state.left_out)

    def check(self, batch: int) -> None:
        """Refuse to go on (UserError) where too many of the crops of ``state.step`` batches could not be decoded."""
        crops = self._state.step * batch * len(REGIONS)
        if self._state.replaced > max(REPLACED_FLOOR, crops * MOST_REPLACED):
            raise UserError(
                f"{self._state.replaced:,} of {crops:,} crops drawn could not be decoded, above {MOST_REPLACED:.1%}: "
                "the shards are damaged. Run `jigsaw-prep verify --repair`, or prep the dataset again, then --resume"
            )
