"""`detect compare`: does the pre-training pay? One command that runs a comparison, or tabulates finished runs.

With RUNs it only reads them. With --out it pre-trains, fine-tunes and tabulates arms; called again it continues, so a
machine lent for ten minutes at a time will do (--budget). Table 3's comparison at the papers' recipes takes GPU-weeks;
bench/quality.py and `make compare` run it at sizes that end.
"""

import logging
import math
from pathlib import Path

import click

from jigsaw_pretrain import detect
from jigsaw_pretrain.cli import Command, FiniteRange
from jigsaw_pretrain.config import as_number
from jigsaw_pretrain.detect.annotations import check_places
from jigsaw_pretrain.detect.commands import options
from jigsaw_pretrain.detect.comparison.arms import ARMS, choose
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.annotations import options as reads
from jigsaw_pretrain.formats.annotations.read import Reading
from jigsaw_pretrain.formats.dataset.dataset import open_dataset

logger = logging.getLogger(__name__)


@click.command(cls=Command)
@click.argument("runs", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Write the comparison to this folder: tables, curves and all its runs.",
)
@click.option("--annotations", help="Fine-tune on these annotations, of any kind that prep takes.")
@click.option("--images", help="Look for their images here: a folder, zip or tar; a path or a URL.")
@click.option("--val-annotations", help="Report AP on these annotations, of any kind that prep takes.")
@click.option("--val-images", help="Look for the images of --val-annotations here.")
@click.option(
    "--val-split",
    metavar="NAME",
    help="Use this split of --val-annotations, where --split names that of the training images.",
)
@reads.reading
@click.option("--data", help="Pre-train on this dataset, which `jigsaw-prep shards` made of the same annotations.")
@click.option(
    "--arms",
    default="scratch,jigsaw",
    show_default=True,
    help=f"Compare these arms, separated by commas: TOML files of your own, and {', '.join(ARMS)}.",
)
@click.option(
    "--seeds",
    default=3,
    show_default=True,
    type=click.IntRange(1),
    help="Train each arm with this many seeds, counted from 0.",
)
@click.option(
    "--rates",
    default="0.01,0.02,0.04",
    show_default=True,
    help="Try these learning rates in the sweep. They are stated for batch 16.",
)
@click.option("--recipe", help="Take this recipe for the detector: a TOML file, or a name such as detect-paper.")
@click.option(
    "--set",
    "sets",
    multiple=True,
    metavar="SECTION.KEY=VALUE",
    help="Override a key of the detector's recipe. The option may be given several times.",
)
@click.option(
    "--pretrain-recipe", help="Take this recipe for the pre-training: a TOML file, or a name such as paper-r50."
)
@click.option(
    "--pretrain-set",
    "pretrain_sets",
    multiple=True,
    metavar="SECTION.KEY=VALUE",
    help="Override a key of the pre-training's recipe. The option may be given several times.",
)
@click.option("--imagenet", type=click.Path(path_type=Path), help="Add an arm that begins from this weights file.")
@click.option(
    "--budget", type=FiniteRange(min=0), help="Stop after this many seconds. Call the command again to continue."
)
@click.option(
    "--workers", default=2, show_default=True, type=click.IntRange(0), help="Read images in this many processes."
)
@click.option(
    "--gpus", default=1, show_default=True, type=click.IntRange(1), help="Train on this many GPUs (ranks) at a time."
)
@click.option(
    "--device", default="auto", show_default=True, type=click.Choice(options.DEVICES), help="Run on this device."
)
def compare(
    runs: tuple[Path, ...],
    out: Path | None,
    annotations: str | None,
    images: str | None,
    val_annotations: str | None,
    val_images: str | None,
    val_split: str | None,
    reading: Reading,
    data: str | None,
    arms: str,
    seeds: int,
    rates: str,
    recipe: str | None,
    sets: tuple[str, ...],
    pretrain_recipe: str | None,
    pretrain_sets: tuple[str, ...],
    imagenet: Path | None,
    budget: float | None,
    workers: int,
    gpus: int,
    device: str,
) -> None:
    """Tabulate finished RUNs, or run and tabulate a whole comparison, with --out and the options of the data."""
    if runs:
        from jigsaw_pretrain.detect.comparison.report import markdown, tables, write_report
        from jigsaw_pretrain.detect.comparison.results import read_result, tell_apart

        found, shared = tell_apart([read_result(run) for run in runs])
        notes = [f"Settings that all runs have: {', '.join(shared)}."] if shared else []
        if out is not None:
            click.echo(write_report(out, found, notes))
        else:
            click.echo("\n".join([markdown(tables(found)), *(f"- {note}" for note in notes)]))
        return
    needed = {
        "--out": out,
        "--annotations": annotations,
        "--images": images,
        "--val-annotations": val_annotations,
        "--val-images": val_images,
        "--data": data,
    }
    missing = [name for name, value in needed.items() if value is None]
    if missing or out is None:
        raise UserError(f"a comparison needs {', '.join(missing)}; or name finished RUNs to tabulate")
    swept = _rates(rates)
    check_places(str(annotations), images)
    check_places(str(val_annotations), val_images, "--val-annotations")
    open_dataset(str(data))
    chosen = choose(arms, imagenet)
    logger.info("%s; loading torch", ", ".join(arm.name for arm in chosen))
    detect.compare(
        out,
        annotations=str(annotations),
        images=str(images),
        val_annotations=str(val_annotations),
        val_images=str(val_images),
        val_split=val_split,
        reading=reading,
        data=str(data),
        arms=arms,
        seeds=seeds,
        rates=swept,
        recipe=recipe,
        settings=sets,
        pretrain_recipe=pretrain_recipe,
        pretrain_settings=pretrain_sets,
        imagenet=imagenet,
        budget=budget,
        workers=workers,
        gpus=gpus,
        device=device,
    )


def _rates(text: str) -> tuple[float, ...]:
    try:
        found = tuple(as_number(one) for one in text.split(","))
    except ValueError as error:
        raise UserError(f"--rates {text!r} is no list of numbers such as 0.01,0.02,0.04") from error
    if not all(0 < rate < math.inf for rate in found):
        raise UserError(f"--rates {text!r} must all be above 0, and finite")
    return found
