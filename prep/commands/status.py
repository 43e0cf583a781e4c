"""``prep status`` tells how far a run is, from its output alone, on any machine that can read it.

Parts done are their records; running and failed ones are told by small markers (prep/records.py) and are hints. Speed
is that of the last hundred parts, by the store's own times of writing. One listing and a few small reads.
"""

import time
from dataclasses import dataclass

import click
from rich.console import Console
from rich.table import Table

from jigsaw_pretrain.cli import Command, one_line_errors
from jigsaw_pretrain.formats.dataset import layout
from jigsaw_pretrain.prep import records
from jigsaw_pretrain.prep.records import PlanRecord, require_plan
from jigsaw_pretrain.prep.report.console import plain, readable_time
from jigsaw_pretrain.storage import Entry, Storage, redacted

RECENT_PARTS = 100
PAUSE_SECONDS = 1800.0
"""A gap between two parts that is longer is a pause of the run, not its speed."""

LOST_SECONDS = 900.0
"""A part that was begun longer ago is most likely that of a killed task."""


@dataclass(frozen=True)
class Progress:
    """Of ``parts``: those done, those begun (and of these the ones begun long ago), those failed with their reasons.

    parts_per_second: None where too few are done to tell.
    """

    parts: int
    done: int
    running: int
    lost: int
    failed: dict[int, str]
    parts_per_second: float | None
    finished: bool

    @property
    def seconds_left(self) -> float | None:
        """The time left at the present speed."""
        return (self.parts - self.done) / self.parts_per_second if self.parts_per_second else None


@click.command(cls=Command)
@click.option("--out", required=True, metavar="OUT", help="The output: a folder or a URL.")
def status(out: str) -> None:
    """How far a run is: parts done, running and failed, speed, time left."""
    with one_line_errors(out):
        storage = Storage(out)
        plan = require_plan(storage)
        found = progress(storage, plan, time.time())
    listing = Table(title=plain(redacted(out)), show_header=False, title_justify="left")
    listing.add_column()
    listing.add_column(justify="right")
    listing.add_row("parts done", f"{found.done:,} of {found.parts:,}")
    listing.add_row("running", f"{found.running:,}")
    if found.lost:
        listing.add_row(f"begun over {LOST_SECONDS / 60:.0f} min ago (killed?)", f"{found.lost:,}")
    listing.add_row("failed", f"{len(found.failed):,}")
    if found.parts_per_second and not found.finished:
        crops = plan.crops / plan.parts
        rate = found.parts_per_second
        listing.add_row("speed", f"{60 * rate:,.1f} parts/min, {crops * rate:,.0f} crops/s")
        listing.add_row("time left", f"about {readable_time(found.seconds_left or 0.0)}")
    listing.add_row("state", _state(found))
    console = Console()
    console.print(listing)
    for part, reason in list(found.failed.items())[:10]:
        console.print(f"part {part} failed: {plain(reason)}", highlight=False, soft_wrap=True)


def progress(out: Storage, plan: PlanRecord, now: float) -> Progress:
    """The progress of an output at a Unix time."""
    entries = {entry.name: entry for entry in out.entries(layout.PARTS)}
    done = {number for number in range(plan.parts) if f"{number:06d}.json" in entries}
    begun = _marked(entries, records.RUNNING, done)
    failed = _marked(entries, records.FAILED, done)
    lost = [entry for entry in begun.values() if entry.written is not None and now - entry.written > LOST_SECONDS]
    written = (entries[f"{number:06d}.json"].written for number in done)
    return Progress(
        parts=plan.parts,
        done=len(done),
        running=len(begun) - len(lost),
        lost=len(lost),
        failed={number: records.failure_reason(out, number) for number in failed},
        parts_per_second=_speed(sorted(moment for moment in written if moment is not None)),
        finished=out.exists(layout.DATASET),
    )


def _marked(entries: dict[str, Entry], kind: str, done: set[int]) -> dict[int, Entry]:
    numbers = {name.removesuffix(kind): entry for name, entry in entries.items() if name.endswith(kind)}
    found = {int(number): entry for number, entry in numbers.items() if number.isdigit()}
    return {number: found[number] for number in sorted(found.keys() - done)}


def _speed(moments: list[float]) -> float | None:
    """Parts per second since the last pause; None where fewer than two tell."""
    recent = moments[-RECENT_PARTS:]
    start = len(recent) - 1
    while start > 0 and recent[start] - recent[start - 1] < PAUSE_SECONDS:
        start -= 1
    count, span = len(recent) - 1 - start, recent[-1] - recent[start] if recent else 0.0
    return count / span if count > 0 and span > 0 else None


def _state(found: Progress) -> str:
    if found.finished:
        return "finished"
    if found.done == found.parts:
        return "all parts are done: jigsaw-prep finish"
    return "running" if found.running else "stopped; run `jigsaw-prep shards` again to resume"
