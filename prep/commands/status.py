"""``prep status`` tells how far a run is, from its output alone, on any machine that can read it.

Parts done are their records; running and failed ones have small markers (prep/records.py), which are hints. Speed
is that of the last hundred parts, by the store's own times of writing. One listing and a few small reads.
"""

import click
from rich.table import Table

from jigsaw_pretrain.cli import Command, console_for_names, one_line_errors, plain
from jigsaw_pretrain.errors import redacted
from jigsaw_pretrain.prep import records
from jigsaw_pretrain.prep.records import LOST_SECONDS, RunStatus
from jigsaw_pretrain.prep.report.console import readable_time


@click.command(cls=Command)
@click.option("--out", required=True, metavar="OUT", help="Look at what prep has written to OUT, a folder or a URL.")
def status(out: str) -> None:
    """Show how far a run is: the parts done, running and failed, the speed and the time left."""
    with one_line_errors(out):
        found = records.status(out)
    listing = Table(title=plain(redacted(out)), show_header=False, title_justify="left")
    listing.add_column()
    listing.add_column(justify="right")
    listing.add_row("parts done", f"{found.done:,} of {found.parts:,}")
    listing.add_row("running", f"{found.running:,}")
    if found.lost:
        listing.add_row(f"begun over {LOST_SECONDS / 60:.0f} min ago (killed?)", f"{found.lost:,}")
    listing.add_row("failed", f"{len(found.failed):,}")
    if found.parts_per_second and not found.finished:
        crops = found.crops / found.parts
        rate = found.parts_per_second
        listing.add_row("speed", f"{60 * rate:,.1f} parts/min, {crops * rate:,.0f} crops/s")
        listing.add_row("time left", f"about {readable_time(found.seconds_left or 0.0)}")
    listing.add_row("state", _state(found))
    console = console_for_names()
    console.print(listing)
    for part, reason in list(found.failed.items())[:10]:
        console.print(f"part {part} failed: {plain(reason)}", highlight=False, soft_wrap=True)


def _state(found: RunStatus) -> str:
    if found.missing:
        rest = "finished, but" if found.finished else "stopped:"
        return f"{rest} {found.missing:,} images are missing; `jigsaw-prep shards` with their --images looks again"
    if found.finished:
        return "finished"
    if found.done == found.parts:
        return "all parts are done: jigsaw-prep finish"
    return "running" if found.running else "stopped; run `jigsaw-prep shards` again to resume"
