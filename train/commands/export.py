"""`export`: a run's backbone for another library, with the configuration that must go with it."""

from pathlib import Path
from typing import Any

import click

import jigsaw_pretrain as jp
from jigsaw_pretrain.cli import Command, tell_next
from jigsaw_pretrain.train.commands.options import DEVICES, check_run
from jigsaw_pretrain.train.export.readme import PYRAMID_TARGET, TARGET_NAMES


@click.command(cls=Command)
@click.option("--run", required=True, help="Take the run in this folder or URL.")
@click.option("--to", required=True, type=click.Choice(TARGET_NAMES), help="Write the weights for this library.")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help="Write the weights to this file."
)
@click.option(
    "--backbone",
    metavar="NAME",
    help="Refuse the run unless this is its backbone. One of your own (module:callable) runs only where it is named "
    "here.",
)
@click.option(
    "--recalibrate-bn", "jigsaws", type=click.IntRange(min=1), metavar="N", help="Measure batch norm anew on N jigsaws."
)
@click.option("--data", metavar="OUT", help="Measure on this dataset, the run's own, with --recalibrate-bn.")
@click.option(
    "--workers",
    default=2,
    show_default=True,
    type=click.IntRange(min=0),
    help="Read data in this many processes, with --recalibrate-bn.",
)
@click.option(
    "--device",
    default="auto",
    show_default=True,
    type=click.Choice(DEVICES),
    help="Measure on this device, with --recalibrate-bn.",
)
def export(
    run: str,
    to: str,
    out: Path,
    backbone: str | None,
    jigsaws: int | None,
    data: str | None,
    workers: int,
    device: str,
) -> None:
    """Write the backbone of the run's newest checkpoint and a README, checked against the library's own names."""
    check_run(run)
    dataset = jp.open_dataset(data) if jigsaws is not None and data is not None else None
    measured: dict[str, Any] = {"recalibrate_bn": jigsaws, "dataset": dataset, "workers": workers, "device": device}
    found = jp.export(run, to, out, backbone=backbone, **measured)
    click.echo(
        f"{out}: {found.backbone} after {found.step} of {found.steps} steps, {found.tensors} tensors, "
        f"{found.bytes / 1e6:.1f} MB, checked against {to}; what to paste: {found.readme}"
    )
    if found.leaves_neck:
        click.echo(f"the backbone alone: --to {PYRAMID_TARGET} has the neck's weights too")
    detector = ["jigsaw-detect", "train", "--annotations", "ANNOTATIONS", "--images", "IMAGES"]
    detector += ["--val-annotations", "VAL_ANNOTATIONS", "--val-images", "VAL_IMAGES"]
    run = run.rstrip("/")
    detector += ["--init", run, "--recipe", "OUT/detect.toml", "--run", f"{run}-detector", "--resume"]
    tell_next(("or a detector of this project, and its AP; OUT is what prep wrote", detector))
