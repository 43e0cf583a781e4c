"""The part task: decode a part's images once, publish its shards, then its rows, last its done record.

The unit of work, publishing and retry. The task is a picklable function of a picklable description, the same under
every executor; it may die at any moment, be retried or run twice: it writes the same bytes, whole files only, and what
has no done record does not exist. About 10 s and 300 MB for 4,000 crops of 600 photographs on one core.
"""

import hashlib
import io
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from formats import manifest, names
from formats.dataset import FORMAT_VERSION
from formats.groups import GROUPS
from formats.pixels import RGB8, PixelFormat
from formats.storage import Storage
from prep import markers
from prep.archive import Member
from prep.columns import Crops, Images
from prep.crops import encode_crops
from prep.images import ImageTrouble
from prep.lossless import encode_lossless
from prep.measures import Measure
from prep.rasters import read
from prep.reasons import Skipped
from prep.records import PartRecord, ShardRecord, check_agreement, encode, read_part, shaping_versions
from prep.source import ImageSource, read_ahead

OWNER = "jigsaw"
"""User and group of all tar members, whoever runs prep."""


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
    background: int
    format_version: int
    images: Images
    crops: Crops
    places: dict[str, Member] | None = None
    pixels: PixelFormat = RGB8


def run_part(task: PartTask) -> PartRecord:
    """Cut and publish one part, or return its done record where there is one. Raises UserError, OSError."""
    out = Storage(task.out)
    expected = {"plan": task.plan, "versions": task.versions}
    here = {"plan": task.plan, "versions": shaping_versions()}
    check_agreement(f"The plan of {task.out}", expected, here)
    done = read_part(out, task.number)
    if done is not None:
        check_agreement(
            out.describe(names.part_record(task.number)), {"plan": done.plan, "versions": done.versions}, here
        )
        return done
    markers.begin(out, task.number)
    try:
        record = publish_part(task, out)
    except Exception as error:
        markers.fail(out, task.number, error)
        raise
    markers.end(out, task.number)
    return record


def publish_part(task: PartTask, out: Storage) -> PartRecord:
    """Cut a part and publish it: its shards, its rows, last its done record."""
    measure = None if task.pixels == RGB8 else Measure(task.pixels)
    encoded, skipped = cut_images(task, measure)
    suffix = task.pixels.member
    kept = task.crops.take(np.array([jpeg is not None for jpeg in encoded], dtype=bool))
    jpegs = [jpeg for jpeg in encoded if jpeg is not None]
    keys = [
        names.crop_key(task.images.ids[image], ordinal, label == task.background)
        for image, ordinal, label in zip(kept.image, kept.ordinal.tolist(), kept.label, strict=True)
    ]
    shards, tables = [], []
    for code, group in enumerate(GROUPS):
        rows = np.flatnonzero(kept.group == code)
        if not len(rows):
            # An attempt that was killed when other images were readable may have left one.
            out.remove(f"{names.SHARDS}/{names.shard_name(group, task.number)}")
            continue
        rows = rows[np.argsort(kept.member[rows], kind="stable")]
        name = names.shard_name(group, task.number)
        members = [keys[row] for row in rows]
        data = tar_bytes(members, kept.label[rows].tolist(), [jpegs[row] for row in rows], suffix)
        out.publish(f"{names.SHARDS}/{name}", data)
        shards.append(ShardRecord(name, group, len(rows), len(data), hashlib.sha256(data).hexdigest()))
        rows_made = crop_table(kept.take(rows), task.images, members, task.number, name, member_places(data, suffix))
        tables.append(with_margins(rows_made, np.zeros((len(rows), 4), np.int32), task.format_version))
    out.publish(names.part_rows(task.number), manifest.table_bytes(manifest.crops_schema(task.format_version), tables))
    record = PartRecord(
        part=task.number,
        plan=task.plan,
        versions=task.versions,
        images=len(np.unique(kept.image)),
        crops=len(kept),
        shards=shards,
        skipped=skipped,
        pixels=None if measure is None else measure.total(),
    )
    out.publish(names.part_record(task.number), encode(record))
    return record


def cut_images(task: PartTask, measure: Measure | None = None) -> tuple[list[bytes | None], list[Skipped]]:
    """Each crop's member, None where its image cannot be used, and a row for each such image.

    measure: what takes in the crops' pixels, of all formats but RGB8.
    """
    source = ImageSource(task.source, task.places)
    encoded: list[bytes | None] = []
    skipped: list[Skipped] = []
    ends = np.searchsorted(task.crops.image, np.arange(len(task.images)), side="right")
    fetched = read_ahead(source, task.images.files)
    for index, (end, raw) in enumerate(zip(ends.tolist(), fetched, strict=True)):
        boxes = task.crops.boxes[len(encoded) : end]
        file = task.images.files[index]
        width, height = int(task.images.widths[index]), int(task.images.heights[index])
        try:
            if isinstance(raw, ImageTrouble):
                raise raw
            pixels = read(raw, width, height, task.exif, task.pixels)
            if measure is None:
                encoded += encode_crops(pixels, boxes, task.quality, task.subsampling)
            else:
                encoded += encode_lossless(pixels, boxes, task.pixels, measure)
        except ImageTrouble as trouble:
            encoded += [None] * len(boxes)
            skipped.append(Skipped(task.images.ids[index], file, None, None, "cut", str(trouble)))
    return encoded, skipped


def tar_bytes(keys: Sequence[str], labels: Sequence[int], jpegs: Sequence[bytes], suffix: str = "jpg") -> bytes:
    """A shard: members ``<key>.cls`` and ``<key>.SUFFIX`` in the order given, with a fixed time and owner.

    The bytes are those of webdataset.TarWriter(mtime=0) (a test compares them), which is this loop around tarfile;
    importing webdataset imports torch, and four seconds and 300 MB for each worker are too much for a loop.
    """
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:", format=tarfile.USTAR_FORMAT) as tar:
        for key, label, jpeg in zip(keys, labels, jpegs, strict=True):
            for kind, data in (("cls", str(label).encode("ascii")), (suffix, jpeg)):
                member = tarfile.TarInfo(f"{key}.{kind}")
                member.size, member.mtime, member.mode = len(data), 0, 0o444
                member.uname = member.gname = OWNER
                tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def member_places(data: bytes, suffix: str = "jpg") -> list[tuple[int, int]]:
    """Offset and size in bytes of each crop of a shard, in member order, as tarfile finds them."""
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        return [(member.offset_data, member.size) for member in tar if member.name.endswith(f".{suffix}")]


def crop_table(
    crops: Crops, images: Images, keys: list[str], part: int, shard: str, places: list[tuple[int, int]]
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
        "offset": np.array([offset for offset, _ in places], dtype=np.int64),
        "size": np.array([size for _, size in places], dtype=np.int64),
    }
    columns |= {name: crops.boxes[:, i] for i, name in enumerate(("left", "top", "right", "bottom"))}
    boxes = ("box_x", "box_y", "box_width", "box_height")
    columns |= {name: pa.array(crops.xywh[:, i], mask=empty) for i, name in enumerate(boxes)}
    return pa.table({field.name: columns[field.name] for field in manifest.CROPS}, schema=manifest.CROPS)


def with_margins(rows: pa.Table, margins: npt.NDArray[np.int32], format_version: int) -> pa.Table:
    """The rows with how far each member extends beyond its crop, int32 [n, 4], where the format has these columns."""
    if format_version == FORMAT_VERSION:
        return rows
    for i, name in enumerate(manifest.MARGINS):
        rows = rows.append_column(manifest.CROPS_WITH_MARGINS.field(name), pa.array(margins[:, i]))
    return rows
