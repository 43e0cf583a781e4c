"""`digest`: one line per step that says which crops and pixels a batch holds."""

from typing import Any

import click

from jigsaw_pretrain.cli import Command
from jigsaw_pretrain.formats.jigsaw import Template
from jigsaw_pretrain.train.commands.options import read_options, read_options_from
from jigsaw_pretrain.train.data.digest import digest_lines
from jigsaw_pretrain.train.data.loader import loaders_of
from jigsaw_pretrain.train.recipe import BALANCES, FITS, StreamOptions


@click.command(cls=Command)
@click.option("--data", required=True, metavar="OUT", help="The prepped dataset: a folder or URL.")
@click.option("--batch", default=64, show_default=True, help="Jigsaws in a global batch.")
@click.option("--lanes", type=int, help="Streams of the run. [default: the largest divisor of the batch up to 64]")
@click.option("--steps", default=4, show_default=True, help="How many steps to print.")
@click.option("--from-step", default=0, show_default=True, help="The first of them.")
@click.option("--world", default=1, show_default=True, help="Ranks to simulate.")
@click.option("--workers", default=0, show_default=True, help="Worker processes of each rank.")
@click.option("--seed", default=0, show_default=True, help="Seed of the run.")
@click.option("--size", default=224, show_default=True, help="Side of a jigsaw in pixels.")
@click.option("--split", default=64, show_default=True, help="Where the template is cut.")
@click.option("--fit", type=click.Choice(FITS), default="crop", show_default=True, help="How a crop meets its region.")
@click.option("--resize-low", default=0.8, show_default=True, help="Smallest resize ratio.")
@click.option("--resize-high", default=1.5, show_default=True, help="Largest resize ratio.")
@click.option("--flip", default=0.5, show_default=True, help="Probability of a horizontal flip.")
@click.option("--max-repeat", default=20, show_default=True, help="How often a thin group's crops may repeat.")
@click.option("--balance", type=click.Choice(BALANCES), default="none", show_default=True, help="Favour rare classes.")
@read_options
@click.option("--start-method", type=click.Choice(["fork", "spawn", "forkserver"]), help="How workers are started.")
def digest(
    data: str,
    batch: int,
    lanes: int | None,
    steps: int,
    from_step: int,
    world: int,
    workers: int,
    seed: int,
    size: int,
    split: int,
    fit: str,
    resize_low: float,
    resize_high: float,
    flip: float,
    max_repeat: int,
    balance: str,
    start_method: str | None,
    **access_settings: Any,
) -> None:
    """Print `step identity-sha256 pixels-sha256` for each step of a run: two machines see the same data if these agree.

    The defaults are the paper's; a run of other options has the lines of those options.
    """
    options = StreamOptions(
        seed=seed,
        batch=batch,
        lanes=lanes,
        fit=fit,
        resize_low=resize_low,
        resize_high=resize_high,
        flip=flip,
        max_repeat=max_repeat,
        balance=balance,
    )
    access = read_options_from(**access_settings)
    dataset, template = access.open_dataset(data), Template(size, split)
    loaders = loaders_of(
        dataset,
        template,
        options,
        world=world,
        workers=workers,
        first=from_step,
        steps=steps,
        start_method=start_method,
        access=access,
    )
    for note in loaders[0].notes:
        click.echo(note, err=True)
    for line in digest_lines(loaders, options):
        click.echo(line)
