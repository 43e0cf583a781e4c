"""`estimate`: what a recipe will cost on this machine."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import jigsaw_pretrain as jp
from jigsaw_pretrain.cli import Command, is_first_rank
from jigsaw_pretrain.config import choices
from jigsaw_pretrain.storage.files import publish_locally
from jigsaw_pretrain.train.commands.options import (
    DEVICES,
    read_options,
    read_options_from,
    recipe_options,
    tell_loading,
    tell_training,
)
from jigsaw_pretrain.train.recipe import Compile, Recipe
from jigsaw_pretrain.words import number

if TYPE_CHECKING:
    from jigsaw_pretrain.train.engine.distributed import Ranks


@click.command(cls=Command)
@click.option(
    "--data",
    required=True,
    metavar="OUT",
    help="Read the dataset in OUT, a folder or URL that `jigsaw-prep shards` wrote.",
)
@recipe_options
@read_options
@click.option("--steps", default=30, show_default=True, type=click.IntRange(min=1), help="Time this many steps.")
@click.option(
    "--workers",
    default=2,
    show_default=True,
    type=click.IntRange(min=0),
    help="Read data in this many processes per rank.",
)
@click.option("--device", default="auto", show_default=True, type=click.Choice(DEVICES), help="Train on this device.")
@click.option(
    "--compile",
    "compiling",
    default="auto",
    type=click.Choice(choices(Compile)),
    help="Use torch.compile, or not. auto uses it on GPUs.",
)
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Also write the figures to this file."
)
def estimate(
    data: str,
    recipe: str | None,
    settings: tuple[str, ...],
    steps: int,
    workers: int,
    device: str,
    compiling: Compile,
    json_file: Path | None,
    **access_settings: Any,
) -> None:
    """Time some steps of a recipe, and forecast what the whole run costs and what limits it."""
    access = read_options_from(**access_settings)
    given = None
    if is_first_rank():
        # What torch is not needed for, which takes seconds to import.
        given = access.open_dataset(data)
        Recipe.load(recipe, settings)
        tell_loading(data)

    from jigsaw_pretrain.train.engine.distributed import rank_zero_errors, start

    with rank_zero_errors():
        ranks = start(device)
        dataset = ranks.run_on_all(lambda: given or access.open_dataset(data))
        found = jp.estimate(
            dataset,
            recipe,
            settings,
            steps=steps,
            workers=workers,
            device=device,
            compiling=compiling,
            access=access,
        )
        _say(ranks, found, workers)
        if json_file is not None and ranks.first:
            figures = {**asdict(found.forecast), "costs": asdict(found.costs), "world": found.world}
            publish_locally(json_file, (json.dumps(figures, indent=2) + "\n").encode())
        tell_training("train; with fewer --set optim.steps=N it takes less", data, recipe, settings)


def _say(ranks: "Ranks", estimated: "jp.Estimate", workers: int) -> None:
    recipe, costs, found = estimated.recipe, estimated.costs, estimated.forecast
    kind = "GPU" if ranks.device.type == "cuda" else "CPU process"
    ranks.log_rank_zero(
        f"a step: {number(costs.step)} s, {number(found.images_per_second)} images/s; "
        f"{costs.wait / costs.step:.0%} of it waiting for data, copies to the device {costs.copy / costs.step:.0%}"
    )
    ranks.log_rank_zero(
        f"start {number(costs.start)} s, a refresh of the ERF table {number(costs.refresh)} s, "
        f"a save {number(costs.save)} s (all on the wall clock)"
    )
    ranks.log_rank_zero(
        f"the full recipe: {recipe.optim.steps:,} steps of {recipe.data.batch} on {ranks.world} {kind}"
        f"{'s' if ranks.world > 1 else ''}: {number(found.hours)} hours on the wall clock, "
        f"{number(found.device_days)} {kind}-days"
    )
    remedy = {
        "data": f"the loader: raise --workers above {workers}, or put the shards on a nearer disk",
        "copies": "copies to the device: the bus is slow or shared",
        "compute": "the device's own arithmetic: run.precision = bf16, --compile on or more devices would help",
    }
    ranks.log_rank_zero(f"limited by {found.limit}: {remedy[found.limit]}")
