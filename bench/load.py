"""Crops to assembled jigsaws against decoding alone: CPU time a jigsaw in one process, where decoding its crops is 1.

    python bench/load.py [--data OUT] [--jigsaws 1024] [--repeats 5]

OUT is a prepped dataset (the sample dataset is drawn and prepped where none is given). Two minutes on one core.
The peers are bench/peers.py's, one of them asking Pillow for the window alone (resize(box)).
"""

import itertools
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import click
import numpy as np
import simplejpeg

from bench import peers
from bench.sample import prepped
from bench.timing import Goal, interleaved, judged, show, write
from jigsaw_pretrain.cli import Command
from jigsaw_pretrain.formats.dataset.dataset import Dataset, open_dataset
from jigsaw_pretrain.formats.jigsaw import Template
from jigsaw_pretrain.train.data.jigsaw import Assembler
from jigsaw_pretrain.train.data.loader import JigsawLoader
from jigsaw_pretrain.train.recipe import DataOptions

FLOOR = "decode the four crops (floor)"
LANES = "lanes (this project)"
PILLOW = "webdataset + Pillow"
BOX = "webdataset + Pillow, resize(box)"
OTHERS = {"litdata": peers.litdata_streams, "mosaicml-streaming": peers.mosaicml_streams}


class Decoded:
    """Counts what a reader decodes, to replay it: the floor is these very crops."""

    def __init__(self) -> None:
        self.jpegs: list[bytes] = []

    def replay(self) -> None:
        """Decode them all."""
        for jpeg in self.jpegs:
            simplejpeg.decode_jpeg(jpeg, "RGB")


def ours(dataset: Dataset, options: DataOptions, steps: int) -> None:
    """Batches as a worker makes them."""
    assembler = Assembler(dataset, options, range(options.lane_count))
    images = np.zeros((options.batch, options.template_size, options.template_size, 3), dtype=np.uint8)
    for step in range(steps):
        assembler.step(step, images)


def record(dataset: Dataset, options: DataOptions, steps: int) -> Decoded:
    """The JPEGs of the crops in these jigsaws."""
    seen, original = Decoded(), simplejpeg.decode_jpeg

    def noting(data: bytes, *arguments: object, **named: object) -> object:
        seen.jpegs.append(bytes(data))
        return original(data, *arguments, **named)

    simplejpeg.decode_jpeg = noting
    try:
        ours(dataset, options, steps)
    finally:
        simplejpeg.decode_jpeg = original
    return seen


def received(dataset: Dataset, options: DataOptions, steps: int) -> float:
    """CPU microseconds a jigsaw of the main process with two workers, the first three batches aside."""
    import time

    loader = JigsawLoader(dataset, options, workers=2, stop_step=steps + 3)
    try:
        batches = iter(loader)
        for _ in itertools.islice(batches, 3):
            pass
        begun = time.process_time()
        for _ in batches:
            pass
        return 1e6 * (time.process_time() - begun) / (steps * options.batch)
    finally:
        loader.close()


@click.command(cls=Command)
@click.option("--data", help="A prepped dataset; the sample dataset where none is given.")
@click.option("--jigsaws", default=1024, show_default=True, help="In a repeat.")
@click.option("--repeats", default=5, show_default=True)
@click.option("--batch", default=64, show_default=True)
@click.option("--lanes", type=int, default=16, show_default=True)
def main(data: str | None, jigsaws: int, repeats: int, batch: int, lanes: int) -> None:
    """Print the table and write bench/results/load.json."""
    with tempfile.TemporaryDirectory() as scratch:
        if data is None:
            data = prepped(Path(scratch), 120)
        dataset, template = open_dataset(data), Template()
        options, steps = DataOptions(batch=batch, lanes=lanes), max(1, jigsaws // batch)
        crops = record(dataset, options, steps)
        count = steps * batch
        cases: dict[str, Callable[[], object]] = {
            FLOOR: crops.replay,
            LANES: lambda: ours(dataset, options, steps),
        }
        own_format = peers.webdataset_streams(dataset, Path(scratch))
        cases[BOX] = lambda: peers.assemble(own_format, template, count, window_only=True)
        cases[PILLOW] = lambda: peers.assemble(own_format, template, count)
        for name, streams_of in OTHERS.items():
            try:
                streams = streams_of(dataset, Path(scratch))
            except ImportError as error:
                click.echo(f"{name} is not compared ({str(error).splitlines()[0]}): pip install {name}")
                continue
            cases[f"{name} + Pillow"] = partial(peers.assemble, streams, template, count)
        times = interleaved(cases, repeats)
        title = f"load: {count} jigsaws of {template.size} px, CPU time of one process"
        rows = show(title, times, FLOOR, count, "jigsaw", {LANES: Goal(1.25)})
        own = rows[LANES]["us"]
        summary: dict[str, object] = dict(rows)
        goals = {PILLOW: Goal(5, True), BOX: Goal(4, True)}
        for name in list(cases)[list(cases).index(BOX) :]:
            times_faster = rows[name]["us"] / own  # type: ignore[operator]
            what = f"times as fast as {name}"
            if name in goals:
                summary[what] = judged(what, times_faster, goals[name], ".2f")
            else:
                click.echo(f"{what}: {times_faster:.2f}")
                summary[what] = times_faster
        main_process = received(dataset, options, 4 * steps)
        summary["main process"] = judged("us a jigsaw in the main process", main_process, Goal(120), ".0f")
        write("load", summary)


if __name__ == "__main__":
    main()
