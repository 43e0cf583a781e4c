"""Options that several commands of the prep stage share, as decorators of click."""

import click

from jigsaw_pretrain.cli import Share
from jigsaw_pretrain.prep.records import MAX_SKIPPED

again_annotations = click.option(
    "--annotations",
    metavar="FILE",
    help="Read the annotations in FILE, as given to `shards`. They are needed where parts are cut again.",
)
again_images = click.option(
    "--images",
    metavar="DIR",
    help="Look for the images in DIR, as given to `shards`. They are needed where parts are cut again.",
)
workers = click.option(
    "--workers",
    type=click.IntRange(1),
    default=None,
    help="Work in this many processes. All usable cores are used by default.",
)
scheduler = click.option("--scheduler", metavar="tcp://HOST:PORT", help="Cut on the Dask cluster of this scheduler.")
max_skipped = click.option(
    "--max-skipped",
    type=Share(),
    default=f"{MAX_SKIPPED:.0%}",
    show_default=True,
    help="Stop where more than this share of the images, or of the boxes, is unusable.",
)
