"""What a neck costs in pre-training, and how far its interpolated ERF tables are from measured ones.

    python bench/neck.py [--data OUT] [--steps 30] [--drawn 7]

ResNet-18 at 128 px, 16 jigsaws per batch, one process on the CPU; OUT is a prepped dataset (the sample dataset is drawn
and prepped where none is given). CPU seconds of a step and of a refresh without a neck, with one of 64 channels and of
256; then, after ``--steps`` steps with 64, equation 2's weights at 49 positions drawn from each finer level: measured
there, on four jigsaws, against interpolated (train/erf.py, measuring_grid). Three minutes on two cores.
"""

import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import click
import torch
from rich.console import Console
from rich.table import Table

from bench.sample import prepped
from bench.timing import interleaved, show, write
from jigsaw_pretrain.cli import Command
from jigsaw_pretrain.formats.dataset.dataset import open_dataset
from jigsaw_pretrain.train.data.batch import Batch
from jigsaw_pretrain.train.data.loader import JigsawLoader
from jigsaw_pretrain.train.engine.distributed import Ranks
from jigsaw_pretrain.train.engine.pretraining import PretrainingTask, TrainingJob
from jigsaw_pretrain.train.engine.run_folder import Origin, RunFolder
from jigsaw_pretrain.train.engine.state import State, build_state, grids, region_maps
from jigsaw_pretrain.train.erf import Grid, label_weights, region_masses
from jigsaw_pretrain.train.recipe import Recipe

TOY = (
    "model.backbone=resnet18",
    "data.template_size=128",
    "data.template_split=32",
    "data.batch=16",
    "data.lanes=16",
    "optim.lr_batch=16",
)
RATES = ("optim.steps=200", "optim.warmup_steps=20", "optim.lr_start=0.005", "optim.lr_peak=0.05")
CASES = {
    "no neck": (),
    "fpn of 64": ("model.neck=fpn", "model.neck_channels=64"),
    "fpn of 256": ("model.neck=fpn",),
}
IMAGES = 4


def task_of(recipe: Recipe, classes: tuple[str, ...], folder: Path) -> PretrainingTask:
    """Pre-training at its first step, with tables of random weights in force."""
    job = TrainingJob(recipe, Origin(classes, "0" * 64), RunFolder(folder), Ranks())
    return PretrainingTask(job, build_state(recipe, len(classes) + 1, Ranks()))


def errors(state: State, recipe: Recipe, batch: Batch, drawn: int) -> dict[str, dict[str, float]]:
    """By finer level: mean and largest difference of the weights, and of the masses' own shares (tau = 0)."""
    images = state.model.normalise(batch.images[:IMAGES])
    words = torch.Generator().manual_seed(0)
    maps = region_maps(recipe, state.backbone, torch.device("cpu"))
    levels = zip(state.backbone.stages, state.model.levels(), maps, grids(recipe, state.backbone), strict=True)
    found: dict[str, dict[str, float]] = {}
    for stage, level, regions, chosen in list(levels)[:-1]:
        lines = torch.randperm(len(regions), generator=words)[:drawn].sort().values
        every = torch.arange(len(lines))
        measured = region_masses(
            level, images, regions, grid=Grid(tuple(lines.tolist()), every, every, 0 * every.double())
        )
        filled = region_masses(level, images, regions, grid=chosen)[:, lines][:, :, lines]
        own = regions[lines][:, lines]
        row: dict[str, float] = {}
        for name, tau in (("weights", recipe.loss.tau), ("shares", 0.0)):
            apart = (label_weights(measured, own, tau) - label_weights(filled, own, tau)).abs()
            row |= {f"{name}, mean": float(apart.mean()), f"{name}, largest": float(apart.max())}
        found[stage.level] = row
    return found


@click.command(cls=Command)
@click.option("--data", help="A prepped dataset.")
@click.option(
    "--steps", default=30, show_default=True, type=click.IntRange(2), help="With a neck, before tables are compared."
)
@click.option("--drawn", default=7, show_default=True, help="Rows and columns drawn of each level's positions.")
@click.option("--repeats", default=3, show_default=True, help="Of each step that is timed.")
def main(data: str | None, steps: int, drawn: int, repeats: int) -> None:
    """Print both tables and write bench/results/neck.json."""
    with tempfile.TemporaryDirectory() as scratch:
        dataset = open_dataset(data or prepped(Path(scratch) / "sample", 120))
        recipes = {name: Recipe.load(None, (*TOY, *RATES, *more)).resolved() for name, more in CASES.items()}
        plain = recipes["no neck"]
        source = JigsawLoader(dataset, plain.data, workers=0, stop_step=steps)
        batches = iter(source)
        first = next(batches)
        first = Batch(first.step, first.images.clone(), first.labels.clone(), first.groups.clone(), 0)
        classes = tuple(dataset.classes)
        tasks = {name: task_of(one, classes, Path(scratch) / name) for name, one in recipes.items()}
        refreshed = {}
        for name, task in tasks.items():
            # Not part of it: the optimizer's step is made at its first use.
            _ = task.stepper
            begun = time.process_time()
            task.refresh(first.images)
            refreshed[f"refresh, {name}"] = [time.process_time() - begun] * repeats
        taken = {f"step, {name}": partial(one.stepper.take, first.images, first.labels) for name, one in tasks.items()}
        times = {**interleaved(taken, repeats), **refreshed}
        rows = show("CPU time of one process", times, "step, no neck", 1, "call")
        task = task_of(recipes["fpn of 64"], classes, Path(scratch) / "trained")
        for batch in batches:
            # The first of them refreshes the tables.
            task.take(batch)
            task.step += 1
        source.close()
        apart = errors(task.state, recipes["fpn of 64"], first, drawn)
    table = Table(title=f"interpolated from measured weights of labels, after {task.step} steps")
    for head in ("level", *next(iter(apart.values()))):
        table.add_column(head)
    for level, one in apart.items():
        table.add_row(level, *(f"{value:.4f}" for value in one.values()))
    Console().print(table)
    write("neck", {"times": rows, "steps": task.step, "apart": apart})


if __name__ == "__main__":
    main()
