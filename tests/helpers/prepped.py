"""Small detection datasets drawn for a test, running prep on one, and reading what it wrote."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.prep import crops
from jigsaw_pretrain.prep.commands.sample_data import sample_data
from jigsaw_pretrain.prep.commands.shards import shards


@dataclass
class Drawn:
    """A COCO dataset in a folder: images are smooth colour ramps with noise, so that JPEG keeps them well."""

    folder: Path
    images: list[dict[str, Any]] = field(default_factory=list)
    annotations: list[dict[str, Any]] = field(default_factory=list)
    categories: list[dict[str, Any]] = field(default_factory=lambda: [{"id": 7, "name": "b"}, {"id": 3, "name": "a"}])

    def add(
        self,
        name: str,
        size: tuple[int, int],
        boxes: Sequence[Sequence[float]] = (),
        draw: bool = True,
        **extra: Any,
    ) -> int:
        """Add an image of ``size`` (width, height) with boxes of category 3; returns its id."""
        number = len(self.images) + 1
        self.images.append({"id": number, "file_name": name, "width": size[0], "height": size[1], **extra})
        for box in boxes:
            self.box(number, box)
        if draw:
            path = self.folder / "images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(ramp(*size, seed=number)).save(path, quality=95)
        return number

    def box(self, image: int, box: Any, category: int = 3, **extra: Any) -> None:
        """Add an annotation."""
        number = len(self.annotations) + 100
        self.annotations.append({"id": number, "image_id": image, "category_id": category, "bbox": box, **extra})

    def write(self) -> Path:
        """Write annotations.json; returns its path."""
        path = self.folder / "annotations.json"
        lists = {"images": self.images, "annotations": self.annotations, "categories": self.categories}
        path.write_text(json.dumps(lists))
        return path


def ramp(width: int, height: int, seed: int = 0) -> np.ndarray:
    """A smooth picture with a little noise: uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    planes = [128 + 100 * np.sin((x * a + y * b) / 40 + c) for a, b, c in rng.uniform(0.2, 1.0, (3, 3))]
    return np.clip(np.stack(planes, axis=-1) + rng.normal(0, 2, (height, width, 1)), 0, 255).astype(np.uint8)


Run = Callable[..., Result]


def run_shards(annotations: Path | str, images: Path | str, out: Path | str, *extra: str) -> Result:
    """The command in this process."""
    return invoke(shards, *inputs(annotations, images), "--out", str(out), *extra)


def inputs(annotations: Path | str, images: Path | str) -> tuple[str, str, str, str]:
    """The options that name a dataset."""
    return "--annotations", str(annotations), "--images", str(images)


def tree(folder: Path) -> Mapping[str, bytes]:
    """Every file below a folder and its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def rows(out: Path, table: str) -> list[dict[str, Any]]:
    """Rows of a manifest."""
    return pq.read_table(out / "manifests" / f"{table}.parquet").to_pylist()


@dataclass(frozen=True)
class Small:
    """A small dataset, and the tree that an undisturbed run in parts of ``crops_per_part`` makes of it."""

    annotations: Path
    images: Path
    crops_per_part: int
    tree: Mapping[str, bytes] = field(repr=False)

    @property
    def options(self) -> tuple[str, ...]:
        """The options that give ``tree``, with one worker."""
        return ("--crops-per-part", str(self.crops_per_part), "--workers", "1")

    def arguments(self, out: str | Path, *extra: str) -> list[str]:
        """The arguments of the shards command."""
        named = {"--annotations": self.annotations, "--images": self.images, "--out": out}
        named["--crops-per-part"] = str(self.crops_per_part)
        return [*(str(word) for pair in named.items() for word in pair), *extra]

    def run(self, out: str | Path, *extra: str) -> Result:
        """The shards command in this process, with one worker."""
        return CliRunner().invoke(shards, self.arguments(out, "--workers", "1", *extra))


def write_sample(folder: Path, images: int) -> None:
    """The sample dataset."""
    result = CliRunner().invoke(sample_data, ["--out", str(folder), "--images", str(images)])
    assert result.exit_code == 0, result.output


def invoke(command: click.Command, *arguments: str) -> Result:
    """A command in this process."""
    return CliRunner().invoke(command, list(arguments))


def _has_library() -> bool:
    try:
        crops.load_turbojpeg()
    except UserError:
        return False
    return True


needs_turbojpeg = pytest.mark.skipif(not _has_library(), reason="the turbojpeg library is not on this machine")
