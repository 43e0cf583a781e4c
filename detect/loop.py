"""The training loop of a detector: steps, schedule, metrics, checkpoints, signals, evaluations on the way.

Every source of randomness is a function of (seed, step, rank): batches (detect/order.py), views (detect/views.py) and
torch's own generator, which the sampling of anchors and regions draws from, is reseeded each step. So a resumed run
equals an undisturbed one bit for bit on a CPU. Losses stay on the device between log lines.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from jigsaw_pretrain import rng
from jigsaw_pretrain.detect.data import Sample
from jigsaw_pretrain.detect.models.detectors import label_offset
from jigsaw_pretrain.detect.models.norms import is_norm
from jigsaw_pretrain.detect.models.weights import CHECKPOINTS
from jigsaw_pretrain.detect.predict import to_device
from jigsaw_pretrain.detect.recipe import Recipe
from jigsaw_pretrain.detect.run import METRICS, Config, read_rows
from jigsaw_pretrain.detect.scaling import rate
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.train.engine.checkpoint import newest_checkpoint, save_checkpoint
from jigsaw_pretrain.train.engine.distributed import Ranks, StopRequest
from jigsaw_pretrain.train.engine.metrics import device_clock, metrics_file

KEEP = 2
"""Checkpoints that stay."""


@dataclass
class Progress:
    """Where a run is.

    step: optimiser steps done. seconds: of the device (train.clock) so far, evaluations and checkpoints aside.

    evaluation_seconds: of evaluations. evaluated: the steps after which there is one.
    """

    step: int = 0
    seconds: float = 0.0
    evaluation_seconds: float = 0.0
    evaluated: set[int] = field(default_factory=set)


@dataclass
class Trainer:
    """All that a loop works on. held: the frozen modules; evaluate: gives a row of AP, or None where it was stopped."""

    folder: Path
    config: Config
    ranks: Ranks
    model: nn.Module
    held: list[nn.Module]
    optimizer: torch.optim.SGD
    progress: Progress
    evaluate: Callable[[Callable[[], bool]], dict[str, Any] | None] | None

    def save(self) -> None:
        """Publish a checkpoint of where the run is, on rank 0."""
        content = {
            "model": {name: value.detach().cpu() for name, value in self.model.state_dict().items()},
            "optimizer": self.optimizer.state_dict(),
            "seconds": self.progress.seconds,
            "evaluation_seconds": self.progress.evaluation_seconds,
        }
        step = self.progress.step
        self.ranks.on_first(lambda: str(save_checkpoint(self.folder / CHECKPOINTS, step, content, KEEP)))

    def resume(self) -> bool:
        """Continue from the newest checkpoint; False where there is none."""
        found = self.ranks.together(lambda: newest_checkpoint(self.folder / CHECKPOINTS, self.ranks.say))
        if found is None:
            return False
        content = found[1]
        try:
            self.model.load_state_dict(content["model"])
            self.optimizer.load_state_dict(content["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise UserError(f"{found[0]} is of another detector ({str(error).splitlines()[0]})") from error
        step = int(content["step"])
        self.ranks.on_first(lambda: metrics_file(self.folder / METRICS).cut_back(step))
        evaluated = {row["step"] + 1 for row in read_rows(self.folder) if "AP" in row}
        self.progress = Progress(step, content["seconds"], content["evaluation_seconds"], evaluated)
        return True


def optimizer_of(model: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    """SGD over what learns, norm layers with a weight decay of their own."""
    norms = {id(one) for module in model.modules() if is_norm(module) for one in module.parameters(recurse=False)}
    learned = [one for one in model.parameters() if one.requires_grad]
    groups = [
        {"params": [one for one in learned if id(one) not in norms], "weight_decay": recipe.weight_decay},
        {"params": [one for one in learned if id(one) in norms], "weight_decay": recipe.norm_decay},
    ]
    return torch.optim.SGD([group for group in groups if group["params"]], lr=recipe.lr, momentum=recipe.momentum)


def parallel(model: nn.Module, ranks: Ranks) -> nn.Module:
    """The model as the step calls it: itself, or under DDP."""
    if ranks.world == 1:
        return model
    devices = [ranks.device.index] if ranks.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)


class _Window:
    """Losses since the last row, on the device, and where the time went."""

    def __init__(self, device: torch.device) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps = 0
        self.waited = 0.0
        self.since = time.perf_counter()
        self.clock = device_clock(device)
        self.spent = self.clock()

    def add(self, losses: dict[str, Tensor], waited: float) -> None:
        self.steps += 1
        self.waited += waited
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, torch.zeros_like(value)) + value.detach()

    def row(self, trainer: Trainer) -> dict[str, Any]:
        """The mean losses over ranks and steps, and the speed; counts the window's time to the run's."""
        ranks, progress = trainer.ranks, trainer.progress
        names = sorted(self.sums)
        means = torch.stack([self.sums[name] for name in names]).double() / self.steps
        shared = (ranks.total(means) / ranks.world).tolist()
        elapsed = time.perf_counter() - self.since
        progress.seconds += self.clock() - self.spent
        loss = sum(shared)
        if not torch.isfinite(torch.tensor(loss)):
            raise UserError(
                f"the loss is {loss} at step {progress.step}: lower the learning rate (--set lr=...), or set clip=10"
            )
        recipe = trainer.config.recipe
        memory = torch.cuda.max_memory_allocated(ranks.device) if ranks.device.type == "cuda" else None
        return {
            "step": progress.step - 1,
            "loss": loss,
            "losses": dict(zip(names, shared, strict=True)),
            "lr": trainer.optimizer.param_groups[0]["lr"],
            "images_per_second": round(self.steps * recipe.batch / max(elapsed, 1e-9), 3),
            "seconds_per_step": round(elapsed / self.steps, 5),
            "data_wait": round(self.waited / max(elapsed, 1e-9), 4),
            "seconds": round(progress.seconds, 3),
            "gpu_memory": memory,
        }


def train_steps(trainer: Trainer, batches: Any, last: int, stop: StopRequest) -> bool:
    """Train to step ``last`` (of the schedule's plan); False where a signal ended it, after a checkpoint."""
    recipe, ranks, progress = trainer.config.recipe, trainer.ranks, trainer.progress
    stepped = parallel(trainer.model, ranks)
    metrics = metrics_file(trainer.folder / METRICS)
    iterator = iter(batches)
    window = _Window(ranks.device)

    def write(row: dict[str, Any]) -> None:
        if ranks.first:
            metrics.append([json.dumps(row)])

    while True:
        due = _due(recipe, progress.step) or progress.step == trainer.config.plan.steps
        if trainer.evaluate and due and progress.step not in progress.evaluated:
            if not _evaluated(trainer, stop, write):
                return False
            window = _Window(ranks.device)
        if progress.step >= last:
            return True
        _set_mode(trainer)
        began = time.perf_counter()
        samples = next(iterator)
        waited = time.perf_counter() - began
        losses = one_step(trainer, stepped, samples)
        window.add(losses, waited)
        progress.step += 1
        stopping = ranks.largest(int(stop.name is not None)) > 0
        saving = progress.step % recipe.save_every == 0 or progress.step >= last or stopping
        # Rows end where evaluations begin, so that no step's seconds are lost to the cost.
        if saving or progress.step % recipe.log_every == 0 or _due(recipe, progress.step):
            row = window.row(trainer)
            write(row)
            _say(trainer, row)
            window = _Window(ranks.device)
        if saving:
            trainer.save()
            window = _Window(ranks.device)
        if stopping:
            return False


def _due(recipe: Recipe, step: int) -> bool:
    """Whether an evaluation on the way belongs after ``step`` steps."""
    return bool(recipe.eval_every and step and step % recipe.eval_every == 0)


def _evaluated(trainer: Trainer, stop: StopRequest, write: Callable[[dict[str, Any]], None]) -> bool:
    """Evaluate and write the row; False where a signal came in between, after a checkpoint."""
    assert trainer.evaluate is not None
    progress = trainer.progress
    row = trainer.evaluate(lambda: stop.name is not None)
    if row is None:
        trainer.save()
        return False
    progress.evaluated.add(progress.step)
    progress.evaluation_seconds += row["evaluation_seconds"]
    write({"step": progress.step - 1, "seconds": round(progress.seconds, 3), **row})
    trainer.ranks.say(f"step {progress.step}: AP {row['AP']:.4f}  AP50 {row['AP50']:.4f}")
    return True


def _set_mode(trainer: Trainer) -> None:
    if not trainer.model.training:
        trainer.model.train()
    for module in trainer.held:
        module.eval()


def one_step(trainer: Trainer, stepped: nn.Module, samples: list[Sample]) -> dict[str, Tensor]:
    """One optimiser step on this rank's samples; returns its losses by name."""
    recipe, device, step = trainer.config.recipe, trainer.ranks.device, trainer.progress.step
    key = rng.derive_key(rng.key_of_text(recipe.seed, "detector's sampling"), step, trainer.ranks.rank)
    torch.manual_seed(int(key[0]) >> 1)
    for group in trainer.optimizer.param_groups:
        group["lr"] = rate(trainer.config.plan, step, recipe.warmup_factor, recipe.gamma)
    pairs = [to_device(sample, device, label_offset(recipe.model)) for sample in samples]
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=recipe.precision == "bf16"):
        losses: dict[str, Tensor] = stepped([image for image, _ in pairs], [target for _, target in pairs])
    total: Tensor = sum(losses.values())  # type: ignore[assignment]
    trainer.optimizer.zero_grad(set_to_none=True)
    total.backward()
    if recipe.clip:
        nn.utils.clip_grad_norm_([one for one in trainer.model.parameters() if one.requires_grad], recipe.clip)
    trainer.optimizer.step()
    return losses


_PLAIN_EVERY = 10.0
_said = [0.0]


def _say(trainer: Trainer, row: dict[str, Any]) -> None:
    """A line on rank 0 now and then."""
    last = trainer.progress.step >= trainer.config.plan.steps
    if time.monotonic() - _said[0] < _PLAIN_EVERY and not last:
        return
    _said[0] = time.monotonic()
    trainer.ranks.say(
        f"step {trainer.progress.step}/{trainer.config.plan.steps}  loss {row['loss']:.3f}  lr {row['lr']:.4g}  "
        f"{row['images_per_second']:.1f} images/s  data wait {row['data_wait']:.0%}"
    )
