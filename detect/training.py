"""Trains one detector: a task of the trainer (train/engine/trainer.py), from its arguments to a finished run's files.

Every source of randomness is a function of (seed, step, rank): batches and transforms (detect/data.py), and torch's own
generator, which the sampling of anchors and regions draws from, is reseeded at each step. So a resumed run equals an
undisturbed one bit for bit on a CPU. What does not fit (other classes, weights of another backbone, resuming as another
run) is refused before the first step.
"""

import contextlib
import json
import logging
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from jigsaw_pretrain import rng
from jigsaw_pretrain.config import PositiveOrZero
from jigsaw_pretrain.detect.annotations import (
    GroundTruth,
    check_images,
    read_ground_truth,
    require_same_classes,
    subset,
)
from jigsaw_pretrain.detect.coco_eval import AP_FILE, Evaluation, evaluate_model, save_evaluation
from jigsaw_pretrain.detect.data import (
    Augmentation,
    DetectionDataset,
    ImageReader,
    Order,
    Sample,
    SampleLoader,
    check_missing_data,
    looked_at,
    measured_mean_and_std,
    shared_bytes,
    to_device,
    training_batches,
)
from jigsaw_pretrain.detect.evaluation import WritePage
from jigsaw_pretrain.detect.models import backbone
from jigsaw_pretrain.detect.models.detectors import label_offset
from jigsaw_pretrain.detect.models.flops import flop_counter
from jigsaw_pretrain.detect.models.weights import (
    BACKBONE_FILE,
    brings_statistics,
    load,
    load_neck,
    pyramid_of,
    read_backbone,
    read_neck,
)
from jigsaw_pretrain.detect.recipe import DetectorRecipe, fit_to_dataset, learning_rate
from jigsaw_pretrain.detect.run import (
    CONFIG,
    DETECTOR,
    MOST_FLOPS,
    SUMMARY,
    DetectorConfig,
    backbone_from_config,
    detector_from_config,
    read_config,
)
from jigsaw_pretrain.errors import Interrupted, UserError, redacted
from jigsaw_pretrain.formats.annotations.read import Reading
from jigsaw_pretrain.formats.images.pixel_format import pixels_of_images
from jigsaw_pretrain.formats.images.source import ImageSource
from jigsaw_pretrain.formats.pixels import RGB8, PixelFormat, named
from jigsaw_pretrain.storage.store import Storage
from jigsaw_pretrain.train.data.loader import check_shared_memory
from jigsaw_pretrain.train.engine.checkpoint import check_fits, check_values, list_checkpoints, save_file
from jigsaw_pretrain.train.engine.distributed import Ranks, start
from jigsaw_pretrain.train.engine.metrics import Row, StepMetrics, WindowMetrics, read_rows
from jigsaw_pretrain.train.engine.optim import arithmetic, make_optimizer, parameter_groups, set_rate
from jigsaw_pretrain.train.engine.run_folder import RunFolder, check_same_recipe, continues, open_run_folder
from jigsaw_pretrain.train.engine.trainer import Stopped, Trainer, TrainerOptions
from jigsaw_pretrain.train.engine.weights_info import WeightsInfo, read_weights_info
from jigsaw_pretrain.train.models.feature_maps import Backbone
from jigsaw_pretrain.train.models.weights import with_about
from jigsaw_pretrain.train.recipe import MEAN, STD
from jigsaw_pretrain.words import counted, hundredths

LONG = 200
"""From this many steps on the user is told how to try fewer."""

STATISTICS_OF = 64
"""Images over which mean and std are measured, where neither weights nor recipe give them."""


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


def train(
    annotations: str,
    images: str,
    run: str | Path,
    recipe: DetectorRecipe | None = None,
    *,
    val_annotations: str | None = None,
    val_images: str | None = None,
    val_split: str | None = None,
    init: str = "scratch",
    reading: Reading | None = None,
    resume: bool = False,
    stop_after: int | None = None,
    workers: int = 2,
    device: str = "auto",
    log: Sequence[str] = (),
    write_page: WritePage | None = None,
    title: str | None = None,
) -> RunFolder:
    """Fine-tune a detector; under torchrun every rank calls it.

    Args:
        annotations: COCO JSON, or a folder of VOC or YOLO files, as prep takes them.
        images: their images, a folder, zip or tar; a path or a URL.
        run: folder or URL of the run, made or continued.
        recipe: None for the Jigsaw paper's.
        val_annotations: annotations to report AP on.
        val_images: their images.
        val_split: the split of the validation annotations, as ``reading`` has that of the training annotations.
        init: ``scratch``, a weights file, or a pre-training run's folder.
        reading: how annotations are read; None for the defaults of prep.
        resume: continue from the newest checkpoint, or begin.
        stop_after: end at this step and leave the schedule as it is.
        workers: processes that read images; 0 reads them in this one.
        device: ``auto``, ``cpu`` or ``cuda``.
        log: names of loggers (train/engine/loggers.py).
        write_page: draws the finished run's page, where there is a validation set.
        title: of a progress bar on a terminal; None logs lines.

    Returns:
        The run's folder. torch's global random state and switches are afterwards as they were.

    Raises:
        UserError: for what the user can put right.
        Interrupted: a signal ended it, after a checkpoint.
    """
    recipe = recipe or DetectorRecipe()
    if (val_annotations is None) != (val_images is None):
        raise UserError("--val-annotations and --val-images belong together: give both, or neither for no AP")
    if reading and reading.split and val_split is None and val_annotations == str(annotations):
        raise UserError(
            f"--val-annotations are those of --split {reading.split} too: name their split with --val-split"
        )
    ranks = start(device)
    if recipe.data.batch % ranks.world:
        raise UserError(f"a batch of {recipe.data.batch} is not divisible by {ranks.world} ranks: --set data.batch=...")
    folder = ranks.run_on_all(lambda: open_run_folder(run, CONFIG))
    if folder.remote:
        ranks.run_on_rank_zero(folder.remote.pull)
    data = (str(annotations), str(images), val_annotations, val_images)
    job = DetectorJob(*data, folder, init, workers, resume, ranks, reading or Reading(), tuple(log), title, val_split)
    with (
        arithmetic(ranks.device, tf32=recipe.run.tf32, one_shape=False),
        torch.random.fork_rng([ranks.device] if ranks.device.type == "cuda" else []),
    ):
        _run(job, recipe, stop_after, write_page)
    return folder


def _run(job: DetectorJob, recipe: DetectorRecipe, stop_after: int | None, write_page: WritePage | None) -> None:
    ranks, folder = job.ranks, job.folder
    every = ranks.run_on_all(lambda: read_ground_truth(job.annotations, job.images, job.reading))
    training = subset(every, recipe.data.images_limit, recipe.data.subset_seed)
    validation = ranks.run_on_all(lambda: _validation(training, job))
    ranks.run_on_rank_zero(lambda: check_images(training, job.images))
    if validation is not None and (held_out := job.val_images) is not None:
        ranks.run_on_rank_zero(lambda: check_images(validation, held_out, "--val-images"))
    task = build_task(job, recipe, training, len(every.images))
    ranks.run_on_rank_zero(lambda: _check_missing_data(task, training, validation))
    ranks.run_on_all(lambda: task.check_shared_memory(validation))
    evaluation = None
    if validation is not None and job.val_images is not None:
        evaluation = PeriodicAP(task, validation, job.val_images, job.workers)
    options = TrainerOptions(
        folder,
        ranks,
        recipe.run.log_every,
        recipe.run.checkpoint_every,
        recipe.run.keep_checkpoints,
        lambda: task.config.write(folder.path),
        recipe.to_dict(),
        (),
        job.log,
        evaluation,
        job.title,
    )
    trainer = Trainer(task, options)
    if not trainer.resume():
        _describe(task.config, training, ranks)
    ending = trainer.run(min(task.steps, stop_after or task.steps))
    if ending or task.step < task.steps:
        where = f"after step {task.step} of {task.steps}: continue with --resume"
        if ending:
            raise Interrupted(f"stopped on {ending} {where}")
        ranks.log_rank_zero(f"stopped {where}")
        return
    _finish(task, evaluation, folder)
    if validation is not None and (val_images := job.val_images) is not None and write_page is not None:
        ranks.run_on_rank_zero(lambda: str(write_page(folder.path, validation, val_images, task.config)))
    ranks.run_on_rank_zero(folder.push)
    of = "device time" if ranks.device.type == "cuda" else "processor time"
    spent = f"{task.seconds * ranks.world:,.0f}"
    ranks.log_rank_zero(f"{folder}: finished after {counted(task.step, 'step')}, {spent} s of {of} in training steps")


def _check_missing_data(task: "DetectorTask", training: GroundTruth, validation: GroundTruth | None) -> None:
    """Raise UserError where a new run would take missing data for measurements."""
    job = task.job
    if list_checkpoints(job.folder.checkpoints):
        return
    check_missing_data(training, job.images, task.config.pixels)
    if validation is not None and job.val_images is not None:
        check_missing_data(validation, job.val_images, task.config.pixels)


def _validation(training: GroundTruth, job: DetectorJob) -> GroundTruth | None:
    if job.val_annotations is None:
        return None
    found = read_ground_truth(job.val_annotations, job.val_images, replace(job.reading, split=job.val_split))
    require_same_classes(training, found)
    trained = {record.file_name for record in training.images} if job.val_images == job.images else set()
    if shared := sum(record.file_name in trained for record in found.images):
        job.ranks.log_rank_zero(
            f"{shared:,} of {len(found.images):,} validation images are trained on: AP says little of images that it "
            "has not seen",
            logging.WARNING,
        )
    return found


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
        """Model, optimizer and seconds."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "seconds": self.seconds,
            "evaluation_seconds": self.evaluation_seconds,
            "flops": self.flops,
        }

    def check_checkpoint(self, path: Path, content: dict[str, Any]) -> None:
        """Raise UserError for one that is not of this run, or damaged."""
        check_fits(path, content, self.model.state_dict(), self.steps, self._optimizer)
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


def build_task(
    job: DetectorJob, recipe: DetectorRecipe, training: GroundTruth, images: int | None = None
) -> DetectorTask:
    """The detector with the weights that it starts from; the same on every rank.

    images: how many there are, where ``training`` is a subset.
    """
    ranks, folder = job.ranks, job.folder
    found = ranks.run_on_rank_zero(lambda: _config_of_run(job, recipe, training))
    is_fresh = ranks.run_on_rank_zero(lambda: not list_checkpoints(folder.checkpoints))
    weights = None
    if is_fresh and job.init != "scratch":
        weights = ranks.run_on_all(lambda: read_backbone(Path(job.init)))
    config = found or _config(job, recipe, training, weights, images or len(training.images))
    torch.manual_seed(int(rng.key_of_text(recipe.data.seed, "detector's initial weights")) >> 1)
    network = ranks.run_on_all(lambda: backbone_from_config(config, ranks.device))
    if config.norm_built != recipe.model.norm and not backbone.has_batch_norm(network):
        config = replace(config, norm_built=recipe.model.norm)
    if weights is not None:
        report = ranks.run_on_all(lambda: load(network, weights, job.init, recipe.model.partial))
        ranks.log_rank_zero(f"weights {report.text}")
        if told := _other_norm(network, weights, job.init, config.norm_built):
            ranks.log_rank_zero(told, logging.WARNING)
        config = replace(config, weights=asdict(report))
    model, frozen = detector_from_config(config, network, ranks.device)
    if is_fresh:
        config = _with_neck(job, config, model)
    return DetectorTask(job, config, training, model, frozen)


def _other_norm(network: Backbone, weights: dict[str, Tensor], source: str, norm: str) -> str | None:
    """What to say where weights were trained under another norm than the network has; None where they were not."""
    own = any(name.endswith("running_mean") for part in network.parts for name in part.state_dict())
    theirs = any(name.endswith("running_mean") for name in weights)
    if own == theirs:
        return None
    words = {True: "batch norm", False: "group norm"}
    return (
        f"{source} was trained with {words[theirs]}, and this detector has {words[own]} ({norm}): weights are worth "
        f"little under another norm. Fine-tune with --norm {'frozen-bn' if theirs else 'gn'}, or pre-train with --set "
        f"model.norm={'bn' if own else 'gn'}"
    )


def _config_of_run(job: DetectorJob, recipe: DetectorRecipe, training: GroundTruth) -> DetectorConfig | None:
    """The config of the run that goes on, None for a new one; UserError where it would go on as another run."""
    folder = job.folder
    if not continues(folder, job.resume):
        return None
    config = read_config(folder.path)
    check_same_recipe(folder, recipe.differences(config.recipe))
    if config.categories != training.categories:
        raise UserError(f"{folder} was begun with other categories than {job.annotations} has: name its own file")
    if config.init != job.init:
        raise UserError(f"{folder} was begun with --init {config.init}, not {job.init}: name that, or another folder")
    if config.reading is not None and config.reading.differences() != job.reading.differences():
        told = ", ".join(f"--{name.replace('_', '-')} {one}" for name, one in config.reading.differences().items())
        raise UserError(f"{folder} was begun with {told or 'no --exif, --nodata or the like'}: give the same")
    return config


def _config(
    job: DetectorJob,
    recipe: DetectorRecipe,
    training: GroundTruth,
    weights: dict[str, Tensor] | None,
    images: int,
) -> DetectorConfig:
    """A new run's config, without the reports on weights."""
    short = float(np.median([min(record.width, record.height) for record in training.images]))
    built = recipe.model.norm
    if recipe.model.norm == "frozen-bn" and (weights is None or not brings_statistics(weights)):
        built = "sync-bn"
    data = {
        "annotations": redacted(job.annotations),
        "images": redacted(job.images),
        "val_annotations": job.val_annotations and redacted(job.val_annotations),
        "val_images": job.val_images and redacted(job.val_images),
        **({"val_split": job.val_split} if job.val_split else {}),
    }
    count = len(training.images)
    plan = fit_to_dataset(recipe, images if recipe.data.subset_schedule == "whole" else count, short, count)
    labels = [record.labels[~record.crowd] for record in training.images]
    boxes = tuple(np.bincount(np.concatenate(labels), minlength=len(training.categories)).tolist())
    read_as = job.ranks.run_on_rank_zero(lambda: _image_options(job, recipe, training))
    return DetectorConfig(
        recipe, plan, built, training.categories, job.init, data, None, None, *read_as, boxes, job.reading
    )


def _image_options(
    job: DetectorJob, recipe: DetectorRecipe, training: GroundTruth
) -> tuple[tuple[float, ...], tuple[float, ...], PixelFormat]:
    """Mean, std and pixels: the weights' own, else the recipe's, else what suits the images.

    Raises UserError for a recipe that contradicts the weights.
    """
    said = None if job.init == "scratch" else read_weights_info(Path(job.init))
    given = named(recipe.data.pixels) if recipe.data.pixels else None
    if said is not None:
        mean, std, pixels = said.mean, said.std, said.pixels
        for key, ours, theirs in (
            ("pixels", given and str(given), str(pixels)),
            ("mean", recipe.data.mean, mean),
            ("std", recipe.data.std, std),
        ):
            if ours is not None and ours != theirs:
                raise UserError(
                    f"data.{key} = {ours} and {said.source} was trained with {theirs}: leave it out, for weights are "
                    "of use with their own only"
                )
        if recipe.model.backbone != said.backbone:
            job.ranks.log_rank_zero(f"{said.source} says it is of {said.backbone}", logging.WARNING)
        return mean, std, pixels
    source = ImageSource(job.images)
    pixels = given or _pixels(training, source, job.ranks)
    measured = None
    if not pixels.is_rgb8 and (recipe.data.mean is None or recipe.data.std is None):
        if job.init != "scratch":
            raise UserError(
                f"{job.init} does not say which mean and std its {pixels} were normalised with: give data.mean and "
                "data.std"
            )
        records = looked_at(training)[:STATISTICS_OF]
        measured = measured_mean_and_std(ImageReader(job.images, training, pixels), records, pixels)
    default = measured or (MEAN, STD)
    mean, std = recipe.data.mean or default[0], recipe.data.std or default[1]
    for key, values in (("mean", mean), ("std", std)):
        if len(values) != pixels.channels:
            raise UserError(f"data.{key} = {list(values)} must be {pixels.channels} numbers, one for each channel")
    if job.init != "scratch" and recipe.data.mean is None:
        job.ranks.log_rank_zero(
            f"{job.init} does not say which mean and std it was trained with: ImageNet's are taken (data.mean, "
            "data.std)"
        )
    return mean, std, pixels


def _pixels(training: GroundTruth, source: ImageSource, ranks: Ranks) -> PixelFormat:
    """What images hold; 8 bits are read as RGB, as detectors' weights from elsewhere want it."""
    files = [record.file_name for record in looked_at(training)]
    found = pixels_of_images(files, source, "--set data.pixels")
    if found.pixels.dtype == "uint8" and found.pixels.channels == 1:
        return RGB8
    if found.note:
        ranks.log_rank_zero(found.note)
    return found.pixels


def _with_neck(job: DetectorJob, config: DetectorConfig, model: nn.Module) -> DetectorConfig:
    """Put the neck that the weights come with into the model's pyramid, if so; the config with its report."""
    ranks = job.ranks
    neck = {} if job.init == "scratch" else ranks.run_on_all(lambda: read_neck(Path(job.init)))
    if not neck:
        return config
    pyramid, recipe = pyramid_of(model), config.recipe
    if pyramid is None or recipe.model.pretrained_neck == "none":
        why = "model.pretrained_neck = none" if pyramid else f"this {recipe.model.name} has no pyramid that takes one"
        ranks.log_rank_zero(f"neck {job.init}: left out ({why})")
        return config
    report = ranks.run_on_all(lambda: load_neck(pyramid, neck, job.init))
    ranks.log_rank_zero(f"neck {report.text}")
    return replace(config, neck=asdict(report))


def optimizer_of(model: nn.Module, recipe: DetectorRecipe) -> torch.optim.Optimizer:
    """The optimizer over what learns."""
    bodies = ["backbone.body."]
    if len(list(backbone.backbone_modules(model))) > 1:
        bodies.append("roi_heads.box_head.")

    def own_name(name: str) -> str | None:
        return next((name.removeprefix(body) for body in bodies if name.startswith(body)), None)

    groups = parameter_groups(model, recipe.optim, own_name, recipe.optim.backbone_rate)
    return make_optimizer(groups, recipe.optim, lr=recipe.optim.lr)


def _describe(config: DetectorConfig, training: GroundTruth, ranks: Ranks) -> None:
    """Log what the run is about to do, with warnings, in a few lines."""
    recipe, plan = config.recipe, config.plan
    ranks.log_rank_zero(
        f"{recipe.model.name}, {recipe.model.backbone}, {config.norm_built}, freeze {recipe.model.freeze}, "
        f"from {config.init}; {counted(len(training.images), 'image')}, "
        f"{counted(len(training.categories), 'class', 'classes')}, {counted(ranks.world, 'process', 'processes')} on "
        f"{ranks.device}"
    )
    short = "; for a short first try add --set optim.steps=50" if plan.steps >= LONG else ""
    ranks.log_rank_zero(
        f"fitted to this dataset: {counted(plan.steps, 'step')} of {recipe.data.batch} ({plan.epochs:.1f} epochs), "
        f"rate {plan.lr:.3g}, warm-up {plan.warmup_steps}, drops at {', '.join(map(str, plan.drops)) or 'none'}, "
        f"images {plan.short_side} x {plan.long_side}, anchors x {plan.anchor_scale:.2f}{short}"
    )
    warnings = []
    if config.norm_built != recipe.model.norm:
        warnings.append(
            "frozen-bn needs weights that bring batch statistics, and these bring none: batch norm that learns "
            "(sync-bn) is built in its place"
        )
    if recipe.model.freeze == "backbone" and config.init == "scratch":
        warnings.append("a frozen backbone from scratch stays random: give --init weights")
    if training.unusable:
        warnings.append(f"{training.unusable} boxes cannot be used and are left out of training")
    if recipe.model.name == "mask-rcnn-fpn" and training.segmented < 1:
        warnings.append(
            f"{1 - training.segmented:.0%} of the boxes have no segmentation: their masks are the whole boxes, so the "
            "mask head learns rectangles from them"
        )
    if recipe.data.copy_paste and training.segmented < 1:
        warnings.append(f"{1 - training.segmented:.0%} of the boxes have no segmentation: their whole boxes are pasted")
    for warning in warnings:
        ranks.log_rank_zero(warning, logging.WARNING)


def _finish(task: DetectorTask, evaluation: PeriodicAP | None, folder: RunFolder) -> None:
    """Write the weights, the evaluation's files and the summary."""
    ranks, path = task.ranks, folder.path
    has_files = ranks.run_on_rank_zero(lambda: (path / AP_FILE).exists())
    if evaluation is not None and evaluation.last is None and not has_files:
        # A run that was killed between its last evaluation and here.
        evaluation(lambda: False)

    def write() -> None:
        save_file(path / DETECTOR, {key: value.cpu().contiguous() for key, value in task.model.state_dict().items()})
        config = task.config
        info = WeightsInfo("", config.recipe.model.backbone, config.norm_built, config.mean, config.std, config.pixels)
        save_file(path / BACKBONE_FILE, with_about(backbone.backbone_state(task.model), info.to_about()))
        if evaluation is not None and evaluation.last is not None:
            save_evaluation(path, evaluation.last, config.boxes)
        Storage(path).publish(SUMMARY, json.dumps(summarise(task, folder), indent=2).encode() + b"\n")

    ranks.run_on_rank_zero(write)


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
