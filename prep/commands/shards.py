"""``prep shards``: annotations and images -> shards/ and manifests/, the whole of the stage.

Costs about 4 ms of one core for each image of COCO (eight crops), 3 with ``--encode lossless``. The same command goes
on with a run that was cut short and says so at once when nothing is left to do; ``--dry-run`` shows what would be made
and writes nothing.
"""

import os
import time
from dataclasses import dataclass

import click
from rich.console import Console

from jigsaw_pretrain.cli import Command, Share, one_line_errors
from jigsaw_pretrain.formats.annotations.read import read_annotations
from jigsaw_pretrain.formats.dataset import layout
from jigsaw_pretrain.prep.crops import SUBSAMPLINGS
from jigsaw_pretrain.prep.executors import ArrayTask, array_task, open_executor, usable_cores
from jigsaw_pretrain.prep.images.pixel_format import AUTO, wanted
from jigsaw_pretrain.prep.images.source import ImageSource
from jigsaw_pretrain.prep.inputs import Inputs, remember
from jigsaw_pretrain.prep.manifests import finish, tidy
from jigsaw_pretrain.prep.pipeline import PrepJob, begin, begun_as, check_means, cut, plan_job, settled
from jigsaw_pretrain.prep.plan import forecast
from jigsaw_pretrain.prep.plan.plan import CONTEXT_AT, ENCODINGS, Plan, PlanOptions
from jigsaw_pretrain.prep.records import MAX_SKIPPED, remove_dataset
from jigsaw_pretrain.prep.report.console import plain, print_summary
from jigsaw_pretrain.storage import Storage, redacted

ANNOTATIONS_HELP = "COCO JSON, or a folder of Pascal VOC XML or YOLO txt files; a path or a URL."
IMAGES_HELP = "What the file names are relative to: a folder, zip or tar; a path or a URL."


@dataclass(frozen=True)
class RunOptions:
    """How a job is done, none of which shapes the data.

    workers: processes. scheduler: a Dask cluster's address. task: of an array job. max_skipped: a share of images.
    """

    workers: int
    scheduler: str | None
    task: ArrayTask | None
    max_skipped: float
    overwrite: bool
    dry_run: bool


@click.command(cls=Command)
@click.option("--annotations", "annotation_file", required=True, metavar="FILE", help=ANNOTATIONS_HELP)
@click.option("--images", required=True, metavar="DIR", help=IMAGES_HELP)
@click.option("--out", required=True, metavar="OUT", help="Where shards/ and manifests/ go: a folder or a URL.")
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
    "--context-at",
    type=click.Choice(CONTEXT_AT),
    default="prep",
    show_default=True,
    help="Who draws how far each box is enlarged. prep: once, for all (the paper). train: the trainer, anew each time "
    "a crop is drawn; shards then hold each object with all of the context.",
)
@click.option("--crops-per-part", type=click.IntRange(1), default=4000, show_default=True, help="At most.")
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
@click.option(
    "--encode",
    type=click.Choice(ENCODINGS),
    default="pixels",
    show_default=True,
    help="pixels: decode the image, encode the crops. lossless: cut JPEGs along their own blocks (needs turbojpeg; of "
    "8-bit RGB only).",
)
@click.option(
    "--pixels",
    default=AUTO,
    show_default=True,
    metavar="FORMAT",
    help="Of the crops. auto: as the images have them. rgb8: 8-bit RGB as JPEG. Else channels and type (uint8, uint16, "
    "float32), such as 1xuint16 or 6xfloat32, kept losslessly as PNG or npy.",
)
@click.option("--workers", type=click.IntRange(1), default=None, help="Processes; all usable cores by default.")
@click.option("--scheduler", metavar="tcp://HOST:PORT", help="Cut on a Dask cluster.")
@click.option("--task-index", type=click.IntRange(0), help="Cut one share of the parts, as a task of an array job.")
@click.option("--task-count", type=click.IntRange(1), help="Of how many; then `prep finish` once all are done.")
@click.option(
    "--max-skipped", type=Share(), default=MAX_SKIPPED, show_default=True, help="The most images that may be unusable."
)
@click.option("--overwrite", is_flag=True, help="Remove what prep wrote to OUT before, and start anew.")
@click.option("--dry-run", is_flag=True, help="Print the plan's table and write nothing.")
def shards(
    annotation_file: str,
    images: str,
    out: str,
    seed: int,
    negatives_per_positive: float,
    context: float,
    context_at: str,
    crops_per_part: int,
    jpeg_quality: int,
    subsampling: str,
    exif: str,
    encode: str,
    pixels: str,
    workers: int | None,
    scheduler: str | None,
    task_index: int | None,
    task_count: int | None,
    max_skipped: float,
    overwrite: bool,
    dry_run: bool,
) -> None:
    """Cut a detection dataset into shards of object and background crops.

    The same command goes on with a run that was cut short. The result is the same for any number of workers.
    """
    shaping = (negatives_per_positive, context, crops_per_part, jpeg_quality, subsampling, exif, encode, context_at)
    options = PlanOptions(*shaping, pixels=wanted(pixels))
    task = array_task(task_index, task_count, os.environ)
    manner = RunOptions(workers or usable_cores(), scheduler, task, max_skipped, overwrite, dry_run)
    with one_line_errors(out):
        run(PrepJob(annotation_file, images, out, seed, options), manner)


def run(job: PrepJob, manner: RunOptions) -> None:
    """Do the job; raises UserError, OSError. Tables go to standard output, progress to standard error."""
    begun = time.monotonic()
    console = Console()
    shown = plain(redacted(job.out))
    raw = read_annotations(job.annotations, job.images)
    out = Storage(job.out)
    if not manner.dry_run and not manner.overwrite:
        job = settled(job, begun_as(out, job, raw.sha256))
        if out.exists(layout.DATASET):
            tidy(out)
            console.print(f"{shown} is finished: nothing to do.", highlight=False, soft_wrap=True)
            return
    source = ImageSource(job.images)
    source.check()
    plan = plan_job(job, raw, source)
    del raw
    if manner.dry_run:
        _print_plan(console, plan, manner)
        return
    check_means(job.options)
    if manner.overwrite:
        remove_dataset(out)
    begin(plan, out)
    remember(job.out, Inputs(job.annotations, job.images))
    mine = manner.task.mine(plan.part_count) if manner.task else range(plan.part_count)
    workers = min(manner.workers, len(mine)) or 1
    with open_executor(workers, manner.scheduler) as (executor, at_once):
        cut(plan, job, source, mine, executor, at_once, manner.max_skipped)
    if manner.task:
        console.print(
            f"Task {manner.task.index} of {manner.task.count} is done: {len(mine):,} of {plan.part_count:,} parts. "
            f"When all tasks are: jigsaw-prep finish --out {shown}",
            highlight=False,
            soft_wrap=True,
        )
        return
    found = finish(out, manner.max_skipped)
    print_summary(console, f"dataset in {shown}", found, time.monotonic() - begun, estimated=False)


def _print_plan(console: Console, plan: Plan, manner: RunOptions) -> None:
    expected = forecast.planned(plan)
    seconds = (expected.seconds or 0.0) / min(manner.workers, plan.part_count)
    print_summary(console, "plan (nothing was written)", expected, seconds, estimated=True)
