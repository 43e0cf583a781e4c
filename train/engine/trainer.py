"""The training loop: a batch, a step, a row of metrics, and every so often a fresh ERF table and a checkpoint.

Every step is a function of the state, its batch and (seed, step, rank), so a run that stops and resumes anywhere equals
one that does not, bit for bit on a CPU. The loop takes any source of batches, and one rank or many. Beside a step's own
cost it adds a row of sums on the device and, with several ranks, one agreement in host memory; the host waits for the
device once per `log_every` steps only.

`execute` begins or continues a run; `Trainer` alone takes a state through steps.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.dataset.dataset import Dataset
from jigsaw_pretrain.train import erf
from jigsaw_pretrain.train.data.batch import Batch, BatchSource
from jigsaw_pretrain.train.data.digest import digest_line, interleave
from jigsaw_pretrain.train.data.loader import JigsawLoader
from jigsaw_pretrain.train.data.remote import ReadOptions
from jigsaw_pretrain.train.engine.callbacks import Callback, DataErrors, Pictures
from jigsaw_pretrain.train.engine.checkpoint import (
    backbone_state,
    newest_checkpoint,
    pyramid_state,
    read_checkpoint,
    remove_leftovers,
    save_checkpoint,
    save_file,
    trained_state,
)
from jigsaw_pretrain.train.engine.distributed import Ranks, StopRequest
from jigsaw_pretrain.train.engine.loggers import Loggers, ProgressLine
from jigsaw_pretrain.train.engine.metrics import MetricsWindow, Row, digest_file, metrics_file
from jigsaw_pretrain.train.engine.optim import set_arithmetic
from jigsaw_pretrain.train.engine.run_folder import Origin, RunFolder, check_origin, describe_run, versions
from jigsaw_pretrain.train.engine.state import ErfTable, State, build_state, grids, region_maps
from jigsaw_pretrain.train.engine.step import MachineOptions, Stepper, micro_batch_of
from jigsaw_pretrain.train.erf import Grid
from jigsaw_pretrain.train.models.weights import load_weights
from jigsaw_pretrain.train.recipe import Recipe

OpenSource = Callable[[int, int], BatchSource]
"""Opens this rank's batches of steps [first, end)."""

Digests = tuple[tuple[bytes, bytes], ...]

DigestLine = Callable[[int, list[Digests]], str]
"""The digest line of a step, from every rank's digests of its batch."""

Validate = Callable[[State], dict[str, Any]]
"""Evaluates on held-out jigsaws; called on all ranks, returns the same figures on each."""

_GO, _FAILED, _STOP = 0, 1, 2


@dataclass(frozen=True)
class TrainingJob:
    """What is run: the recipe, its dataset, the run folder, the ranks, and what does not change the result.

    callbacks: called on rank 0. log: names of loggers. keep: checkpoints that stay; None for the recipe's
    keep_checkpoints. validate: called every val_every steps.
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


class Trainer:
    """Takes a state from its step to another one. Create one per process."""

    def __init__(self, job: TrainingJob, state: State, digest_line: DigestLine | None = None) -> None:
        self.job = job
        self.state = state
        self._digest_line = digest_line
        self._region_maps = region_maps(job.recipe, state.backbone, job.ranks.device)
        self._stepper = Stepper(job.recipe, state, job.ranks, self._region_maps, job.machine_options)
        self._window = MetricsWindow(job.ranks, tuple(stage.level for stage in state.backbone.stages))
        self._digests: list[str] = []
        self._data_errors = DataErrors(state, job.ranks)
        self._validation: dict[str, Any] | None = None
        self._saved = state.step
        self._described = False
        self._loggers: Loggers | None = None
        self._copied: torch.cuda.Event | None = None
        self._callbacks = job.callbacks if job.ranks.first else ()

    def run(self, open_source: OpenSource, until: int) -> str | None:
        """Train until ``until`` steps are done; returns the name of the signal that ended it sooner, if one did.

        Leaves a checkpoint of the step it reached. Raises UserError (on all ranks) where the data of any rank fails,
        after saving, and where the loss is not finite, without.
        """
        job, state = self.job, self.state
        if job.ranks.first:
            for file in (metrics_file(job.folder.metrics), digest_file(job.folder.digest)):
                file.cut_back(state.step)
        with (
            StopRequest() as stop,
            ProgressLine(state.step, job.recipe.steps, job.ranks.first) as progress,
            Loggers(job.log if job.ranks.first else (), job.folder.path, state.step, job.recipe.to_dict()) as loggers,
        ):
            self._loggers = loggers
            source = job.ranks.run_on_all(lambda: open_source(state.step, until))
            if state.left_out:
                source.leave_out(state.left_out)
            try:
                batches = iter(source)
                self._window.restart()
                while state.step < until:
                    began = time.perf_counter()
                    batch, error = _next_batch(batches, state.step)
                    waited = time.perf_counter() - began
                    # A signal wins over an error: a scheduler that ends a job ends its data workers too.
                    verdict = job.ranks.all_reduce_max(_STOP if stop.name else _FAILED if error else _GO)
                    if verdict != _GO:
                        progress.show(self.flush())
                        self.save()
                        if verdict == _FAILED:
                            job.ranks.run_on_all(lambda: _raise(error))  # noqa: B023
                        break
                    assert batch is not None
                    self.step(batch, source.lanes_per_rank, waited)
                    self.describe()
                    self._validate()
                    save = state.step == until or state.step % job.recipe.checkpoint_every == 0
                    if save or self._validation or state.step % job.recipe.log_every == 0:
                        progress.show(self.flush())
                    if save:
                        self.save()
            finally:
                source.close()
        names = [name for name in job.ranks.all_gather(stop.name) if name]
        return names[0] if names and state.step < until else None

    def step(self, batch: Batch, lanes: int, waited: float) -> None:
        """One optimizer step on this rank's share of the batch."""
        recipe, state, ranks = self.job.recipe, self.state, self.job.ranks
        images, labels = self._moved(batch)
        if recipe.strategy == "erf-adaptive" and state.step % recipe.erf_every == 0:
            self.refresh(images[:: len(images) // lanes])
        output = self._stepper.take(images, labels)
        hits = output.predictions.eq(labels).sum(dim=0)
        for callback in self._callbacks:
            callback.on_step(batch, labels, output.predictions)
        self._window.add(state.step, output.lr, output.losses, hits, len(images), batch.replaced, waited)
        self._data_errors.note(batch)
        if self._digest_line is not None:
            shares = ranks.all_gather(batch.digests or ())
            self._digests.append(self._digest_line(state.step, shares))
        state.step += 1

    def _moved(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The batch's images and labels on the device; a GPU's copies do not wait."""
        device = self.job.ranks.device
        if self._copied is not None:
            # The loader writes into this memory again two batches on: no copy may be more than one step behind.
            self._copied.synchronize()
        images, labels = batch.images.to(device, non_blocking=True), batch.labels.to(device, non_blocking=True)
        if device.type == "cuda":
            self._copied = torch.cuda.current_stream(device).record_event()
        return images, labels

    def refresh(self, images: Tensor) -> None:
        """Renew the ERF table of every map from the first jigsaw of each lane, averaged over all ranks' lanes."""
        model, ranks = self.state.model, self.job.ranks
        ranks.broadcast_buffers(model)
        with torch.no_grad():
            normalised = model.normalise(images)
        levels = list(zip(model.levels(), self._region_maps, grids(self.job.recipe, self.state.backbone), strict=True))
        self.state.tables = tuple(self._table(normalised, *one) for one in levels)
        for callback in self._callbacks:
            # Of a neck's levels the coarsest, whose positions are those of a run without one.
            level, region_map, _ = levels[-1]
            self._log(self.state.step, callback.on_refresh(self.state.tables[-1], level, normalised, region_map))

    def _table(self, normalised: Tensor, level: nn.Module, region_map: Tensor, measured: Grid) -> ErfTable:
        """The table of one map, from this rank's images and all others'."""
        masses = erf.region_masses(level, normalised, region_map, self._stepper.micro_batch, measured)
        # One sum for masses and image count: the mean over all ranks' images, however they are dealt out.
        count = masses.new_tensor([len(normalised)])
        summed = self.job.ranks.all_reduce_sum(torch.cat([masses.flatten() * count, count]))
        masses = (summed[:-1] / summed[-1]).view_as(masses)
        return ErfTable(self.state.step, masses, erf.label_weights(masses, region_map, self.job.recipe.tau))

    def _validate(self) -> None:
        """Evaluate the model where it is due; the figures go into the row of the step just done."""
        job, done = self.job, self.state.step
        if job.validate is None or not job.val_every or (done % job.val_every and done != job.recipe.steps):
            return
        self._validation = job.validate(self.state)
        self.state.model.train()

    def flush(self) -> list[Row]:
        """Write the rows and digest lines since the last flush; refuses a loss that is not finite, and bad data."""
        rows = self._data_errors.settle(self._window.flush())
        if rows and self._validation is not None:
            rows[-1] = replace(rows[-1], validation=self._validation)
        self._validation = None
        if self.job.ranks.first:
            metrics_file(self.job.folder.metrics).append([row.to_json() for row in rows])
            digest_file(self.job.folder.digest).append(self._digests)
        self._digests = []
        if self._loggers is not None:
            self._loggers.rows(rows)
        for row in rows:
            if not math.isfinite(row.loss):
                raise UserError(
                    f"{self.job.folder.path}: the loss of step {row.step} is {row.loss} at a learning rate of "
                    f"{row.lr:.4g}: begin another run with a lower lr_peak or a longer warmup_steps "
                    "(the last checkpoint is from before)"
                )
        self._data_errors.check(self.job.recipe.batch)
        return rows

    def save(self) -> None:
        """Publish a checkpoint of this step, unless it is there; all ranks leave together. Flush first."""
        state, job = self.state, self.job
        if self._saved == state.step:
            return
        job.ranks.run_on_rank_zero(self._publish)
        self._saved = state.step
        self._window.restart()

    def _publish(self) -> None:
        state, job = self.state, self.job
        content = {
            **state.to_checkpoint(),
            "recipe": job.recipe.to_dict(),
            "classes": list(job.origin.classes),
            "dataset": job.origin.fingerprint,
            "versions": versions(),
        }
        try:
            save_checkpoint(job.folder.checkpoints, state.step, content, job.keep or job.recipe.keep_checkpoints)
        except OSError as error:
            raise UserError(
                f"{job.folder.checkpoints}: the checkpoint of step {state.step} cannot be written ({error.strerror}): "
                "make room, then --resume from the one before"
            ) from error
        for callback in self._callbacks:
            self._log(state.step - 1, callback.on_save(state.step))
        job.folder.push()

    def _log(self, step: int, pictures: Pictures) -> None:
        if self._loggers is not None:
            for name, pixels in pictures.items():
                self._loggers.picture(step, name, pixels)

    def describe(self) -> None:
        """Write run.json once a step is done: a run that never came so far leaves no trace of one."""
        if self._described:
            return
        found, neck = self.state.backbone, self.state.model.neck
        about: dict[str, Any] = {"name": found.name, "channels": found.channels, "stride": found.stride}
        if neck is not None:
            levels = {one.level: one.stride for one in found.stages}
            about["neck"] = {"name": self.job.recipe.neck, "channels": neck.channels, "levels": levels}
        folder = self.job.folder

        def write() -> None:
            if not folder.description.exists():
                describe_run(folder, self.job.recipe, self.job.origin, about)
                folder.push()

        self.job.ranks.run_on_rank_zero(write)
        self._described = True


def _next_batch(batches: Iterator[Batch], step: int) -> tuple[Batch | None, Exception | None]:
    """The next batch, or why there is none."""
    try:
        batch = next(batches)
        if batch.step != step:
            raise RuntimeError(f"the source gave batch {batch.step} for step {step}")
        return batch, None
    except StopIteration:
        return None, RuntimeError(f"the source ended before step {step}")
    except Exception as error:
        return None, error


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error


def execute(
    job: TrainingJob, open_source: OpenSource, *, stop_after: int | None = None, digest_line: DigestLine | None = None
) -> State:
    """Begin or continue a job's run, on every rank; returns the state it ended with.

    Writes RUN/backbone.pth, and with a neck RUN/backbone-fpn.pth, where the schedule ends. Raises UserError for
    whatever the user can mend.
    """
    recipe, folder, ranks = job.recipe, job.folder, job.ranks
    set_arithmetic(ranks.device, tf32=recipe.tf32, deterministic=job.machine_options.deterministic)
    ranks.run_on_rank_zero(lambda: check_origin(folder, job.origin))
    state = ranks.run_on_all(lambda: build_state(recipe, len(job.origin.classes) + 1, ranks, job.origin.pixels))
    _continue(job, state)
    until = min(recipe.steps, stop_after or recipe.steps)
    ending = None
    if state.step < until:
        announce(job, state, until)
        ending = Trainer(job, state, digest_line).run(open_source, until)
    else:
        ranks.log_rank_zero(
            f"{folder}: {state.step} of {recipe.steps} steps are done; nothing is left to do up to {until}"
        )
    if state.step >= recipe.steps:
        ranks.run_on_rank_zero(lambda: _publish_backbone(folder, state))
        ranks.log_rank_zero(f"done: {folder}/{folder.backbone.name} holds the backbone under its own names")
        if recipe.neck != "none":
            ranks.log_rank_zero(f"      {folder}/{folder.pyramid.name} has the neck too, for a BackboneWithFPN")
    else:
        why = f"on {ending} " if ending else ""
        ranks.log_rank_zero(f"stopped {why}after step {state.step} of {recipe.steps}: continue with --resume")
    return state


def _continue(job: TrainingJob, state: State) -> None:
    """Restore the newest checkpoint, where there is one; without one take the recipe's initial weights."""
    folder, ranks = job.folder, job.ranks

    def find() -> Path | None:
        remove_leftovers(folder.checkpoints)
        newest = newest_checkpoint(folder.checkpoints, click.echo)
        return newest and newest[0]

    path = ranks.run_on_rank_zero(find)
    if path is None:
        if (file := job.recipe.init) is not None:
            ranks.log_rank_zero(f"begun from {ranks.run_on_all(lambda: load_weights(state.backbone, file))}")
        return
    # Hosts other than rank 0's have nothing staged yet.
    ranks.run_on_all(lambda: folder.stage(path.name))
    content = ranks.run_on_all(lambda: read_checkpoint(folder.checkpoints / path.name))
    state.restore(content)
    now = versions()
    changed = [
        f"{name} {old}, now {now.get(name)}" for name, old in content["versions"].items() if now.get(name) != old
    ]
    if changed:
        ranks.log_rank_zero(
            f"warning: resuming with other versions ({'; '.join(changed)}): results may differ in their last bits"
        )


def announce(job: TrainingJob, state: State, until: int) -> None:
    """Say what is about to run."""
    recipe, ranks = job.recipe, job.ranks
    start_rate, peak = recipe.rates
    stride, levels = state.backbone.stride, [stage.level for stage in state.backbone.stages]
    neck = f" with a neck ({recipe.neck}, {levels[0]} to {levels[-1]} of {recipe.neck_channels})" if levels else ""
    micro_batch, share = micro_batch_of(recipe, ranks.world), recipe.batch // ranks.world
    ranks.log_rank_zero(
        f"{recipe.backbone} (stride {stride}, {state.backbone.channels} channels){neck}, "
        f"{len(job.origin.classes)} classes and background, {recipe.strategy}, {ranks.world} x {ranks.device.type}"
    )
    if not job.origin.pixels.is_rgb8:
        mean, std = (", ".join(f"{value:.4g}" for value in values[:6]) for values in recipe.normalisation)
        ranks.log_rank_zero(f"pixels {job.origin.pixels}; mean {mean}, std {std} (of {job.origin.pixels.full_scale:g})")
    ranks.log_rank_zero(
        f"steps {state.step} to {until} of {recipe.steps}, batch {recipe.batch} in {recipe.lanes} lanes, learning rate "
        f"{start_rate:.4g} to {peak:.4g} over {recipe.warmup_steps} steps, then cosine to 0"
    )
    if recipe.precision != "fp32" or micro_batch < share:
        ranks.log_rank_zero(
            f"{recipe.precision}, {share // micro_batch} micro-batches of {micro_batch} per step and process"
        )
    if recipe.micro_batch and recipe.batch >= recipe.micro_batch > share and not recipe.sync_bn:
        ranks.log_rank_zero(
            f"warning: the recipe's batch statistics are of {recipe.micro_batch} jigsaws, here of {share}, a process's "
            "share: use fewer processes, or sync_bn"
        )
    if recipe.warmup_steps >= recipe.steps:
        ranks.log_rank_zero(
            f"warning: the warm-up ({recipe.warmup_steps} steps) is as long as the run ({recipe.steps}): the rate "
            "never falls; set warmup_steps lower"
        )


def _publish_backbone(folder: RunFolder, state: State) -> None:
    trained = trained_state(state.to_checkpoint())
    if pyramid := pyramid_state(trained):
        save_file(folder.pyramid, pyramid)
    save_file(folder.backbone, backbone_state(trained))
    folder.push()


def loader_source(
    job: TrainingJob, dataset: Dataset, workers: int, with_digests: bool, access: ReadOptions | None = None
) -> OpenSource:
    """One rank's jigsaws of a dataset, from any step on."""

    def open_source(first: int, end: int) -> BatchSource:
        loader = JigsawLoader(
            dataset,
            job.recipe.template,
            job.recipe.stream,
            rank=job.ranks.rank,
            world=job.ranks.world,
            workers=workers,
            start_step=first,
            stop_step=end,
            with_digests=with_digests,
            pin_memory=job.ranks.device.type == "cuda",
            access=access,
        )
        for note in loader.notes:
            job.ranks.log_rank_zero(note)
        if not loader.notes:
            shares = ", ".join(f"{group} {share:.1%}" for group, share in loader.shares.items())
            job.ranks.log_rank_zero(f"shares of the crops drawn: {shares}")
        return loader

    return open_source


def digest_lines(job: TrainingJob) -> DigestLine:
    """The lines that `digest` prints, from the digests of all ranks' batches."""
    stream, world = job.recipe.stream, job.ranks.world
    return lambda step, shares: digest_line(step, interleave(shares, world, stream.lane_count, stream.chunk))
