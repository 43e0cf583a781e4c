"""``prep verify`` hashes every shard and decodes every crop; ``--repair`` cuts damaged parts again.

Exit 0: whole, or repaired; 1: damaged.
"""

import sys

import click
from rich.console import Console
from rich.table import Table

from jigsaw_pretrain.cli import Command, console_for_names, one_line_errors, plain
from jigsaw_pretrain.errors import redacted
from jigsaw_pretrain.prep import pipeline
from jigsaw_pretrain.prep import verify as checks
from jigsaw_pretrain.prep.commands import options
from jigsaw_pretrain.prep.records import Damage
from jigsaw_pretrain.prep.report.console import ConsoleProgress


@click.command(cls=Command)
@click.option("--out", required=True, metavar="OUT", help="Check the dataset in OUT, a folder or a URL.")
@click.option("--repair", is_flag=True, help="Cut damaged parts again, and make the manifests again.")
@options.again_annotations
@options.again_images
@options.workers
def verify(out: str, repair: bool, annotations: str | None, images: str | None, workers: int | None) -> None:
    """Hash every shard, decode every crop, and compare the manifests.

    The exit status is 0 for a whole dataset, and 1 for a damaged one.
    """
    console = console_for_names()
    shown = plain(redacted(out))
    with one_line_errors(out):
        found = checks.verify(out, workers=workers)
        if not found:
            console.print(f"{shown} is whole.", highlight=False, soft_wrap=True)
            return
        _print(console, shown, found)
        if repair:
            pipeline.repair(
                out, found, annotations=annotations, images=images, workers=workers, progress=ConsoleProgress()
            )
            found = checks.verify(out, workers=workers)
            if not found:
                console.print(f"{shown} is repaired.", highlight=False, soft_wrap=True)
                return
            _print(console, shown, found)
            console.print(f"Cutting gives this again: {shown} is not repaired. Please report it.", soft_wrap=True)
            sys.exit(1)
    redone = sorted({damage.part for damage in found if damage.part is not None})
    said = f"Parts to cut again: {', '.join(map(str, redone)) or 'none, only manifests are to be made again'}"
    again = " --annotations FILE --images DIR" if redone else ""
    console.print(
        f"{said}. `jigsaw-prep verify --out {shown} --repair{again}` does it.", highlight=False, soft_wrap=True
    )
    sys.exit(1)


def _print(console: Console, shown: str, found: list[Damage]) -> None:
    listing = Table(title=f"damage in {shown}", title_justify="left")
    for name in ("part", "file", "what"):
        listing.add_column(name, overflow="fold")
    for damage in found:
        listing.add_row("" if damage.part is None else str(damage.part), damage.file, plain(damage.what))
    console.print(listing)
