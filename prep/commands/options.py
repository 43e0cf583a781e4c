"""Options that several commands of the prep stage share, as decorators of click."""

import click

from jigsaw_pretrain.cli import Share
from jigsaw_pretrain.prep.records import MAX_SKIPPED

again_annotations = click.option(
    "--annotations", metavar="FILE", help="The annotations, as given to `shards`; needed where parts are cut again."
)
again_images = click.option(
    "--images", metavar="DIR", help="The images, as given to `shards`; needed where parts are cut again."
)
workers = click.option(
    "--workers", type=click.IntRange(1), default=None, help="Processes; all usable cores by default."
)
scheduler = click.option("--scheduler", metavar="tcp://HOST:PORT", help="Cut on a Dask cluster.")
max_skipped = click.option(
    "--max-skipped",
    type=Share(),
    default=f"{MAX_SKIPPED:.0%}",
    show_default=True,
    help="The largest share of the images, and of the boxes, that may be unusable.",
)
