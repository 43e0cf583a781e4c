"""``prep sample-data`` draws a small detection dataset to try everything on."""

from collections.abc import Iterable
from pathlib import Path

import click
from rich.console import Console
from rich.progress import track

from jigsaw_pretrain.cli import Command
from jigsaw_pretrain.prep.sample import scenes
from jigsaw_pretrain.prep.sample.sprites import SPRITES


@click.command(cls=Command)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Fill this folder with images/ and annotations.json."
)
@click.option(
    "--images", default=240, show_default=True, type=click.IntRange(1, 100_000), help="Draw this many images."
)
@click.option(
    "--seed", default=0, show_default=True, type=int, help="Draw the images from this seed; another one draws others."
)
def sample_data(out: Path, images: int, seed: int) -> None:
    """Draw a small detection dataset of twelve classes and write OUT/images/ and OUT/annotations.json."""
    console = Console(stderr=True)

    def shown(indices: Iterable[int]) -> Iterable[int]:
        return track(indices, "drawing", images, console=console, disable=not console.is_terminal)

    objects = scenes.sample_data(out, images, seed, shown)
    click.echo(f"{images} images with {objects} objects of {len(SPRITES)} classes in {out}")
