"""A source of batches for tests: jigsaws that are a pure function of (seed, step, lane) and that can be learnt."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from jigsaw_pretrain.formats.jigsaw import REGION_GROUPS, Template
from jigsaw_pretrain.train.data.batch import Batch
from jigsaw_pretrain.train.recipe import DataOptions

CLASSES = 5
"""Foreground classes; the background is one more."""


@dataclass
class SyntheticSource:
    """One rank's share of batches [first, end): each region is noise around its label's colour."""

    template: Template
    batch: int
    lanes: int
    first: int
    end: int
    rank: int = 0
    world: int = 1
    seed: int = 0
    fail_at: int | None = None
    closed: bool = False
    lanes_per_rank: int = field(init=False)

    def __post_init__(self) -> None:
        self.lanes_per_rank = len(range(self.rank, self.lanes, self.world))

    def __iter__(self) -> Iterator[Batch]:
        for step in range(self.first, self.end):
            if step == self.fail_at:
                raise RuntimeError(f"broken at step {step}")
            yield self.of(step)

    def of(self, step: int) -> Batch:
        images, labels = self.whole(step)
        chunk = self.batch // self.lanes
        mine = [lane * chunk + place for lane in range(self.rank, self.lanes, self.world) for place in range(chunk)]
        digests = tuple((hashlib.sha256(images[i].tobytes()).digest(),) * 2 for i in mine)
        groups = np.tile(np.array(["STW".index(group) for group in REGION_GROUPS], dtype=np.uint8), (len(mine), 1))
        return Batch(
            step, torch.from_numpy(images[mine]), torch.from_numpy(labels[mine]), torch.from_numpy(groups), 0, digests
        )

    def whole(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        words = np.random.default_rng((self.seed, step))
        labels = words.integers(0, CLASSES + 1, (self.batch, 4))
        colours = np.random.default_rng(self.seed).integers(0, 256, (CLASSES + 1, 3))
        size = self.template.size
        images = words.integers(-40, 40, (self.batch, size, size, 3))
        for i, region in enumerate(self.template.regions):
            rows, columns = (
                slice(region.top, region.top + region.height),
                slice(region.left, region.left + region.width),
            )
            images[:, rows, columns] += colours[labels[:, i]][:, None, None, :]
        return images.clip(0, 255).astype(np.uint8), labels.astype(np.int64)

    def leave_out(self, shards: Sequence[str]) -> None:
        pass

    def close(self) -> None:
        self.closed = True


def small_data(**more: Any) -> DataOptions:
    """Options of jigsaws of 96 pixels cut at 32."""
    return DataOptions(template_size=96, template_split=32, **more)
