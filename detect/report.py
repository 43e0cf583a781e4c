"""A detector run's page: one HTML file with everything inline, readable without a network.

AP by size and class, precision-recall curves, AP and loss over time, and the validation images with the worst mistakes,
detections and missed objects drawn in. About 1 MB and 3 s; matplotlib draws without a display.
"""

import io
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw
from torchvision.ops import box_iou

from jigsaw_pretrain.config import Number
from jigsaw_pretrain.detect.annotations import NO_LABEL, GroundTruth, ImageRecord
from jigsaw_pretrain.detect.coco_eval import AP_FILE, RESULTS_FILE, STATS, STRATA_KEY, Detection, read_results
from jigsaw_pretrain.detect.data import ImageReader
from jigsaw_pretrain.detect.recipe import DetectorRecipe
from jigsaw_pretrain.detect.run import CONFIG, METRICS, SUMMARY, DetectorConfig, Stratum, read_file
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.fonts import fitted
from jigsaw_pretrain.formats.pixels import display_note, displayed
from jigsaw_pretrain.html import Figure, Section, Table, chart, picture, render
from jigsaw_pretrain.storage.store import Storage
from jigsaw_pretrain.train.engine.metrics import read_rows
from jigsaw_pretrain.words import hundredths, setting

log = logging.getLogger(__name__)

PAGE = "report.html"
PICTURES = 8
SHOWN_ABOVE = 0.3
"""Scores from which detections are drawn; where an image has none, its best three are."""

MOST_SHOWN = 12
"""Detections, and missed objects, that are drawn of an image: more cannot be told apart."""

_SIDE = 560
"""The longer side of a picture, in pixels."""

_RIGHT, _WRONG, _MISSED = (86, 180, 233), (255, 176, 32), (255, 255, 255)

_FACTS = {
    "steps": ("steps", 1),
    "device": ("device", 1),
    "world": ("processes", 1),
    "seconds": ("training, seconds on the wall clock", 1),
    "device_seconds": ("training, seconds of the device", 1),
    "evaluation_seconds": ("one evaluation, seconds on the wall clock", 1),
    "seconds_per_step": ("a step, seconds on the wall clock", 1),
    "gpu_memory": ("most GPU memory, GB", 1e9),
    "flops_per_image": ("an image, billions of FLOPs", 1e9),
    "parameters_learned": ("parameters that are trained, millions", 1e6),
}
"""The keys of summary.json, in a reader's words, and what each is divided by."""


def write_page(folder: Path, annotations: GroundTruth, images: str, config: DetectorConfig) -> Path:
    """Write the page of a run's folder from its files (config, metrics, ap.json, results.json); returns its path."""
    plain = partial(read_file, kind=dict[str, Any])
    readers: dict[str, Callable[[Path], Any]] = {
        **{CONFIG: plain, SUMMARY: plain, RESULTS_FILE: read_results},
        AP_FILE: lambda path: msgspec.to_builtins(read_file(path, _Ap)),
    }
    values = {name: _read(folder / name, read) for name, read in readers.items()}
    rows = read_rows(folder / METRICS)
    sections, figures, tiles = [], [], {}
    if values[AP_FILE]:
        sections += ap_sections(values[AP_FILE])
        figures.append(curves_figure(values[AP_FILE]["bbox"]["curves"]))
        tiles = {name: hundredths(values[AP_FILE]["bbox"]["stats"][name]) for name in ("AP", "AP50", "AP75")}
    figures += over_time(rows)
    sections += [Section("Curves", figures=figures)] if figures else []
    if values[RESULTS_FILE] is not None:
        sections.append(pictures(annotations, images, values[RESULTS_FILE], config))
    if values[SUMMARY]:
        summary = values[SUMMARY]
        known = {key: summary[key] for key in _FACTS if summary.get(key) is not None}
        facts = [[_FACTS[key][0], _scaled(value, _FACTS[key][1])] for key, value in known.items()]
        sections.append(Section("Cost", tables=[Table(["", "value"], facts)]))
    if values[CONFIG]:
        text = "What differs from the paper's recipe, and how the recipe was fitted to the dataset (plan)."
        rows_of = settings_rows(values[CONFIG])
        sections.append(Section("Settings", text, [Table(["setting", "this run", "the paper's"], rows_of)]))
    lead = "Average precision (AP) of boxes on the validation images, in hundredths."
    page = render(f"Detector {folder.name}", lead, sections, tiles)
    Storage(folder).publish(PAGE, page.encode())
    return folder / PAGE


def _read(path: Path, read: Callable[[Path], Any]) -> Any:
    """What a file of the run holds; None where there is none, and where it is damaged, which is logged."""
    try:
        return read(path) if path.exists() else None
    except UserError as error:
        log.warning("the page lacks a part: %s", error.message)
        return None


def _scaled(value: Any, by: float) -> Any:
    return value / by if by != 1 and isinstance(value, int | float) else value


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


def ap_sections(found: dict[str, Any]) -> list[Section]:
    """AP by size, by class and by the annotations of a class, from ap.json's contents."""
    kinds = [kind for kind in ("bbox", "segm") if found.get(kind)]
    heads = [{"bbox": "boxes", "segm": "masks"}[kind] for kind in kinds]
    sizes = [[name, *(hundredths(found[kind]["stats"][name]) for kind in kinds)] for name in STATS]
    classes = [
        [name, int(one["boxes"]), hundredths(one["AP"]), hundredths(one["AP50"])]
        for name, one in found["bbox"]["classes"].items()
    ]
    strata = [[name, one["classes"], hundredths(one["AP"])] for name, one in found.get(STRATA_KEY, {}).items()]
    text = (
        "AR: average recall, of the surest 1, 10 or 100 detections of an image. s, m, l: of small, medium and large "
        "objects. 50, 75: at an IoU of 0.50 and 0.75 alone; else the mean over 0.50 to 0.95. All in hundredths."
    )
    counts = Table(["annotations in training", "classes", "AP"], strata)
    return [
        Section("By size", text, [Table(["", *heads], sizes)]),
        Section("By class", tables=[Table(["class", "objects", "AP", "AP50"], classes)]),
        *([Section("By how many annotations of a class there are in training", tables=[counts])] if strata else []),
    ]


def settings_rows(config: Mapping[str, Any]) -> list[list[str]]:
    """Rows of what a run's config.json says: key, value, and the paper's value where the recipe has that key."""
    flat = dict(_flat({name: config[name] for name in ("recipe", "plan", "init", "norm_built") if name in config}))
    paper = dict(_flat({"recipe": DetectorRecipe().to_dict()}))
    return [
        [key.removeprefix("recipe."), value, paper.get(key, "")]
        for key, value in flat.items()
        if value != paper.get(key)
    ]


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """The values of nested tables as text, by their keys joined with dots."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", setting(value)


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
        axes.set(xlabel="step", ylabel="AP (hundredths)", xlim=(0, None), ylim=(0, None))
        axes.legend(frameon=False)

    def draw_loss(axes: Any) -> None:
        axes.plot(*zip(*losses, strict=True))
        axes.set(xlabel="step", ylabel="loss", xlim=(0, None), ylim=(0, None))

    figures = [chart(draw_ap, *2 * ("AP on the validation images over time",))] if scored else []
    return figures + ([chart(draw_loss, *2 * ("Training loss over time",))] if losses else [])


@dataclass(frozen=True)
class _Judged:
    """An image's detections, surest first, whether each is right, and which of its objects none of them found."""

    record: ImageRecord
    found: Sequence[Detection]
    right: Sequence[bool]
    missed: Sequence[int]

    @property
    def badness(self) -> tuple[float, float]:
        """The score of the surest wrong detection, then the share of the objects that were missed."""
        wrong = [float(one["score"]) for one, right in zip(self.found, self.right, strict=True) if not right]
        return max(wrong, default=0.0), len(self.missed) / max(1, len(self.record.boxes))


def pictures(annotations: GroundTruth, images: str, results: list[Detection], config: DetectorConfig) -> Section:
    """The validation images with the worst mistakes, worst first."""
    by_image: dict[Any, list[Detection]] = {}
    for one in results:
        by_image.setdefault(one["image_id"], []).append(one)
    labels = {category: label for label, (category, _) in enumerate(annotations.categories)}
    judged = [_judged(record, by_image.get(record.id, []), labels) for record in annotations.images]
    judged.sort(key=lambda one: one.badness, reverse=True)
    reader = ImageReader(images, annotations, config.pixels)
    figures = []
    for shown in judged[:PICTURES]:
        pixels = displayed(reader.read(shown.record), config.pixels, config.mean, config.std)
        sink = io.BytesIO()
        _drawn(pixels, shown, labels, annotations.classes).save(sink, "WEBP", quality=85)
        counts = f"{sum(shown.right)} right, {len(shown.right) - sum(shown.right)} wrong, {len(shown.missed)} missed"
        words = f"{shown.record.file_name}: {counts}"
        figures.append(picture(sink.getvalue(), words, words, "webp"))
    text = (
        "The validation images with the surest wrong detections come first, then those of which most was missed. "
        "Blue: detections that are right (the class, and IoU of 0.5 or more). Orange: wrong ones. White, dashed: "
        f"objects that were missed. Detections of score {SHOWN_ABOVE} or more count, and where there is none the best "
        f"three; at most {MOST_SHOWN} of them are drawn in an image. "
        f"{display_note(config.pixels)}"
    )
    return Section("Worst mistakes", text.strip(), figures=figures)


def _judged(record: ImageRecord, found: Sequence[Detection], labels: Mapping[int, int]) -> _Judged:
    """Match the detections that are shown with the image's objects, the surest first, as AP50 does."""
    ranked = sorted((one for one in found if one["category_id"] in labels), key=lambda one: -one["score"])
    shown = [one for one in ranked if one["score"] >= SHOWN_ABOVE] or ranked[:3]
    free = ~record.crowd
    right = []
    for one in shown:
        left, top, width, height = one["bbox"]
        box = torch.tensor([[left, top, left + width, top + height]], dtype=torch.float64)
        overlap = box_iou(box, torch.tensor(record.boxes, dtype=torch.float64))[0].numpy()
        fits = (record.labels == labels[one["category_id"]]) & (overlap >= 0.5) & free
        best = int(np.argmax(np.where(fits, overlap, -1))) if fits.any() else None
        if best is not None:
            free[best] = False
        # What lies on a crowd is neither right nor wrong; it is not held against the detector. Regions of no category
        # are of every class.
        of_class = np.isin(record.labels, (labels[one["category_id"]], NO_LABEL))
        on_crowd = of_class & record.crowd & (_share_inside(box[0].numpy(), record.boxes) >= 0.5)
        right.append(best is not None or bool(on_crowd.any()))
    return _Judged(record, shown, right, np.flatnonzero(free).tolist())


def _share_inside(box: npt.NDArray[np.float64], regions: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The share of a box that lies in each region, by which COCO matches crowds."""
    sides = np.maximum(0, np.minimum(box[2:], regions[:, 2:]) - np.maximum(box[:2], regions[:, :2]))
    return np.asarray(sides.prod(axis=1) / max(float((box[2:] - box[:2]).prod()), 1e-9))


def _drawn(
    pixels: npt.NDArray[np.uint8], judged: _Judged, labels: Mapping[int, int], classes: Sequence[str]
) -> Image.Image:
    """The image, enlarged or reduced to _SIDE, with boxes of what was found and missed and a plate at each."""
    image = Image.fromarray(pixels)
    scale = _SIDE / max(image.size)
    image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    pen = ImageDraw.Draw(image)
    plates: list[tuple[tuple[float, float, float, float], str, tuple[int, int, int]]] = []
    for place in judged.missed[:MOST_SHOWN]:
        box = tuple(float(side) * scale for side in judged.record.boxes[place])
        _dashed(pen, box)
        plates.append((box, classes[int(judged.record.labels[place])], _MISSED))  # type: ignore[arg-type]
    for one, right in reversed(list(zip(judged.found, judged.right, strict=True))[:MOST_SHOWN]):
        left, top, width, height = (float(side) * scale for side in one["bbox"])
        box = (left, top, left + width, top + height)
        colour = _RIGHT if right else _WRONG
        pen.rectangle(box, outline=(0, 0, 0), width=4)
        pen.rectangle(box, outline=colour, width=2)
        plates.append((box, f"{classes[labels[one['category_id']]]} {one['score']:.2f}", colour))
    taken: list[tuple[float, float, float, float]] = []
    # The surest detections come last, and say first what they are.
    for box, text, colour in reversed(plates):
        _plate(pen, image.size, box, text, colour, taken)
    return image


def _dashed(pen: ImageDraw.ImageDraw, box: tuple[float, ...]) -> None:
    left, top, right, bottom = box
    for width, colour in ((4, (0, 0, 0)), (2, _MISSED)):
        for x in np.arange(left, right, 10):
            for y in (top, bottom):
                pen.line((x, y, min(x + 5, right), y), fill=colour, width=width)
        for y in np.arange(top, bottom, 10):
            for x in (left, right):
                pen.line((x, y, x, min(y + 5, bottom)), fill=colour, width=width)


def _plate(
    pen: ImageDraw.ImageDraw,
    size: tuple[int, int],
    box: tuple[float, float, float, float],
    text: str,
    colour: tuple[int, int, int],
    taken: list[tuple[float, float, float, float]],
) -> None:
    """Write a text on a dark plate above its box, or within it; not where other texts are, which both would spoil."""
    text, font = fitted(text, 15, size[0] / 2)
    width, height = font.getlength(text) + 6, sum(font.getmetrics())
    left = min(max(0.0, box[0]), size[0] - width)
    tops = [box[1] - height, *np.arange(box[1], box[3], height), box[3]]
    places = [(left, top, left + width, top + height) for top in tops if 0 <= top <= size[1] - height]
    chosen = next((place for place in places if not any(_meet(place, other) for other in taken)), None)
    if chosen is None:
        return
    taken.append(chosen)
    pen.rectangle(chosen, fill=(0, 0, 0))
    pen.text((chosen[0] + 3, chosen[3]), text, fill=colour, font=font, anchor="ld")


def _meet(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
