"""One HTML page about a run, or several side by side: is it healthy?

It reads the run folder alone (metrics.jsonl, run.json, looks/), no checkpoint, no dataset and no GPU, in about 3 s; a
run draws the same page as it goes (RunPage). What is not there yet is said, not an error. Curves of long
runs are thinned to about 600 points by averaging neighbours, so a page's size does not grow with the run; several runs
are drawn into the same axes.
"""

import io
import itertools
import logging
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor, nn

from jigsaw_pretrain.formats.jigsaw import REGION_WORDS, REGIONS
from jigsaw_pretrain.formats.pixels import DisplayRange, display_note
from jigsaw_pretrain.html import Bars, Figure, Section, Table, chart, picture, render
from jigsaw_pretrain.storage.store import Storage
from jigsaw_pretrain.train.data.batch import Batch
from jigsaw_pretrain.train.engine.callbacks import Callback, Pictures
from jigsaw_pretrain.train.engine.metrics import Row, read_rows
from jigsaw_pretrain.train.engine.run_folder import Origin, RunFolder, pixels_of, read_description
from jigsaw_pretrain.train.engine.state import ErfTable
from jigsaw_pretrain.train.recipe import Recipe
from jigsaw_pretrain.train.report.figures import field_figure, short_names, spread, weight_figure
from jigsaw_pretrain.train.report.sheet import sheet
from jigsaw_pretrain.train.report.snapshots import (
    JIGSAWS,
    ErfSnapshot,
    PredictionRecorder,
    PredictionSnapshot,
    load_snapshot,
    region_fields,
    save_snapshot,
    snapshots,
)
from jigsaw_pretrain.words import counted, setting

POINTS = 600
SMOOTH = 50
"""Points of an accuracy curve: a batch's own is too coarse to follow."""
_LINE_STYLES = ("-", "--", ":", "-.")

F64 = npt.NDArray[np.float64]

CONFUSIONS = 20

PAGE_SECONDS = 60.0
"""Least time between two pages of a run that goes on."""

_DRAW = """
import os, pathlib, sys
os.nice(10)
from jigsaw_pretrain.train.report.page import write_report
write_report(pathlib.Path(sys.argv[1]), finished=False)
"""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Metrics:
    """metrics.jsonl as arrays [n], accuracy [n, 4] by region; ``name`` labels the run's curves.

    balanced, majority: not a number where earlier versions wrote a row.
    """

    name: str
    step: F64
    loss: F64
    accuracy: F64
    lr: F64
    images_per_second: F64
    data_wait: F64
    balanced: F64
    majority: F64

    @property
    def last(self) -> int:
        """How many of the last steps the page's figures are means of: a twentieth, at least ten."""
        return min(len(self.step), max(10, len(self.step) // 20))

    def tail(self, values: F64) -> float:
        """The mean over the last steps."""
        return float(values[-self.last :].mean())


def read_metrics(path: Path, name: str) -> Metrics | None:
    """The rows of a metrics.jsonl; None where there are none."""
    rows = [row for row in read_rows(path) if _is_row(row)]
    if not rows:
        return None

    def column(key: str) -> F64:
        return np.array([row[key] for row in rows], dtype=np.float64)

    accuracy = np.array([[row["accuracy"][region] for region in REGIONS] for row in rows], dtype=np.float64)
    speed = (column("images_per_second"), column("data_wait"))
    beside = (np.array([row.get(key, np.nan) for row in rows]) for key in ("balanced_accuracy", "majority_share"))
    return Metrics(name, column("step"), column("loss"), accuracy, column("lr"), *speed, *beside)


def _is_row(row: Row) -> bool:
    """Whether a row has the numbers that the page draws."""
    accuracy = row.get("accuracy")
    values = [row.get(key) for key in ("step", "loss", "lr", "images_per_second", "data_wait")]
    values += [accuracy.get(region) if isinstance(accuracy, dict) else None for region in REGIONS]
    return all(isinstance(value, int | float) and abs(value) < 1e300 for value in values)


def page(runs: Sequence[Path], refresh_seconds: int | None = None) -> str:
    """The page of these run folders; ``refresh_seconds`` makes a browser read it again while the run goes on."""
    named = short_names(runs)
    found = [_metrics(run, name) for run, name in zip(runs, named, strict=True)]
    known = [metrics for metrics in found if metrics is not None]
    sections = [_figures_side_by_side(known)] if len(known) > 1 else []
    sections += _drawn("Curves", lambda: [_curves_section(known)])
    about = [_about(run, JIGSAWS if len(runs) == 1 else 4) for run in runs]
    sections += about[0] if len(runs) == 1 else _side_by_side(named, about)
    sections += _drawn("Configuration", lambda: [_configuration(runs, named)])
    title = f"Pre-training {', '.join(named)}"
    tiles = _figures(known[0]) if len(runs) == len(known) == 1 else {}
    return render(title, _lead(runs, found), sections, tiles, refresh_seconds)


def _metrics(run: Path, name: str) -> Metrics | None:
    try:
        return read_metrics(RunFolder(run).metrics, name)
    except OSError as error:
        log.warning("%s", error)
        return None


def _drawn(title: str, sections: Callable[[], list[Section]]) -> list[Section]:
    """The sections, or one that says why there are none: what is damaged in a run's folder costs its own part alone."""
    try:
        return sections()
    except Exception as error:
        log.warning("the page lacks %s (%s: %s)", title, type(error).__name__, str(error)[:200])
        return [Section(title, missing=f"It could not be drawn ({type(error).__name__}): its files are damaged.")]


def _recipe(run: Path) -> Recipe | None:
    folder = RunFolder(run)
    if not folder.description.exists():
        return None
    return Recipe.from_dict(read_description(folder)["recipe"], str(folder.description))


def _lead(runs: Sequence[Path], found: Sequence[Metrics | None]) -> str:
    parts = []
    for run, metrics in zip(runs, found, strict=True):
        recipe = _recipe(run)
        done = int(metrics.step[-1]) + 1 if metrics is not None else 0
        if recipe is None:
            parts.append(f"{run.name}: no step was taken")
        else:
            parts.append(f"{recipe.model.backbone}, {recipe.loss.strategy}: step {done:,} of {recipe.optim.steps:,}")
    ended = "" if len(found) != 1 or found[0] is None else f" Means over the last {counted(found[0].last, 'step')}:"
    return "; ".join(parts) + "." + ended


def _figures(metrics: Metrics) -> dict[str, float]:
    """What a run has come to, as means over its last steps."""
    return {
        "loss, nats": metrics.tail(metrics.loss),
        "% of crops named right": 100 * metrics.tail(metrics.accuracy.mean(axis=1)),
        **_beside_accuracy(metrics),
        "jigsaws / s": metrics.tail(metrics.images_per_second),
        "% of time waiting for data": 100 * metrics.tail(metrics.data_wait),
    }


def _figures_side_by_side(found: Sequence[Metrics]) -> Section:
    """A column of figures for each of several runs."""
    columns = [{"steps": int(one.step[-1]) + 1, **_figures(one)} for one in found]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [[name, *(column.get(name) for column in columns)] for name in names]
    text = "Means over the last steps of each run: a twentieth of them, at least ten."
    return Section("Figures", text, [Table(["", *(one.name for one in found)], rows)])


def _beside_accuracy(metrics: Metrics) -> dict[str, float]:
    """What accuracy is to be read beside; nothing of a run of an earlier version."""
    found = {
        "% right, every class counting alike": 100 * metrics.tail(metrics.balanced),
        "% right by always naming the commonest class": 100 * metrics.tail(metrics.majority),
    }
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _curves_section(found: list[Metrics]) -> Section:
    if not found:
        return Section("Curves", missing="metrics.jsonl has no row yet: no step was finished and logged.")
    return Section("Curves", "Over the training batches themselves, augmented.", figures=curves(found))


def curves(runs: Sequence[Metrics]) -> list[Figure]:
    """Loss, accuracy by region, learning rate, speed and data wait over the steps."""
    several, named = len(runs) > 1, ", ".join(run.name for run in runs)

    def plain(
        pick: Callable[[Metrics], F64], label: str, top: float | None = None, log: bool = False
    ) -> Callable[[Any], None]:
        def draw(axes: Any) -> None:
            for run, style in zip(runs, _LINE_STYLES * len(runs), strict=False):
                axes.plot(thinned(run.step), thinned(pick(run)), style, linewidth=1.3, label=run.name)
            axes.set_xlabel("step")
            axes.set_ylabel(label)
            if log:
                axes.set_yscale("log")
            else:
                axes.set_ylim(bottom=0, top=top)
            if several:
                axes.legend(frameon=False, fontsize="small")

        return draw

    def shares(caption: str, lines: Mapping[str, tuple[Metrics, F64]]) -> list[Figure]:
        # Rows of earlier versions lack some of these numbers.
        known = {label: line for label, line in lines.items() if np.isfinite(line[1]).any()}

        def draw(axes: Any) -> None:
            for (label, (run, values)), style in zip(known.items(), itertools.cycle(_LINE_STYLES), strict=False):
                axes.plot(thinned(run.step, SMOOTH), thinned(100 * values, SMOOTH), style, linewidth=1.4, label=label)
            axes.set_xlabel("step")
            axes.set_ylabel("crops named right, %")
            axes.set_ylim(0, 100)
            axes.legend(frameon=False, fontsize="small")

        return [chart(draw, f"{caption}, over steps of {named}", caption)] if known else []

    # Of one run what there is to compare, of several one curve each.
    first = runs[0]
    all_crops = {run.name: (run, run.accuracy.mean(axis=1)) for run in runs}
    accuracies = {
        "Accuracy on the batch": all_crops,
        "Accuracy on the batch, every class counting alike": {run.name: (run, run.balanced) for run in runs},
    }
    if not several:
        accuracies = {
            "Accuracy on the batch, and what it is to be read beside": {
                "all crops": all_crops[first.name],
                "every class counting alike": (first, first.balanced),
                "always the commonest class": (first, first.majority),
            },
            "Accuracy on the batch, by region": {
                REGION_WORDS[region]: (first, first.accuracy[:, i]) for i, region in enumerate(REGIONS)
            },
        }
    return [
        chart(plain(lambda run: run.loss, "loss, nats"), f"loss over steps of {named}", "Loss on the batch"),
        *(figure for caption, lines in accuracies.items() for figure in shares(caption, lines)),
        chart(plain(lambda run: run.lr, "learning rate"), f"learning rate over steps of {named}", "Learning rate"),
        chart(
            plain(lambda run: run.images_per_second, "jigsaws / s"),
            f"speed over steps of {named}",
            "Speed, jigsaws per second",
        ),
        chart(
            plain(lambda run: 100 * run.data_wait, "time waiting for data, %", 100),
            f"share of time waiting for data of {named}",
            "Data wait: near 0 the data keeps up; raise --workers where it does not",
        ),
    ]


def thinned(values: F64, points: int = POINTS) -> F64:
    """Means of equal stretches of the first axis, at most ``points`` of them."""
    stretch = max(1, -(-len(values) // points))
    whole = len(values) // stretch * stretch
    parts = values[:whole].reshape(-1, stretch, *values.shape[1:]).mean(axis=1)
    return parts if whole == len(values) else np.concatenate([parts, values[whole:].mean(axis=0, keepdims=True)])


def _about(run: Path, count: int) -> list[Section]:
    """One run's own sections, with ``count`` jigsaws."""
    recipe = _recipe(run)
    if recipe is None:
        why = "is damaged" if (run / "run.json").exists() else "is not there: no step was ever taken"
        return [Section("Jigsaws and what they were taken for", missing=f"{run.name}/run.json {why}.")]
    classes = [*read_description(RunFolder(run))["classes"], "background"]
    return [
        *_drawn("Jigsaws and what they were taken for", lambda: _predictions(run, recipe, classes, count)),
        *_drawn("Effective receptive fields", lambda: _fields(run, recipe)),
    ]


def _side_by_side(names: Sequence[str], about: Sequence[list[Section]]) -> list[Section]:
    """Several runs' sections: one of each kind, the runs' figures beside each other; tables of each run apart."""
    sections = []
    for title in dict.fromkeys(section.title for found in about for section in found):
        same = [(name, one) for name, found in zip(names, about, strict=True) for one in found if one.title == title]
        if any(one.tables or one.bars for _, one in same):
            sections += [replace(one, title=f"{title}: {name}") for name, one in same]
            continue
        figures = [replace(one, caption=f"{name}. {one.caption}".strip()) for name, of in same for one in of.figures]
        texts = [f"{name}: {one.text}" for name, one in same if one.text]
        if len({one.text for _, one in same}) == 1:
            texts = [same[0][1].text]
        missing = " ".join(f"{name}: {one.missing}" for name, one in same if one.missing)
        sections.append(Section(title, " ".join(texts), figures=figures, missing=missing))
    return sections


def _configuration(runs: Sequence[Path], names: Sequence[str]) -> Section:
    """What differs from the paper's recipe, and the versions that ran."""
    recipes = {name: recipe for run, name in zip(runs, names, strict=True) if (recipe := _recipe(run)) is not None}
    if not recipes:
        return Section("Configuration", missing="There is no recipe yet: no step was taken.")
    paper = _settings(Recipe().resolved())
    found = [_settings(recipe) for recipe in recipes.values()]
    rows = [
        [key, *(setting(one.get(key)) for one in found), setting(value)]
        for key, value in paper.items()
        if any(one.get(key) != value for one in found)
    ]
    heads = list(recipes) if len(runs) > 1 else ["this run"]
    described = [read_description(RunFolder(run))["versions"] for run in runs if _recipe(run) is not None]
    packages = sorted({name for versions in described for name in versions})
    versions = [[name, *(one.get(name, "–") for one in described)] for name in packages]
    differ = counted(len(rows), "setting differs", "settings differ")
    text = f"{differ} from the paper's recipe; all others are the paper's. RUN/recipe.toml has every one."
    tables = [Table(["setting", *heads, "the paper's"], rows)] if rows else []
    return Section("Configuration", text, [*tables, Table(["package", *heads], versions)])


def _settings(recipe: Recipe) -> dict[str, Any]:
    """A recipe's keys as they are written on the command line, and their values."""
    return {f"{part}.{key}": value for part, held in recipe.to_dict().items() for key, value in held.items()}


def _predictions(run: Path, recipe: Recipe, classes: list[str], count: int) -> list[Section]:
    found = snapshots(run, PredictionSnapshot)
    if not found:
        missing = "No checkpoint has been written yet, so there are no jigsaws to look at."
        return [Section("Jigsaws and what they were taken for", missing=missing)]
    step, path = list(found.items())[-1]
    snapshot = load_snapshot(path, PredictionSnapshot)
    shown = [
        [_verdict(classes, int(label), int(prediction)) for label, prediction in zip(*pair, strict=True)]
        for pair in zip(snapshot.labels, snapshot.predictions, strict=True)
    ]
    names = sorted({text for row in shown for text in row})
    numbered = [[names.index(text) for text in row] for row in shown]
    images = snapshot.images[:count]
    image = sheet(images, numbered, snapshot.groups.tolist(), recipe.data.template, names)
    alt = f"{counted(len(images), 'jigsaw')} of step {step} with the class of each crop and what it was taken for"
    note = display_note(pixels_of(RunFolder(run), read_description(RunFolder(run))))
    jigsaws = Section(
        "Jigsaws and what they were taken for",
        "A region says its class, and after an arrow what it was taken for. Its outline's colour tells square, tall "
        "and wide crops apart." + (f" {note}" if note else ""),
        figures=[_webp(image, alt, f"Of step {step}.")],
    )
    return [jigsaws, _confusion(step, snapshot, classes)]


def _verdict(classes: list[str], label: int, prediction: int) -> str:
    return classes[label] if label == prediction else f"{classes[label]} → {classes[prediction]}"


def _webp(image: Image.Image, alt: str, caption: str) -> Figure:
    sink = io.BytesIO()
    image.thumbnail((1600, 1600))
    image.save(sink, "WEBP", quality=80)
    return picture(sink.getvalue(), alt, caption, "webp", large=True)


def _confusion(step: int, snapshot: PredictionSnapshot, classes: list[str]) -> Section:
    labels, predicted, counts = snapshot.confusion.T
    total = np.bincount(labels, counts, minlength=len(classes))
    right = np.bincount(labels, counts * (labels == predicted), minlength=len(classes))
    wrong = sorted(
        ((int(n), int(a), int(b)) for a, b, n in snapshot.confusion if a != b), key=lambda row: (-row[0], row[1:])
    )
    rows = [[classes[a], classes[b], n, 100 * n / total[a]] for n, a, b in wrong[:CONFUSIONS]]
    table = Table(["class", "taken for", "how often", "% of its crops"], rows)
    shares = [(classes[i], float(100 * right[i] / total[i])) for i in np.argsort(-total, kind="stable") if total[i]]
    text = f"Of the {counted(int(total.sum()) // 4, 'jigsaw')} that were trained on just before step {step}."
    bars = Bars("% of a class's crops that were named right, the most frequent class first:", shares, 100)
    return Section("Accuracy by class, and what is confused", text, [table] if rows else [], bars)


def _fields(run: Path, recipe: Recipe) -> list[Section]:
    found = snapshots(run, ErfSnapshot)
    title = "Effective receptive fields"
    if not found:
        why = "has not refreshed its table yet" if recipe.loss.strategy == "erf-adaptive" else "uses no ERF table"
        return [Section(title, missing=f"The run ({recipe.loss.strategy}) {why}.")]
    loaded = {step: load_snapshot(found[step], ErfSnapshot) for step in spread(list(found))}
    last = list(loaded)[-1]
    text = f"Refreshed {counted(len(found), 'time')}; the newest table is of step {last}."
    if recipe.model.neck != "none":
        text += " Of the neck's levels the coarsest is shown; each has a table of its own."
    return [
        Section("Effective receptive fields", text, figures=[field_figure(loaded, recipe.data.template)]),
        Section("Label weights", figures=[weight_figure(last, loaded[last])]),
    ]


class RunPage(Callback):
    """Keeps snapshots of a run and RUN/report.html as it goes.

    The page is drawn at checkpoints, at most once in PAGE_SECONDS and by a process of its own; at the end by this one.
    """

    def __init__(self, run: Path, recipe: Recipe, origin: Origin) -> None:
        self._run, self._steps = run, recipe.optim.steps
        shown = DisplayRange(origin.pixels, *recipe.data.normalisation)
        self._recorder = PredictionRecorder(len(origin.classes) + 1, shown)
        self._snapshot: PredictionSnapshot | None = None
        self._drawn = -math.inf
        self._drawing: subprocess.Popen[bytes] | None = None
        self._goes_on = True

    def on_refresh(self, table: ErfTable, level: nn.Module, images: Tensor, region_map: Tensor) -> Pictures:
        """Keep the regions' fields."""
        snapshot = region_fields(level, images, region_map, table.masses, table.weights)
        self._keep(table.step, snapshot)
        return {"erf": snapshot.picture()}

    def on_step(self, batch: Batch, labels: Tensor, predictions: Tensor) -> None:
        """Record what the network predicted."""
        self._recorder.note(batch, labels, predictions)

    def on_save(self, step: int, last: bool) -> Pictures:
        """Take what the steps since the last page showed, where one is due."""
        is_drawing = self._drawing is not None and self._drawing.poll() is None
        if not last and (is_drawing or time.monotonic() - self._drawn < PAGE_SECONDS):
            return {}
        self._drawn, self._goes_on = time.monotonic(), not last
        self._snapshot = self._recorder.take()
        return {} if self._snapshot is None else {"jigsaws": self._snapshot.picture()}

    def write(self, step: int) -> None:
        """Write what was taken, and begin to draw the page."""
        snapshot, self._snapshot = self._snapshot, None
        if snapshot is None:
            return
        self._keep(step, snapshot)
        if self._goes_on:
            self._wait()
            environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
            self._drawing = subprocess.Popen(
                [sys.executable, "-c", _DRAW, str(self._run)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )

    def on_end(self, step: int) -> None:
        """Draw the page once more, in place of a process that still draws: one of its niceness may take minutes."""
        if self._drawing is not None and self._drawing.poll() is None:
            self._drawing.terminate()
            self._drawing.communicate()
            self._drawing = None
        self._wait()
        if not RunFolder(self._run).begun:
            # Without a step there is nothing to show, and a page alone would be taken for somebody's own.
            return
        try:
            Storage(self._run).sweep("")
            write_report(self._run, finished=step >= self._steps)
        except Exception as error:
            # The page never ends a run.
            log.warning("the page of %s was not drawn (%s: %s)", self._run, type(error).__name__, error)

    def _keep(self, step: int, snapshot: ErfSnapshot | PredictionSnapshot) -> None:
        try:
            save_snapshot(self._run, step, snapshot)
        except OSError as error:
            log.warning("a snapshot of step %d was not kept: %s", step, error)

    def _wait(self) -> None:
        """Wait for the process that draws, if there is one, and log what went wrong with it."""
        drawing, self._drawing = self._drawing, None
        if drawing is None:
            return
        _, said = drawing.communicate()
        if drawing.returncode:
            lines = said.decode(errors="replace").strip().splitlines()
            log.warning("the page of %s was not drawn (%s)", self._run, lines[-1] if lines else "no output")


def write_report(run: Path, finished: bool) -> Path:
    """Write RUN/report.html, whole or not at all; while the run goes on, browsers read it again every minute."""
    Storage(run).publish("report.html", page([run], None if finished else 60).encode())
    return run / "report.html"
