"""Small detection datasets of other sensors: images in files of every kind, and the arrays they were written from."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import tifffile
from click.testing import CliRunner

from jigsaw_pretrain.prep.commands.shards import shards
from tests.helpers.prepped import Drawn

Array = npt.NDArray[Any]
SHAPES = ((40, 40), (66, 24), (20, 52))
"""Width and height of the three classes' objects: a crop of each group."""


def grey_png(path: Path, pixels: Array) -> None:
    """16 or 8 bits, one channel."""
    assert cv2.imwrite(str(path), pixels[..., 0])


def stack_npy(path: Path, pixels: Array) -> None:
    """[height, width, channels]."""
    with path.open("wb") as file:
        np.save(file, pixels)


def bands_tiff(path: Path, pixels: Array) -> None:
    """One page of several samples."""
    tifffile.imwrite(path, pixels, photometric="minisblack", planarconfig="contig", compression="zlib")


@dataclass(frozen=True)
class Sensor:
    """A dataset of one kind: where it lies, and each image's pixels [height, width, channels] by file name."""

    annotations: Path
    images: Path
    pixels: dict[str, Array]

    def shards(self, out: Path, *more: str) -> str:
        """Run the shards command, which must succeed; its output."""
        arguments = ["--annotations", str(self.annotations), "--images", str(self.images), "--out", str(out), *more]
        result = CliRunner().invoke(shards, arguments)
        assert result.exit_code == 0, result.output
        return result.output


def scene(rng: np.random.Generator, channels: int, boxes: list[tuple[int, int, int, int]]) -> Array:
    """Pixels of 16 bits in a sliver of their range, objects brighter or darker by class."""
    y, x = np.mgrid[:96, :128]
    level = 30000 + 200 * np.stack([np.sin((a * x + b * y) / 20) for a, b in rng.uniform(0.2, 1, (channels, 2))], -1)
    for nth, (left, top, width, height) in enumerate(boxes):
        level[top : top + height, left : left + width] += 500 * (nth % 3 - 1)
    return (level + rng.normal(0, 20, level.shape)).astype(np.uint16)


def draw(
    folder: Path,
    channels: int,
    suffix: str,
    write: Callable[[Path, Array], None],
    dtype: str = "uint16",
    count: int = 4,
) -> Sensor:
    """Write a dataset of ``count`` images of 128 x 96 pixels with three objects each."""
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(channels)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    pixels = {}
    for nth in range(count):
        places = [(int(rng.integers(0, 128 - w)), int(rng.integers(0, 96 - h)), w, h) for w, h in SHAPES]
        name = f"{nth}.{suffix}"
        whole = scene(rng, channels, places)
        pixels[name] = (whole >> 8).astype(np.uint8) if dtype == "uint8" else whole.astype(dtype)
        write(folder / "images" / name, pixels[name])
        images.append({"id": nth, "file_name": name, "width": 128, "height": 96})
        annotations += [{"image_id": nth, "category_id": kind, "bbox": box} for kind, box in enumerate(places)]
    lists = {"images": images, "annotations": annotations}
    for nth, one in enumerate(annotations):
        one["id"] = nth
    lists["categories"] = [{"id": kind, "name": name} for kind, name in enumerate(("round", "wide", "tall"))]
    (folder / "annotations.json").write_text(json.dumps(lists))
    return Sensor(folder / "annotations.json", folder / "images", pixels)


def thermal(folder: Path) -> Sensor:
    """One channel of 16 bits as PNG."""
    return draw(folder, 1, "png", grey_png)


def multispectral(folder: Path) -> Sensor:
    """Six channels of 16 bits as npy."""
    return draw(folder, 6, "npy", stack_npy)


def tiles(drawn: Drawn, value: float, affected: int = 6, count: int = 60) -> Path:
    """Annotations of float tiles around 300, a tenth of which hold a value in a corner."""
    for nth in range(count):
        number = drawn.add(f"{nth}.npy", (24, 20), draw=False)
        drawn.box(number, [4, 4, 12, 12])
        pixels = np.random.default_rng(nth).normal(300, 15, (20, 24, 2)).astype(np.float32)
        if nth < affected:
            pixels[:6, :8] = value
        np.save(drawn.folder / "images" / f"{nth}.npy", pixels)
    return drawn.write()


def noise(height: int, width: int, channels: int, dtype: str, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    if dtype.startswith("float"):
        return rng.normal(300, 20, (height, width, channels)).astype(dtype)
    limits = np.iinfo(dtype)
    return rng.integers(limits.min, limits.max, (height, width, channels), dtype=dtype, endpoint=True)
