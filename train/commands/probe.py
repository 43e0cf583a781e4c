"""`probe`: a linear probe of a run's features."""

import json
from pathlib import Path
from typing import Any

import click
from rich.table import Table

import jigsaw_pretrain as jp
from jigsaw_pretrain.cli import Command, console_for_names, plain, tell_next
from jigsaw_pretrain.config import choices
from jigsaw_pretrain.formats.jigsaw import Fit
from jigsaw_pretrain.storage.files import publish_locally
from jigsaw_pretrain.train.commands.options import DEVICES, check_run, exporting, own_backbone


@click.command(cls=Command)
@click.option("--run", required=True, type=click.Path(path_type=Path), help="Probe the run in this folder.")
@own_backbone
@click.option(
    "--data",
    required=True,
    metavar="OUT2",
    help="Fit and judge the probe on this dataset, of other images than the run's.",
)
@click.option(
    "--weights",
    multiple=True,
    metavar="FILE",
    help="Also probe these weights of the same backbone, such as another method's or ImageNet's. The option may be "
    "given several times.",
)
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Also write the figures to this file."
)
@click.option(
    "--crops", default=20_000, show_default=True, type=click.IntRange(min=16), help="Use at most this many crops."
)
@click.option(
    "--side",
    type=click.IntRange(min=8),
    help="Show the crops in squares of this side, in pixels. [default: the large region's]",
)
@click.option(
    "--fit",
    default="warp",
    show_default=True,
    type=click.Choice(choices(Fit)),
    help="Show the crops as the recipe's data.fit does: crop at their own size, warp whole and warped, resize whole "
    "and padded.",
)
@click.option("--device", default="auto", show_default=True, type=click.Choice(DEVICES), help="Run on this device.")
def probe(
    run: Path,
    data: str,
    weights: tuple[str, ...],
    json_file: Path | None,
    crops: int,
    side: int | None,
    fit: Fit,
    device: str,
) -> None:
    """Fit a linear probe on features of held-out crops, of the run and of a randomly initialised backbone."""
    check_run(str(run))
    dataset = jp.open_dataset(data)
    report = jp.probe(run, dataset, weights=weights, crops=crops, side=side, fit=fit, device=device)
    if json_file is not None:
        publish_locally(json_file, (json.dumps(report, indent=2) + "\n").encode())
    show(report)
    tell_next(exporting(str(run), "the weights for a detector"))


def show(report: dict[str, Any]) -> None:
    """Print a report as a table."""
    told = (
        f"{report['backbone']} after {report['step']} steps: probe on {report['crops_to_judge']} crops of "
        f"{report['classes_judged']} classes (majority {report['majority_share']:.1%})"
    )
    table = Table(title=plain(told))
    for column in ("features", "accuracy", "mean over classes"):
        table.add_column(column, justify="left" if column == "features" else "right")
    rows = {"this run": report["run"], "random initialisation": report["random"], **report["weights"]}
    for label, shares in rows.items():
        table.add_row(plain(label), f"{shares['top1']:.1%}", f"{shares['class_mean']:.1%}")
    table.add_section()
    ratio = f"{report['class_mean_ratio']:.2f}"
    table.add_row("this run, times random", _ratio(report["run"]["top1"], report["random"]["top1"]), ratio)
    console_for_names().print(table)


def _ratio(value: float, base: float) -> str:
    """How many times as large, a dash where there is no telling."""
    return f"{value / base:.2f}" if base else "–"
