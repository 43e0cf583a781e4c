"""`evaluate`: accuracy by region, group and class on the jigsaws of a dataset."""

import json
from pathlib import Path
from typing import Any

import click
import torch
from msgspec.structs import replace
from rich.console import Console
from rich.table import Table

from jigsaw_pretrain.cli import Command
from jigsaw_pretrain.storage import publish_locally
from jigsaw_pretrain.train.commands.options import read_options, read_options_from
from jigsaw_pretrain.train.data.loader import JigsawLoader
from jigsaw_pretrain.train.engine.checkpoint import trained_state
from jigsaw_pretrain.train.engine.distributed import DEVICES, start
from jigsaw_pretrain.train.engine.run_folder import check_classes, check_pixels, open_run, open_trained, pixels_of
from jigsaw_pretrain.train.engine.state import build_model, region_maps
from jigsaw_pretrain.train.evaluate import MOST_JIGSAWS, one_pass, predict, summarise


@click.command(cls=Command)
@click.option("--run", required=True, help="Folder or URL of the run.")
@click.option("--data", required=True, metavar="OUT", help="Dataset to evaluate on, with the run's classes.")
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write the figures here too."
)
@click.option("--jigsaws", type=click.IntRange(min=1), help=f"How many; default one pass, at most {MOST_JIGSAWS}.")
@click.option("--batch", default=64, show_default=True, type=click.IntRange(min=1), help="Jigsaws at a time.")
@click.option("--workers", default=2, show_default=True, type=click.IntRange(min=0), help="Data processes.")
@read_options
@click.option("--device", default="auto", show_default=True, type=click.Choice(DEVICES), help="Where to run.")
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
    """Accuracy by region, group and class on a dataset's jigsaws, beside the majority class's share."""
    access = read_options_from(**access_settings)
    folder = open_run(run)
    description, recipe, content = open_trained(folder)
    dataset = access.open_dataset(data)
    check_classes(folder, description["classes"], tuple(dataset.classes))
    check_pixels(folder, pixels_of(folder, description), dataset.pixels)
    backbone, model = build_model(recipe, dataset.label_count, dataset.pixels)
    model.load_state_dict(trained_state(content))
    chosen = start(device).device
    model.to(device=chosen, memory_format=torch.channels_last)  # type: ignore[call-overload]
    maps = region_maps(recipe, backbone, chosen)
    wanted = jigsaws or min(MOST_JIGSAWS, one_pass(dataset))
    batch = min(batch, wanted)
    stream = replace(recipe.data, batch=batch, lanes=None, augment=False, balance="none")
    end = -(-wanted // batch)
    source = JigsawLoader(dataset, stream, workers=workers, stop_step=end, access=access)
    for note in source.notes:
        click.echo(note, err=True)
    try:
        predictions = predict(model, source, maps)
    finally:
        source.close()
    report = {"step": content["step"], "backbone": recipe.model.backbone, **summarise(predictions, dataset.classes)}
    if json_file is not None:
        publish_locally(json_file, (json.dumps(report, indent=2) + "\n").encode())
    show(report)


def show(report: dict[str, Any]) -> None:
    """Print a report as a table."""
    table = Table(title=f"{report['backbone']} after {report['step']} steps, {report['jigsaws']} jigsaws")
    for column in ("crops of", "count", "accuracy", "majority share"):
        table.add_column(column, justify="left" if column == "crops of" else "right")

    def add(name: str, found: dict[str, Any], majority: float | None) -> None:
        shares = ("-" if value is None else f"{value:.1%}" for value in (found["accuracy"], majority))
        table.add_row(name, str(found["count"]), *shares)

    add("all regions", report["overall"], report["overall"]["majority_share"])
    for kind in ("regions", "groups"):
        table.add_section()
        for name, found in report[kind].items():
            add(f"{kind[:-1]} {name}", found, found["majority_share"])
    table.add_section()
    for found in report["classes"]:
        add(f"class {found['class']}", found, None)
    Console().print(table)
