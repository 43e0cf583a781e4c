"""`estimate`: what a recipe will cost on this machine, before it is paid for.

It runs about 30 real steps in a temporary folder and times apart what a run does now and then: start (compiling
included), a refresh of the ERF table, a checkpoint. The forecast is their sum over the full recipe; under torchrun it
is for all processes. Costs a minute or two; prefer a larger `--steps` where steps vary much.
"""

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch

from jigsaw_pretrain.cli import Command
from jigsaw_pretrain.formats.dataset.dataset import open_dataset
from jigsaw_pretrain.storage import publish_locally
from jigsaw_pretrain.train.commands.options import recipe_options
from jigsaw_pretrain.train.data.batch import Batch
from jigsaw_pretrain.train.engine.distributed import DEVICES, Ranks, rank_zero_errors, start
from jigsaw_pretrain.train.engine.optim import set_arithmetic
from jigsaw_pretrain.train.engine.pretraining import OpenSource, TrainingJob, loader_source, trainer_of
from jigsaw_pretrain.train.engine.run_folder import Origin, RunFolder
from jigsaw_pretrain.train.engine.state import build_state
from jigsaw_pretrain.train.engine.step import COMPILE, MachineOptions
from jigsaw_pretrain.train.recipe import Recipe
from jigsaw_pretrain.train.report.page import RunPage

WARM = 5
"""Steps before the timed ones, in which caches and the loader's queue fill."""

SLOW = 0.1
"""Share of a step from which waiting or copying is said to limit it."""


@dataclass(frozen=True)
class Costs:
    """Seconds on this machine.

    start: compiling included. step: of which wait are spent waiting for data. copy: of a batch to the device. refresh:
    of the ERF table. save: of a checkpoint.
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
    shares = {"data": costs.wait / costs.step, "copies": costs.copy / costs.step}
    largest = max(shares, key=lambda key: shares[key])
    limit = largest if shares[largest] >= SLOW else "compute"
    return Forecast(hours, hours * world / 24, recipe.data.batch / costs.step, limit)


def measure(job: TrainingJob, open_source: OpenSource, steps: int) -> Costs:
    """Time a job's steps on every rank; its folder gets a run's files. Raises what its data or memory raise."""
    ranks = job.ranks
    began = _now(ranks)
    state = ranks.run_on_all(lambda: build_state(job.recipe, len(job.origin.classes) + 1, ranks, job.origin.pixels))
    trainer = trainer_of(job, state)
    source = ranks.run_on_all(lambda: open_source(0, WARM + steps + 1))
    waits: list[float] = []
    try:
        batches = iter(source)

        def step() -> Batch:
            asked = time.perf_counter()
            batch = next(batches)
            waits.append(time.perf_counter() - asked)
            trainer.step(batch, waits[-1])
            return batch

        batch = step()
        first = _now(ranks) - began
        images = batch.images.to(ranks.device)
        refresh = 0.0
        if job.recipe.loss.strategy == "erf-adaptive":
            refresh = _timed(ranks, lambda: trainer.task.refresh(trainer.task.first_of_lanes(images)))
        for _ in range(WARM - 1):
            step()
        waits.clear()
        seconds = _timed(ranks, lambda: [step() for _ in range(steps)]) / steps
        wait = sum(waits) / steps
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


@click.command(cls=Command)
@click.option("--data", required=True, metavar="OUT", help="Folder or URL that `jigsaw-prep shards` wrote.")
@recipe_options
@click.option("--steps", default=30, show_default=True, type=click.IntRange(min=1), help="Steps to time.")
@click.option("--workers", default=2, show_default=True, type=click.IntRange(min=0), help="Data processes per rank.")
@click.option("--device", default="auto", show_default=True, type=click.Choice(DEVICES), help="Device to train on.")
@click.option(
    "--compile", "compiling", default="auto", type=click.Choice(COMPILE), help="Use torch.compile; auto: on GPUs."
)
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Also write the figures to this file."
)
def estimate(
    data: str,
    recipe: Path | None,
    settings: tuple[str, ...],
    steps: int,
    workers: int,
    device: str,
    compiling: str,
    json_file: Path | None,
) -> None:
    """Time some steps of a recipe, and forecast what the whole run costs and what limits it."""
    with rank_zero_errors(), tempfile.TemporaryDirectory() as scratch:
        ranks = start(device)
        dataset = ranks.run_on_all(lambda: open_dataset(data))
        chosen = ranks.run_on_all(lambda: Recipe.load(recipe, settings).resolved(dataset))
        # The schedule must reach past the timed steps, and nothing that is timed apart may fall among them.
        reach = chosen.optim.steps + chosen.optim.warmup_steps + WARM + steps
        timed = chosen.updated(f"optim.steps={reach}", "loss.erf_every=1_000_000_000", "model.init=none")
        set_arithmetic(ranks.device, tf32=chosen.run.tf32, deterministic=False)
        origin = Origin(tuple(dataset.classes), dataset.fingerprint, pixels=dataset.pixels)
        job = TrainingJob(
            timed,
            origin,
            RunFolder(Path(scratch)),
            ranks,
            (RunPage(Path(scratch), timed, origin),),
            machine_options=MachineOptions(compiling),
        )
        costs = measure(job, loader_source(job, dataset, workers, False), steps)
        found = forecast(chosen, costs, ranks.world)
        _say(ranks, chosen, costs, found, workers)
        if json_file is not None and ranks.first:
            text = json.dumps({**asdict(found), "costs": asdict(costs), "world": ranks.world}, indent=2)
            publish_locally(json_file, (text + "\n").encode())


def _say(ranks: Ranks, recipe: Recipe, costs: Costs, found: Forecast, workers: int) -> None:
    kind = "GPU" if ranks.device.type == "cuda" else "CPU process"
    ranks.log_rank_zero(
        f"a step: {costs.step:.3f} s, {found.images_per_second:,.1f} images/s; {costs.wait / costs.step:.0%} of it "
        f"waiting for data, copies to the device {costs.copy / costs.step:.0%}"
    )
    ranks.log_rank_zero(
        f"start {costs.start:.1f} s, a refresh of the ERF table {costs.refresh:.1f} s, a save {costs.save:.1f} s"
    )
    ranks.log_rank_zero(
        f"the full recipe: {recipe.optim.steps:,} steps of {recipe.data.batch} on {ranks.world} {kind}"
        f"{'s' if ranks.world > 1 else ''}: {found.hours:.2f} hours, {found.device_days:.3f} {kind}-days"
    )
    remedy = {
        "data": f"the loader: raise --workers above {workers}, or put the shards on a nearer disk",
        "copies": "copies to the device: the bus is slow or shared",
        "compute": "the device's own arithmetic: run.precision = bf16, --compile on or more devices would help",
    }
    ranks.log_rank_zero(f"limited by {found.limit}: {remedy[found.limit]}")
