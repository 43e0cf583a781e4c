"""``prep shards``: annotations and images -> shards/ and manifests/, the whole of the stage.

Costs about 15 ms of one core for each image of COCO (seven crops). The same command resumes a run that was cut short
and says so at once when there is nothing left to do; ``--dry-run`` shows what would be made and writes nothing.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import click
from rich.console import Console

from formats import names
from formats.dataset import FORMAT_VERSION
from formats.errors import UserError
from formats.storage import Storage
from prep import annotations, summary, table
from prep.crops import SUBSAMPLINGS
from prep.executors import local_executor, run_tasks, usable_cores
from prep.finish import finish
from prep.parts import PartTask, run_part
from prep.plan import Options, Plan, make_plan
from prep.records import (
    PartRecord,
    check_agreement,
    publish_plan,
    read_part,
    read_plan,
    recorded_options,
    shaping_versions,
)
from prep.source import ImageSource


@dataclass(frozen=True)
class Job:
    """A run of ``prep shards``: what to read, where to write, the options that shape the data and those that do not."""

    annotations: str
    images: str
    out: str
    seed: int
    options: Options
    workers: int
    dry_run: bool


@click.command()
@click.option("--annotations", "annotation_file", required=True, metavar="FILE", help="COCO JSON.")
@click.option("--images", required=True, metavar="DIR", help="What the annotations' file names are relative to.")
@click.option("--out", required=True, metavar="OUT", help="Where shards/ and manifests/ go.")
@click.option("--seed", default=0, show_default=True, help="Decides every random choice.")
@click.option(
    "--negatives-per-positive",
    type=click.FloatRange(0, 100),
    default=0.1,
    show_default=True,
    help="Background crops for each object crop; 0 for none (federated labels such as LVIS's).",
)
@click.option(
    "--context",
    type=click.FloatRange(1, 10),
    default=2.0,
    show_default=True,
    help="How many times as wide and as high an enlarged box may become.",
)
@click.option(
    "--crops-per-part", type=click.IntRange(1), default=4000, show_default=True, help="At most; see --workers."
)
@click.option("--jpeg-quality", type=click.IntRange(1, 100), default=95, show_default=True, help="Of the crops.")
@click.option(
    "--subsampling", type=click.Choice(SUBSAMPLINGS), default="444", show_default=True, help="Of the crops' colour."
)
@click.option(
    "--exif",
    type=click.Choice(("ignore", "apply")),
    default="ignore",
    show_default=True,
    help="ignore: boxes refer to stored pixels (COCO). apply: boxes were drawn on upright pictures.",
)
@click.option("--workers", type=click.IntRange(1), default=None, help="Processes; all usable cores by default.")
@click.option("--dry-run", is_flag=True, help="Print the plan's table and write nothing.")
def shards(
    annotation_file: str,
    images: str,
    out: str,
    seed: int,
    negatives_per_positive: float,
    context: float,
    crops_per_part: int,
    jpeg_quality: int,
    subsampling: str,
    exif: str,
    workers: int | None,
    dry_run: bool,
) -> None:
    """Cut a detection dataset into shards of object and background crops.

    The same command goes on with a run that was cut short. The result is the same for any number of workers.
    """
    options = Options(negatives_per_positive, context, crops_per_part, jpeg_quality, subsampling, exif)
    run(Job(annotation_file, images, out, seed, options, workers or usable_cores(), dry_run))


def run(job: Job) -> None:
    """Do the job; raises UserError. Tables go to standard output, progress to standard error."""
    begun = time.monotonic()
    console = Console()
    try:
        raw, sha256 = annotations.read_file(job.annotations)
        out = Storage(job.out)
        if not job.dry_run and already_finished(out, job, sha256):
            console.print(f"{table.plain(job.out)} is finished: nothing to do.", highlight=False)
            return
        ImageSource(job.images).check()
        plan = make_plan(annotations.parse(raw, job.annotations, sha256), job.options, job.seed)
        del raw
        if job.dry_run:
            expected = summary.planned(plan)
            seconds = (expected.seconds or 0.0) / min(job.workers, plan.part_count)
            table.print_summary(console, "plan (nothing was written)", expected, seconds, estimated=True)
            return
        cut(plan, job, out)
        found = finish(out)
    except OSError as error:
        raise UserError(
            f"{error.filename or job.out}: {error.strerror or error}. Mend that and run the same command again: it "
            "goes on with what is done."
        ) from error
    table.print_summary(console, f"dataset in {table.plain(job.out)}", found, time.monotonic() - begun, estimated=False)


def already_finished(out: Storage, job: Job, sha256: str) -> bool:
    """Whether ``out`` holds the finished dataset of this job; raises UserError where it holds another's data."""
    record = read_plan(out)
    if record is None:
        return False
    check_agreement(
        out.describe(names.PLAN),
        {
            "format_version": record.format_version,
            "seed": record.seed,
            "options": record.options,
            "versions": record.versions,
        },
        {
            "format_version": FORMAT_VERSION,
            "seed": job.seed,
            "options": recorded_options(job.options.to_dict(), sha256),
            "versions": shaping_versions(),
        },
    )
    return out.exists(names.DATASET)


def cut(plan: Plan, job: Job, out: Storage) -> None:
    """Cut all parts that have no done record."""
    begun = read_plan(out)
    if begun is None:
        publish_plan(out, plan)
    else:
        check_agreement(out.describe(names.PLAN), {"plan": begun.plan}, {"plan": plan.digest})
    missing = [number for number in range(plan.part_count) if read_part(out, number) is None]
    workers = min(job.workers, len(missing)) or 1
    with local_executor(workers) as executor:
        records: Iterator[PartRecord] = run_tasks(
            executor, run_part, (task_of(plan, job, number) for number in missing), 2 * workers
        )
        table.show_progress(Console(stderr=True), records, plan.part_count, plan.part_count - len(missing))


def task_of(plan: Plan, job: Job, number: int) -> PartTask:
    """The task of one part."""
    images, crops = plan.part(number)
    return PartTask(
        number=number,
        plan=plan.digest,
        versions=shaping_versions(),
        out=job.out,
        source=job.images,
        quality=job.options.jpeg_quality,
        subsampling=job.options.subsampling,
        exif=job.options.exif,
        background=plan.background,
        images=images,
        crops=crops,
    )
