"""A drawn dataset without oddities gives the shards and rows that it gave, written as COCO, VOC and YOLO.

The digests are of the locked versions of libraries and were made by the version before annotations were read as people
write them (commit cac55e8). Who changes what is cut on purpose makes them anew, and raises PLAN_VERSION.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.prepped import Drawn, rows, run_shards
from tests.helpers.writers import write_voc, write_yolo

SHARDS = "f5d70f5059a3a7fa4be10807896f31fdf96413a73a6bab9d8d7bfc61dd1de4bc"
ROWS = "51e194e5b459be84e4c20d3bcca38b39ca7c753d3168c96f768f2e7ff13f331f"


@pytest.mark.parametrize("kind", ["coco", "voc", "yolo"])
def test_shards_and_rows_are_those_that_were_made(drawn: Drawn, kind: str) -> None:
    drawn.categories = [{"id": 1, "name": "ant"}, {"id": 2, "name": "bee"}]
    for number in range(6):
        width, height = 160 + 10 * number, 120 + 7 * number
        image = drawn.add(f"{'ab'[number % 2]}/{number}.png", (width, height), draw=False)
        y, x = np.mgrid[:height, :width]
        # Whole numbers alone, which are the same on every machine.
        pixels = np.stack([(x * (number + 1) + y) % 256, (x * x + 3 * y) // 7 % 256, (x + y * y) // 9 % 256], axis=-1)
        path = drawn.folder / "images" / f"{'ab'[number % 2]}/{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
        for nth in range(number):
            drawn.box(image, [7 * nth, 5 * nth, 20 + 9 * nth, 60 - 8 * nth], category=1 + nth % 2)
    drawn.write()
    annotations = {"coco": drawn.folder / "annotations.json", "voc": drawn.folder / "xml", "yolo": drawn.folder}[kind]
    if kind == "voc":
        write_voc(drawn, annotations, origin=1)
    elif kind == "yolo":
        write_yolo(drawn, annotations, empty=True)
    out = drawn.folder / "out"
    given = ("--workers", "1", "--negatives-per-positive", "0.5", "--seed", "3", "--crops-per-part", "8")
    assert run_shards(annotations, drawn.folder / "images", out, *given).exit_code == 0
    assert digest(out) == (SHARDS, ROWS)


def digest(out: Path) -> tuple[str, str]:
    """SHA-256 of the shards' names and bytes, and of the rows of crops.parquet but for the annotations' ids."""
    shards = hashlib.sha256()
    for path in sorted((out / "shards").iterdir()):
        shards.update(path.name.encode() + path.read_bytes())
    kept = [{name: value for name, value in row.items() if name != "annotation_id"} for row in rows(out, "crops")]
    return shards.hexdigest(), hashlib.sha256(json.dumps(kept).encode()).hexdigest()
