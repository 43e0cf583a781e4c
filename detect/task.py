"""A detector's training as a task of the trainer (train/engine/trainer.py): its steps, its checkpoints and its AP.

Every source of randomness is a function of (seed, step, rank): batches and transforms (detect/data.py), and torch's own
generator, which the sampling of anchors and regions draws from, is reseeded at each step. So a resumed run equals an
undisturbed one bit for bit on a CPU.
"""

import contextlib
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from jigsaw_pretrain import rng
from jigsaw_pretrain.config import PositiveOrZero
from jigsaw_pretrain.detect.annotations import GroundTruth
from jigsaw_pretrain.detect.coco_eval import Evaluation, evaluate_model
from jigsaw_pretrain.detect.data import (
    Augmentation,
    DetectionDataset,
    Order,
    Sample,
    SampleLoader,
    shared_bytes,
    to_device,
    training_batches,
)
from jigsaw_pretrain.detect.models import backbone
from jigsaw_pretrain.detect.models.detectors import label_offset
from jigsaw_pretrain.detect.models.flops import flop_counter
from jigsaw_pretrain.detect.recipe import DetectorRecipe, learning_rate
from jigsaw_pretrain.detect.run import MOST_FLOPS, DetectorConfig
from jigsaw_pretrain.formats.annotations.read import Reading
from jigsaw_pretrain.train.data.loader import check_shared_memory
from jigsaw_pretrain.train.engine.checkpoint import check_fits, check_values
from jigsaw_pretrain.train.engine.distributed import Ranks
from jigsaw_pretrain.train.engine.metrics import Row, StepMetrics, WindowMetrics, read_rows
from jigsaw_pretrain.train.engine.optim import make_optimizer, parameter_groups, set_rate
from jigsaw_pretrain.train.engine.run_folder import RunFolder
from jigsaw_pretrain.train.engine.trainer import Stopped
from jigsaw_pretrain.words import hundredths


@dataclass(frozen=True)
class DetectorJob:
    """What is run, beside the recipe: the data as the user named it, the folder, and how the machine is used."""

    annotations: str
    images: str
    val_annotations: str | None
    val_images: str | None
    folder: RunFolder
    init: str
    workers: int
    resume: bool
    ranks: Ranks
    reading: Reading = Reading()
    log: tuple[str, ...] = ()
    title: str | None = None
    val_split: str | None = None


class _Spent(msgspec.Struct):
    """The plain values of a checkpoint."""

    seconds: PositiveOrZero
    evaluation_seconds: PositiveOrZero
    flops: Annotated[float, msgspec.Meta(ge=0, le=MOST_FLOPS)] | None = None


class DetectorTask:
    """A detector and what takes it through steps: an engine.trainer.TrainingTask.

    seconds: device-seconds of training so far (train/engine/metrics.py), without evaluations and checkpoints.
    evaluation_seconds: those of evaluations. flops: of a training step per image (detect/models/flops.py), counted in
    this process's first one.
    """

    remedy = "lower the learning rate (--set optim.lr=...), or set optim.clip_norm=10"

    def __init__(
        self,
        job: DetectorJob,
        config: DetectorConfig,
        training: GroundTruth,
        model: nn.Module,
        frozen: Sequence[nn.Module],
    ) -> None:
        """frozen: the modules that stay in eval mode."""
        self.config, self.ranks, self.model = config, job.ranks, model
        self.step, self.steps = 0, config.plan.steps
        self.seconds = self.evaluation_seconds = 0.0
        self.job, self._training, self._frozen = job, training, frozen
        self._optimizer = optimizer_of(model, config.recipe)
        self.flops: float | None = None
        self._parallel: nn.Module | None = None
        self._batches: SampleLoader | None = None

    def open(self, until: int) -> Iterator[list[Sample]]:
        """Give this rank's samples of each batch."""
        recipe, ranks, plan = self.config.recipe, self.ranks, self.config.plan
        landscape = np.array([record.width >= record.height for record in self._training.images])
        order = Order(landscape, recipe.data.batch, recipe.data.seed)
        dataset = DetectionDataset(
            self._training,
            self.job.images,
            plan,
            _augmentation(recipe),
            masks=_has_masks(recipe),
            pixels=self.config.pixels,
        )
        share = recipe.data.batch // ranks.world
        self._batches = training_batches(dataset, order, range(self.step, until), ranks.rank, share, self.job.workers)
        return iter(self._batches)

    def check_shared_memory(self, validation: GroundTruth | None) -> None:
        """Raise UserError where what the workers read does not fit into shared memory, that of evaluations included."""
        recipe, pixels, plan = self.config.recipe, self.config.pixels, self.config.plan
        share = max(1, recipe.data.batch // self.ranks.world), self.job.workers
        own = shared_bytes(
            *(self._training, plan, pixels, *share), training=_augmentation(recipe), masks=_has_masks(recipe)
        )
        check_shared_memory(own + (shared_bytes(validation, plan, pixels, *share) if validation else 0))

    def close(self) -> None:
        """End the workers."""
        if self._batches is not None:
            self._batches.close()

    def take(self, batch: list[Sample]) -> StepMetrics:
        """One optimizer step on this rank's samples."""
        recipe, device = self.config.recipe, self.ranks.device
        if self._parallel is None:
            self._parallel = self.ranks.joined(self.model)
        if not self.model.training:
            self.model.train()
        for module in self._frozen:
            module.eval()
        key = rng.derive_key(rng.key_of_text(recipe.data.seed, "detector's sampling"), self.step, self.ranks.rank)
        torch.manual_seed(int(key[0]) >> 1)
        rate = learning_rate(self.config.plan, self.step, recipe.optim.warmup_factor, recipe.optim.gamma)
        set_rate(self._optimizer, rate)
        offset, scale = label_offset(recipe.model.name), self.config.pixels.full_scale
        pairs = [to_device(sample, device, offset, scale) for sample in batch]
        arrived = None if self.ranks.streams is None else self.ranks.streams.event()
        self._optimizer.zero_grad(set_to_none=True)
        counter = flop_counter() if self.flops is None else None
        with counter or contextlib.nullcontext():
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=recipe.run.precision == "bf16"):
                losses: dict[str, Tensor] = self._parallel(
                    [image for image, _ in pairs], [target for _, target in pairs]
                )
            total: Tensor = sum(losses.values())  # type: ignore[assignment]
            total.backward()
        if counter is not None:
            self.flops = counter.get_total_flops() / len(batch)
        if recipe.optim.clip_norm:
            nn.utils.clip_grad_norm_(
                [one for one in self.model.parameters() if one.requires_grad], recipe.optim.clip_norm
            )
        self._optimizer.step()
        sums = {name: losses[name] * len(batch) for name in sorted(losses)}
        return StepMetrics(sums, len(batch), rate, arrived=arrived)

    def rows(self, window: WindowMetrics) -> list[Row]:
        """One row per window: the mean of each loss and their sum, the speed, and ``seconds`` so far."""
        steps = window.steps
        losses = {name: statistics.fmean(one.means[name][0] for one in steps) for name in steps[0].means}
        self.seconds += window.device_seconds
        device = self.ranks.device
        return [
            {
                "step": steps[-1].step,
                "loss": sum(losses.values()),
                "losses": losses,
                "lr": steps[-1].lr,
                "images_per_second": round(window.samples_per_second, 3),
                "seconds_per_step": round(window.seconds / len(steps), 5),
                "data_wait": round(window.data_wait, 4),
                "seconds": round(self.seconds, 3),
                "gpu_memory": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
            }
        ]

    def check(self) -> None:
        """Nothing but the loss keeps a detector from going on."""

    def to_checkpoint(self) -> dict[str, Any]:
        """Model, optimizer and seconds, and what they belong to."""
        return {
            **self._run(),
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "seconds": self.seconds,
            "evaluation_seconds": self.evaluation_seconds,
            "flops": self.flops,
        }

    def _run(self) -> dict[str, Any]:
        """What the run is of."""
        config = self.config
        categories = [list(one) for one in config.categories]
        return {"recipe": config.recipe.to_dict(), "categories": categories, "init": config.init}

    def check_checkpoint(self, path: Path, content: dict[str, Any]) -> None:
        """Raise UserError for one that is not of this run, or damaged."""
        check_fits(path, content, self.model.state_dict(), self.steps, self._run(), self._optimizer)
        check_values(path, content, _Spent)

    def restore(self, content: dict[str, Any]) -> None:
        """Take a checkpoint's place."""
        self.model.load_state_dict(content["model"])
        self._optimizer.load_state_dict(content["optimizer"])
        self.seconds, self.evaluation_seconds = content["seconds"], content["evaluation_seconds"]
        self.flops = content.get("flops")


def _augmentation(recipe: DetectorRecipe) -> Augmentation:
    key = rng.key_of_text(recipe.data.seed, "detector's augmentation")
    jitter = (recipe.data.jitter_low, recipe.data.jitter_high)
    return Augmentation(recipe.data.flip, jitter, key, recipe.data.copy_paste)


def _has_masks(recipe: DetectorRecipe) -> bool:
    return recipe.model.name == "mask-rcnn-fpn"


class PeriodicAP:
    """AP on the validation set as the run goes and at its end (engine.trainer.PeriodicEvaluation).

    last: the newest evaluation of this process.
    """

    key: str | None = None

    def __init__(self, task: DetectorTask, validation: GroundTruth, images: str, workers: int) -> None:
        self._task, self._validation, self._images, self._workers = task, validation, images, workers
        self.last: Evaluation | None = None

    def due(self, step: int) -> bool:
        """Every so many steps, and at the end."""
        every = self._task.config.recipe.run.val_every
        return step == self._task.steps or bool(every and step % every == 0)

    def made(self, row: Row) -> bool:
        """Whether a row has AP."""
        return "AP" in row

    def __call__(self, stopped: Stopped) -> dict[str, Any] | None:
        """The AP values of a row, or None where a signal came in between."""
        task, recipe, ranks = self._task, self._task.config.recipe, self._task.ranks
        self.last = evaluate_model(
            task.model,
            recipe,
            task.config.plan,
            task.config.pixels,
            self._validation,
            self._images,
            ranks,
            self._workers,
            max(1, recipe.data.batch // ranks.world),
            stopped,
        )
        if self.last is None:
            return None
        task.evaluation_seconds += self.last.seconds
        figures: dict[str, Any] = {"seconds": round(task.seconds, 3), **self.last.boxes.stats}
        if self.last.masks:
            figures |= {f"mask_{name}": value for name, value in self.last.masks.stats.items()}
        ranks.log_rank_zero(f"step {task.step:,}: AP {hundredths(figures['AP'])}  AP50 {hundredths(figures['AP50'])}")
        return figures | {"evaluation_seconds": round(self.last.seconds, 3)}


def optimizer_of(model: nn.Module, recipe: DetectorRecipe) -> torch.optim.Optimizer:
    """The optimizer over what learns."""
    bodies = ["backbone.body."]
    if len(list(backbone.backbone_modules(model))) > 1:
        bodies.append("roi_heads.box_head.")

    def own_name(name: str) -> str | None:
        return next((name.removeprefix(body) for body in bodies if name.startswith(body)), None)

    groups = parameter_groups(model, recipe.optim, own_name, recipe.optim.backbone_rate)
    return make_optimizer(groups, recipe.optim, lr=recipe.optim.lr)


def summarise(task: DetectorTask, folder: RunFolder) -> dict[str, Any]:
    """summary.json: cost, speed, memory and AP of a finished run."""
    rows = read_rows(folder.metrics)
    speeds = [row["seconds_per_step"] for row in rows if "seconds_per_step" in row]
    memory = [row["gpu_memory"] for row in rows if row.get("gpu_memory")]
    scored = [row for row in rows if "AP" in row]
    device = task.ranks.device
    return {
        "steps": task.step,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "world": task.ranks.world,
        "seconds": round(task.seconds, 3),
        "device_seconds": round(task.seconds * task.ranks.world, 3),
        "evaluation_seconds": round(task.evaluation_seconds, 3),
        "seconds_per_step": statistics.median(speeds) if speeds else None,
        "gpu_memory": max(memory) if memory else None,
        "flops_per_image": task.flops,
        "parameters_learned": sum(one.numel() for one in task.model.parameters() if one.requires_grad),
        "AP": {key: scored[-1][key] for key in scored[-1] if "AP" in key} if scored else None,
    }
