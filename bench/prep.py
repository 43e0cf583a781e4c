"""Prep against its floor: CPU time an image, where decoding each image once is 1.

    python bench/prep.py [--data FOLDER] [--images 60] [--repeats 5] [--boxes 1000000]

FOLDER holds annotations.json and images/ (the sample dataset is drawn where none is given). Two minutes on one core.
The peers are what a competent user would write: one Pillow process over each image's boxes, and one file at a time.
"""

import io
import json
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import click
import numpy as np
import simplejpeg
from PIL import Image

from bench.timing import Goal, interleaved, show, write
from prep.job import Job, plan_job, task_of
from prep.parts import PartTask, cut_images, tar_bytes
from prep.plan import Options
from prep.reading import read_annotations
from prep.source import ImageSource

Item = TypeVar("Item")


def part_of(folder: Path, images: int) -> PartTask:
    """One part with the crops of the first images."""
    options = Options(0.1, 2.0, 10**9, 95, "444", "ignore")
    job = Job(str(folder / "annotations.json"), str(folder / "images"), ".", 0, options)
    source = ImageSource(job.images)
    plan = plan_job(job, read_annotations(job.annotations, job.images), source)
    task = task_of(plan, job, source, 0)
    kept = task.crops.take(task.crops.image < images)
    first = min(images, len(task.images))
    columns = {name: getattr(task.images, name)[:first] for name in ("ids", "files", "widths", "heights")}
    return replace(task, images=replace(task.images, **columns), crops=kept)


def ours(task: PartTask) -> None:
    """What a part task does between reading and publishing."""
    encoded, _ = cut_images(task)
    tar_bytes([f"{i:08d}" for i in range(len(encoded))], task.crops.label.tolist(), [jpeg or b"" for jpeg in encoded])


def pillow(task: PartTask, again: bool) -> None:
    """A plain script: Pillow, a crop saved at a time; ``again`` opens the image anew for each of its crops."""
    image: Image.Image | None = None
    last = -1
    with tarfile.open(fileobj=io.BytesIO(), mode="w:") as tar:
        for number, box in enumerate(task.crops.boxes.tolist()):
            index = int(task.crops.image[number])
            if image is None or index != last or again:
                image = Image.open(Path(task.source) / task.images.files[index]).convert("RGB")
                last = index
            sink = io.BytesIO()
            image.crop(box).save(sink, "JPEG", quality=95, subsampling=2)
            member = tarfile.TarInfo(f"{number:08d}.jpg")
            member.size = sink.tell()
            sink.seek(0)
            tar.addfile(member, sink)


def synthetic(folder: Path, boxes: int) -> Path:
    """COCO JSON of that many boxes, ten an image."""
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
    code = "import sys; from prep.cli import main; main(sys.argv[1:])"
    arguments = ["shards", "--annotations", file, "--images", file.parent, "--out", file.parent / "out", "--dry-run"]
    command = [sys.executable, "-c", code, *map(str, arguments)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=Path(__file__).parents[1])
    peak = max(before, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
    return time.perf_counter() - begun, peak / 1e6


def each(items: Iterable[Item], action: Callable[[Item], object]) -> Callable[[], None]:
    """A case that does the action to all items."""
    kept = list(items)

    def case() -> None:
        for item in kept:
            action(item)

    return case


@click.command()
@click.option("--data", type=click.Path(path_type=Path), help="Folder with annotations.json and images/.")
@click.option("--images", default=60, show_default=True, help="How many of its images.")
@click.option("--repeats", default=5, show_default=True)
@click.option("--boxes", default=1_000_000, show_default=True, help="Of the synthetic plan; 0 leaves it out.")
def main(data: Path | None, images: int, repeats: int, boxes: int) -> None:
    """Print the tables and write bench/results/prep.json."""
    with tempfile.TemporaryDirectory() as scratch:
        if data is None:
            data = Path(scratch) / "sample"
            sample = ["-m", "prep", "sample-data", "--out", str(data), "--images", str(images)]
            subprocess.run([sys.executable, *sample], check=True, cwd=Path(__file__).parents[1])
        task = part_of(data, images)
        raw = [(Path(task.source) / name).read_bytes() for name in task.images.files]
        times = interleaved(
            {
                "decode each image once (floor)": each(raw, lambda jpeg: simplejpeg.decode_jpeg(jpeg, "RGB")),
                "prep, q95 4:2:0": lambda: ours(replace(task, subsampling="420")),
                "prep, q95 4:4:4 (default)": lambda: ours(task),
                "Pillow, an image at a time": lambda: pillow(task, again=False),
                "Pillow, a crop at a time": lambda: pillow(task, again=True),
            },
            repeats,
        )
        title = f"prep: {len(raw)} images, {len(task.crops)} crops, CPU time"
        goals = {"prep, q95 4:2:0": Goal(1.7)}
        results: dict[str, object] = dict(
            show(title, times, "decode each image once (floor)", len(raw), "image", goals)
        )
        if boxes:
            seconds, gigabytes = plan_alone(synthetic(Path(scratch), boxes))
            limits = Goal(20), Goal(2)
            click.echo(
                f"plan of {boxes:,} boxes, reading included: {seconds:.1f} s (goal {limits[0]}), "
                f"{gigabytes:.2f} GB (goal {limits[1]})"
            )
            results["plan"] = {"boxes": boxes, "seconds": seconds, "gigabytes": gigabytes}
        write("prep", results)


if __name__ == "__main__":
    main()
