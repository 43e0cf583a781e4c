"""Crops to assembled jigsaws against decoding alone: CPU time a jigsaw in one process, where decoding its crops is 1.

    python bench/load.py [--data OUT] [--jigsaws 256] [--repeats 5]

OUT is a prepped dataset (the sample dataset is drawn and prepped where none is given). A minute on one core. The peers
are what a user would write: webdataset readers of the three groups, Pillow to resize, flip, crop or pad, and paste; the
second asks Pillow for the window alone (resize(box)).
"""

import io
import itertools
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import click
import numpy as np
import numpy.typing as npt
import simplejpeg
import webdataset
from PIL import Image

from bench.timing import Goal, interleaved, show, write
from formats.dataset import Dataset, open_dataset
from train.jigsaw import Assembler
from train.loader import JigsawLoader
from train.streams import StreamOptions
from train.template import REGION_GROUPS, Region, Template

FLOOR = "decode the four crops (floor)"


class Decoded:
    """Counts what a reader decodes, to replay it: the floor is these very crops."""

    def __init__(self) -> None:
        self.jpegs: list[bytes] = []

    def replay(self) -> None:
        """Decode them all."""
        for jpeg in self.jpegs:
            simplejpeg.decode_jpeg(jpeg, "RGB")


def ours(dataset: Dataset, template: Template, options: StreamOptions, steps: int) -> None:
    """Batches as a worker makes them."""
    assembler = Assembler(dataset, template, options, range(options.lane_count))
    images = np.zeros((options.batch, template.size, template.size, 3), dtype=np.uint8)
    for step in range(steps):
        images[:] = 0
        assembler.step(step, images)


def record(dataset: Dataset, template: Template, options: StreamOptions, steps: int) -> Decoded:
    """The JPEGs that ``ours`` decodes."""
    seen, original = Decoded(), simplejpeg.decode_jpeg

    def noting(data: bytes, *arguments: object, **named: object) -> object:
        seen.jpegs.append(bytes(data))
        return original(data, *arguments, **named)

    simplejpeg.decode_jpeg = noting
    try:
        ours(dataset, template, options, steps)
    finally:
        simplejpeg.decode_jpeg = original
    return seen


def stream(dataset: Dataset, group: str) -> Iterator[bytes]:
    """A group's crops for ever, as webdataset reads and shuffles them."""
    urls = [str(Path(dataset.url) / "shards" / shard.name) for shard in dataset.of_group(group)]
    reader = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0, empty_check=False).shuffle(500).repeat()
    return (sample["jpg"] for sample in reader)


def place(jpeg: bytes, region: Region, rng: random.Random, window_only: bool) -> Image.Image:
    """One crop in its region: resized, flipped, cropped or padded by Pillow."""
    image = Image.open(io.BytesIO(jpeg)).convert("RGB")
    ratio = rng.uniform(0.8, 1.5)
    width, height = max(1, round(image.width * ratio)), max(1, round(image.height * ratio))
    shown_x, shown_y = min(width, region.width), min(height, region.height)
    x, y = rng.randint(0, width - shown_x), rng.randint(0, height - shown_y)
    if window_only:
        box = (x / ratio, y / ratio, min(image.width, (x + shown_x) / ratio), min(image.height, (y + shown_y) / ratio))
        image = image.resize((shown_x, shown_y), Image.Resampling.BILINEAR, box=box)
    else:
        image = image.resize((width, height), Image.Resampling.BILINEAR).crop((x, y, x + shown_x, y + shown_y))
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    page = Image.new("RGB", (region.width, region.height))
    page.paste(image, (rng.randint(0, region.width - shown_x), rng.randint(0, region.height - shown_y)))
    return page


def peer(dataset: Dataset, template: Template, count: int, window_only: bool) -> list[npt.NDArray[np.uint8]]:
    """webdataset + Pillow."""
    streams = {group: stream(dataset, group) for group in "STW"}
    rng, made = random.Random(0), []
    for _ in range(count):
        page = Image.new("RGB", (template.size, template.size))
        for region, group in zip(template.regions, REGION_GROUPS, strict=True):
            page.paste(place(next(streams[group]), region, rng, window_only), (region.left, region.top))
        made.append(np.asarray(page))
    return made


def received(dataset: Dataset, template: Template, options: StreamOptions, steps: int) -> float:
    """CPU microseconds a jigsaw of the main process with two workers, the first three batches aside."""
    import time

    loader = JigsawLoader(dataset, template, options, workers=2, stop_step=steps + 3)
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


@click.command()
@click.option("--data", help="A prepped dataset; the sample dataset where none is given.")
@click.option("--jigsaws", default=256, show_default=True, help="In a repeat.")
@click.option("--repeats", default=5, show_default=True)
@click.option("--batch", default=64, show_default=True)
@click.option("--lanes", type=int, default=16, show_default=True)
def main(data: str | None, jigsaws: int, repeats: int, batch: int, lanes: int) -> None:
    """Print the table and write bench/results/load.json."""
    with tempfile.TemporaryDirectory() as scratch:
        if data is None:
            data, source = f"{scratch}/out", f"{scratch}/sample"
            root = Path(__file__).parents[1]
            python = [sys.executable, "-m", "prep"]
            subprocess.run([*python, "sample-data", "--out", source, "--images", "120"], check=True, cwd=root)
            named = ["--annotations", f"{source}/annotations.json", "--images", f"{source}/images", "--out", data]
            subprocess.run([*python, "shards", *named], check=True, cwd=root, stdout=subprocess.DEVNULL)
        dataset, template = open_dataset(data), Template()
        options, steps = StreamOptions(batch=batch, lanes=lanes), max(1, jigsaws // batch)
        crops = record(dataset, template, options, steps)
        times = interleaved(
            {
                FLOOR: crops.replay,
                "lanes (this project)": lambda: ours(dataset, template, options, steps),
                "webdataset + Pillow, resize(box)": lambda: peer(dataset, template, steps * batch, True),
                "webdataset + Pillow": lambda: peer(dataset, template, steps * batch, False),
            },
            repeats,
        )
        title = f"load: {steps * batch} jigsaws of {template.size} px, CPU time of one process"
        rows = show(title, times, FLOOR, steps * batch, "jigsaw", {"lanes (this project)": Goal(1.2)})
        own = rows["lanes (this project)"]["us"]
        summary: dict[str, object] = dict(rows)
        for name, goal in (("webdataset + Pillow", Goal(5, True)), ("webdataset + Pillow, resize(box)", Goal(4, True))):
            times_faster = rows[name]["us"] / own  # type: ignore[operator]
            click.echo(f"{times_faster:.2f} times as fast as {name} (goal {goal})")
            summary[f"times as fast as {name}"] = times_faster
        main_process = received(dataset, template, options, 4 * steps)
        click.echo(f"main process: {main_process:.0f} us a jigsaw (goal {Goal(120)})")
        write("load", {**summary, "main process us": main_process})


if __name__ == "__main__":
    main()
