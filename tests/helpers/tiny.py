"""Tiny finished datasets in the agreed layout, drawn at random: train's tests need no prep."""

import hashlib
import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
import webdataset

from jigsaw_pretrain.formats.dataset import layout, schema
from jigsaw_pretrain.formats.dataset.dataset import Dataset, Description, open_dataset
from jigsaw_pretrain.formats.jigsaw import aspect_group
from jigsaw_pretrain.storage.store import Storage

CLASSES = ["ant", "bee", "cat"]


def crop_size(group: str, rng: np.random.Generator, low: int = 12, high: int = 60) -> tuple[int, int]:
    """A random width and height of the group."""
    while True:
        width, height = (int(side) for side in rng.integers(low, high, 2))
        if aspect_group(width, height) == group:
            return width, height


def picture(width: int, height: int, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """A blocky random image without black pixels, so that padding can be told from it."""
    cells = rng.integers(60, 256, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    return np.ascontiguousarray(np.kron(cells, np.ones((8, 8, 1), dtype=np.uint8))[:height, :width])


def flat_pictures(
    shards: Mapping[str, Sequence[int]], seed: int = 0, low: int = 12, high: int = 60
) -> dict[str, list[npt.NDArray[np.uint8]]]:
    """Crops of one colour each, no two alike, so that a jigsaw's pixels tell whose they are (at most 343 crops)."""
    rng = np.random.default_rng(seed)
    levels = range(64, 256, 31)
    colours = iter([(red, green, blue) for red in levels for green in levels for blue in levels])
    found: dict[str, list[npt.NDArray[np.uint8]]] = {}
    for group, counts in shards.items():
        for _ in range(sum(counts)):
            width, height = crop_size(group, rng, low, high)
            found.setdefault(group, []).append(np.full((height, width, 3), next(colours), dtype=np.uint8))
    return found


class Colours:
    """Whose pixels these are, in a dataset of flat pictures."""

    def __init__(self, dataset: Dataset) -> None:
        self.rows = list(all_crops(dataset).values())
        self._colours = []
        for row in self.rows:
            path = Path(dataset.url) / layout.SHARDS / row["shard"]
            raw = path.read_bytes()[row["offset"] : row["offset"] + row["size"]]
            self._colours.append(simplejpeg.decode_jpeg(raw)[0, 0].astype(int))
        self._table = np.array(self._colours)

    def owner(self, region: npt.NDArray[np.uint8]) -> dict[str, Any]:
        """The crops.parquet row of the crop in a region, uint8 [height, width, 3]."""
        colour = region.reshape(-1, 3).max(axis=0).astype(int)
        distance = np.abs(self._table - colour).sum(axis=1)
        assert distance.min() <= 6, f"no crop has the colour {colour}"
        return self.rows[int(distance.argmin())]


def make_dataset(
    folder: Path,
    shards: Mapping[str, Sequence[int]],
    *,
    seed: int = 0,
    pictures: Mapping[str, Sequence[npt.NDArray[np.uint8]]] | None = None,
    low: int = 12,
    high: int = 60,
) -> Dataset:
    """Write a dataset whose shards hold ``shards[group]`` crops each, and open it.

    pictures: the crops' images by group, in order, instead of random ones.
    """
    rng = np.random.default_rng(seed)
    storage = Storage(str(folder))
    tables, rows, ordinal = [], [], 0
    by_label = [0] * (len(CLASSES) + 1)
    given = {group: list(images) for group, images in (pictures or {}).items()}
    for part in range(max((len(counts) for counts in shards.values()), default=0)):
        for group in ("S", "T", "W"):
            counts = shards.get(group, ())
            if part >= len(counts) or not counts[part]:
                continue
            shard = layout.shard_name(group, part)
            buffer = io.BytesIO()
            crops: list[dict[str, Any]] = []
            with webdataset.TarWriter(buffer, mtime=0) as writer:
                for _ in range(counts[part]):
                    if given.get(group):
                        image = given[group].pop(0)
                        height, width = image.shape[:2]
                    else:
                        width, height = crop_size(group, rng, low, high)
                        image = picture(width, height, rng)
                    label = int(rng.integers(0, len(CLASSES) + 1))
                    identity = f"image-{ordinal}"
                    background = label == len(CLASSES)
                    by_label[label] += 1
                    key = layout.crop_key(identity, ordinal, background)
                    writer.write(
                        {
                            "__key__": key,
                            "jpg": simplejpeg.encode_jpeg(image, quality=95, colorsubsampling="444"),
                            "cls": str(label).encode(),
                        }
                    )
                    crops.append(
                        {
                            "key": key,
                            "image_id": identity,
                            "image_file": f"{identity}.jpg",
                            "annotation_id": None if background else ordinal,
                            "ordinal": ordinal,
                            "label": label,
                            "group": group,
                            "left": 3,
                            "top": 5,
                            "right": 3 + width,
                            "bottom": 5 + height,
                            "box_x": 3.0,
                            "box_y": 5.0,
                            "box_width": float(width),
                            "box_height": float(height),
                            "part": part,
                            "shard": shard,
                        }
                    )
                    ordinal += 1
            data = buffer.getvalue()
            with tarfile.open(fileobj=io.BytesIO(data)) as tar:
                members = {member.name: member for member in tar}
            for crop in crops:
                member = members[f"{crop['key']}.jpg"]
                crop["offset"], crop["size"] = member.offset_data, member.size
            storage.publish(f"{layout.SHARDS}/{shard}", data)
            tables.append(pa.Table.from_pylist(crops, schema=schema.CROPS))
            rows.append(
                {
                    "name": shard,
                    "group": group,
                    "part": part,
                    "crops": len(crops),
                    "bytes": len(data),
                    "sha256": hashlib.sha256(data).hexdigest(),
                }
            )
    storage.publish(layout.CROPS, schema.table_bytes(schema.CROPS, tables))
    table = pa.Table.from_pylist(rows, schema=schema.SHARDS)
    storage.publish(layout.SHARD_TABLE, schema.table_bytes(schema.SHARDS, [table]))
    description = Description(
        format_version=1,
        classes=CLASSES,
        background=len(CLASSES),
        seed=seed,
        plan="0" * 64,
        options={},
        versions={},
        totals={"crops": ordinal, "by_label": by_label},
    )
    storage.publish(layout.DATASET, description.to_json())
    return open_dataset(str(folder))


def spoil(dataset: Dataset, key: str) -> None:
    """Overwrite one crop's bytes in its shard, leaving every size as it is."""
    rows = {row["key"]: row for row in pq.read_table(Path(dataset.url) / layout.CROPS).to_pylist()}
    row = rows[key]
    with (Path(dataset.url) / layout.SHARDS / row["shard"]).open("r+b") as file:
        file.seek(row["offset"])
        file.write(b"\0" * row["size"])


def all_crops(dataset: Dataset) -> dict[str, dict[str, Any]]:
    """Every row of crops.parquet by key."""
    return {row["key"]: row for row in pq.read_table(Path(dataset.url) / layout.CROPS).to_pylist()}
