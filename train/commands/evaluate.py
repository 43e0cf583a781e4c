"""`evaluate`: accuracy by region, group and class on the jigsaws of a dataset."""

import json
from pathlib import Path
from typing import Any

import click
from rich.table import Table

import jigsaw_pretrain as jp
from jigsaw_pretrain.cli import Command, console_for_names, plain, tell_next
from jigsaw_pretrain.formats.jigsaw import REGION_WORDS, SHAPES
from jigsaw_pretrain.storage.files import publish_locally
from jigsaw_pretrain.train.commands.options import (
    DEVICES,
    check_run,
    exporting,
    own_backbone,
    read_options,
    read_options_from,
)


@click.command(cls=Command)
@click.option("--run", required=True, help="Take the run in this folder or URL.")
@own_backbone
@click.option("--data", required=True, metavar="OUT", help="Evaluate on this dataset, which has the run's classes.")
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Also write the figures to this file."
)
@click.option(
    "--jigsaws", type=click.IntRange(min=1), help="Evaluate on this many jigsaws. [default: one pass, at most 4,096]"
)
@click.option(
    "--batch",
    default=64,
    show_default=True,
    type=click.IntRange(min=1),
    help="Put this many jigsaws into a forward pass.",
)
@click.option(
    "--workers", default=2, show_default=True, type=click.IntRange(min=0), help="Read data in this many processes."
)
@read_options
@click.option("--device", default="auto", show_default=True, type=click.Choice(DEVICES), help="Run on this device.")
def evaluate(
    run: str,
    data: str,
    json_file: Path | None,
    jigsaws: int | None,
    batch: int,
    workers: int,
    device: str,
    **access_settings: Any,
) -> None:
    """Print accuracy by region, group and class on a dataset's jigsaws, beside the majority class's share."""
    access = read_options_from(**access_settings)
    check_run(run)
    dataset = access.open_dataset(data)
    report = jp.evaluate(run, dataset, jigsaws=jigsaws, batch=batch, workers=workers, device=device, access=access)
    if json_file is not None:
        publish_locally(json_file, (json.dumps(report, indent=2) + "\n").encode())
    show(report)
    run = run.rstrip("/")
    tell_next(
        ("is it better than no training? A linear probe", ["jigsaw-train", "probe", "--run", run, "--data", data]),
        exporting(run, "the weights for a detector"),
    )


def show(report: dict[str, Any]) -> None:
    """Print a report as a table."""
    seen = " that it was trained on" if report["trained_on"] else ""
    told = f"{report['backbone']} after {report['step']} steps, {report['jigsaws']} jigsaws{seen}"
    table = Table(title=plain(told))
    for column in ("where", "count", "accuracy", "majority share"):
        table.add_column(column, justify="left" if column == "where" else "right")

    def add(name: str, found: dict[str, Any], majority: float | None) -> None:
        shares = ("-" if value is None else f"{value:.1%}" for value in (found["accuracy"], majority))
        table.add_row(plain(name), str(found["count"]), *shares)

    overall = report["overall"]
    add("all regions", overall, overall["majority_share"])
    add("all, every class counting alike", {**overall, "accuracy": overall["balanced_accuracy"]}, None)
    for kind, words, said in (("regions", REGION_WORDS, "region"), ("groups", SHAPES, "crops")):
        table.add_section()
        for name, found in report[kind].items():
            add(f"{words[name]} {said}", found, found["majority_share"])
    table.add_section()
    for found in report["classes"]:
        add(f"class {found['class']}", found, None)
    console_for_names().print(table)
    click.echo(verdict(report))


def verdict(report: dict[str, Any]) -> str:
    """How the accuracy stands beside always naming the commonest class, by crops and with classes counting alike."""
    from jigsaw_pretrain.train.engine.pretraining import NO_BETTER

    overall = report["overall"]
    accuracy, majority, balanced = (overall[key] for key in ("accuracy", "majority_share", "balanced_accuracy"))
    blind = 1 / sum(one["count"] > 0 for one in report["classes"])
    than = "better" if accuracy >= majority + NO_BETTER else "no better"
    told = f"{than} than always naming the commonest class, {accuracy:.1%} against {majority:.1%}"
    than = "better" if balanced >= blind + NO_BETTER else "no better"
    return f"verdict: {told}; with every class counting alike {than}, {balanced:.1%} against {blind:.1%}"
