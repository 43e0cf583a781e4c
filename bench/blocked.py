"""How long checkpoints and the page keep a run of two ranks from training.

    python bench/blocked.py [--data OUT] [--set SECTION.KEY=VALUE ...] [--steps 150] [--every 5]

Two ranks train under torchrun on this machine, by default a toy on the sample dataset, with a checkpoint every few
steps and a page. What blocks is the time that rank 0 spends on saving: copying the state, waiting for the write before,
and what the page is made of; the other rank waits for it at most as long. The result is its share of the wall time from
the start of the loop to its last step. What is waited for after that (the last write, the page drawn once more) is
shown apart: no step comes after it. Prints one line for each, writes bench/results/blocked.json. Two minutes.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import click

from bench.sample import prepped
from bench.timing import Goal, judged, write
from jigsaw_pretrain.cli import Command
from jigsaw_pretrain.formats.dataset.dataset import open_dataset
from jigsaw_pretrain.train.engine.distributed import finish, start
from jigsaw_pretrain.train.engine.pretraining import TrainingJob, loader_source, trainer_of
from jigsaw_pretrain.train.engine.run_folder import RunFolder, origin_of
from jigsaw_pretrain.train.engine.state import build_state
from jigsaw_pretrain.train.recipe import Recipe
from jigsaw_pretrain.train.report.page import RunPage

TOY = ("model.backbone=resnet18", "data.template_size=128", "data.template_split=32", "data.batch=16")

BLOCKED = Goal(0.02)
"""Share of the wall time."""


class Stopwatch:
    """Adds up the seconds and calls of the functions that it is put around."""

    def __init__(self) -> None:
        self.seconds, self.calls = 0.0, 0

    def around(self, action: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        @wraps(action)
        def timed(*arguments: Any, **more: Any) -> Any:
            began = time.perf_counter()
            try:
                return action(*arguments, **more)
            finally:
                self.seconds += time.perf_counter() - began
                self.calls += 1

        return timed


def rank(folder: Path, data: str, settings: tuple[str, ...]) -> None:
    """What one rank does; rank 0 writes FOLDER/found.json."""
    ranks, dataset = start("cpu"), open_dataset(data)
    recipe = Recipe().updated(*settings).resolved(dataset)
    origin = origin_of(dataset, recipe.data)
    page = RunPage(folder / "run", recipe, origin)
    job = TrainingJob(recipe, origin, RunFolder(folder / "run"), ranks, (page,))
    state = build_state(recipe, len(dataset.classes) + 1, ranks)
    trainer = trainer_of(job, state, loader_source(job, dataset, 1, False))
    saving, ending, steps = Stopwatch(), Stopwatch(), Stopwatch()
    # Made before the clock runs: a dry run is no step.
    _ = trainer.task.stepper
    for name, watch in (("save", saving), ("_end", ending), ("step", steps)):
        setattr(trainer, name, watch.around(getattr(trainer, name)))
    began = time.perf_counter()
    trainer.run(recipe.optim.steps)
    wall = time.perf_counter() - began - ending.seconds
    if ranks.first:
        found = {"wall": wall, "blocked": saving.seconds, "saves": saving.calls, "step": steps.seconds / steps.calls}
        (folder / "found.json").write_text(json.dumps({**found, "end": ending.seconds}))
    finish()


@click.command(cls=Command)
@click.option("--data", help="A prepped dataset; the sample where none is given.")
@click.option("--set", "settings", multiple=True, metavar="SECTION.KEY=VALUE", help="Of the recipe; else a toy one.")
@click.option("--steps", default=150, show_default=True)
@click.option("--every", default=5, show_default=True, help="Steps between checkpoints.")
@click.option("--rank-of", type=click.Path(path_type=Path), hidden=True)
def main(data: str | None, settings: tuple[str, ...], steps: int, every: int, rank_of: Path | None) -> None:
    """Print the shares and write bench/results/blocked.json."""
    if rank_of is not None:
        assert data is not None
        rank(rank_of, data, settings)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data = data or prepped(folder / "sample", 240)
        chosen = (*TOY, *settings, f"optim.steps={steps}", "optim.warmup_steps=5", f"run.checkpoint_every={every}")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
        command += [__file__, "--rank-of", scratch, "--data", data]
        command += [part for setting in chosen for part in ("--set", setting)]
        subprocess.run(command, check=True)
        found = json.loads((folder / "found.json").read_text())
    share = found["blocked"] / found["wall"]
    what = f"blocked by {found['saves']} saves and the page, of {found['wall']:.0f} s ({found['step']:.3f} s a step)"
    goal = judged(what, share, BLOCKED, ".2%")
    click.echo(f"a save {found['blocked'] / found['saves']:.4f} s; after the last step {found['end']:.1f} s")
    write("blocked", {**found, "share": goal})


if __name__ == "__main__":
    main()
