"""Trains one detector, from its arguments to the files of a finished run.

Every source of randomness is a function of (seed, step, rank): batches and transforms (detect/data.py), and torch's own
generator, which the sampling of anchors and regions draws from, is reseeded at each step. So a resumed run equals an
undisturbed one bit for bit on a CPU. What does not fit (other classes, weights of another backbone, resuming as another
run) is refused before the first step. Losses stay on the device between the rows of metrics.jsonl.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from jigsaw_pretrain import rng
from jigsaw_pretrain.detect.annotations import GroundTruth, read_ground_truth, require_same_classes
from jigsaw_pretrain.detect.data import Augmentation, DetectionDataset, Order, Sample, to_device, training_batches
from jigsaw_pretrain.detect.evaluate import AP_FILE, Evaluation, evaluate_model, save_evaluation
from jigsaw_pretrain.detect.models import backbone
from jigsaw_pretrain.detect.models.backbone import is_norm
from jigsaw_pretrain.detect.models.detectors import label_offset
from jigsaw_pretrain.detect.models.weights import (
    BACKBONE_FILE,
    CHECKPOINTS,
    brings_statistics,
    load,
    load_neck,
    pyramid_of,
    read_backbone,
    read_neck,
)
from jigsaw_pretrain.detect.recipe import DetectorRecipe, fit_to_dataset, learning_rate
from jigsaw_pretrain.detect.run import (
    DETECTOR,
    METRICS,
    SUMMARY,
    DetectorConfig,
    backbone_from_config,
    detector_from_config,
    read_config,
)
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.annotations.read import Reading
from jigsaw_pretrain.storage import Storage
from jigsaw_pretrain.train.engine.checkpoint import (
    list_checkpoints,
    newest_checkpoint,
    remove_leftovers,
    save_checkpoint,
    save_file,
)
from jigsaw_pretrain.train.engine.distributed import Ranks, StopRequest
from jigsaw_pretrain.train.engine.metrics import device_clock, metrics_file, read_rows

KEEP = 2
"""Checkpoints that stay."""

LOG_SECONDS = 10.0
"""Least time between two lines of progress."""

WritePage = Callable[[Path, GroundTruth, str], object]
"""Draws the page of a run: its folder, the validation set, and the folder of its images."""


@dataclass(frozen=True)
class DetectorJob:
    """The command's arguments that are no part of the recipe."""

    annotations: str
    images: str
    val_annotations: str | None
    val_images: str | None
    run: Path
    init: str
    workers: int
    resume: bool
    stop_after: int | None
    reading: Reading = Reading()


@dataclass
class DetectorProgress:
    """Where a run is.

    step: optimiser steps done. seconds: device-seconds so far (train/engine/metrics.py), without evaluations and
    checkpoints. evaluation_seconds: those of evaluations. evaluated: the steps after which there is one.
    """

    step: int = 0
    seconds: float = 0.0
    evaluation_seconds: float = 0.0
    evaluated: set[int] = field(default_factory=set)


@dataclass
class DetectorTrainer:
    """All that the training loop works on.

    frozen: the modules that stay in eval mode. evaluate: None without a validation set. logged: when the last line of
    progress was printed, by the monotonic clock.
    """

    folder: Path
    config: DetectorConfig
    ranks: Ranks
    model: nn.Module
    frozen: list[nn.Module]
    optimizer: torch.optim.SGD
    progress: DetectorProgress
    evaluate: "Evaluator | None"
    logged: float = 0.0

    def save(self) -> None:
        """Publish a checkpoint of where the run is, on rank 0."""
        content = {
            "model": {name: value.detach().cpu() for name, value in self.model.state_dict().items()},
            "optimizer": self.optimizer.state_dict(),
            "seconds": self.progress.seconds,
            "evaluation_seconds": self.progress.evaluation_seconds,
        }
        step = self.progress.step
        self.ranks.run_on_rank_zero(lambda: str(save_checkpoint(self.folder / CHECKPOINTS, step, content, KEEP)))

    def resume(self) -> bool:
        """Continue from the newest checkpoint; False where there is none."""
        found = self.ranks.run_on_all(lambda: newest_checkpoint(self.folder / CHECKPOINTS))
        if found is None:
            return False
        content = found[1]
        try:
            self.model.load_state_dict(content["model"])
            self.optimizer.load_state_dict(content["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise UserError(f"{found[0]} is of another detector ({str(error).splitlines()[0]})") from error
        step = int(content["step"])
        self.ranks.run_on_rank_zero(lambda: metrics_file(self.folder / METRICS).cut_back(step))
        evaluated = {row["step"] + 1 for row in read_rows(self.folder / METRICS) if "AP" in row}
        self.progress = DetectorProgress(step, content["seconds"], content["evaluation_seconds"], evaluated)
        return True


def run_job(job: DetectorJob, recipe: DetectorRecipe, ranks: Ranks, write_page: WritePage | None = None) -> None:
    """Train as ``job`` says; every rank calls it. Raises UserError for what the user can put right.

    write_page: draws the finished run's page, on rank 0, where there is a validation set.
    """
    training = ranks.run_on_all(lambda: read_ground_truth(job.annotations, job.images, job.reading))
    validation = ranks.run_on_all(lambda: _validation(training, job))
    with StopRequest() as stop:
        trainer, fresh = _trainer(job, recipe, ranks, training, validation)
        if fresh:
            ranks.log_rank_zero(_described(trainer.config, training, ranks))
        batches = _batches(trainer, training, job)
        done = train_steps(trainer, batches, min(trainer.config.plan.steps, job.stop_after or 2**62), stop)
        if stop.name or not done:
            ranks.log_rank_zero(f"stopped at step {trainer.progress.step}, which --resume continues")
            return
        if trainer.progress.step < trainer.config.plan.steps:
            ranks.log_rank_zero(f"ended at step {trainer.progress.step} as asked, which --resume continues")
            return
    finish(trainer, validation, job.val_images, write_page)


def _validation(training: GroundTruth, job: DetectorJob) -> GroundTruth | None:
    if job.val_annotations is None:
        return None
    found = read_ground_truth(job.val_annotations, job.val_images, job.reading)
    require_same_classes(training, found)
    return found


def _trainer(
    job: DetectorJob, recipe: DetectorRecipe, ranks: Ranks, training: GroundTruth, validation: GroundTruth | None
) -> tuple[DetectorTrainer, bool]:
    """The trainer, and whether it is at its first step (else where the newest checkpoint is)."""
    resuming = job.resume and ranks.run_on_rank_zero(lambda: bool(list_checkpoints(job.run / CHECKPOINTS)))
    state: dict[str, torch.Tensor] | None = None
    if resuming:
        config = ranks.run_on_all(lambda: read_config(job.run))
        _require_same(config, recipe, training, job)
    else:
        ranks.run_on_rank_zero(lambda: _prepare_folder(job))
        config, state = ranks.run_on_all(lambda: _config(job, recipe, training))
    torch.manual_seed(int(rng.key_of_text(recipe.data.seed, "detector's initial weights")) >> 1)
    network = backbone_from_config(config, ranks.device)
    if not resuming and state is not None:
        found, partial = state, recipe.model.partial
        report = ranks.run_on_all(lambda: load(network, found, job.init, partial))
        ranks.log_rank_zero(f"weights {report.text}")
        config = replace(config, weights=asdict(report))
    model, frozen = detector_from_config(config, network, ranks.device)
    if not resuming:
        settled = config = _with_neck(job, config, model, ranks)
        ranks.run_on_rank_zero(lambda: settled.write(job.run))
    evaluate = None
    if validation is not None and job.val_images is not None:
        evaluate = Evaluator(model, config, validation, job.val_images, ranks, job.workers)
    trainer = DetectorTrainer(
        job.run, config, ranks, model, frozen, optimizer_of(model, config.recipe), DetectorProgress(), evaluate
    )
    return trainer, not (resuming and trainer.resume())


def _prepare_folder(job: DetectorJob) -> None:
    """Make the run's folder; refuse one that holds a run."""
    if list_checkpoints(job.run / CHECKPOINTS) or (job.run / DETECTOR).exists():
        raise UserError(f"{job.run} holds a run already: continue it with --resume, or name another folder")
    try:
        job.run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{job.run} cannot be made ({error.strerror}): name another folder") from error
    remove_leftovers(job.run / CHECKPOINTS)
    (job.run / METRICS).unlink(missing_ok=True)


def _require_same(config: DetectorConfig, recipe: DetectorRecipe, training: GroundTruth, job: DetectorJob) -> None:
    """Refuse to resume a run as another one."""
    if changed := recipe.differences(config.recipe):
        raise UserError(
            f"{job.run} was begun with another recipe ({'; '.join(changed)}): resume it with the options it was begun "
            "with, or name another folder"
        )
    if config.categories != training.categories:
        raise UserError(f"{job.run} was begun with other categories than {job.annotations} has: name its own file")
    if config.init != job.init:
        raise UserError(f"{job.run} was begun with --init {config.init}, not {job.init}: name that, or another folder")


def _config(
    job: DetectorJob, recipe: DetectorRecipe, training: GroundTruth
) -> tuple[DetectorConfig, dict[str, torch.Tensor] | None]:
    """The run's config without the reports on weights, and the weights."""
    short = float(np.median([min(record.width, record.height) for record in training.images]))
    state = None if job.init == "scratch" else read_backbone(Path(job.init))
    built = recipe.model.norm
    if recipe.model.norm == "frozen-bn" and (state is None or not brings_statistics(state)):
        built = "sync-bn"
    data = {
        "annotations": str(job.annotations),
        "images": str(job.images),
        "val_annotations": None if job.val_annotations is None else str(job.val_annotations),
        "val_images": None if job.val_images is None else str(job.val_images),
    }
    plan = fit_to_dataset(recipe, len(training.images), short)
    return DetectorConfig(recipe, plan, built, training.categories, job.init, data, None), state


def _with_neck(job: DetectorJob, config: DetectorConfig, model: torch.nn.Module, ranks: Ranks) -> DetectorConfig:
    """Put the neck that the weights come with into the model's pyramid, if so; the config with its report."""
    neck = {} if job.init == "scratch" else ranks.run_on_all(lambda: read_neck(Path(job.init)))
    if not neck:
        return config
    pyramid, recipe = pyramid_of(model), config.recipe
    if pyramid is None or recipe.model.pretrained_neck == "none":
        ranks.log_rank_zero(
            f"neck {job.init}: left out "
            f"({'model.pretrained_neck = none' if pyramid else f'{recipe.model.name} has no pyramid'})"
        )
        return config
    report = ranks.run_on_all(lambda: load_neck(pyramid, neck, job.init))
    ranks.log_rank_zero(f"neck {report.text}")
    return replace(config, neck=asdict(report))


def optimizer_of(model: nn.Module, recipe: DetectorRecipe) -> torch.optim.SGD:
    """SGD over what learns, norm layers with a weight decay of their own."""
    norms = {id(one) for module in model.modules() if is_norm(module) for one in module.parameters(recurse=False)}
    learned = [one for one in model.parameters() if one.requires_grad]
    groups = [
        {"params": [one for one in learned if id(one) not in norms], "weight_decay": recipe.optim.weight_decay},
        {"params": [one for one in learned if id(one) in norms], "weight_decay": recipe.optim.norm_decay},
    ]
    return torch.optim.SGD(
        [group for group in groups if group["params"]], lr=recipe.optim.lr, momentum=recipe.optim.momentum
    )


def _batches(trainer: DetectorTrainer, training: GroundTruth, job: DetectorJob) -> Any:
    recipe, ranks, plan = trainer.config.recipe, trainer.ranks, trainer.config.plan
    landscape = np.array([record.width >= record.height for record in training.images])
    order = Order(landscape, recipe.data.batch, recipe.data.seed)
    key = rng.key_of_text(recipe.data.seed, "detector's augmentation")
    augmentation = Augmentation(recipe.data.flip, (recipe.data.jitter_low, recipe.data.jitter_high), key)
    dataset = DetectionDataset(training, job.images, plan, augmentation, masks=recipe.model.name == "mask-rcnn-fpn")
    steps = range(trainer.progress.step, plan.steps)
    return training_batches(dataset, order, steps, ranks.rank, recipe.data.batch // ranks.world, job.workers)


def _described(config: DetectorConfig, training: GroundTruth, ranks: Ranks) -> str:
    """What the run is about to do, with warnings, in a few lines."""
    recipe, plan = config.recipe, config.plan
    lines = [
        f"{recipe.model.name}, {recipe.model.backbone}, {config.norm_built}, freeze {recipe.model.freeze}, "
        f"from {config.init}; {len(training.images)} images, {len(training.categories)} classes, "
        f"{ranks.world} rank(s) on {ranks.device}",
        f"fitted to this dataset: {plan.steps} steps of {recipe.data.batch} ({plan.epochs:.1f} epochs), "
        f"rate {plan.lr:.4g}, warm-up {plan.warmup_steps}, drops at {', '.join(map(str, plan.drops)) or 'none'}, "
        f"images {plan.short_side} x {plan.long_side}, anchors x {plan.anchor_scale:.2f}",
    ]
    if config.norm_built != recipe.model.norm:
        lines.append(
            "warning: frozen-bn needs weights that bring batch statistics, and these bring none: batch norm that "
            "learns (sync-bn) is built in its place"
        )
    if recipe.model.freeze == "backbone" and config.init == "scratch":
        lines.append("warning: a frozen backbone from scratch stays random: give --init weights")
    if training.unusable:
        lines.append(f"warning: {training.unusable} boxes cannot be used and are left out of training")
    if recipe.model.name == "mask-rcnn-fpn" and training.segmented < 1:
        lines.append(
            f"warning: {1 - training.segmented:.0%} of the boxes have no segmentation: their masks are the whole "
            "boxes, so the mask head learns rectangles from them"
        )
    return "\n".join(lines)


def train_steps(trainer: DetectorTrainer, batches: Any, last: int, stop: StopRequest) -> bool:
    """Train to step ``last`` (of the schedule's plan); False where a signal ended it, after a checkpoint."""
    recipe, ranks, progress = trainer.config.recipe, trainer.ranks, trainer.progress
    stepped = parallel(trainer.model, ranks)
    metrics = metrics_file(trainer.folder / METRICS)
    iterator = iter(batches)
    window = _LossWindow(ranks.device)

    def write(row: dict[str, Any]) -> None:
        if ranks.first:
            metrics.append([json.dumps(row)])

    while True:
        due = _due(recipe, progress.step) or progress.step == trainer.config.plan.steps
        if trainer.evaluate and due and progress.step not in progress.evaluated:
            if not _evaluated(trainer, stop, write):
                return False
            window = _LossWindow(ranks.device)
        if progress.step >= last:
            return True
        _set_mode(trainer)
        began = time.perf_counter()
        samples = next(iterator)
        waited = time.perf_counter() - began
        losses = one_step(trainer, stepped, samples)
        window.add(losses, waited)
        progress.step += 1
        stopping = ranks.all_reduce_max(int(stop.name is not None)) > 0
        saving = progress.step % recipe.run.checkpoint_every == 0 or progress.step >= last or stopping
        # Rows end where evaluations begin, so that no step's seconds are lost to the cost.
        if saving or progress.step % recipe.run.log_every == 0 or _due(recipe, progress.step):
            row = window.row(trainer)
            write(row)
            _log_progress(trainer, row)
            window = _LossWindow(ranks.device)
        if saving:
            trainer.save()
            window = _LossWindow(ranks.device)
        if stopping:
            return False


def one_step(trainer: DetectorTrainer, stepped: nn.Module, samples: list[Sample]) -> dict[str, Tensor]:
    """One optimiser step on this rank's samples; returns its losses by name."""
    recipe, device, step = trainer.config.recipe, trainer.ranks.device, trainer.progress.step
    key = rng.derive_key(rng.key_of_text(recipe.data.seed, "detector's sampling"), step, trainer.ranks.rank)
    torch.manual_seed(int(key[0]) >> 1)
    for group in trainer.optimizer.param_groups:
        group["lr"] = learning_rate(trainer.config.plan, step, recipe.optim.warmup_factor, recipe.optim.gamma)
    pairs = [to_device(sample, device, label_offset(recipe.model.name)) for sample in samples]
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=recipe.run.precision == "bf16"):
        losses: dict[str, Tensor] = stepped([image for image, _ in pairs], [target for _, target in pairs])
    total: Tensor = sum(losses.values())  # type: ignore[assignment]
    trainer.optimizer.zero_grad(set_to_none=True)
    total.backward()
    if recipe.optim.clip_norm:
        nn.utils.clip_grad_norm_(
            [one for one in trainer.model.parameters() if one.requires_grad], recipe.optim.clip_norm
        )
    trainer.optimizer.step()
    return losses


def parallel(model: nn.Module, ranks: Ranks) -> nn.Module:
    """The model as the step calls it: itself, or under DDP."""
    if ranks.world == 1:
        return model
    devices = [ranks.device.index] if ranks.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)


def _set_mode(trainer: DetectorTrainer) -> None:
    if not trainer.model.training:
        trainer.model.train()
    for module in trainer.frozen:
        module.eval()


def _due(recipe: DetectorRecipe, step: int) -> bool:
    """Whether an evaluation on the way belongs after ``step`` steps."""
    return bool(recipe.run.val_every and step and step % recipe.run.val_every == 0)


def _evaluated(trainer: DetectorTrainer, stop: StopRequest, write: Callable[[dict[str, Any]], None]) -> bool:
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
    trainer.ranks.log_rank_zero(f"step {progress.step}: AP {row['AP']:.4f}  AP50 {row['AP50']:.4f}")
    return True


class _LossWindow:
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

    def row(self, trainer: DetectorTrainer) -> dict[str, Any]:
        """The mean losses over ranks and steps, and the speed; counts the window's time to the run's."""
        ranks, progress = trainer.ranks, trainer.progress
        names = sorted(self.sums)
        means = torch.stack([self.sums[name] for name in names]).double() / self.steps
        shared = (ranks.all_reduce_sum(means) / ranks.world).tolist()
        elapsed = time.perf_counter() - self.since
        progress.seconds += self.clock() - self.spent
        loss = sum(shared)
        if not torch.isfinite(torch.tensor(loss)):
            raise UserError(
                f"the loss is {loss} at step {progress.step}: lower the learning rate (--set optim.lr=...), "
                "or clip (--set optim.clip_norm=10)"
            )
        recipe = trainer.config.recipe
        memory = torch.cuda.max_memory_allocated(ranks.device) if ranks.device.type == "cuda" else None
        return {
            "step": progress.step - 1,
            "loss": loss,
            "losses": dict(zip(names, shared, strict=True)),
            "lr": trainer.optimizer.param_groups[0]["lr"],
            "images_per_second": round(self.steps * recipe.data.batch / max(elapsed, 1e-9), 3),
            "seconds_per_step": round(elapsed / self.steps, 5),
            "data_wait": round(self.waited / max(elapsed, 1e-9), 4),
            "seconds": round(progress.seconds, 3),
            "gpu_memory": memory,
        }


def _log_progress(trainer: DetectorTrainer, row: dict[str, Any]) -> None:
    """Print a line on rank 0, at most one in LOG_SECONDS."""
    last = trainer.progress.step >= trainer.config.plan.steps
    if time.monotonic() - trainer.logged < LOG_SECONDS and not last:
        return
    trainer.logged = time.monotonic()
    trainer.ranks.log_rank_zero(
        f"step {trainer.progress.step}/{trainer.config.plan.steps}  loss {row['loss']:.3f}  lr {row['lr']:.4g}  "
        f"{row['images_per_second']:.1f} images/s  data wait {row['data_wait']:.0%}"
    )


class Evaluator:
    """Evaluates the model as it is; keeps the last evaluation for the end of the run."""

    def __init__(
        self,
        model: nn.Module,
        config: DetectorConfig,
        validation: GroundTruth,
        images: str,
        ranks: Ranks,
        workers: int,
    ) -> None:
        self._model, self._config, self._validation = model, config, validation
        self._images, self._ranks, self._workers = images, ranks, workers
        self.last: Evaluation | None = None

    def __call__(self, stopped: Callable[[], bool]) -> dict[str, Any] | None:
        """The AP values of a metrics row, or None where a signal came in between."""
        recipe, ranks = self._config.recipe, self._ranks
        self.last = evaluate_model(
            self._model,
            recipe,
            self._config.plan,
            self._validation,
            self._images,
            ranks,
            self._workers,
            max(1, recipe.data.batch // ranks.world),
            stopped,
        )
        if self.last is None:
            return None
        row: dict[str, Any] = dict(self.last.boxes.stats)
        if self.last.masks:
            row |= {f"mask_{name}": value for name, value in self.last.masks.stats.items()}
        return row | {"evaluation_seconds": round(self.last.seconds, 3)}


def finish(
    trainer: DetectorTrainer, validation: GroundTruth | None, images: str | None, write_page: WritePage | None
) -> None:
    """Write the weights, the evaluation's files, the summary and the page."""
    ranks, folder, evaluator = trainer.ranks, trainer.folder, trainer.evaluate
    if (
        evaluator is not None
        and evaluator.last is None
        and not ranks.run_on_rank_zero(lambda: (folder / AP_FILE).exists())
    ):
        evaluator(lambda: False)

    def write() -> None:
        save_file(folder / DETECTOR, {key: value.cpu() for key, value in trainer.model.state_dict().items()})
        save_file(folder / BACKBONE_FILE, backbone.backbone_state(trainer.model))
        if evaluator is not None and evaluator.last is not None:
            save_evaluation(folder, evaluator.last)
        summary = summarise(trainer)
        Storage(folder).publish(SUMMARY, json.dumps(summary, indent=2).encode() + b"\n")
        if validation is not None and images is not None and write_page is not None:
            write_page(folder, validation, images)

    ranks.run_on_rank_zero(write)
    ranks.log_rank_zero(
        f"{folder}: finished after {trainer.progress.step} steps, {trainer.progress.seconds:.0f} s of training"
    )


def summarise(trainer: DetectorTrainer) -> dict[str, Any]:
    """summary.json: cost, speed, memory and AP of a finished run."""
    rows = read_rows(trainer.folder / METRICS)
    speeds = [row["seconds_per_step"] for row in rows if "seconds_per_step" in row]
    memory = [row["gpu_memory"] for row in rows if row.get("gpu_memory")]
    scored = [row for row in rows if "AP" in row]
    device = trainer.ranks.device
    return {
        "steps": trainer.progress.step,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "world": trainer.ranks.world,
        "seconds": round(trainer.progress.seconds, 3),
        "device_seconds": round(trainer.progress.seconds * trainer.ranks.world, 3),
        "evaluation_seconds": round(trainer.progress.evaluation_seconds, 3),
        "seconds_per_step": statistics.median(speeds) if speeds else None,
        "gpu_memory": max(memory) if memory else None,
        "parameters_learned": sum(one.numel() for one in trainer.model.parameters() if one.requires_grad),
        "AP": {key: scored[-1][key] for key in scored[-1] if "AP" in key} if scored else None,
    }
