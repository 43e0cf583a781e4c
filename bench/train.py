"""Training steps: real shards against the same step on data that lies on the device, and against plain classification.

    python bench/train.py [--data OUT] [--set KEY=VALUE ...] [--workers N ...] [--device D] [--repeats 5] [--block 10]

On a GPU by default the paper's ResNet-50 at 224 pixels in bf16, 256 jigsaws per step, with one worker less than the
machine has cores; on a CPU a toy. The three steps take turns in blocks: (1) jigsaws from shards through the loader, (2)
one batch that stays on the device, (3) torchvision's own classifier on that batch with one label per image, in the same
precision, memory format, micro-batches, optimizer and compilation. The results are the speed of (1) as a share of (2)'s
and of (2) as a share of (3)'s; then the share of (1) in which the device has nothing to do, what a refresh of the ERF
table costs spread over 5,000 steps, and the peak of memory. Several --workers are measured side by side. Workers
needed are the jigsaws a second of (2) over one worker's, measured with the device idle; on a GPU, (1) is then timed
once more with that many. On a CPU the loader takes the cores that the model computes on, so (1) stays below (2) by what
the jigsaws cost, whatever the number of workers; the output says so. Six minutes on a GPU, compiling included. Real
crops are larger than the sample's: `jigsaw-prep shards` a dataset first and name it with --data.
"""

import contextlib
import math
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import click
import torch
from torch import Tensor, nn

from bench.sample import prepped
from bench.timing import Goal, interleaved, judged, show, write
from jigsaw_pretrain.cli import Command
from jigsaw_pretrain.config import choices
from jigsaw_pretrain.formats.dataset.dataset import open_dataset
from jigsaw_pretrain.train.data.batch import Batch, BatchSource
from jigsaw_pretrain.train.engine.distributed import Ranks, start
from jigsaw_pretrain.train.engine.optim import autocast, loss_scaler, set_arithmetic
from jigsaw_pretrain.train.engine.pretraining import (
    OpenSource,
    PretrainingTask,
    TrainingJob,
    loader_source,
    trainer_of,
)
from jigsaw_pretrain.train.engine.run_folder import Origin, RunFolder
from jigsaw_pretrain.train.engine.state import build_state
from jigsaw_pretrain.train.engine.step import MachineOptions
from jigsaw_pretrain.train.engine.trainer import Trainer
from jigsaw_pretrain.train.models import backbones
from jigsaw_pretrain.train.models.classifier import DenseClassifier
from jigsaw_pretrain.train.recipe import Compile, Device, Recipe

ON_GPU = ("data.batch=256", "run.precision=bf16")
TOY = ("model.backbone=resnet18", "data.template_size=64", "data.template_split=32", "data.batch=16")

SHARDS, DEVICE, CLASSES = "jigsaws from shards", "jigsaws on the device", "torchvision's classification"


class Classifier(nn.Module):
    """torchvision's whole model behind the same normalisation."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.whole = backbones.whole_model(recipe.model.backbone)
        self.pixels = DenseClassifier(nn.Identity(), 1, 1, *recipe.data.normalisation)
        self.pixels.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [n, 1000] of uint8 images."""
        logits: Tensor = self.whole(self.pixels.normalise(images))
        return logits


def classification(
    recipe: Recipe, ranks: Ranks, machine: MachineOptions, batch: Batch, micro_batch: int
) -> Callable[[], None]:
    """A plain training step on a batch's images and its first labels."""
    model = Classifier(recipe)
    model.to(device=ranks.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    forward = torch.compile(model) if machine.compiles(ranks.device) else model
    fused = ranks.device.type == "cuda" or None
    optimizer = torch.optim.SGD(model.whole.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, fused=fused)
    scaler = loss_scaler(recipe.run.precision, ranks.device)
    images, labels = (
        one.to(ranks.device).split(micro_batch) for one in (batch.images, batch.labels[:, 0].contiguous())
    )

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        for some, named in zip(images, labels, strict=True):
            with autocast(recipe.run.precision, ranks.device):
                logits = forward(some)
            scaler.scale(nn.functional.cross_entropy(logits.float(), named) / len(images)).backward()
        scaler.step(optimizer)
        scaler.update()

    return step


def clock(ranks: Ranks) -> Callable[[], float]:
    """Wall time after all that was asked of the device is done."""

    def now() -> float:
        if ranks.device.type == "cuda":
            torch.cuda.synchronize(ranks.device)
        return time.perf_counter()

    return now


def block_of(step: Callable[[], object], steps: int) -> Callable[[], None]:
    """A case of that many steps."""

    def case() -> None:
        for _ in range(steps):
            step()

    return case


def worker_speed(open_source: OpenSource, batch: int, seconds: float = 8.0) -> float:
    """Jigsaws a second of a source alone, after its first batches."""
    source = open_source(0, 10**6)
    try:
        batches, steps = iter(source), 0
        # What was made ahead while the worker started is no measure of its speed.
        for _ in range(3):
            next(batches)
        began = time.perf_counter()
        while steps < 3 or time.perf_counter() - began < seconds:
            next(batches)
            steps += 1
        return steps * batch / (time.perf_counter() - began)
    finally:
        source.close()


@dataclass
class FedBy:
    """A case: steps on the next of a source's batches. ``idle``: the share of each in which the device had no work."""

    source: BatchSource
    trainer: Trainer[PretrainingTask]
    steps: int
    idle: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Start the workers."""
        self._batches = iter(self.source)

    def __call__(self) -> None:
        """The steps; those before have been flushed."""
        for _ in range(self.steps):
            began = time.perf_counter()
            batch = next(self._batches)
            self.trainer.step(batch, time.perf_counter() - began)
        self.idle.append(self.trainer.flush()[-1]["data_wait"])


def resident_steps(batch: Batch, trainer: Trainer[PretrainingTask], steps: int) -> Callable[[], None]:
    """A case: steps on one batch that lies on the device."""

    def case() -> None:
        for _ in range(steps):
            trainer.step(batch, 0.0)
        trainer.flush()

    return case


def share(times: dict[str, list[float]], of: str, base: str) -> float:
    """The speed of a case as a share of another's: within a repeat, then the median."""
    return statistics.median(b / a for a, b in zip(times[of], times[base], strict=True))


@click.command(cls=Command)
@click.option("--data", help="A prepped dataset; the sample where none is given.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Of the recipe; the paper's or a toy one.")
@click.option(
    "--workers",
    "given_workers",
    multiple=True,
    type=click.IntRange(min=0),
    help="Data processes, repeatable; default one less than there are cores.",
)
@click.option("--device", default="auto", show_default=True, type=click.Choice(choices(Device)))
@click.option("--compile", "compiling", default="auto", show_default=True, type=click.Choice(choices(Compile)))
@click.option("--repeats", default=5, show_default=True)
@click.option("--block", default=10, show_default=True, help="Steps in a turn.")
@click.option("--brief", is_flag=True, help="Leave out what one worker makes, and the run with as many as are needed.")
def main(
    data: str | None,
    settings: tuple[str, ...],
    given_workers: tuple[int, ...],
    device: str,
    compiling: Compile,
    repeats: int,
    block: int,
    brief: bool,
) -> None:
    """Print the tables and write bench/results/train.json."""
    ranks, machine = start(device), MachineOptions(compiling)
    on_gpu = ranks.device.type == "cuda"
    recipe = Recipe.load(None, (*(ON_GPU if on_gpu else TOY), *settings)).resolved()
    counts = given_workers or (max(1, (os.cpu_count() or 2) - 1),)
    set_arithmetic(ranks.device, tf32=recipe.run.tf32, deterministic=False)
    with tempfile.TemporaryDirectory() as scratch:
        dataset = open_dataset(data or prepped(Path(scratch) / "sample", 240))
        origin = Origin(tuple(dataset.classes), dataset.fingerprint)
        # No refresh falls among the timed steps; it is timed apart.
        job = TrainingJob(
            recipe.updated("loss.erf_every=1_000_000_000"),
            origin,
            RunFolder(Path(scratch)),
            ranks,
            machine_options=machine,
        )
        trainer = trainer_of(job, build_state(job.recipe, len(dataset.classes) + 1, ranks))
        one_worker = None if brief else worker_speed(loader_source(job, dataset, 1, False), recipe.data.batch)
        with contextlib.ExitStack() as opened:

            def fed_by(workers: int) -> FedBy:
                source = opened.enter_context(contextlib.closing(loader_source(job, dataset, workers, False)(0, 10**6)))
                return FedBy(source, trainer, block)

            first = next(iter(loader_source(job, dataset, 0, False)(0, 1)))
            resident = replace(
                first, images=first.images.clone().to(ranks.device), labels=first.labels.to(ranks.device)
            )
            now = clock(ranks)
            trainer.step(resident, 0.0)
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            on_device = resident_steps(resident, trainer, block)
            resident_steps(resident, trainer, 3)()
            peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else _resident_peak()
            plain = classification(recipe, ranks, machine, resident, trainer.task.stepper.micro_batch)
            # What is fed comes after what flushes the metrics, so that their window begins with it.
            fed = {named(workers): fed_by(workers) for workers in counts}
            times = interleaved({CLASSES: block_of(plain, block), DEVICE: on_device, **fed}, repeats, now)
            picked = trainer.task.first_of_lanes(resident.images)
            refresh = min(interleaved({"refresh": lambda: trainer.task.refresh(picked)}, 2, now)["refresh"])
            per, step_time = block * recipe.data.batch, statistics.median(times[DEVICE]) / block
            needed = None if one_worker is None else max(1, math.ceil(recipe.data.batch / step_time / one_worker))
            with_needed = None
            if needed is not None and on_gpu and needed < (os.cpu_count() or 1):
                pair = interleaved({DEVICE: on_device, SHARDS: fed_by(needed)}, repeats, now)
                with_needed = share(pair, SHARDS, DEVICE)
    device = torch.cuda.get_device_name() if on_gpu else "CPU"
    where = f"{device}, {recipe.model.backbone} at {recipe.data.template_size} px"
    title = f"{where}, {recipe.run.precision}, {recipe.data.batch} a step, {', '.join(map(str, counts))} workers"
    rows = show(title, times, DEVICE, per, "image")
    for name, seconds in times.items():
        click.echo(f"{name}: {per / statistics.median(seconds):,.1f} images/s")
    note = "" if on_gpu else "on a CPU: the goal is a GPU's"
    alone = note and f"{note}, the loader takes the model's own cores"
    by_workers, least = {}, []
    for workers in counts:
        name = named(workers)
        speed, idle = per / statistics.median(times[name]), statistics.median(fed[name].idle)
        real = share(times, name, DEVICE)
        by_workers[workers] = {"real": real, "images_per_second": speed, "idle": idle}
        least.append(judged(f"speed of {name}, of that on the device", real, Goal(0.98, True), note=alone))
        click.echo(f"{name}: the device has nothing to do for {idle:.1%} of the time")
    dense = share(times, DEVICE, CLASSES)
    refreshed = refresh / (5_000 * step_time)
    least += [
        judged("speed of the dense step, of classification", dense, Goal(0.97, True), note=note),
        judged(
            f"a refresh of the ERF table ({refresh:.2f} s, {len(picked)} jigsaws), of 5,000 steps",
            refreshed,
            Goal(0.003),
            ".3%",
            note,
        ),
    ]
    click.echo(f"peak memory of {'a step' if on_gpu else 'this process'}: {peak:.1f} GiB")
    if needed is not None:
        said = "" if with_needed is None else f"; with so many, the speed is {with_needed:.3f} of that on the device"
        click.echo(f"workers needed: {needed} ({one_worker:,.0f} jigsaws/s of one worker, the device idle){said}")
    figures = {"workers_needed": needed, "one_worker": one_worker, "with_needed": with_needed, "by_workers": by_workers}
    more = {"dense": dense, "refresh": refresh, "refresh_share": refreshed, "peak_gib": peak, "on_gpu": on_gpu}
    write("train", {"title": title, "steps": rows, **figures, **more, "goals": least})


def named(workers: int) -> str:
    """The case that so many workers feed."""
    return f"{SHARDS}, {workers} workers"


def _resident_peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
