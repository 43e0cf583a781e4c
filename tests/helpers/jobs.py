"""Small jobs on synthetic batches, for tests of the loop."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jigsaw_pretrain.formats.jigsaw import REGIONS
from jigsaw_pretrain.train.engine.distributed import Ranks
from jigsaw_pretrain.train.engine.metrics import Row
from jigsaw_pretrain.train.engine.pretraining import OpenSource, TrainingJob
from jigsaw_pretrain.train.engine.run_folder import Origin, RunFolder
from jigsaw_pretrain.train.models import backbones
from jigsaw_pretrain.train.models.classifier import DenseClassifier
from jigsaw_pretrain.train.recipe import Recipe
from tests.helpers.detection import TINY
from tests.helpers.sources import CLASSES, SyntheticSource

ORIGIN = Origin(tuple(f"class {i}" for i in range(CLASSES)), "f" * 64)

SMALL = (
    f"model.backbone={TINY}",
    "data.template_size=64",
    "data.template_split=32",
    "data.batch=4",
    "data.lanes=4",
    "optim.steps=6",
    "optim.warmup_steps=2",
    "optim.lr_batch=4",
    "optim.lr_start=0.01",
    "optim.lr_peak=0.02",
    "loss.erf_every=4",
)


BASE = [part for setting in (*SMALL, "optim.steps=4", "loss.erf_every=3") for part in ("--set", setting)]
"""The options of a command that give a small job of four steps."""


class Plain(nn.Module):
    """A network of stride 32 without batch statistics that is built and trained at once."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((3, 8), (8, 16), (16, 32), (32, 32), (32, 32)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc(self.pool(self.features(x)).flatten(1))
        return result


@contextmanager
def plain_for_vgg11() -> Iterator[None]:
    """The backbone vgg11 is Plain here: torchvision's spends seconds on weights of a classifier that is dropped."""
    original = backbones.whole_model
    backbones.whole_model = lambda name, norm="bn": Plain() if name == "vgg11" else original(name, norm)
    try:
        yield
    finally:
        backbones.whole_model = original


def small_job(folder: Path, *settings: str, ranks: Ranks | None = None) -> TrainingJob:
    recipe = Recipe.load(None, (*SMALL, *settings)).resolved()
    return TrainingJob(recipe, ORIGIN, RunFolder(folder), ranks or Ranks())


def synthetic(job: TrainingJob, fail_at: int | None = None) -> OpenSource:
    def open_source(first: int, end: int) -> SyntheticSource:
        recipe, ranks = job.recipe, job.ranks
        lanes = recipe.data.lane_count
        return SyntheticSource(
            recipe.data.template,
            recipe.data.batch,
            lanes,
            first,
            end,
            ranks.rank,
            ranks.world,
            recipe.data.seed,
            fail_at,
        )

    return open_source


def crowded_forward(most: int) -> Callable[[DenseClassifier, Tensor], tuple[Tensor, ...]]:
    """A dense classifier's forward on a device whose memory takes ``most`` jigsaws."""
    forward = DenseClassifier.forward

    def crowded(self: DenseClassifier, images: Tensor) -> tuple[Tensor, ...]:
        if len(images) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, images)

    return crowded


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def untimed(folder: Path) -> list[dict[str, Any]]:
    """The rows without what depends on the clock."""
    return [
        {k: v for k, v in row.items() if k not in ("images_per_second", "data_wait", "device_seconds")}
        for row in rows(folder)
    ]


def same(left: Any, right: Any) -> bool:
    """Whether two nests of dicts, lists and tensors are equal bit for bit."""
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(same(*pair) for pair in zip(left, right, strict=True))
    return bool(left == right)


def metrics_row(step: int, loss: float = 1.0) -> Row:
    accuracy = dict(zip(REGIONS, (0.5, 0.25, 1.0, 0.25), strict=True))
    return {"step": step, "loss": loss, "accuracy": accuracy, "lr": 0.1, "images_per_second": 12.34, "data_wait": 0.25}
