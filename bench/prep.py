"""Prep against its floor: CPU time per image, where decoding each image once is 1.

    python bench/prep.py [--data FOLDER] [--images 60] [--repeats 5] [--boxes 1000000] [--growth 250,500,1000,2000]

FOLDER holds annotations.json and images/ (the sample dataset is drawn where none is given). A few minutes on two cores.
Ours is the whole part task: reading, cutting, the tars and rows written and synced; "cutting alone" makes the same
JPEGs of images in memory, which is what the design's first 1.85 was measured of. The floor decodes bytes that are in
memory, and lets each image go at once, so that its memory is used again. Peers: bench/prep_peers.py.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import click
import numpy as np
import simplejpeg

from bench.prep_peers import opencv_sample, pillow_image, pillow_sample, work_of, write_tar
from bench.prep_scaling import growth, processes
from bench.sample import ROOT, draw
from bench.timing import Goal, interleaved, judged, show, write
from jigsaw_pretrain.cli import Command
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.annotations.read import read_annotations
from jigsaw_pretrain.formats.images.decode import PixelBuffer, decode
from jigsaw_pretrain.formats.images.source import ImageSource
from jigsaw_pretrain.prep import crops
from jigsaw_pretrain.prep.crops import encode_crops
from jigsaw_pretrain.prep.parts import PartTask, publish_part
from jigsaw_pretrain.prep.pipeline import PrepJob, plan_job, task_of
from jigsaw_pretrain.prep.plan.plan import PlanOptions
from jigsaw_pretrain.storage.store import Storage

Item = TypeVar("Item")

FLOOR = "decode each image once (floor)"
LOSSLESS = "prep, --encode lossless"
ALONE = "cutting alone, q95 4:2:0"
LOSSLESS_ALONE = "cutting alone, lossless"


def part_of(folder: Path, images: int) -> PartTask:
    """One part with the crops of the first images."""
    options = PlanOptions(0.1, 2.0, 10**9, 95, "444", "ignore")
    job = PrepJob(str(folder / "annotations.json"), str(folder / "images"), ".", 0, options)
    source = ImageSource(job.images)
    plan = plan_job(job, read_annotations(job.annotations, job.images), source)
    task = task_of(plan, job, source, 0)
    kept = task.crops.take(task.crops.image < images)
    first = min(images, len(task.images))
    columns = {name: getattr(task.images, name)[:first] for name in ("ids", "files", "widths", "heights")}
    return replace(task, images=replace(task.images, **columns), crops=kept)


def ours(task: PartTask, **options: Any) -> Callable[[], object]:
    """A case that does the whole part task, with other options."""
    changed = replace(task, **options)
    return lambda: publish_part(changed, Storage(changed.out))


def cutting(task: PartTask, raw: list[bytes], subsampling: str | None) -> Callable[[], None]:
    """A case that makes the crops' JPEGs of images in memory and nothing else; without a subsampling, losslessly."""
    ends = np.searchsorted(task.crops.image, np.arange(len(raw)), side="right").tolist()
    sizes = zip(task.images.widths.tolist(), task.images.heights.tolist(), strict=True)
    jobs = [
        (jpeg, task.crops.boxes[first:end], size)
        for jpeg, first, end, size in zip(raw, [0, *ends], ends, sizes, strict=False)
    ]
    buffer = PixelBuffer()

    def case() -> None:
        for jpeg, boxes, size in jobs:
            if subsampling is None:
                crops.cut_lossless(jpeg, boxes, *size, task.exif)
            else:
                encode_crops(decode(jpeg, *size, task.exif, buffer), boxes, task.quality, subsampling)

    return case


def synthetic(folder: Path, boxes: int) -> Path:
    """COCO JSON of that many boxes, ten per image."""
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 500, (boxes, 2)).round(2)
    size = rng.uniform(8, 140, (boxes, 2)).round(2)
    images = [{"id": i, "file_name": f"{i:012d}.jpg", "width": 640, "height": 640} for i in range(max(1, boxes // 10))]
    file = folder / "synthetic.json"
    with file.open("w") as out:
        out.write(f'{{"images": {json.dumps(images)}, "annotations": [')
        for i in range(boxes):
            box = [*corner[i].tolist(), *size[i].tolist()]
            record = {"id": i, "image_id": i % len(images), "category_id": 1 + i % 80, "bbox": box}
            out.write(("," if i else "") + json.dumps(record))
        names = [{"id": i + 1, "name": f"class {i}"} for i in range(80)]
        out.write(f'], "categories": {json.dumps(names)}}}')
    return file


def plan_alone(file: Path) -> tuple[float, float]:
    """Seconds and GB of a plan in a process of its own, reading the file included."""
    begun = time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    # The images are not there, which `shards --dry-run` would say: the plan itself needs none.
    code = """
import sys
from jigsaw_pretrain.formats.annotations.read import Reading, listed, read_annotations
from jigsaw_pretrain.formats.images.source import ImageSource
from jigsaw_pretrain.prep.plan.plan import PlanOptions, make_plan
file, images = sys.argv[1:]
make_plan(listed(read_annotations(file, images), ImageSource(images), Reading()), PlanOptions(), 0).summary()
"""
    command = [sys.executable, "-c", code, str(file), str(file.parent)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    peak = max(before, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
    return time.perf_counter() - begun, peak / 1e6


def each(items: Iterable[Item], action: Callable[[Item], object]) -> Callable[[], None]:
    """A case that does the action to all items."""
    kept = list(items)

    def case() -> None:
        for item in kept:
            action(item)

    return case


@click.command(cls=Command)
@click.option("--data", type=click.Path(path_type=Path), help="Folder with annotations.json and images/.")
@click.option("--images", default=60, show_default=True, help="How many of its images.")
@click.option("--repeats", default=5, show_default=True)
@click.option("--boxes", default=1_000_000, show_default=True, help="Of the synthetic plan; 0 leaves it out.")
@click.option("--growth", "sizes", default="250,500,1000,2000", show_default=True, help="Images; empty leaves it out.")
def main(data: Path | None, images: int, repeats: int, boxes: int, sizes: str) -> None:
    """Print the tables and write bench/results/prep.json."""
    with tempfile.TemporaryDirectory() as scratch:
        if data is None:
            data = draw(Path(scratch) / "sample", images)
        task = replace(part_of(data, images), out=str(Path(scratch) / "out"))
        work = work_of(task)
        samples = [(file, box) for file, boxes in work for box in boxes]
        raw = [Path(file).read_bytes() for file, _ in work]
        tar = Path(scratch) / "peer.tar"
        cases = {
            FLOOR: each(raw, lambda jpeg: simplejpeg.decode_jpeg(jpeg, "RGB")),
            ALONE: cutting(task, raw, "420"),
            "prep, q95 4:2:0": ours(task, subsampling="420"),
            "prep, q95 4:4:4 (default)": ours(task),
            LOSSLESS_ALONE: cutting(task, raw, None),
            LOSSLESS: ours(task, encode="lossless", format_version=2),
            "Pillow, an image at a time": lambda: write_tar(tar, (jpeg for one in work for jpeg in pillow_image(one))),
            "Pillow, a crop at a time": lambda: write_tar(tar, (pillow_sample(*one) for one in samples)),
            "OpenCV, a crop at a time": lambda: write_tar(tar, (opencv_sample(*one) for one in samples)),
        }
        try:
            crops.load_turbojpeg()
        except UserError as error:
            click.echo(f"left out: {error.message}")
            del cases[LOSSLESS], cases[LOSSLESS_ALONE]
        times = interleaved(cases, repeats)
        title = f"prep: {len(raw)} images, {len(task.crops)} crops, CPU time"
        goals = {ALONE: Goal(1.7), "prep, q95 4:2:0": Goal(1.7), LOSSLESS_ALONE: Goal(1.3), LOSSLESS: Goal(1.3)}
        results: dict[str, object] = dict(show(title, times, FLOOR, len(raw), "image", goals))
        results["processes"] = processes(task, repeats, Path(scratch))
        if sizes:
            results["growth"] = growth(data, [int(size) for size in sizes.split(",")], 1)
        if boxes:
            found = plan_alone(synthetic(Path(scratch), boxes))
            what = f"plan of {boxes:,} boxes, reading included"
            results["plan"] = [
                judged(f"{what}, {unit}", value, goal, ".2f")
                for unit, value, goal in (("seconds", found[0], Goal(20)), ("GB", found[1], Goal(2)))
            ]
        write("prep", results)


if __name__ == "__main__":
    main()
