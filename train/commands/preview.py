"""`preview`: a sheet of jigsaws as the trainer sees them."""

from pathlib import Path
from typing import Any

import click

from jigsaw_pretrain.cli import Command
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.pixels import display_note
from jigsaw_pretrain.train.commands.options import (
    read_options,
    read_options_from,
    recipe_options,
    tell_loading,
    tell_training,
)
from jigsaw_pretrain.train.recipe import Recipe


@click.command(cls=Command)
@click.option(
    "--data",
    required=True,
    metavar="OUT",
    help="Read the dataset in OUT, a folder or URL that `jigsaw-prep shards` wrote.",
)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help="Write the picture to this file."
)
@click.option("--count", default=16, show_default=True, type=click.IntRange(1, 400), help="Draw this many jigsaws.")
@recipe_options
@read_options
def preview(
    data: str, out: Path, count: int, recipe: str | None, settings: tuple[str, ...], **access_settings: Any
) -> None:
    """Draw the first jigsaws of a recipe's run as the trainer sees them, regions outlined and labelled."""
    access = read_options_from(**access_settings)
    dataset = access.open_dataset(data)
    chosen = Recipe.load(recipe, settings)
    tell_loading(data)

    from jigsaw_pretrain.train.report import sheet

    page = sheet.preview(dataset, chosen.data, count, access)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        page.save(out)
    except (OSError, ValueError) as error:
        raise UserError(f"{out}: cannot write the picture ({error}): choose another file, such as sheet.png") from error
    click.echo(" ".join(filter(None, (f"{out}: {count} jigsaws", display_note(dataset.pixels)))))
    tell_training("train, if these show your objects", data, recipe, settings)
