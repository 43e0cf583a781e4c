"""Pre-training as a task of the trainer: jigsaws in, dense classification, and every so often a fresh ERF table.

`execute` begins or continues a run on every rank. `PretrainingTask` alone takes a state through steps.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from jigsaw_pretrain.config import CountOrZero
from jigsaw_pretrain.errors import Interrupted, UserError
from jigsaw_pretrain.formats.dataset.dataset import Dataset
from jigsaw_pretrain.formats.jigsaw import REGIONS, SHAPES
from jigsaw_pretrain.train import erf
from jigsaw_pretrain.train.data.batch import Batch, BatchSource
from jigsaw_pretrain.train.data.device import DeviceCopies
from jigsaw_pretrain.train.data.digest import digest_line, interleave
from jigsaw_pretrain.train.data.loader import JigsawLoader
from jigsaw_pretrain.train.data.remote import ReadOptions
from jigsaw_pretrain.train.engine.callbacks import Callback, DataErrors
from jigsaw_pretrain.train.engine.checkpoint import (
    backbone_state,
    check_fits,
    check_values,
    pyramid_state,
    save_file,
    trained_state,
)
from jigsaw_pretrain.train.engine.distributed import Ranks
from jigsaw_pretrain.train.engine.metrics import Row, StepMetrics, WindowMetrics, digest_file, read_rows
from jigsaw_pretrain.train.engine.optim import arithmetic, true_float32
from jigsaw_pretrain.train.engine.run_folder import Origin, RunFolder, check_origin, describe_run
from jigsaw_pretrain.train.engine.state import ErfTable, State, build_state, grids, region_maps
from jigsaw_pretrain.train.engine.step import MachineOptions, Stepper, micro_batch_of
from jigsaw_pretrain.train.engine.trainer import Stopped, Trainer, TrainerOptions
from jigsaw_pretrain.train.engine.weights_info import info_of
from jigsaw_pretrain.train.erf import Grid
from jigsaw_pretrain.train.models.weights import check_tensors, load_weights, with_about
from jigsaw_pretrain.train.recipe import LossOptions, Recipe
from jigsaw_pretrain.words import counted

OpenSource = Callable[[int, int], BatchSource]
"""Opens this rank's batches of steps [first, end)."""

Digests = tuple[tuple[bytes, bytes], ...]

DigestLine = Callable[[int, list[Digests]], str]
"""The digest line of a step, from every rank's digests of its batch."""

LOG_EVERY = 10
"""Steps between fetches of metrics, where the recipe does not say."""

LOG_EVERY_ON_GPU = 50
"""The same on GPUs, which have nothing to do at each."""

Validate = Callable[[State, Stopped], dict[str, Any] | None]
"""Evaluates on held-out jigsaws; called on all ranks, returns the same figures on each."""


@dataclass(frozen=True)
class TrainingJob:
    """What is run: the recipe, its dataset, the run folder, the ranks, and what does not change the result.

    callbacks: called on rank 0. log: names of loggers. keep: checkpoints that stay; None for the recipe's
    keep_checkpoints. validate: called every val_every steps, and at the end. title: of the progress bar on a terminal.
    commonest: the label that most crops have, and their share, 0 to 1.
    """

    recipe: Recipe
    origin: Origin
    folder: RunFolder
    ranks: Ranks
    callbacks: tuple[Callback, ...] = ()
    log: tuple[str, ...] = ()
    machine_options: MachineOptions = MachineOptions()
    keep: int | None = None
    validate: Validate | None = None
    val_every: int = 0
    title: str | None = None
    commonest: tuple[str, float] | None = None


class _Values(msgspec.Struct):
    """The plain values of a checkpoint."""

    scaler: dict[str, float]
    erf: list[dict[str, Any]] | dict[str, Any] | None
    replaced: CountOrZero = 0
    left_out: list[str] = []


class _TableValues(msgspec.Struct):
    """Those of a table of label weights."""

    step: CountOrZero


class PretrainingTask:
    """A state, and what takes it through steps: an engine.trainer.TrainingTask.

    open_source: not needed for ``take`` alone.
    """

    remedy = "begin another run with a lower lr_peak or a longer warmup_steps"

    def __init__(
        self,
        job: TrainingJob,
        state: State,
        open_source: OpenSource | None = None,
        digest_line: DigestLine | None = None,
    ) -> None:
        self._job, self._recipe, self._ranks = job, job.recipe, job.ranks
        self.state = state
        self._open_source, self._digest_line = open_source, digest_line
        self._region_maps = region_maps(job.recipe, state.backbone, job.ranks.device)
        self._stepper: Stepper | None = None
        self._levels = [stage.level for stage in state.backbone.stages]
        self._source: BatchSource | None = None
        self._digests: list[str] = []
        self._data_errors = DataErrors(state, job.ranks)
        self._to_device = DeviceCopies(job.ranks.device, job.ranks.streams)
        self._callbacks = job.callbacks if job.ranks.first else ()
        self.doing: Callable[[str], AbstractContextManager[Any]] = nullcontext
        """Says to whoever follows the run what keeps it from its next step (Trainer.doing)."""

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.state.step

    @step.setter
    def step(self, value: int) -> None:
        self.state.step = value

    @property
    def steps(self) -> int:
        """The recipe's steps."""
        return self._recipe.optim.steps

    @property
    def stepper(self) -> Stepper:
        """What runs the optimizer; made on all ranks together, compiling and a dry run included, when it is needed."""
        if self._stepper is None:
            self._stepper = Stepper(self._recipe, self.state, self._ranks, self._region_maps, self._job.machine_options)
        return self._stepper

    def open(self, until: int) -> Iterator[Batch]:
        """Give this rank's jigsaws; what the run has left out stays out."""
        assert self._open_source is not None
        if self._ranks.first:
            digest_file(self._job.folder.digest).cut_back(self.step)
        source = self._source = self._open_source(self.step, until)
        if self.state.left_out:
            source.leave_out(self.state.left_out)
        return self._in_order(source)

    def _in_order(self, source: BatchSource) -> Iterator[Batch]:
        for batch in source:
            if batch.step != self.step:
                raise RuntimeError(f"the source gave batch {batch.step} for step {self.step}")
            yield batch

    def close(self) -> None:
        """End the source's workers."""
        if self._source is not None:
            self._source.close()

    def take(self, batch: Batch) -> StepMetrics:
        """One optimizer step on this rank's share of the batch, the ERF table renewed before where that is due."""
        recipe, state = self._recipe, self.state
        (images, labels), arrived = self._to_device(batch.images, batch.labels)
        pictures: dict[str, Any] = {}
        if recipe.loss.strategy == "erf-adaptive" and state.step % recipe.loss.erf_every == 0:
            with self.doing("measuring and drawing receptive fields"):
                pictures = self.refresh(self.first_of_lanes(images))
        stepper = self.stepper
        if not state.model.training:
            # An evaluation leaves it so.
            state.model.train()
        output = stepper.take(images, labels)
        for callback in self._callbacks:
            callback.on_step(batch, labels, output.predictions)
        self._data_errors.note(batch)
        if self._digest_line is not None:
            shares = self._ranks.all_gather(batch.digests or ())
            self._digests.append(self._digest_line(state.step, shares))
        losses, count = output.losses.detach().double().reshape(-1), len(images)
        right = output.predictions.eq(labels)
        sums = {
            "loss": losses.mean() * count,
            "hits": right.sum(dim=0),
            "labels": self._by_label(labels, torch.ones_like(right)),
            "named": self._by_label(labels, right),
        }
        if self._levels:
            sums["levels"] = losses * count
        if output.skipped is not None:
            sums["skipped"] = output.skipped * count
        return StepMetrics(sums, count, output.lr, {"replaced": batch.replaced}, pictures, arrived)

    def _by_label(self, labels: Tensor, values: Tensor) -> Tensor:
        """The sum of values [n, 4] over the regions of each label: [C + 1]."""
        total = torch.zeros(len(self._job.origin.classes) + 1, device=labels.device)
        return total.index_add_(0, labels.flatten().long(), values.flatten().to(total.dtype))

    def first_of_lanes(self, images: Tensor) -> Tensor:
        """The first jigsaw of each of this rank's lanes, of its images in lane order."""
        return images[:: len(images) * self._ranks.world // self._recipe.data.lane_count]

    def refresh(self, images: Tensor) -> dict[str, Any]:
        """Renew the ERF table of every map from the first jigsaw of each lane, averaged over all ranks' lanes.

        Returns the callbacks' pictures.
        """
        model, ranks = self.state.model, self._ranks
        ranks.broadcast_buffers(model)
        with torch.no_grad():
            normalised = model.normalise(images)
        levels = list(zip(model.levels(), self._region_maps, grids(self._recipe, self.state.backbone), strict=True))
        with true_float32():
            self.state.tables = tuple(self._table(normalised, *one) for one in levels)
        # Of a neck's levels the coarsest, whose positions are those of a run without one.
        level, region_map, _ = levels[-1]
        pictures: dict[str, Any] = {}
        for callback in self._callbacks:
            pictures |= callback.on_refresh(self.state.tables[-1], level, normalised, region_map)
        return pictures

    def _table(self, normalised: Tensor, level: nn.Module, region_map: Tensor, measured: Grid) -> ErfTable:
        """The table of one map, from this rank's images and all others'."""
        masses = erf.region_masses(level, normalised, region_map, self.stepper.micro_batch, measured)
        # One sum for masses and image count: the mean over all ranks' images, however they are dealt out.
        count = masses.new_tensor([len(normalised)])
        summed = self._ranks.all_reduce_sum(torch.cat([masses.flatten() * count, count]))
        masses = (summed[:-1] / summed[-1]).view_as(masses)
        return ErfTable(self.state.step, masses, erf.label_weights(masses, region_map, self._recipe.loss.tau))

    def rows(self, window: WindowMetrics) -> list[Row]:
        """One row per step; all rows of a window carry its speed, waiting share and device-seconds per step.

        loss: mean over the global batch. accuracy: by region, the share of jigsaws whose region's mean logits are
        largest at its label. balanced_accuracy: of each class in the batch the share of its crops named right, their
        mean. majority_share: that of the dataset's commonest class in the batch, the accuracy of always naming it.
        replaced: crops that stand in for undecodable ones. left_out: shards that the run goes on without.
        loss_by_level: with a neck, of each of its levels, of which ``loss`` is the mean. skipped: the step was left out
        by fp16's scaler; its loss may be none.
        """
        left_out = self._data_errors.settle(sum(one.counts["replaced"] for one in window.steps))
        rows = []
        for one in window.steps:
            row: Row = {
                "step": one.step,
                "loss": one.means["loss"][0],
                "accuracy": dict(zip(REGIONS, one.means["hits"], strict=True)),
                "lr": one.lr,
                "images_per_second": round(window.samples_per_second, 2),
                "data_wait": round(window.data_wait, 4),
                "replaced": one.counts["replaced"],
                "left_out": left_out,
                "device_seconds": round(window.device_seconds / len(window.steps), 5),
            }
            row |= self._beside_accuracy(one.means["labels"], one.means["named"])
            if self._levels:
                row["loss_by_level"] = dict(zip(self._levels, one.means["levels"], strict=True))
            if one.means.get("skipped", [0.0])[0]:
                row["skipped"] = True
                row["loss"] = row["loss"] if math.isfinite(row["loss"]) else None
            rows.append(row)
        if self._ranks.first:
            digest_file(self._job.folder.digest).append(self._digests)
        self._digests = []
        return rows

    def _beside_accuracy(self, labels: Sequence[float], named: Sequence[float]) -> Row:
        """What accuracy is to be read beside, from the batch's crops of each label and those of them named right."""
        shares = [right / count for right, count in zip(named, labels, strict=True) if count]
        names = [*self._job.origin.classes, "background"]
        name = self._job.commonest[0] if self._job.commonest else None
        most = labels[names.index(name)] if name in names else max(labels)
        return {
            "balanced_accuracy": round(sum(shares) / len(shares), 5),
            "majority_share": round(most / sum(labels), 5),
        }

    def check(self) -> None:
        """Refuse to go on where too many crops could not be decoded."""
        self._data_errors.check(self._recipe.data.batch)

    def to_checkpoint(self) -> dict[str, Any]:
        """The state, and what it belongs to."""
        return {**self.state.to_checkpoint(), **self._run()}

    def _run(self) -> dict[str, Any]:
        """What the run is of."""
        origin = self._job.origin
        return {"recipe": self._recipe.to_dict(), "classes": list(origin.classes), "dataset": origin.fingerprint}

    def check_checkpoint(self, path: Path, content: dict[str, Any]) -> None:
        """Raise UserError for one that is not of this run, or damaged."""
        check_fits(path, content, self.state.model.state_dict(), self.steps, self._run(), self.state.optimizer)
        check_values(path, content, _Values)
        found = content["erf"]
        tables = [found] if isinstance(found, dict) else found or []
        if tables and len(tables) != len(self._region_maps):
            raise UserError(f"{path} is damaged: it does not have a table of label weights for each map")
        for table, region_map in zip(tables, self._region_maps, strict=False):
            check_values(path, table, _TableValues)
            # Masses may be infinite (train/erf.py), weights never are.
            check_tensors({"masses": table.get("masses")}, str(path), finite=False)
            check_tensors({"weights": table.get("weights")}, str(path))
            if any(table[name].shape != (len(REGIONS), *region_map.shape) for name in ("masses", "weights")):
                raise UserError(f"{path} is damaged: a table of label weights is of another shape")

    def restore(self, content: dict[str, Any]) -> None:
        """Take a checkpoint's place."""
        self.state.restore(content)

    def describe(self) -> None:
        """Write run.json and recipe.toml."""
        found, neck = self.state.backbone, self.state.model.neck
        about: dict[str, Any] = {"name": found.name, "channels": found.channels, "stride": found.stride}
        if neck is not None:
            levels = {one.level: one.stride for one in found.stages}
            about["neck"] = {"name": self._recipe.model.neck, "channels": neck.channels, "levels": levels}
        describe_run(self._job.folder, self._recipe, self._job.origin, about)


class Validation:
    """The job's validation as the trainer asks for it (engine.trainer.PeriodicEvaluation)."""

    key: str | None = "validation"

    def __init__(self, validate: Validate, every: int, state: State, steps: int) -> None:
        self._validate, self._every, self._state, self._steps = validate, every, state, steps

    def due(self, step: int) -> bool:
        """Every so many steps, and at the end."""
        return step % self._every == 0 or step == self._steps

    def made(self, row: Row) -> bool:
        """Whether the row has figures."""
        return self.key in row

    def __call__(self, stopped: Stopped) -> dict[str, Any] | None:
        """The figures; None where a signal came first."""
        return self._validate(self._state, stopped)


def trainer_of(
    job: TrainingJob, state: State, open_source: OpenSource | None = None, digest_line: DigestLine | None = None
) -> Trainer[PretrainingTask]:
    """The trainer of a job from a state on."""
    task = PretrainingTask(job, state, open_source, digest_line)
    recipe = job.recipe
    evaluation = (
        Validation(job.validate, job.val_every, state, recipe.optim.steps) if job.validate and job.val_every else None
    )
    options = TrainerOptions(
        job.folder,
        job.ranks,
        recipe.run.log_every or (LOG_EVERY if job.ranks.streams is None else LOG_EVERY_ON_GPU),
        recipe.run.checkpoint_every,
        job.keep or recipe.run.keep_checkpoints,
        task.describe,
        recipe.to_dict(),
        job.callbacks,
        job.log,
        evaluation,
        job.title,
    )
    trainer = Trainer(task, options)
    task.doing = trainer.doing
    return trainer


def execute(
    job: TrainingJob, open_source: OpenSource, *, stop_after: int | None = None, digest_line: DigestLine | None = None
) -> State:
    """Begin or continue a job's run, on every rank; returns the state it ended with.

    Writes RUN/backbone.pth, and with a neck RUN/backbone-fpn.pth, where the schedule ends. torch's global random state
    and switches are afterwards as they were, and the folder is open to other processes. Raises UserError for whatever
    the user can mend, and Interrupted where a signal ended it, after a checkpoint.
    """
    ranks = job.ranks
    with (
        closing(job.folder),
        arithmetic(ranks.device, tf32=job.recipe.run.tf32, deterministic=job.machine_options.deterministic),
        torch.random.fork_rng([ranks.device] if ranks.device.type == "cuda" else []),
    ):
        return _execute(job, open_source, stop_after, digest_line)


def _execute(
    job: TrainingJob, open_source: OpenSource, stop_after: int | None, digest_line: DigestLine | None
) -> State:
    recipe, folder, ranks = job.recipe, job.folder, job.ranks
    ranks.run_on_rank_zero(lambda: check_origin(folder, job.origin))
    state = ranks.run_on_all(lambda: build_state(recipe, len(job.origin.classes) + 1, ranks, job.origin.pixels))
    trainer = trainer_of(job, state, open_source, digest_line)
    if not trainer.resume() and (file := recipe.model.init) is not None:
        ranks.log_rank_zero(f"begun from {ranks.run_on_all(lambda: load_weights(state.backbone, file)).text}")
    until = min(recipe.optim.steps, stop_after or recipe.optim.steps)
    ending = None
    if state.step < until:
        announce(job, state, until)
        # Compiling and the dry run come after what may be refused.
        _ = trainer.task.stepper
        ending = trainer.run(until)
    else:
        ranks.log_rank_zero(
            f"{folder}: {state.step} of {recipe.optim.steps} steps are done; nothing is left to do up to {until}"
        )
    if state.step >= recipe.optim.steps:
        ranks.run_on_rank_zero(lambda: _publish_backbone(job, state))
        ranks.log_rank_zero(f"done: {folder}/{folder.backbone.name} holds the backbone under its own names")
        if recipe.model.neck != "none":
            ranks.log_rank_zero(f"      {folder}/{folder.pyramid.name} has the neck too, for a BackboneWithFPN")
        ranks.run_on_rank_zero(lambda: _judge(job))
    else:
        where = f"after step {state.step} of {recipe.optim.steps}: continue with --resume"
        if ending is not None:
            raise Interrupted(f"stopped on {ending} {where}")
        ranks.log_rank_zero(f"stopped {where}")
    return state


COMMON = 0.5
"""From this share of one label on the start says how much accuracy is no learning."""

NO_BETTER = 0.01
"""A network whose accuracy is at most this much above the commonest label's share is no better than naming that label
always."""


def _judge(job: TrainingJob) -> None:
    """Say how a finished run names crops, beside always naming the commonest; warn where that is no better."""
    rows = read_rows(job.folder.metrics)[-max(10, job.recipe.optim.steps // 20) :]
    values = [value for row in rows for value in row.get("accuracy", {}).values()]
    if not values:
        return
    balanced = [row["balanced_accuracy"] for row in rows if "balanced_accuracy" in row]
    shares = [row["majority_share"] for row in rows if "majority_share" in row]
    name, share = job.commonest or ("the commonest class", 0.0)
    share = sum(shares) / len(shares) if shares else share
    accuracy = sum(values) / len(values)
    told = f"the last {len(rows)} steps name {accuracy:.1%} of the crops right"
    told += f" ({sum(balanced) / len(balanced):.1%} with every class counting alike)" if balanced else ""
    if accuracy >= share + NO_BETTER:
        job.ranks.log_rank_zero(f"verdict: {told}; always saying {name} would be {share:.1%}")
        return
    remedy = "" if job.recipe.data.balance != "none" else ", with data.balance = sqrt"
    job.ranks.log_rank_zero(
        f"verdict: {told}, no better than always saying {name} ({share:.1%}): train longer{remedy}, or prep with more "
        "background",
        logging.WARNING,
    )


def announce(job: TrainingJob, state: State, until: int) -> None:
    """Say what is about to run."""
    recipe, ranks = job.recipe, job.ranks
    start_rate, peak = recipe.rates
    stride, levels = state.backbone.stride, [stage.level for stage in state.backbone.stages]
    neck = (
        f" with a neck ({recipe.model.neck}, {levels[0]} to {levels[-1]} of {recipe.model.neck_channels})"
        if levels
        else ""
    )
    micro_batch, share = micro_batch_of(recipe, ranks.world), recipe.data.batch // ranks.world
    strategy = "" if recipe.loss.strategy == LossOptions().strategy else f", {recipe.loss.strategy}"
    ranks.log_rank_zero(
        f"{recipe.model.backbone} (stride {stride}, {state.backbone.channels} channels){neck}, "
        f"{counted(len(job.origin.classes), 'class', 'classes')} and background{strategy}, "
        f"{ranks.world} x {ranks.device.type}"
    )
    if not job.origin.pixels.is_rgb8:
        mean, std = (", ".join(f"{value:.4g}" for value in values[:6]) for values in recipe.data.normalisation)
        ranks.log_rank_zero(f"pixels {job.origin.pixels}; mean {mean}, std {std} (of {job.origin.pixels.full_scale:g})")
    ranks.log_rank_zero(
        f"steps {state.step:,} to {until:,} of {recipe.optim.steps:,}, batch {recipe.data.batch}, learning rate "
        f"{start_rate:.3g} to {peak:.3g} over {counted(recipe.optim.warmup_steps, 'step')}, then cosine to 0"
    )
    if job.commonest is not None and job.commonest[1] >= COMMON and recipe.data.balance == "none":
        name, part = job.commonest
        ranks.log_rank_zero(
            f"{part:.1%} of the crops are {name}: an accuracy of that much shows no learning", logging.WARNING
        )
    if recipe.run.precision != "fp32" or micro_batch < share:
        ranks.log_rank_zero(
            f"{recipe.run.precision}, {share // micro_batch} micro-batches of {micro_batch} per step and process"
        )
    if recipe.optim.micro_batch and recipe.data.batch >= recipe.optim.micro_batch > share and not recipe.model.sync_bn:
        ranks.log_rank_zero(
            f"the recipe's batch statistics are of {recipe.optim.micro_batch} jigsaws, here of {share}, a process's "
            "share: use fewer processes, or model.sync_bn = true",
            logging.WARNING,
        )
    if recipe.optim.warmup_steps >= recipe.optim.steps:
        ranks.log_rank_zero(
            f"the warm-up ({recipe.optim.warmup_steps} steps) is as long as the run ({recipe.optim.steps}): the rate "
            "never falls; set optim.warmup_steps lower",
            logging.WARNING,
        )


def _publish_backbone(job: TrainingJob, state: State) -> None:
    folder, trained = job.folder, trained_state(state.to_checkpoint())
    about = info_of(job.recipe, job.origin.pixels).to_about()
    if pyramid := pyramid_state(trained):
        save_file(folder.pyramid, with_about(pyramid, about))
    save_file(folder.backbone, with_about(backbone_state(trained), about))
    folder.push()


def loader_source(
    job: TrainingJob, dataset: Dataset, workers: int, with_digests: bool, access: ReadOptions | None = None
) -> OpenSource:
    """One rank's jigsaws of a dataset, from any step on."""

    def open_source(first: int, end: int) -> BatchSource:
        loader = JigsawLoader(
            dataset,
            job.recipe.data,
            rank=job.ranks.rank,
            world=job.ranks.world,
            workers=workers,
            start_step=first,
            stop_step=end,
            with_digests=with_digests,
            streams=job.ranks.streams,
            access=access,
            # An evaluation makes its batches while those of training are there.
            rings=2 if job.validate is not None else 1,
        )
        for note in loader.notes:
            job.ranks.log_rank_zero(note)
        if not loader.notes:
            shares = ", ".join(f"{SHAPES[group]} {share:.1%}" for group, share in loader.shares.items())
            job.ranks.log_rank_zero(f"shares of the crops drawn: {shares}")
        return loader

    return open_source


def digest_lines(job: TrainingJob) -> DigestLine:
    """The lines that `digest` prints, from the digests of all ranks' batches."""
    stream, world = job.recipe.data, job.ranks.world
    return lambda step, shares: digest_line(step, interleave(shares, world, stream.lane_count, stream.chunk))
