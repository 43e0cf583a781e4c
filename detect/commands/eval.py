"""`detect eval`: AP of a finished run, or of a COCO results file, by pycocotools.

A run is evaluated on its own validation set or on another one of the same classes; a results file needs no run and no
GPU. Writes results.json, ap.json and report.html where told (a run's folder by default).
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import click

from jigsaw_pretrain import detect
from jigsaw_pretrain.cli import Command
from jigsaw_pretrain.detect.annotations import check_places
from jigsaw_pretrain.detect.commands import options
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.annotations import options as reads
from jigsaw_pretrain.formats.annotations.read import Reading
from jigsaw_pretrain.words import hundredths

if TYPE_CHECKING:
    from jigsaw_pretrain.detect.coco_eval import Score


logger = logging.getLogger(__name__)


@click.command("eval", cls=Command)
@click.option("--run", help="Evaluate this finished run of `detect train`, a folder or a URL.")
@click.option(
    "--results",
    type=click.Path(path_type=Path),
    help="Evaluate this COCO results file in place of --run. It needs --annotations.",
)
@click.option(
    "--annotations", help="Take this ground truth, of any kind that prep takes. [default: the run's own validation set]"
)
@click.option("--images", help="Look for their images here: a folder, zip or tar; a path or a URL.")
@reads.reading
@click.option(
    "--backbone",
    help="Refuse the run unless this is its backbone. One of your own (module:callable) runs only where it "
    "is named here.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Write the files to this folder. [default: the run's]")
@click.option(
    "--kind",
    type=click.Choice(["bbox", "segm"]),
    help="Say what --results holds: boxes (bbox) or masks (segm). [default: bbox]",
)
@click.option(
    "--workers", default=2, show_default=True, type=click.IntRange(0), help="Read images in this many processes."
)
@click.option(
    "--device", default="auto", show_default=True, type=click.Choice(options.DEVICES), help="Run on this device."
)
def evaluate(
    run: str | None,
    results: Path | None,
    annotations: str | None,
    images: str | None,
    reading: Reading,
    backbone: str | None,
    out: Path | None,
    kind: str | None,
    workers: int,
    device: str,
) -> None:
    """Print the AP, by size and class, of a run or of a results file; a run gets its files and page anew."""
    if (run is None) == (results is None):
        raise UserError("give either --run RUN or --results FILE")
    if results is not None and annotations is None:
        raise UserError(f"{results} is scored against ground truth: give --annotations FILE")
    if results is not None and backbone is not None:
        raise UserError(f"--backbone is of a --run, and {results} is of none: leave it out")
    if run is not None and kind is not None:
        raise UserError(f"--kind says what --results holds, and {run} has its own boxes and masks: leave it out")
    if run is not None:
        options.check_weights(run, "--run")
    if annotations is not None:
        check_places(annotations, images)
    logger.info("%s: loading torch", run or results)

    from jigsaw_pretrain.detect.report import write_page
    from jigsaw_pretrain.train.engine.distributed import rank_zero_errors, start

    with rank_zero_errors():
        if results is not None:
            assert annotations is not None
            scored = detect.evaluate_results(
                results, annotations, images, reading=reading, kind=kind or "bbox", out=out
            )
            click.echo(table(scored))
            return
        assert run is not None
        ranks = start(device)
        found = detect.evaluate(
            run,
            annotations,
            images,
            reading=reading,
            backbone=backbone,
            out=out,
            workers=workers,
            device=device,
            write_page=write_page,
        )
        ranks.log_rank_zero(table(found.boxes))
        if found.masks:
            ranks.log_rank_zero("masks\n" + table(found.masks))


def table(found: "Score") -> str:
    """AP by size and class as text, in hundredths."""
    from jigsaw_pretrain.detect.coco_eval import STATS

    lines = ["  ".join(f"{name} {hundredths(found.stats[name])}" for name in STATS)]
    width = max((len(name) for name in found.classes), default=0)
    for name, one in found.classes.items():
        lines.append(
            f"  {name:<{width}}  {one['boxes']:6.0f} boxes  AP {hundredths(one['AP'])}  AP50 {hundredths(one['AP50'])}"
        )
    return "\n".join(lines)
