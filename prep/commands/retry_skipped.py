"""``prep retry-skipped`` cuts the parts of skipped images again, once the cause is fixed.

Costs what cutting these parts costs (``recut`` of prep/pipeline.py).
"""

import time

import click

from jigsaw_pretrain.cli import Command, console_for_names, one_line_errors, plain
from jigsaw_pretrain.errors import redacted
from jigsaw_pretrain.formats.annotations import options as reads
from jigsaw_pretrain.formats.dataset import layout
from jigsaw_pretrain.prep.commands import options
from jigsaw_pretrain.prep.executors import usable_cores
from jigsaw_pretrain.prep.pipeline import done_records, recut
from jigsaw_pretrain.prep.records import require_plan
from jigsaw_pretrain.prep.report.console import ConsoleProgress, print_summary
from jigsaw_pretrain.storage.store import Storage


@click.command("retry-skipped", cls=Command)
@click.option("--out", required=True, metavar="OUT", help="Try again what was skipped in OUT, finished or not.")
@reads.annotations
@reads.images
@options.workers
@options.scheduler
@options.max_skipped
def retry_skipped(
    out: str,
    annotations: str,
    images: str,
    workers: int | None,
    scheduler: str | None,
    max_skipped: float,
) -> None:
    """Try images again that could not be used, once the cause is fixed; their parts are cut again."""
    begun = time.monotonic()
    console = console_for_names()
    shown = plain(redacted(out))
    with one_line_errors(out):
        storage = Storage(out)
        records = done_records(storage, require_plan(storage))
        before = {row.image_file for record in records.values() for row in record.skipped}
        parts = [number for number, record in records.items() if record.skipped]
        if not parts and storage.exists(layout.DATASET):
            console.print(f"{shown} has no image that was skipped when cutting: nothing to do.", soft_wrap=True)
            return
        count, progress = workers or usable_cores(), ConsoleProgress()
        found = recut(out, annotations, images, parts, count, scheduler, max_skipped, progress)
        after = {
            row.image_file for record in done_records(storage, require_plan(storage)).values() for row in record.skipped
        }
    title = f"dataset in {shown}"
    print_summary(console, title, found, time.monotonic() - begun, estimated=False)
    console.print(f"{len(before - after):,} of {len(before):,} skipped images are used now.", highlight=False)
