"""`digest`: one line per step that says which crops and pixels a batch holds."""

from typing import Any

import click

import jigsaw_pretrain as jp
from jigsaw_pretrain.cli import Command
from jigsaw_pretrain.train.commands.options import read_options, read_options_from, recipe_options, tell_loading


@click.command(cls=Command)
@click.option(
    "--data",
    required=True,
    metavar="OUT",
    help="Read the dataset in OUT, a folder or URL that `jigsaw-prep shards` wrote.",
)
@recipe_options
@click.option("--steps", default=4, show_default=True, help="Print this many steps.")
@click.option("--from-step", default=0, show_default=True, help="Begin with this step.")
@click.option("--world", default=1, show_default=True, help="Simulate this many ranks.")
@click.option("--workers", default=0, show_default=True, help="Read each rank's data in this many processes.")
@read_options
@click.option(
    "--start-method", type=click.Choice(["fork", "spawn", "forkserver"]), help="Start the workers in this way."
)
def digest(
    data: str,
    recipe: str | None,
    settings: tuple[str, ...],
    steps: int,
    from_step: int,
    world: int,
    workers: int,
    start_method: str | None,
    **access_settings: Any,
) -> None:
    """Print `step identity-sha256 pixels-sha256` for each step of a run: two machines see the same data if these agree.

    Only the recipe's section `data` decides the lines. A run writes its own with `pretrain --log-digest`.
    """
    access = read_options_from(**access_settings)
    dataset, chosen = access.open_dataset(data), jp.Recipe.load(recipe, settings)
    tell_loading(data)
    for line in jp.digest(
        dataset,
        chosen.data,
        steps=steps,
        first=from_step,
        world=world,
        workers=workers,
        start_method=start_method,
        access=access,
    ):
        click.echo(line)
