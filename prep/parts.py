"""The part task decodes a part's images once, publishes its shards, then its rows, last its done record.

The unit of work, publishing and retry. The task is a picklable function of a picklable description, the same under
every executor; it may die at any moment, be retried or run twice: it writes the same bytes, whole files only, and what
has no done record does not exist. About 2 s and 300 MB for 4,000 crops of 450 photographs on one core.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from jigsaw_pretrain.formats.annotations.skipped import Skipped
from jigsaw_pretrain.formats.dataset import layout, schema
from jigsaw_pretrain.formats.dataset.dataset import FORMAT_VERSION, json_bytes
from jigsaw_pretrain.formats.dataset.shard import tar_bytes
from jigsaw_pretrain.formats.images.archive import Member
from jigsaw_pretrain.formats.images.decode import ImageError, PixelBuffer, decode_raster
from jigsaw_pretrain.formats.images.source import ImageSource, read_ahead
from jigsaw_pretrain.formats.jigsaw import GROUPS
from jigsaw_pretrain.formats.pixels import RGB8, PixelFormat
from jigsaw_pretrain.prep import crops, records
from jigsaw_pretrain.prep.crops import encode_crops, encode_members
from jigsaw_pretrain.prep.images.statistics import ChannelStatistics
from jigsaw_pretrain.prep.plan.crop_table import CropTable, ImageTable, member_boxes
from jigsaw_pretrain.prep.plan.crop_table import margins as beyond
from jigsaw_pretrain.prep.records import PartRecord, ShardRecord, check_agreement, read_part, shaping_versions
from jigsaw_pretrain.storage.store import Storage


@dataclass(frozen=True)
class PartTask:
    """All that a worker needs to cut one part: columns, where images come from, where results go."""

    number: int
    plan: str
    versions: dict[str, str]
    out: str
    source: str
    quality: int
    subsampling: str
    exif: str
    encode: str
    background: int
    format_version: int
    images: ImageTable
    crops: CropTable
    member_offsets: dict[str, Member] | None = None
    drawn_context: float | None = None
    pixels: PixelFormat = RGB8
    nodata: float | None = None


def run_part(task: PartTask, tell: Callable[[], None] | None = None) -> PartRecord:
    """Cut and publish one part, or return its done record where there is one. Raises UserError, OSError.

    tell: what is called as each image is begun.
    """
    out = Storage(task.out)
    expected = {"plan": task.plan, "versions": task.versions}
    here = {"plan": task.plan, "versions": shaping_versions()}
    check_agreement(f"The plan of {out.describe('')}", expected, here)
    done = read_part(out, task.number)
    if done is not None:
        check_agreement(
            out.describe(layout.part_record(task.number)), {"plan": done.plan, "versions": done.versions}, here
        )
        return done
    records.mark_begun(out, task.number)
    try:
        record = publish_part(task, out, tell)
    except Exception as error:
        records.mark_failed(out, task.number, error)
        raise
    records.mark_ended(out, task.number)
    return record


def publish_part(task: PartTask, out: Storage, tell: Callable[[], None] | None = None) -> PartRecord:
    """Cut a part and publish it: its shards, its rows, last its done record."""
    measure = None if task.pixels == RGB8 else ChannelStatistics(task.pixels)
    made = cut_images(task, measure, tell)
    usable = np.array([member is not None for member in made.members], dtype=bool)
    kept, margins = task.crops.take(usable), made.margins[usable]
    stored = [member for member in made.members if member is not None]
    keys = [
        layout.crop_key(task.images.ids[image], ordinal, label == task.background)
        for image, ordinal, label in zip(kept.image, kept.ordinal.tolist(), kept.label, strict=True)
    ]
    shards, tables = [], []
    for code, group in enumerate(GROUPS):
        rows = np.flatnonzero(kept.group == code)
        if not len(rows):
            # An attempt that was killed when other images were readable may have left one.
            out.remove(f"{layout.SHARDS}/{layout.shard_name(group, task.number)}")
            continue
        rows = rows[np.argsort(kept.member[rows], kind="stable")]
        name = layout.shard_name(group, task.number)
        members = [keys[row] for row in rows]
        crops = [stored[row] for row in rows]
        data, offsets = tar_bytes(members, kept.label[rows].tolist(), crops, task.pixels.member)
        out.publish(f"{layout.SHARDS}/{name}", data)
        shards.append(ShardRecord(name, group, len(rows), len(data), hashlib.sha256(data).hexdigest()))
        rows_made = crop_table(kept.take(rows), task.images, members, task.number, name, offsets, crops)
        tables.append(with_margins(rows_made, margins[rows], task.format_version))
    out.publish(layout.part_rows(task.number), schema.table_bytes(schema.crops_schema(task.format_version), tables))
    record = PartRecord(
        part=task.number,
        plan=task.plan,
        versions=task.versions,
        images=len(np.unique(kept.image)),
        crops=len(kept),
        shards=shards,
        skipped=made.skipped,
        encoded=dict(sorted(made.encoded.items())) if task.encode == "lossless" else None,
        pixels=None if measure is None else measure.total(),
    )
    out.publish(layout.part_record(task.number), json_bytes(record))
    return record


@dataclass(frozen=True)
class CutImages:
    """What cutting a part's images gave.

    members: each crop's, None where its image cannot be used. margins: int32 [n, 4], how far each extends beyond its
    crop. skipped: a row for each image that cannot be used. encoded: crops that were to be cut losslessly and could
    not, by reason.
    """

    members: list[bytes | None]
    margins: npt.NDArray[np.int32]
    skipped: list[Skipped]
    encoded: Counter[str]


def cut_images(
    task: PartTask, measure: ChannelStatistics | None = None, tell: Callable[[], None] | None = None
) -> CutImages:
    """Cut the crops of all images of a part, each image read once; raises UserError, StoreError.

    measure: what takes in the members' pixels, of all formats but RGB8. tell: what is called as each image is begun.
    """
    source = ImageSource(task.source, task.member_offsets)
    members: list[bytes | None] = []
    skipped: list[Skipped] = []
    encoded: Counter[str] = Counter()
    ends = np.searchsorted(task.crops.image, np.arange(len(task.images)), side="right")
    fetched, buffer = read_ahead(source, task.images.files), PixelBuffer()
    cut = member_boxes(task.crops, task.images, task.drawn_context)
    margins = beyond(task.crops.boxes, cut)
    for index, (end, raw) in enumerate(zip(ends.tolist(), fetched, strict=True)):
        if tell is not None:
            tell()
        first = len(members)
        boxes = cut[first:end]
        file = task.images.files[index]
        width, height = int(task.images.widths[index]), int(task.images.heights[index])
        try:
            if isinstance(raw, ImageError):
                raise raw
            if task.encode == "lossless":
                found = crops.cut_lossless(raw, boxes, width, height, task.exif)
                if not found.refused:
                    members += found.jpegs
                    margins[first:end] += found.margins
                    continue
            pixels = decode_raster(raw, width, height, task.exif, task.pixels, buffer, task.nodata)
            if measure is None:
                members += encode_crops(pixels, boxes, task.quality, task.subsampling)
            else:
                members += encode_members(pixels, boxes, task.pixels, measure)
            if task.encode == "lossless":
                encoded[found.refused] += len(boxes)
        except ImageError as trouble:
            members += [None] * len(boxes)
            skipped.append(Skipped(task.images.ids[index], file, None, None, "cut", str(trouble)))
    return CutImages(members, margins, skipped, encoded)


def crop_table(
    crops: CropTable,
    images: ImageTable,
    keys: list[str],
    part: int,
    shard: str,
    offsets: Sequence[int],
    stored: Sequence[bytes],
) -> pa.Table:
    """The manifest rows of one shard, in member order."""
    index = crops.image.tolist()
    count = len(crops)
    empty = np.isnan(crops.xywh[:, 0])
    columns = {
        "key": keys,
        "image_id": [images.ids[image] for image in index],
        "image_file": [images.files[image] for image in index],
        "annotation_id": pa.array(crops.annotation_id, mask=~crops.has_id),
        "ordinal": crops.ordinal.astype(np.int32),
        "label": crops.label.astype(np.int32),
        "group": [GROUPS[code] for code in crops.group.tolist()],
        "part": np.full(count, part, dtype=np.int32),
        "shard": [shard] * count,
        "offset": np.array(offsets, dtype=np.int64),
        "size": np.array([len(member) for member in stored], dtype=np.int64),
    }
    columns |= {name: crops.boxes[:, i] for i, name in enumerate(schema.EDGES)}
    columns |= {name: pa.array(crops.xywh[:, i], mask=empty) for i, name in enumerate(schema.BOX)}
    return pa.table({field.name: columns[field.name] for field in schema.CROPS}, schema=schema.CROPS)


def with_margins(rows: pa.Table, margins: npt.NDArray[np.int32], format_version: int) -> pa.Table:
    """The rows with how far each member extends beyond its crop, int32 [n, 4], where the format has these columns."""
    if format_version == FORMAT_VERSION:
        return rows
    for i, name in enumerate(schema.MARGINS):
        rows = rows.append_column(schema.CROPS_WITH_MARGINS.field(name), pa.array(margins[:, i]))
    return rows
