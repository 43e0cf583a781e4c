"""A detector run's page: one HTML file with everything inline, readable without a network.

AP by size and class, precision-recall curves, AP and loss over time, and predictions beside the ground truth on a few
validation images. About 1 MB and 3 s; matplotlib draws without a display.
"""

import io
import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.figure
import msgspec
import numpy as np
from matplotlib.patches import Rectangle

from jigsaw_pretrain import rng
from jigsaw_pretrain.config import Number
from jigsaw_pretrain.detect.annotations import GroundTruth, ImageRecord
from jigsaw_pretrain.detect.coco_eval import AP_FILE, RESULTS_FILE, STATS, Detection, read_results
from jigsaw_pretrain.detect.data import ImageReader
from jigsaw_pretrain.detect.run import CONFIG, METRICS, SUMMARY, DetectorConfig, Stratum, read_file
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.pixels import display_note, displayed
from jigsaw_pretrain.html import Figure, Section, Table, chart, picture, render
from jigsaw_pretrain.storage import Storage
from jigsaw_pretrain.train.engine.metrics import read_rows

log = logging.getLogger(__name__)

PAGE = "page.html"
STRATA_KEY = "by_training_annotations"
PICTURES = 8
SHOWN_ABOVE = 0.3
"""Scores from which predictions are drawn; where an image has none, its best three are."""


def percent(value: float | None) -> str:
    """AP in hundredths, a dash where there is none."""
    return "–" if value is None or value < 0 else f"{100 * value:.1f}"


def write_page(folder: Path, annotations: GroundTruth, images: str, config: DetectorConfig) -> Path:
    """Write the page of a run's folder from its files (config, metrics, ap.json, results.json); returns its path."""
    plain = partial(read_file, kind=dict[str, Any])
    readers: dict[str, Callable[[Path], Any]] = {
        **{CONFIG: plain, SUMMARY: plain, RESULTS_FILE: read_results},
        AP_FILE: lambda path: msgspec.to_builtins(read_file(path, _Ap)),
    }
    values = {name: _read(folder / name, read) for name, read in readers.items()}
    rows = read_rows(folder / METRICS)
    tables, figures = [], []
    if values[SUMMARY]:
        summary = values[SUMMARY]
        facts = [[key.replace("_", " "), value] for key, value in summary.items() if key != "AP"]
        tables.append(("Run", Table(["", "value"], facts)))
    if values[AP_FILE]:
        tables += ap_tables(values[AP_FILE])
        figures.append(curves_figure(values[AP_FILE]["bbox"]["curves"]))
    figures += over_time(rows)
    if values[RESULTS_FILE] is not None:
        figures.append(pictures(annotations, images, values[RESULTS_FILE], config))
    sections = [Section(caption, tables=[table]) for caption, table in tables]
    sections += [Section("Pictures", figures=figures)] if figures else []
    if values[CONFIG]:
        sections.append(Section("Settings", tables=[Table(["setting", "value"], settings_rows(values[CONFIG]))]))
    page = render(f"Detector {folder.name}", "Average precision on the validation images.", sections)
    Storage(folder).publish(PAGE, page.encode())
    return folder / PAGE


def _read(path: Path, read: Callable[[Path], Any]) -> Any:
    """What a file of the run holds; None where there is none, and where it is damaged, which is logged."""
    try:
        return read(path) if path.exists() else None
    except UserError as error:
        log.warning("the page lacks a part: %s", error.message)
        return None


class _Class(msgspec.Struct):
    """AP of a class."""

    boxes: Number
    AP: Number
    AP50: Number


class _Score(msgspec.Struct):
    """AP of boxes or masks, as coco_eval.Score has it."""

    stats: dict[str, Number]
    classes: dict[str, _Class]
    curves: dict[str, list[Number]]

    def __post_init__(self) -> None:
        if not set(STATS) <= self.stats.keys():
            raise ValueError("figures are missing")


class _Ap(msgspec.Struct):
    """The contents of ap.json."""

    bbox: _Score
    segm: _Score | None = None
    by_training_annotations: dict[str, Stratum] = {}


def ap_tables(found: dict[str, Any]) -> list[tuple[str, Table]]:
    """Tables of AP by size and by class from ap.json's contents."""
    kinds = [kind for kind in ("bbox", "segm") if found.get(kind)]
    heads = [{"bbox": "boxes", "segm": "masks"}[kind] for kind in kinds]
    sizes = [[name, *(percent(found[kind]["stats"][name]) for kind in kinds)] for name in STATS]
    classes = [
        [name, f"{one['boxes']:.0f}", percent(one["AP"]), percent(one["AP50"])]
        for name, one in found["bbox"]["classes"].items()
    ]
    strata = [[name, f"{one['classes']}", percent(one["AP"])] for name, one in found.get(STRATA_KEY, {}).items()]
    by_count = [("By annotations of a class in training", Table(["annotations", "classes", "AP"], strata))]
    return [
        *(by_count if strata else []),
        ("AP (hundredths; s, m, l: small, medium, large)", Table(["", *heads], sizes)),
        ("By class", Table(["class", "boxes", "AP", "AP50"], classes)),
    ]


def settings_rows(config: dict[str, Any]) -> list[list[str]]:
    """config.json as rows of names and values, its tables' keys after a dot."""
    rows = []
    for name, value in config.items():
        inner = {f"{name}.{key}": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
        rows += [[key, one if isinstance(one, str) else json.dumps(one)] for key, one in inner.items()]
    return rows


def curves_figure(curves: dict[str, list[float]]) -> Figure:
    """Precision over recall, mean over classes, by IoU threshold."""

    def draw(axes: Any) -> None:
        for threshold, values in curves.items():
            if threshold in ("0.50", "0.60", "0.70", "0.75", "0.80", "0.90"):
                axes.plot(np.linspace(0, 1, len(values)), np.maximum(values, 0), label=f"IoU {threshold}")
        axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
        axes.legend(frameon=False)

    return chart(draw, *2 * ("Precision over recall, mean over classes",))


def over_time(rows: list[dict[str, Any]]) -> list[Figure]:
    """Loss over steps, and AP over steps where there is any."""
    losses = [(row["step"] + 1, row["loss"]) for row in rows if "loss" in row]
    scored = [(row["step"] + 1, row["AP"], row["AP50"]) for row in rows if {"AP", "AP50"} <= row.keys()]

    def draw_ap(axes: Any) -> None:
        steps = [one[0] for one in scored]
        axes.plot(steps, [100 * one[1] for one in scored], "o-", label="AP")
        axes.plot(steps, [100 * one[2] for one in scored], "s--", label="AP50")
        axes.set(xlabel="step", ylabel="AP (hundredths)", ylim=(0, None))
        axes.legend(frameon=False)

    def draw_loss(axes: Any) -> None:
        axes.plot(*zip(*losses, strict=True))
        axes.set(xlabel="step", ylabel="loss", ylim=(0, None))

    figures = [chart(draw_ap, *2 * ("AP on the validation images over time",))] if scored else []
    return figures + ([chart(draw_loss, *2 * ("Training loss over time",))] if losses else [])


def pictures(annotations: GroundTruth, images: str, results: list[Detection], config: DetectorConfig) -> Figure:
    """Validation images, drawn evenly by their keyed order, with ground truth (dashed) and predictions (solid)."""
    order = rng.permutation(rng.key_of_text(0, "pictures of the page"), len(annotations.images))
    chosen = [annotations.images[int(index)] for index in order[:PICTURES]]
    by_image: dict[Any, list[Detection]] = {}
    for one in results:
        by_image.setdefault(one["image_id"], []).append(one)
    names, reader = dict(annotations.categories), ImageReader(images, annotations, config.pixels)
    across = 4
    figure = matplotlib.figure.Figure(figsize=(4 * across, 3.4 * -(-len(chosen) // across)))
    for place, record in enumerate(chosen):
        axes = figure.add_subplot(-(-len(chosen) // across), across, place + 1)
        found = sorted(by_image.get(record.id, []), key=lambda one: -one["score"])
        sure = [one for one in found if one["score"] >= SHOWN_ABOVE]
        axes.imshow(displayed(reader.read(record), config.pixels, config.mean, config.std))
        _picture(axes, record, sure or found[:3], names, annotations.classes)
    figure.tight_layout()
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=110, bbox_inches="tight")
    shown = f"predictions of score {SHOWN_ABOVE} or more, or else the best three, solid"
    words = f"Validation images: ground truth dashed white, {shown}. {display_note(config.pixels)}".strip()
    return picture(sink.getvalue(), words, words, "png")


def _picture(
    axes: Any,
    record: ImageRecord,
    found: list[Detection],
    names: dict[int, str],
    classes: list[str],
) -> None:
    axes.axis("off")
    for left, top, right, bottom in record.boxes:
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, ec="white", ls="--", lw=1))
    colours = matplotlib.colormaps["tab20"]
    for one in found:
        name = names.get(one["category_id"])
        if name is None:
            continue
        colour = colours(classes.index(name) % 20)
        left, top, width, height = one["bbox"]
        axes.add_patch(Rectangle((left, top), width, height, fill=False, ec=colour, lw=1.5))
        axes.text(
            left,
            top,
            f"{name} {one['score']:.2f}",
            fontsize=6,
            color="black",
            backgroundcolor=colour,
            va="bottom",
            parse_math=False,
        )
