"""How prep grows: with processes, beside independent decoding processes, and with images, which should be a line."""

import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack, redirect_stderr, redirect_stdout, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import simplejpeg
from rich.console import Console
from rich.table import Table

from bench.prep_peers import pillow_pool, work_of
from bench.timing import RESULTS, Goal
from jigsaw_pretrain.prep.executors import run_tasks
from jigsaw_pretrain.prep.parts import PartTask, publish_part
from jigsaw_pretrain.prep.pipeline import shards
from jigsaw_pretrain.prep.report.console import ConsoleProgress
from jigsaw_pretrain.storage.store import Storage

GOAL = Goal(0.95, at_least=True)
PROCESSES = 2
PARTS = 8


def cut_part(task: PartTask) -> None:
    """A part task, in a worker."""
    publish_part(task, Storage(task.out))


def decode_files(files: Sequence[str]) -> None:
    """Read and decode, in a worker."""
    for file in files:
        simplejpeg.decode_jpeg(Path(file).read_bytes(), "RGB")


def _all(executor: Executor, function: Callable[[Any], None], tasks: Sequence[Any], at_once: int) -> None:
    for _ in run_tasks(executor, function, tasks, at_once):
        pass


def seconds_of(action: Callable[[], Any]) -> float:
    """Wall-clock seconds."""
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def processes(task: PartTask, repeats: int, scratch: Path) -> dict[str, Any]:
    """Wall-clock images/s with one and two processes that are already started: decoding, prep, the Pillow script.

    Of each the task's images, ``PARTS`` times; decoding processes have nothing to do with each other.
    """
    parts = [replace(task, number=number, out=str(scratch / "scaling")) for number in range(PARTS)]
    work = work_of(task) * PARTS
    files = [file for file, _ in work]
    context = multiprocessing.get_context("spawn")
    cases: dict[str, Callable[[], Any]] = {}
    with ExitStack() as stack:
        for count in (1, PROCESSES):
            executor = stack.enter_context(ProcessPoolExecutor(count, context))
            pool = stack.enter_context(context.Pool(count))
            shares = [files[i::count] for i in range(count)]
            cases[f"decoding {count}"] = partial(_all, executor, decode_files, shares, count)
            cases[f"prep {count}"] = partial(_all, executor, cut_part, parts, 2 * count)
            cases[f"Pillow, multiprocessing {count}"] = partial(pillow_pool, pool, work, scratch / "pillow.tar")
        found: dict[str, list[float]] = {name: [] for name in cases}
        for case in cases.values():
            case()
        for _ in range(repeats):
            for name, case in cases.items():
                found[name].append(seconds_of(case))
    return _show_processes(found, len(files))


def _show_processes(found: dict[str, list[float]], images: int) -> dict[str, Any]:
    table = Table(title=f"prep on {PROCESSES} processes: {images} images, wall clock, q95 4:4:4 (Pillow: 4:2:0)")
    for head in ("case", "images/s with 1", f"with {PROCESSES}", "speed-up", "beside decoding", "goal"):
        table.add_column(head, justify="left" if head == "case" else "right")
    rows: dict[str, Any] = {}
    gains = {}
    for name in ("decoding", "prep", "Pillow, multiprocessing"):
        one, two = found[f"{name} 1"], found[f"{name} {PROCESSES}"]
        gains[name] = [a / b for a, b in zip(one, two, strict=True)]
        beside = statistics.median(a / b for a, b in zip(gains[name], gains["decoding"], strict=True))
        gain = statistics.median(gains[name])
        speeds = images / statistics.median(one), images / statistics.median(two)
        judged = {"goal": str(GOAL), "met": GOAL.met(beside)} if name == "prep" else {}
        verdict = GOAL.verdict(beside) if judged else ""
        table.add_row(name, f"{speeds[0]:,.0f}", f"{speeds[1]:,.0f}", f"{gain:.2f}", f"{beside:.2f}", verdict)
        what = {"what": f"{name} on {PROCESSES} processes beside decoding"}
        rows[name] = what | {"images_per_second": speeds, "speed_up": gain, "ratio": beside} | judged
    Console().print(table)
    return rows


def copies(data: Path, count: int, folder: Path) -> tuple[Path, Path]:
    """A dataset of that many images: those of ``data`` again and again, under names of their own."""
    lists = json.loads((data / "annotations.json").read_text())
    boxes: dict[Any, list[dict[str, Any]]] = {}
    for annotation in lists["annotations"]:
        boxes.setdefault(annotation["image_id"], []).append(annotation)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    (folder / "images").mkdir(parents=True)
    for number in range(count):
        source = lists["images"][number % len(lists["images"])]
        name = f"{number:06d}{Path(source['file_name']).suffix}"
        file = data / "images" / source["file_name"]
        try:
            os.link(file, folder / "images" / name)
        except OSError:
            shutil.copyfile(file, folder / "images" / name)
        images.append(source | {"id": number, "file_name": name})
        for one in boxes.get(source["id"], []):
            annotations.append(one | {"id": len(annotations), "image_id": number})
    whole = {"images": images, "annotations": annotations, "categories": lists["categories"]}
    (folder / "annotations.json").write_text(json.dumps(whole))
    return folder / "annotations.json", folder / "images"


def growth(data: Path, sizes: Sequence[int], repeats: int) -> list[dict[str, float]]:
    """CPU seconds of the whole command, one worker, for each number of images; a table, and a plot beside it."""
    rows = []
    for count in sizes:
        with tempfile.TemporaryDirectory() as scratch:
            annotations, images = copies(data, count, Path(scratch) / "data")
            times = []
            for _ in range(repeats):
                begun = time.process_time()
                with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
                    shards(
                        str(annotations),
                        str(images),
                        str(Path(scratch) / "out"),
                        workers=1,
                        max_skipped=1.0,
                        overwrite=True,
                        progress=ConsoleProgress(),
                    )
                times.append(time.process_time() - begun)
            rows.append({"images": count, "seconds": statistics.median(times)})
    slope, intercept = np.polyfit([row["images"] for row in rows], [row["seconds"] for row in rows], 1)
    table = Table(title="prep, the whole command: CPU time against images (4:4:4, one worker)")
    for head in ("images", "seconds", "ms / image", "beside the line"):
        table.add_column(head, justify="right")
    for row in rows:
        row["fitted"] = float(row["seconds"] / (slope * row["images"] + intercept))
        each = 1e3 * row["seconds"] / row["images"]
        table.add_row(f"{row['images']:,.0f}", f"{row['seconds']:.2f}", f"{each:.2f}", f"{row['fitted']:.3f}")
    Console().print(table)
    click.echo(f"a line of {1e3 * slope:.2f} ms an image and {intercept:.2f} s at the start")
    with suppress(ImportError):
        _plot(rows, float(slope), float(intercept))
    return rows


def _plot(rows: list[dict[str, float]], slope: float, intercept: float) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3.2), layout="constrained")
    most = rows[-1]["images"]
    axes.plot([0, most], [intercept, intercept + slope * most], color="#999999", linewidth=1, label="line")
    axes.plot([row["images"] for row in rows], [row["seconds"] for row in rows], "o", color="#0072B2", label="measured")
    axes.set_xlabel("images")
    axes.set_ylabel("CPU seconds of prep")
    axes.set_xlim(0)
    axes.set_ylim(0)
    axes.legend(frameon=False)
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / "prep-images.svg")
    pyplot.close(figure)
