"""How the trainer's start and a worker's memory grow: with the number of shards, with lanes, with a shard's size.

    python bench/scaling.py [--shards 100,1000,10000] [--lanes 4,16,64] [--crops 25,100,400]

Datasets of tiny crops are drawn for it; --data adds the start on one that is there. Every figure is of a fresh process.
"Opening" is open_dataset of formats/dataset/dataset.py; "first batch" is from there to the loader's first batch, the
workers' start included. A worker's own memory is what only it has; the pages of the shards that it reads are
the kernel's, one copy for all workers of the host. Prints two tables, writes bench/results/scaling.json
and scaling.svg. Three minutes, most of them for drawing 10,000 shards.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from bench.timing import RESULTS, Goal, judged, write
from jigsaw_pretrain.cli import Command
from jigsaw_pretrain.formats.dataset.dataset import open_dataset
from jigsaw_pretrain.train.data.jigsaw import Assembler
from jigsaw_pretrain.train.data.loader import JigsawLoader
from jigsaw_pretrain.train.recipe import DataOptions
from tests.helpers.tiny import make_dataset

OPENING = Goal(3.0)
"""Seconds for 10,000 shards."""

WORKERS = 2

Row = dict[str, float]


class Numbers(click.ParamType):
    """Whole numbers joined by commas."""

    name = "numbers"

    def convert(
        self, value: str | tuple[int, ...], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """The numbers, ascending."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(sorted({int(part) for part in value.split(",")}))
        except ValueError:
            self.fail(f"{value!r} is not a list of whole numbers such as 100,1000", param, ctx)


def start(data: str) -> Row:
    """Seconds of opening a dataset and from there to the first batch, with 64 lanes and two workers."""
    began = time.perf_counter()
    dataset = open_dataset(data)
    opened = time.perf_counter()
    loader = JigsawLoader(dataset, DataOptions(batch=64, lanes=64), workers=WORKERS, stop_step=1)
    for _ in loader:
        pass
    return {"shards": len(dataset.shards), "open_s": opened - began, "first_batch_s": time.perf_counter() - opened}


def memory(data: str, lanes: int) -> Row:
    """MB that a worker of ``lanes`` lanes takes beyond a process that has only imported, after four steps."""
    before = _resident()
    dataset, options = open_dataset(data), DataOptions(batch=lanes, lanes=lanes)
    assembler = Assembler(dataset, options, range(lanes))
    out = np.zeros((lanes, 224, 224, 3), dtype=np.uint8)
    for step in range(4):
        assembler.step(step, out)
    after = _resident()
    largest = max(shard.bytes for shard in dataset.shards)
    row = {"lanes": lanes, "shard_mb": largest / 1e6, "batch_mb": out.nbytes / 1e6}
    assembler.close()
    return row | {"own_mb": after["RssAnon"] - before["RssAnon"]}


def _resident() -> dict[str, float]:
    """Resident MB of this process, by kind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {key: int(rest.split()[0]) / 1e3 for key, rest in (line.split(":") for line in lines) if key[:3] == "Rss"}


def apart(name: str, *arguments: object) -> Row:
    """The row that a measurement of this module finds in a process of its own."""
    command = [sys.executable, __file__, "--only", json.dumps([name, *arguments])]
    found: Row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def middle(rows: Sequence[Row]) -> Row:
    """The median of each column."""
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def starts(folder: Path, counts: Sequence[int], repeats: int) -> list[Row]:
    """A row for each number of shards."""
    rows = []
    for count in counts:
        groups = {group: [2] * (count // 3 + (nth < count % 3)) for nth, group in enumerate("STW")}
        data = make_dataset(folder / f"shards-{count}", groups, low=16, high=64)
        rows.append(middle([apart("start", data.url) for _ in range(repeats)]))
    return rows


def memories(folder: Path, lanes: Sequence[int], sizes: Sequence[int]) -> list[Row]:
    """A row for each number of lanes and crops per shard; the datasets have a shard for each of the lanes' streams."""
    rows = []
    for crops in sizes:
        groups = {group: [crops] * max(lanes) for group in "STW"}
        data = make_dataset(folder / f"memory-{crops}", groups, low=16, high=64)
        rows += [{**apart("memory", data.url, count), "crops": crops} for count in lanes]
    return rows


def table(title: str, heads: dict[str, str], rows: Sequence[Row]) -> None:
    """Print some columns; heads: what stands above each, with its format after a bar."""
    found = Table(title=title)
    for head in heads.values():
        found.add_column(head.split("|")[0], justify="right")
    for row in rows:
        found.add_row(*(format(row[key], head.split("|")[1]) for key, head in heads.items()))
    Console().print(found)


def plot(starts: Sequence[Row], memories: Sequence[Row], path: Path) -> None:
    """Both tables as pictures."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    for key, label in (("open_s", "opening"), ("first_batch_s", "first batch")):
        left.plot([row["shards"] for row in starts], [row[key] for row in starts], marker="o", label=label)
    left.set(xscale="log", xlabel="shards", ylabel="seconds", title="the trainer's start", ylim=(0, None))
    for crops in sorted({row["crops"] for row in memories}):
        rows = [row for row in memories if row["crops"] == crops]
        label = f"{crops} crops a shard"
        right.plot([row["lanes"] for row in rows], [row["own_mb"] for row in rows], marker="o", label=label)
    right.set(xlabel="lanes of the worker", ylabel="own memory, MB", title="a worker's memory", ylim=(0, None))
    for axes in (left, right):
        axes.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


@click.command(cls=Command)
@click.option("--shards", type=Numbers(), default="100,1000,10000", show_default=True)
@click.option("--lanes", type=Numbers(), default="4,16,64", show_default=True, help="Of one worker.")
@click.option("--crops", type=Numbers(), default="25,100,400", show_default=True, help="A shard.")
@click.option("--repeats", default=3, show_default=True, help="Of each start.")
@click.option("--data", help="Also the start on this prepped dataset.")
@click.option("--only", hidden=True)
def main(
    shards: tuple[int, ...],
    lanes: tuple[int, ...],
    crops: tuple[int, ...],
    repeats: int,
    data: str | None,
    only: str | None,
) -> None:
    """Print the tables and write bench/results/scaling.json and scaling.svg."""
    if only:
        name, *arguments = json.loads(only)
        click.echo(json.dumps(start(*arguments) if name == "start" else memory(*arguments)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        started = starts(Path(scratch), shards, repeats)
        if data:
            started.append(middle([apart("start", data) for _ in range(repeats)]))
        heads = {"shards": "shards|,.0f", "open_s": "opening, s|.3f", "first_batch_s": "first batch, s|.2f"}
        table(f"the trainer's start, medians of {repeats}", heads, started)
        held = memories(Path(scratch), lanes, crops)
        heads = {
            "crops": "crops a shard|,.0f",
            "shard_mb": "largest shard, MB|.1f",
            "lanes": "lanes|.0f",
            "batch_mb": "batch, MB|.1f",
            "own_mb": "own memory, MB|.0f",
        }
        table("a worker's memory", heads, held)
    picture = RESULTS / "scaling.svg"
    plot(started, held, picture)
    click.echo(f"drawn in {picture}")
    largest = max(started, key=lambda row: row["shards"])
    note = "" if largest["shards"] >= 10_000 else "the goal is for 10,000 shards"
    what = f"seconds to open {largest['shards']:,.0f} shards"
    opening = judged(what, largest["open_s"], OPENING, note=note)
    whole = judged(f"{what} and have the first batch", largest["open_s"] + largest["first_batch_s"], OPENING, note=note)
    write("scaling", {"starts": started, "memory": held, "goals": [opening, whole]})


if __name__ == "__main__":
    main()
