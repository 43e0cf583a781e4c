"""Training steps: real shards against the same step on data that lies on the device, and against plain classification.

    python bench/train.py [--data OUT] [--set KEY=VALUE ...] [--workers N] [--device auto] [--repeats 5] [--block 10]

On a GPU by default the paper's ResNet-50 at 224 pixels in bf16, 256 jigsaws a step, with one worker less than the
machine has cores; on a CPU a toy. The three steps take turns in blocks: (1) jigsaws from shards through the loader, (2)
one batch that stays on the device, (3) torchvision's own classifier on that batch with one label an image, in the same
precision, memory format, optimizer and compilation. Ratios of (1) and (3) to (2) are the result; then what a refresh of
the ERF table costs spread over 5,000 steps, and the peak of GPU memory. The goals are for GPUs: on
a CPU the loader shares the cores with the model. Five minutes on a GPU, compiling included.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import click
import torch
from torch import Tensor, nn

from bench.sample import prepped
from bench.timing import Goal, interleaved, show, write
from formats.dataset import open_dataset
from train import backbones
from train.batch import Batch
from train.loop import Job, Loop
from train.machine import COMPILE, Machine
from train.model import DenseClassifier
from train.precision import autocast, loss_scaler, set_arithmetic
from train.pretrain import loader_source
from train.ranks import DEVICES, Ranks, start
from train.recipe import Recipe, load_recipe
from train.run import Origin, RunFolder
from train.state import build_state

ON_GPU = ("batch=256", "precision=bf16")
TOY = ("backbone=resnet18", "template_size=64", "template_split=32", "batch=16")

SHARDS, DEVICE, CLASSES = "jigsaws from shards", "jigsaws on the device", "torchvision's classification"


class Classifier(nn.Module):
    """torchvision's whole model behind the same normalisation."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.whole = backbones.whole_model(recipe.backbone)
        self.pixels = DenseClassifier(nn.Identity(), 1, 1, *recipe.normalisation)
        self.pixels.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [n, 1000] of uint8 images."""
        logits: Tensor = self.whole(self.pixels.normalise(images))
        return logits


def classification(recipe: Recipe, ranks: Ranks, machine: Machine, batch: Batch) -> Callable[[], None]:
    """A plain training step on a batch's images and its first labels."""
    model = Classifier(recipe)
    model.to(device=ranks.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    forward = torch.compile(model) if machine.compiles(ranks.device) else model
    fused = ranks.device.type == "cuda" or None
    optimizer = torch.optim.SGD(model.whole.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, fused=fused)
    scaler = loss_scaler(recipe.precision, ranks.device)
    images, labels = batch.images.to(ranks.device), batch.labels[:, 0].to(ranks.device)

    def step() -> None:
        with autocast(recipe.precision, ranks.device):
            logits = forward(images)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(nn.functional.cross_entropy(logits.float(), labels)).backward()
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


@click.command()
@click.option("--data", help="A prepped dataset; the sample where none is given.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Of the recipe; the paper's or a toy one.")
@click.option("--workers", type=click.IntRange(min=0), help="Data processes; default one less than there are cores.")
@click.option("--device", default="auto", show_default=True, type=click.Choice(DEVICES))
@click.option("--compile", "compiling", default="auto", show_default=True, type=click.Choice(COMPILE))
@click.option("--repeats", default=5, show_default=True)
@click.option("--block", default=10, show_default=True, help="Steps in a turn.")
def main(
    data: str | None,
    settings: tuple[str, ...],
    workers: int | None,
    device: str,
    compiling: str,
    repeats: int,
    block: int,
) -> None:
    """Print the tables and write bench/results/train.json."""
    ranks, machine = start(device), Machine(compiling)
    on_gpu = ranks.device.type == "cuda"
    recipe = load_recipe(None, (*(ON_GPU if on_gpu else TOY), *settings)).resolved()
    workers = max(1, (os.cpu_count() or 2) - 1) if workers is None else workers
    set_arithmetic(ranks.device, tf32=recipe.tf32, deterministic=False)
    with tempfile.TemporaryDirectory() as scratch:
        dataset = open_dataset(data or prepped(Path(scratch) / "sample", 240))
        origin = Origin(tuple(dataset.classes), dataset.fingerprint)
        # No refresh falls among the timed steps; it is timed apart.
        job = Job(replace(recipe, erf_every=10**9), origin, RunFolder(Path(scratch)), ranks, machine=machine)
        loop = Loop(job, build_state(job.recipe, len(dataset.classes) + 1, ranks))
        source = loader_source(job, dataset, workers, False)(0, 10**6)
        batches = iter(source)
        lanes = source.lanes_per_rank

        def from_shards() -> None:
            began = time.perf_counter()
            batch = next(batches)
            loop.step(batch, lanes, time.perf_counter() - began)

        first = next(batches)
        resident = replace(first, images=first.images.clone().to(ranks.device), labels=first.labels.to(ranks.device))
        now = clock(ranks)
        try:
            loop.step(resident, lanes, 0.0)
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            steps = {SHARDS: from_shards, DEVICE: lambda: loop.step(resident, lanes, 0.0)}
            block_of(steps[DEVICE], 3)()
            peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
            plain = classification(recipe, ranks, machine, resident)
            cases = {name: block_of(step, block) for name, step in {**steps, CLASSES: plain}.items()}
            times = interleaved(cases, repeats, now)
            picked = resident.images[:: len(resident.images) // lanes]
            refresh = interleaved({"refresh": lambda: loop.refresh(picked)}, 2, now)["refresh"]
        finally:
            source.close()
    per = block * recipe.batch
    where = f"{torch.cuda.get_device_name() if on_gpu else 'CPU'}, {recipe.backbone} at {recipe.template_size} px"
    title = f"{where}, {recipe.precision}, {recipe.batch} a step, {workers} workers"
    results: dict[str, object] = {"title": title}
    results["data"] = show(
        title, {k: times[k] for k in (DEVICE, SHARDS)}, DEVICE, per, "jigsaw", {SHARDS: Goal(1 / 0.98)}
    )
    reference = {k: times[k] for k in (CLASSES, DEVICE)}
    goals = {DEVICE: Goal(1 / 0.97)} if on_gpu else None
    results["head"] = show("dense head and soft labels", reference, CLASSES, per, "image", goals)
    middle = sorted(times[DEVICE])[len(times[DEVICE]) // 2] / block
    share, goal = min(refresh) / (5_000 * middle), Goal(0.003)
    for name in times:
        found = sorted(times[name])[len(times[name]) // 2]
        click.echo(f"{name}: {per / found:,.1f} images/s")
    click.echo(
        f"a refresh of the ERF table from {len(picked)} jigsaws: {min(refresh):.2f} s, {share:.2%} of 5,000 steps "
        f"(goal {goal}: {'met' if goal.met(share) else 'missed'})"
    )
    if on_gpu:
        click.echo(f"peak memory of a step: {peak:.1f} GiB")
    write("train", {**results, "refresh": min(refresh), "refresh_share": share, "peak_gib": peak, "workers": workers})


if __name__ == "__main__":
    main()
