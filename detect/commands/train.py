"""`detect train`: fine-tune a detector from scratch, from a weights file or from a pre-training run.

A run is resumed with --resume and is then bit for bit the undisturbed one on a CPU; under torchrun all ranks stop at
the same step. How the recipe was fitted to the dataset is printed before the first step (detect/recipe.py).
"""

import logging
from collections.abc import Sequence
from typing import Any

import click

from jigsaw_pretrain import detect
from jigsaw_pretrain.cli import Command, is_first_rank, is_restarted, tell_next
from jigsaw_pretrain.config import choices
from jigsaw_pretrain.detect.annotations import check_places
from jigsaw_pretrain.detect.commands import options
from jigsaw_pretrain.detect.recipe import (
    CONFIG,
    DetectorName,
    DetectorNorm,
    DetectorPrecision,
    DetectorRecipe,
    Freeze,
    Schedule,
)
from jigsaw_pretrain.formats.annotations import options as reads
from jigsaw_pretrain.formats.annotations.read import Reading
from jigsaw_pretrain.formats.dataset import layout
from jigsaw_pretrain.train.engine.loggers import NAMES, wanted
from jigsaw_pretrain.train.engine.run_folder import continues, open_run_folder

logger = logging.getLogger(__name__)

SHORT = {
    "model": "model.name",
    "backbone": "model.backbone",
    "norm": "model.norm",
    "freeze": "model.freeze",
    "schedule": "optim.schedule",
    "precision": "run.precision",
    "images_limit": "data.images_limit",
    "subset_seed": "data.subset_seed",
    "seed": "data.seed",
}
"""Options that are short for a key of the recipe."""


@click.command(cls=Command)
@reads.annotations
@reads.images
@click.option("--val-annotations", help="Report AP on these annotations, of any kind that prep takes.")
@click.option("--val-images", help="Look for the images of --val-annotations here.")
@click.option(
    "--val-split",
    metavar="NAME",
    help="Use this split of --val-annotations, where --split names that of the training images.",
)
@reads.reading
@click.option("--run", required=True, help="Write the run to this folder or URL, which is made if it does not exist.")
@click.option(
    "--init",
    default="scratch",
    show_default=True,
    help="Begin from this backbone: scratch, a weights file, or a run's folder.",
)
@click.option(
    "--recipe",
    metavar="FILE",
    help="Take this recipe: a TOML file, or one that comes with the program (detect-sample, detect-paper). "
    "[default: the Jigsaw paper's]",
)
@click.option("--model", type=click.Choice(choices(DetectorName)), help="This is short for --set model.name=...")
@click.option("--backbone", help="This is short for --set model.backbone=...")
@click.option("--norm", type=click.Choice(choices(DetectorNorm)), help="This is short for --set model.norm=...")
@click.option("--freeze", type=click.Choice(choices(Freeze)), help="This is short for --set model.freeze=...")
@click.option("--schedule", type=click.Choice(choices(Schedule)), help="This is short for --set optim.schedule=...")
@click.option(
    "--precision", type=click.Choice(choices(DetectorPrecision)), help="This is short for --set run.precision=..."
)
@click.option("--seed", type=int, help="This is short for --set data.seed=...")
@click.option("--images-limit", type=click.IntRange(1), help="This is short for --set data.images_limit=...")
@click.option("--subset-seed", type=int, help="This is short for --set data.subset_seed=...")
@click.option(
    "--set",
    "sets",
    multiple=True,
    metavar="SECTION.KEY=VALUE",
    help="Override one key of the recipe. The option may be given several times.",
)
@click.option(
    "--workers", default=2, show_default=True, type=click.IntRange(0), help="Read images in this many processes."
)
@click.option(
    "--device", default="auto", show_default=True, type=click.Choice(options.DEVICES), help="Run on this device."
)
@click.option("--resume", is_flag=True, help="Continue from the newest checkpoint, or begin.")
@click.option("--stop-after", type=click.IntRange(1), help="Stop at this step; the schedule stays as it is.")
@click.option(
    "--log",
    multiple=True,
    type=click.Choice([*NAMES, "none"]),
    help="Also log numbers there. The option may be given several times. [default: tensorboard, where it is installed]",
)
def train(
    annotations: str,
    images: str,
    val_annotations: str | None,
    val_images: str | None,
    val_split: str | None,
    reading: Reading,
    run: str,
    init: str,
    recipe: str | None,
    sets: tuple[str, ...],
    workers: int,
    device: str,
    resume: bool,
    stop_after: int | None,
    log: tuple[str, ...],
    **shortcuts: Any,
) -> None:
    """Fine-tune a detector; RUN gets its weights, metrics, COCO results, AP and a page.

    Under torchrun put -- before the module (`torchrun --nproc-per-node N -m -- detect train ...`): without it torchrun
    takes --run for its own --run-path. Ctrl-C and SIGTERM save a checkpoint and end with status 3, --stop-after with 0.
    Continue with --resume.
    """
    resume = resume or is_restarted()
    sets += tuple(f"{SHORT[name]}={value}" for name, value in shortcuts.items() if value is not None)
    chosen = DetectorRecipe.load(recipe, sets)
    if is_first_rank():
        # What can be refused is, before torch is imported: that takes seconds.
        wanted(log)
        check_places(annotations, images)
        if val_annotations is not None:
            check_places(val_annotations, val_images, "--val-annotations")
        if init != "scratch":
            options.check_weights(init, "--init")
        folder = open_run_folder(run, CONFIG)
        if folder.remote is None:
            continues(folder, resume)
        logger.info("%s from %s; loading torch", chosen.model.name, init)

    from jigsaw_pretrain.detect.report import write_page
    from jigsaw_pretrain.detect.run import SUMMARY
    from jigsaw_pretrain.train.engine.distributed import rank_zero_errors

    with rank_zero_errors():
        detect.train(
            annotations,
            images,
            run,
            chosen,
            val_annotations=val_annotations,
            val_images=val_images,
            val_split=val_split,
            init=init,
            reading=reading,
            resume=resume,
            stop_after=stop_after,
            workers=workers,
            device=device,
            log=wanted(log),
            write_page=write_page,
            title="detect train",
        )
        if not (is_first_rank() and (open_run_folder(run, CONFIG).path / SUMMARY).exists()):
            return
        if val_annotations is None or val_images is None:
            words = [
                "jigsaw-detect",
                "eval",
                "--run",
                run,
                "--annotations",
                "VAL_ANNOTATIONS",
                "--images",
                "VAL_IMAGES",
            ]
            tell_next(("its AP, on images that it has not seen", words))
            return
        as_read = reading.words()
        as_read += ["--val-split", val_split] if val_split is not None else []
        _tell_next(annotations, images, val_annotations, val_images, as_read, run, recipe)


def _tell_next(
    annotations: str,
    images: str,
    val_annotations: str,
    val_images: str,
    as_read: Sequence[str],
    run: str,
    recipe: str | None,
) -> None:
    """What to do with a finished detector."""
    run = run.rstrip("/")
    words = ["--annotations", annotations, "--images", images, "--val-annotations", val_annotations]
    words += ["--val-images", val_images, *as_read, "--data", "OUT", *(["--recipe", recipe] if recipe else [])]
    words += ["--pretrain-recipe", f"OUT/{layout.RECIPE}", "--out", f"{run}-comparison"]
    purpose = f"look: open {run}/report.html. Does the pre-training pay? Trainings of both, OUT being what prep wrote"
    tell_next((purpose, ["jigsaw-detect", "compare", *words]))
