"""`python -m train evaluate`: how well a run's model names the regions of jigsaws, of this or another dataset.

Jigsaws are made without augmentation (ratio 1, no flip, centred). A region's prediction is the class with the largest
logit after averaging the logits over the region's positions, whatever the run's strategy, and with a neck over its
levels, each counting alike. Beside every accuracy stands the majority share: what always naming the commonest class of
those crops would reach. Where the dataset leaves the context to the trainer (``--context-at train``) it is drawn here
as in training, by the recipe's seed and the position: the same crops each time. Costs a forward pass a jigsaw.
It measures the pre-training task, not detection: compare runs of one dataset by it, and backbones by a detector's AP.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table

from jigsaw_pretrain.formats.dataset.dataset import Dataset
from jigsaw_pretrain.formats.jigsaw import GROUPS, REGIONS
from jigsaw_pretrain.storage import publish_locally
from jigsaw_pretrain.train import losses
from jigsaw_pretrain.train.data.access import access_from, access_options
from jigsaw_pretrain.train.data.batch import BatchSource
from jigsaw_pretrain.train.engine.checkpoint import trained_state
from jigsaw_pretrain.train.engine.distributed import DEVICES, start
from jigsaw_pretrain.train.engine.run_folder import check_classes, check_pixels, open_run, open_trained, pixels_of
from jigsaw_pretrain.train.engine.state import build_model, region_maps

MOST_JIGSAWS = 4096
"""The default limit: enough for one percent of standard error on each region."""

Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Answers:
    """What was predicted: predictions, labels (classes) and groups (indices into GROUPS), each [n, 4] by region."""

    predictions: Labels
    labels: Labels
    groups: Labels


@torch.inference_mode()
def predict(model: torch.nn.Module, source: BatchSource, region_maps: Sequence[torch.Tensor]) -> Answers:
    """The model's answer for every region of every jigsaw of the source; the model is put in eval mode.

    region_maps: of each map that the model gives logits of.
    """
    model.eval()
    predictions, labels, groups = [], [], []
    for batch in source:
        logits = model(batch.images.to(region_maps[0].device))
        predictions.append(losses.predictions(logits, region_maps).cpu().numpy())
        # The source uses a batch's memory again.
        labels.append(batch.labels.numpy().astype(np.int64))
        groups.append(batch.groups.numpy().astype(np.int64))
    return Answers(np.concatenate(predictions), np.concatenate(labels), np.concatenate(groups))


def score(predictions: Labels, labels: Labels) -> dict[str, Any]:
    """Count, accuracy and majority share of some answers; the latter two None where there are none."""
    count = labels.size
    if not count:
        return {"count": 0, "accuracy": None, "majority_share": None}
    return {
        "count": int(count),
        "accuracy": float((predictions == labels).mean()),
        "majority_share": float(np.bincount(labels.ravel()).max() / count),
    }


def summarise(answers: Answers, classes: list[str]) -> dict[str, Any]:
    """Scores overall, by region, by group and by class (label order, the background last).

    A class's ``share`` is its part of all crops; its majority share would be 1 and is not given.
    """
    predictions, labels = answers.predictions, answers.labels
    by_class = []
    for label, name in enumerate([*classes, "background"]):
        mine = labels == label
        found = score(predictions[mine], labels[mine])
        by_class.append(
            {"class": name, "count": found["count"], "accuracy": found["accuracy"], "share": float(mine.mean())}
        )
    by_group = {group: answers.groups == code for code, group in enumerate(GROUPS)}
    return {
        "jigsaws": len(labels),
        "overall": score(predictions, labels),
        "regions": {region: score(predictions[:, i], labels[:, i]) for i, region in enumerate(REGIONS)},
        "groups": {group: score(predictions[mine], labels[mine]) for group, mine in by_group.items()},
        "classes": by_class,
    }


def one_pass(dataset: Dataset) -> int:
    """Jigsaws that show every crop at least once: two S, one T and one W each."""
    crops = {group: sum(shard.crops for shard in dataset.of_group(group)) for group in GROUPS}
    return max(1, -(-crops["S"] // 2), crops["T"], crops["W"])


@click.command()
@click.option("--run", required=True, help="Folder or URL of the run.")
@click.option("--data", required=True, metavar="OUT", help="Dataset to evaluate on, with the run's classes.")
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write the figures here too."
)
@click.option("--jigsaws", type=click.IntRange(min=1), help=f"How many; default one pass, at most {MOST_JIGSAWS}.")
@click.option("--batch", default=64, show_default=True, type=click.IntRange(min=1), help="Jigsaws at a time.")
@click.option("--workers", default=2, show_default=True, type=click.IntRange(min=0), help="Data processes.")
@access_options
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
    from jigsaw_pretrain.train.data.loader import JigsawLoader

    access = access_from(**access_settings)
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
    stream = replace(recipe.stream, batch=batch, lanes=None, augment=False, balance="none")
    end = -(-wanted // batch)
    source = JigsawLoader(dataset, recipe.template, stream, workers=workers, stop_step=end, access=access)
    for note in source.notes:
        click.echo(note, err=True)
    try:
        answers = predict(model, source, maps)
    finally:
        source.close()
    report = {"step": content["step"], "backbone": recipe.backbone, **summarise(answers, dataset.classes)}
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
