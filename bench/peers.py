"""What a user would write instead of the lane loader: another library's reader of the same crops, and Pillow.

Readers of webdataset, LitData and mosaicml-streaming, each of a dataset in its own format on local disk, shuffled, one
a group; a crop is resized, flipped, cropped or padded by Pillow and pasted. The latter two are no dependencies:
`pip install litdata mosaicml-streaming` into an environment of their own that has this project too.
"""

import importlib
import io
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import webdataset
from PIL import Image

from jigsaw_pretrain.formats.dataset.dataset import Dataset
from jigsaw_pretrain.formats.jigsaw import REGION_GROUPS, Region, Template
from jigsaw_pretrain.train.data.reader import SOURCE, CropReader, LocalShards

Stream = Iterator[bytes]
CHUNK_BYTES = 2**26


def members(dataset: Dataset, group: str) -> Stream:
    """The JPEGs of a group's crops in their order on disk."""
    files = LocalShards(dataset)
    reader = CropReader(dataset, files, capacity=1)
    for shard in dataset.of_group(group):
        with files.open(shard) as file:
            data = file.read()
        for crop in reader.crops(shard.index)[SOURCE].tolist():
            yield data[crop[1] : crop[1] + crop[2]]


def webdataset_streams(dataset: Dataset, folder: Path) -> Callable[[str], Stream]:
    """The project's own shards, as webdataset reads and shuffles them."""

    def stream(group: str) -> Stream:
        urls = [str(Path(dataset.url) / "shards" / shard.name) for shard in dataset.of_group(group)]
        reader = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0, empty_check=False).shuffle(500).repeat()
        return (sample["jpg"] for sample in reader)

    return stream


def litdata_streams(dataset: Dataset, folder: Path) -> Callable[[str], Stream]:
    """The crops in LitData's chunks, written under ``folder``; raises ImportError where it is not installed."""
    litdata, writer = importlib.import_module("litdata"), importlib.import_module("litdata.streaming.writer")
    for group in "STW":
        out = writer.BinaryWriter(str(folder / "litdata" / group), chunk_bytes=CHUNK_BYTES)
        for nth, jpeg in enumerate(members(dataset, group)):
            out.add_item(nth, {"jpg": jpeg})
        out.done()
        out.merge()
    return lambda group: _forever(litdata.StreamingDataset(str(folder / "litdata" / group), shuffle=True))


def mosaicml_streams(dataset: Dataset, folder: Path) -> Callable[[str], Stream]:
    """The crops in mosaicml-streaming's MDS shards; raises ImportError where it is not installed."""
    streaming = importlib.import_module("streaming")
    for group in "STW":
        with streaming.MDSWriter(out=str(folder / "mds" / group), columns={"jpg": "bytes"}) as out:
            for jpeg in members(dataset, group):
                out.write({"jpg": jpeg})
    opened = {
        group: streaming.StreamingDataset(local=str(folder / "mds" / group), shuffle=True, batch_size=1)
        for group in "STW"
    }
    return lambda group: _forever(opened[group])


def _forever(reader: object) -> Stream:
    while True:
        for sample in reader:  # type: ignore[attr-defined]
            yield sample["jpg"]


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


def assemble(
    streams: Callable[[str], Stream], template: Template, count: int, window_only: bool = False
) -> list[npt.NDArray[np.uint8]]:
    """Jigsaws of the crops of three streams."""
    opened = {group: streams(group) for group in "STW"}
    rng, made = random.Random(0), []
    for _ in range(count):
        page = Image.new("RGB", (template.size, template.size))
        for region, group in zip(template.regions, REGION_GROUPS, strict=True):
            page.paste(place(next(opened[group]), region, rng, window_only), (region.left, region.top))
        made.append(np.asarray(page))
    return made
