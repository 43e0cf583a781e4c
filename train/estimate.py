"""What a recipe will cost on this machine, before it is paid for.

`estimate` runs about 30 real steps in a temporary folder and times apart what a run does now and then: start (compiling
included), a refresh of the ERF table, a checkpoint. The forecast is their sum over the full recipe; under torchrun it
is for all processes. Costs a minute or two; prefer more steps where they vary much.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from jigsaw_pretrain.config import Count, CountOrZero, checked
from jigsaw_pretrain.formats.dataset.dataset import Dataset, require_dataset
from jigsaw_pretrain.train.data.batch import Batch
from jigsaw_pretrain.train.data.remote import ReadOptions
from jigsaw_pretrain.train.engine.distributed import Ranks, start
from jigsaw_pretrain.train.engine.optim import arithmetic
from jigsaw_pretrain.train.engine.pretraining import OpenSource, TrainingJob, loader_source, trainer_of
from jigsaw_pretrain.train.engine.run_folder import Origin, RunFolder, given_recipe
from jigsaw_pretrain.train.engine.state import build_state
from jigsaw_pretrain.train.engine.step import MachineOptions
from jigsaw_pretrain.train.recipe import Compile, Recipe
from jigsaw_pretrain.train.report.page import RunPage

WARM = 5
"""Steps before the timed ones, in which caches and the loader's queue fill."""

SLOW = 0.1
"""Share of a step from which waiting is said to limit it."""


@dataclass(frozen=True)
class Costs:
    """Seconds on this machine.

    start: compiling included. step: one step. wait: how long of it the device waits for data. copy: of a batch to the
    device, which is hidden where it computes meanwhile. refresh: of the ERF table. save: of a checkpoint.
    """

    start: float
    step: float
    wait: float
    copy: float
    refresh: float
    save: float


@dataclass(frozen=True)
class Forecast:
    """What the full recipe costs.

    device_days: of GPUs, or of CPU processes. limit: what limits the speed: data, copies or compute.
    """

    hours: float
    device_days: float
    images_per_second: float
    limit: str


def forecast(recipe: Recipe, costs: Costs, world: int) -> Forecast:
    """What the full recipe costs on ``world`` devices."""
    refreshes = -(-recipe.optim.steps // recipe.loss.erf_every) if recipe.loss.strategy == "erf-adaptive" else 0
    saves = -(-recipe.optim.steps // recipe.run.checkpoint_every)
    seconds = costs.start + recipe.optim.steps * costs.step + refreshes * costs.refresh + saves * costs.save
    hours = seconds / 3600
    limit = "compute"
    if costs.wait >= SLOW * costs.step:
        limit = "copies" if costs.copy > costs.wait else "data"
    return Forecast(hours, hours * world / 24, recipe.data.batch / costs.step, limit)


def measure(job: TrainingJob, open_source: OpenSource, steps: int) -> Costs:
    """Time a job's steps on every rank; its folder gets a run's files. Raises what its data or memory raise."""
    ranks = job.ranks
    began = _now(ranks)
    state = ranks.run_on_all(lambda: build_state(job.recipe, len(job.origin.classes) + 1, ranks, job.origin.pixels))
    trainer = trainer_of(job, state)
    source = ranks.run_on_all(lambda: open_source(0, WARM + steps + 1))
    try:
        batches = iter(source)

        def step() -> Batch:
            asked = time.perf_counter()
            batch = next(batches)
            trainer.step(batch, time.perf_counter() - asked)
            return batch

        batch = step()
        first = _now(ranks) - began
        images = batch.images.to(ranks.device)
        refresh = 0.0
        if job.recipe.loss.strategy == "erf-adaptive":
            refresh = _timed(ranks, lambda: trainer.task.refresh(trainer.task.first_of_lanes(images)))
        for _ in range(WARM - 1):
            step()
        trainer.flush()
        seconds = _timed(ranks, lambda: [step() for _ in range(steps)]) / steps
        wait = trainer.flush()[-1]["data_wait"] * seconds
        copy = _timed(ranks, lambda: batch.images.to(ranks.device)) if ranks.device.type != "cpu" else 0.0

        def save() -> None:
            trainer.flush()
            trainer.save()

        trainer.describe()
        # The first one imports what draws the page.
        early = _timed(ranks, save)
        step()
        saved = _timed(ranks, save)
    finally:
        source.close()
        trainer.close()
    # Its first step and refresh are counted among the others.
    once = max(0.0, first - seconds - refresh) + max(0.0, early - saved)
    return Costs(once, seconds, wait, copy, refresh, saved)


def _now(ranks: Ranks) -> float:
    if ranks.device.type == "cuda":
        torch.cuda.synchronize(ranks.device)
    return time.perf_counter()


def _timed(ranks: Ranks, action: Callable[[], object]) -> float:
    began = _now(ranks)
    action()
    return _now(ranks) - began


@dataclass(frozen=True)
class Estimate:
    """What ``estimate`` found: the recipe as it would run, its costs and forecast, and the number of ranks."""

    recipe: Recipe
    costs: Costs
    forecast: Forecast
    world: int


def estimate(
    dataset: Dataset,
    recipe: Recipe | str | Path | None = None,
    settings: Sequence[str] = (),
    *,
    steps: int = 30,
    workers: int = 2,
    device: str = "auto",
    compiling: Compile = "auto",
    access: ReadOptions | None = None,
) -> Estimate:
    """Time some steps of a recipe on this machine, and forecast what the whole run costs; on every rank.

    Args:
        dataset: a prepped dataset.
        recipe: a recipe, a TOML file, or None for the paper's.
        settings: changes to it, such as ``"optim.steps=200"``.
        steps: how many steps are timed, after a few that are not.
        workers: processes that make a rank's jigsaws; 0 makes them here.
        device: ``auto``, ``cpu`` or ``cuda``.
        compiling: ``auto``, ``on`` or ``off``: torch.compile.
        access: how shards at a URL are read and cached.

    Returns:
        Seconds of one step and of what a run does now and then, and hours and device-days of the whole.

    Raises:
        UserError: for whatever the user can put right, on all ranks.
    """
    checked(steps, Count, "steps")
    checked(workers, CountOrZero, "workers")
    require_dataset(dataset)
    ranks = start(device)
    chosen = ranks.run_on_all(lambda: given_recipe(recipe, tuple(settings)).resolved(dataset))
    # The schedule must reach past the timed steps, and nothing that is timed apart may fall among them.
    reach = chosen.optim.steps + chosen.optim.warmup_steps + WARM + steps
    timed = chosen.updated(f"optim.steps={reach}", "loss.erf_every=1_000_000_000", "model.init=none")
    origin = Origin(tuple(dataset.classes), dataset.fingerprint, pixels=dataset.pixels)
    with (
        tempfile.TemporaryDirectory() as scratch,
        arithmetic(ranks.device, tf32=chosen.run.tf32, deterministic=False),
        torch.random.fork_rng([ranks.device] if ranks.device.type == "cuda" else []),
    ):
        job = TrainingJob(
            timed,
            origin,
            RunFolder(Path(scratch)),
            ranks,
            (RunPage(Path(scratch), timed, origin),),
            machine_options=MachineOptions(compiling),
        )
        costs = measure(job, loader_source(job, dataset, workers, False, access), steps)
    return Estimate(chosen, costs, forecast(chosen, costs, ranks.world), ranks.world)
