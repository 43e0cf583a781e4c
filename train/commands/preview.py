"""`preview`: a sheet of jigsaws as the trainer sees them."""

from pathlib import Path
from typing import Any

import click

from jigsaw_pretrain.cli import Command
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.jigsaw import Template
from jigsaw_pretrain.formats.pixels import display_note, displayed
from jigsaw_pretrain.train.commands.options import read_options, read_options_from
from jigsaw_pretrain.train.data.loader import JigsawLoader
from jigsaw_pretrain.train.recipe import FITS, StreamOptions
from jigsaw_pretrain.train.report.sheet import sheet


@click.command(cls=Command)
@click.option("--data", required=True, metavar="OUT", help="The prepped dataset: a folder or URL.")
@click.option("--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help="The picture to write.")
@click.option("--count", default=16, show_default=True, type=click.IntRange(1, 400), help="How many jigsaws.")
@click.option("--seed", default=0, show_default=True, help="Seed of the run.")
@click.option("--size", default=224, show_default=True, help="Side of a jigsaw in pixels.")
@click.option("--split", default=64, show_default=True, help="Where the template is cut.")
@click.option("--fit", type=click.Choice(FITS), default="crop", show_default=True, help="How a crop meets its region.")
@read_options
@click.option("--augment/--no-augment", default=True, show_default=True, help="Augment as in training.")
def preview(
    data: str, out: Path, count: int, seed: int, size: int, split: int, fit: str, augment: bool, **access_settings: Any
) -> None:
    """Draw a sheet of jigsaws as the trainer sees them, regions outlined and labelled."""
    access = read_options_from(**access_settings)
    dataset, template = access.open_dataset(data), Template(size, split)
    options = StreamOptions(seed=seed, batch=count, fit=fit, augment=augment)
    loader = JigsawLoader(dataset, template, options, workers=0, stop_step=1, access=access)
    for note in loader.notes:
        click.echo(note, err=True)
    batch = next(iter(loader))
    shown = displayed(batch.images.numpy(), dataset.pixels, *dataset.measured)
    page = sheet(shown, batch.labels.tolist(), batch.groups.tolist(), template, dataset.classes)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        page.save(out)
    except (OSError, ValueError) as error:
        raise UserError(f"{out}: cannot write the picture ({error}): choose another file, such as sheet.png") from error
    click.echo(" ".join(filter(None, (f"{out}: {count} jigsaws", display_note(dataset.pixels)))))
