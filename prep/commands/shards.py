"""``prep shards`` turns annotations and images into shards/ and manifests/: the whole of the stage.

Costs about 4 ms of one core for each image of COCO (eight crops), 3 with ``--encode lossless``. The same command goes
on with a run that was cut short and says so at once when nothing is left to do; ``--dry-run`` shows what would be made
and writes nothing.
"""

import logging
import os
import time
from collections.abc import Mapping
from typing import Any

import click

from jigsaw_pretrain.cli import Command, FiniteRange, console_for_names, one_line_errors, plain, tell_next
from jigsaw_pretrain.config import choices, read_toml
from jigsaw_pretrain.errors import COMMAND_LINE, redacted
from jigsaw_pretrain.formats.annotations import options as reads
from jigsaw_pretrain.formats.annotations.read import Reading
from jigsaw_pretrain.formats.annotations.skipped import SEVERAL_SPLITS
from jigsaw_pretrain.formats.dataset.dataset import ContextAt, Encoding
from jigsaw_pretrain.prep import pipeline
from jigsaw_pretrain.prep.commands import options
from jigsaw_pretrain.prep.crops import SUBSAMPLINGS
from jigsaw_pretrain.prep.executors import array_task, usable_cores
from jigsaw_pretrain.prep.images.pixel_format import AUTO
from jigsaw_pretrain.prep.plan.plan import Plan
from jigsaw_pretrain.prep.report.console import ConsoleProgress, print_recipe, print_summary

logger = logging.getLogger(__name__)


@click.command(cls=Command)
@reads.annotations
@reads.images
@click.option("--out", required=True, metavar="OUT", help="Write shards/ and manifests/ to OUT, a folder or a URL.")
@click.option("--seed", default=0, show_default=True, help="Draw every random choice from this seed.")
@click.option(
    "--negatives-per-positive",
    type=FiniteRange(0, 100),
    default=0.1,
    show_default=True,
    help="Cut this many background crops for each object crop. 0 cuts none, as federated labels such as "
    "LVIS's ask for.",
)
@click.option(
    "--context",
    type=FiniteRange(1, 10),
    default=2.0,
    show_default=True,
    help="Enlarge boxes to at most this many times their width and height.",
)
@click.option(
    "--context-at",
    type=click.Choice(choices(ContextAt)),
    default="prep",
    show_default=True,
    help="Say who draws how far each box is enlarged. prep draws it once, for all, as in the paper. train "
    "draws it anew each time a crop is used; shards then hold each object with all of the context.",
)
@click.option(
    "--crops-per-part",
    type=click.IntRange(1),
    default=4000,
    show_default=True,
    help="Put at most this many crops into a part.",
)
@click.option(
    "--jpeg-quality",
    type=click.IntRange(1, 100),
    default=95,
    show_default=True,
    help="Encode the crops as JPEG of this quality.",
)
@click.option(
    "--subsampling",
    type=click.Choice(SUBSAMPLINGS),
    default="444",
    show_default=True,
    help="Encode the crops with this chroma subsampling.",
)
@reads.each
@click.option(
    "--encode",
    type=click.Choice(choices(Encoding)),
    default="pixels",
    show_default=True,
    help="pixels decodes the image and encodes the crops. lossless cuts JPEGs along their own blocks; it "
    "needs turbojpeg and takes 8-bit RGB only.",
)
@click.option(
    "--pixels",
    default=AUTO,
    show_default=True,
    metavar="FORMAT",
    help="Store the crops in this pixel format. auto keeps the images' own; rgb8 makes 8-bit RGB as JPEG. "
    "Channels and type (uint8, uint16, float32), such as 1xuint16 or 6xfloat32, are kept losslessly "
    "as PNG or npy.",
)
@options.workers
@options.scheduler
@click.option("--task-index", type=click.IntRange(0), help="Cut one share of the parts, as this task of an array job.")
@click.option(
    "--task-count",
    type=click.IntRange(1),
    help="Share the parts among this many tasks. Run `prep finish` once all of them are done.",
)
@options.max_skipped
@click.option("--overwrite", is_flag=True, help="Remove what prep wrote to OUT before, and start anew.")
@click.option(
    "--recipe",
    metavar="FILE",
    help="Fill the plan's table of slots by this recipe, which training will use. [default: the one that "
    "prep fits to the dataset and writes to OUT/recipe.toml]",
)
@click.option(
    "--dry-run", is_flag=True, help="Print the plan's tables and recipe.toml with its reasons, and write nothing."
)
def shards(
    annotations: str,
    images: str,
    out: str,
    seed: int,
    pixels: str,
    workers: int | None,
    scheduler: str | None,
    task_index: int | None,
    task_count: int | None,
    max_skipped: float,
    overwrite: bool,
    recipe: str | None,
    dry_run: bool,
    **shaping: Any,
) -> None:
    """Cut a detection dataset into shards of object and background crops.

    The same command goes on with a run that was cut short. The result is the same for any number of workers.
    """
    begun = time.monotonic()
    console, shown, shaping = console_for_names(), plain(redacted(out)), {**shaping, "pixels": pixels}
    task = array_task(task_index, task_count, os.environ)
    logger.info("%s: reading the annotations", redacted(annotations))
    with one_line_errors(out):
        if recipe:
            read_toml(recipe)
        if dry_run:
            planned = pipeline.plan(annotations, images, seed=seed, **shaping)
            expected = planned.summary()
            seconds = (expected.seconds or 0.0) / min(workers or usable_cores(), planned.part_count)
            print_summary(console, "plan (nothing was written)", expected, seconds, True, recipe=recipe)
            if not recipe:
                print_recipe(console, expected)
            _tell_what_follows_the_plan(planned, annotations, images, shaping)
            return
        progress = ConsoleProgress()
        shared: dict[str, Any] = {
            "seed": seed,
            "workers": workers,
            "scheduler": scheduler,
            "max_skipped": max_skipped,
            "overwrite": overwrite,
            "progress": progress,
        }
        if task:
            whole = pipeline.shards_task(annotations, images, out, task, **shared, **shaping)
        else:
            pipeline.shards(annotations, images, out, **shared, **shaping)
    if progress.summary:
        print_summary(console, f"dataset in {shown}", progress.summary, time.monotonic() - begun, False, recipe=recipe)
        options.tell_next_of(out, recipe)
        return
    said = f"{shown} is finished: nothing to do."
    if task and whole:
        said = (
            f"Task {task.index} of {task.count} is done: {len(task.mine(whole.part_count)):,} of "
            f"{whole.part_count:,} parts. When all tasks are: jigsaw-prep finish --out {shown}"
        )
    console.print(said, highlight=False, soft_wrap=True)
    if not task:
        options.tell_next_of(out, recipe)


def _tell_what_follows_the_plan(planned: Plan, annotations: str, images: str, shaping: Mapping[str, Any]) -> None:
    words = ["jigsaw-prep", *(word for word in COMMAND_LINE.get() if word != "--dry-run")]
    stated = [
        thing.rpartition(" (")[0] for note in planned.notes if note.check == SEVERAL_SPLITS for thing in note.things
    ]
    if "train" in stated:
        others = " and ".join(f"--split {name}" for name in stated if name != "train")
        tell_next(
            (f"cut the crops of the training images alone; {others} is for validation", [*words, "--split", "train"])
        )
        return
    split = ["jigsaw-prep", "split", "--annotations", annotations, "--images", images, "--out", "split"]
    split += Reading(exif=shaping["exif"], voc_origin=shaping["voc_origin"]).words()
    aside = "first, unless validation images are set aside already: they must stay out of pre-training"
    tell_next(*([] if shaping.get("split") else [(aside, split)]), ("cut the crops", words))
