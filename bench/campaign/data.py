"""The campaign's datasets: where they are, how they are split, and what prep makes of their training images.

They are found in .data/NAME, $JIGSAW_DATA/NAME or ../shared/data/NAME, or in a folder that is named. Splits are drawn
by image with a fixed seed; shards are made once per folder.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.sample import ROOT, command, prep_files


@dataclass(frozen=True)
class Images:
    """Annotations (COCO JSON) and their images."""

    annotations: Path
    images: Path


@dataclass(frozen=True)
class Source:
    """A dataset: its own two halves, or one that is split by image.

    train, val: its folders, relative to the folder of datasets. share: of the images to validate on, where it is split.
    every: one of so many validation images is taken, from the first. category: the one kind of object that is kept,
    and the images that show it; None for all.
    """

    train: str
    val: str | None = None
    share: str = "25%"
    every: int = 1
    category: str | None = None


SOURCES = {
    "voc": Source("voc2007_224/train", "voc2007_224/val", every=4),
    "voc-people": Source("voc2007_224/train", "voc2007_224/val", every=2, category="person"),
    "bccd": Source("bccd"),
    "coco": Source("coco_small_train", "coco_small_val"),
}


def find(name: str, given: Path | None = None) -> Path:
    """The folder of a dataset (COCO layout); ``given`` is the folder of datasets, None for the usual places."""
    shared = os.environ.get("JIGSAW_DATA", str(ROOT.parent / "shared" / "data"))
    places = [given] if given else [ROOT / ".data", Path(shared)]
    for place in places:
        if (place / name).is_dir():
            return (place / name).resolve()
    sys.exit(f"{name} is in none of {', '.join(map(str, places))}: name the folder that holds it with --data")


@dataclass(frozen=True)
class Prepared:
    """A dataset as trainings take it. shards_by, val_shards: what prep made of each half."""

    train: Images
    val: Images
    folder: Path

    def shards_by(self, options: Sequence[str] = ()) -> Path:
        """The crops of the training images by these options of prep, made if need be."""
        out = self.folder / "-".join(["crops", *(option.lstrip("-") for option in options)])
        return prep_files(self.train.annotations, self.train.images, out, "--workers", 1, *options)

    @property
    def val_shards(self) -> Path:
        """The crops of the validation images, made if need be."""
        return prep_files(self.val.annotations, self.val.images, self.folder / "val-crops", "--workers", 1)


def prepare(name: str, out: Path, given: Path | None = None) -> Prepared:
    """Split a dataset of SOURCES into ``out``/NAME, unless that is done.

    Args:
        name: a key of SOURCES.
        out: where splits and shards are kept.
        given: the folder of datasets.
    """
    source = SOURCES[name]
    first, folder = find(source.train, given), out / name
    if source.val is None:
        train, val = folder / "train.json", folder / "val.json"
        if not (train.exists() and val.exists()):
            options = ("--annotations", first / "annotations.json", "--images", first / "images")
            command("prep", "split", *options, "--out", folder, "--share", source.share)
        return Prepared(Images(train, first / "images"), Images(val, first / "images"), folder)
    second = find(source.val, given)
    train, val = first / "annotations.json", second / "annotations.json"
    if source.category is not None:
        train = _written(folder / "train.json", train, slice(None), source.category)
    if source.every > 1:
        val = _written(folder / f"val-1-of-{source.every}.json", val, slice(None, None, source.every), source.category)
    return Prepared(Images(train, first / "images"), Images(val, second / "images"), folder)


def _written(path: Path, annotations: Path, chosen: slice, category: str | None) -> Path:
    """A restricted document in a file, made if need be."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(restricted(annotations, chosen, category)))
    return path


def restricted(annotations: Path, chosen: slice, category: str | None = None) -> dict[str, Any]:
    """A COCO document with some of its images, and what is annotated in them.

    Args:
        annotations: the whole document.
        chosen: which of its images, in their order.
        category: keep the objects of this category alone, and choose among the images that have one; None for all.
    """
    document = json.loads(annotations.read_text())
    if category is not None:
        document["categories"] = [one for one in document["categories"] if one["name"] == category]
        [number] = (one["id"] for one in document["categories"])
        document["annotations"] = [one for one in document["annotations"] if one["category_id"] == number]
        shown = {one["image_id"] for one in document["annotations"]}
        document["images"] = [image for image in document["images"] if image["id"] in shown]
    document["images"] = document["images"][chosen]
    kept = {image["id"] for image in document["images"]}
    return {**document, "annotations": [one for one in document["annotations"] if one["image_id"] in kept]}
