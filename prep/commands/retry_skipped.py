"""Cutting parts again: after a cause of skipped images was mended (``retry-skipped``), or a shard was damaged (verify).

dataset.json goes first, so that nobody reads a dataset in change; then the parts' done records, so that a run that is
cut short leaves parts to be cut, which the same command, or ``shards``, then does. Costs what cutting them costs.
"""

import time
from collections.abc import Iterable, Mapping

import click
from rich.console import Console

from jigsaw_pretrain.cli import Share, one_line_errors
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.annotations.read import read_annotations
from jigsaw_pretrain.formats.dataset import layout
from jigsaw_pretrain.prep.allowance import DEFAULT
from jigsaw_pretrain.prep.executors import open_executor, usable_cores
from jigsaw_pretrain.prep.images.source import ImageSource
from jigsaw_pretrain.prep.inputs import Inputs, recall, remember
from jigsaw_pretrain.prep.manifests import finish
from jigsaw_pretrain.prep.pipeline import Job, begin, begun_as, check_means, cut, plan_job
from jigsaw_pretrain.prep.plan.forecast import Summary
from jigsaw_pretrain.prep.plan.plan import options_of
from jigsaw_pretrain.prep.records import PartRecord, PlanRecord, read_parts, read_plan
from jigsaw_pretrain.prep.report.console import plain, print_summary
from jigsaw_pretrain.storage import Storage, redacted


@click.command("retry-skipped")
@click.option("--out", required=True, metavar="OUT", help="The output, finished or not.")
@click.option("--annotations", metavar="FILE", help="Where they are, if not where this machine last read them.")
@click.option("--images", metavar="DIR", help="Likewise.")
@click.option("--workers", type=click.IntRange(1), default=None, help="Processes; all usable cores by default.")
@click.option("--scheduler", metavar="tcp://HOST:PORT", help="Cut on a Dask cluster.")
@click.option(
    "--max-skipped", type=Share(), default=DEFAULT, show_default=True, help="The most images that may be unusable."
)
def retry_skipped(
    out: str,
    annotations: str | None,
    images: str | None,
    workers: int | None,
    scheduler: str | None,
    max_skipped: float,
) -> None:
    """Try images again that could not be used, once the cause is mended; their parts are cut again."""
    begun = time.monotonic()
    console = Console()
    shown = plain(redacted(out))
    with one_line_errors(out):
        storage = Storage(out)
        records = done_records(storage, plan_of(storage))
        before = {row.image_file for record in records.values() for row in record.skipped}
        parts = [number for number, record in records.items() if record.skipped]
        if not parts and storage.exists(layout.DATASET):
            console.print(f"{shown} has no image that was skipped when cutting: nothing to do.", soft_wrap=True)
            return
        inputs = recall(out, annotations, images)
        found = redo(out, inputs, parts, workers or usable_cores(), scheduler, max_skipped)
        after = {
            row.image_file for record in done_records(storage, plan_of(storage)).values() for row in record.skipped
        }
    title = f"dataset in {shown}"
    print_summary(console, title, found, time.monotonic() - begun, estimated=False)
    console.print(f"{len(before - after):,} of {len(before):,} skipped images are used now.", highlight=False)


def plan_of(out: Storage) -> PlanRecord:
    """The plan that ``out`` was begun with; raises UserError where there is none."""
    plan = read_plan(out)
    if plan is None:
        raise UserError(
            f"{out.describe(layout.PLAN)} is missing: nothing was begun there. Run `jigsaw-prep shards` first."
        )
    return plan


def done_records(out: Storage, plan: PlanRecord) -> Mapping[int, PartRecord]:
    """The done records there are, by part."""
    found = zip(range(plan.parts), read_parts(out, range(plan.parts)), strict=True)
    return {number: record for number, record in found if record is not None}


def redo(
    out: str, inputs: Inputs, parts: Iterable[int], workers: int, scheduler: str | None, max_skipped: float
) -> Summary:
    """Cut ``parts`` and those that are missing again, and finish. Raises UserError, OSError."""
    storage = Storage(out)
    plan_record = plan_of(storage)
    options = options_of(plan_record.options, storage.describe(layout.PLAN))
    job = Job(inputs.annotations, inputs.images, out, plan_record.seed, options)
    check_means(options)
    raw = read_annotations(job.annotations, job.images)
    begun_as(storage, job, raw.sha256)
    source = ImageSource(job.images)
    source.check()
    plan = plan_job(job, raw, source)
    begin(plan, storage)
    remember(out, inputs)
    storage.remove(layout.DATASET)
    for number in parts:
        storage.remove(layout.part_record(number))
    with open_executor(workers, scheduler) as (executor, at_once):
        cut(plan, job, source, range(plan.part_count), executor, at_once, max_skipped)
    return finish(storage, max_skipped)
