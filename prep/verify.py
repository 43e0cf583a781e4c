"""Checks that every byte of a dataset is what its records say, and that every crop can be read; says what is not.

Reads all of it: shards are hashed, their members compared with the rows, every JPEG decoded and measured, and the
manifests made again in memory and compared. About 1 ms per crop on one core. ``repair`` of prep/pipeline.py
makes good what was found.
"""

import hashlib
import io
import tarfile
from collections.abc import Iterable
from typing import Any

import pyarrow.parquet as pq
import simplejpeg

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.dataset import layout, schema
from jigsaw_pretrain.formats.dataset.dataset import memory_file
from jigsaw_pretrain.formats.dataset.schema import crops_schema
from jigsaw_pretrain.formats.pixels import RGB8, PixelFormat, decode_member, pixel_format
from jigsaw_pretrain.prep.executors import local_executor, run_tasks, usable_cores
from jigsaw_pretrain.prep.manifests import manifests, read_records
from jigsaw_pretrain.prep.records import Damage, PlanRecord, ShardRecord, read_part, require_plan, shaping_versions
from jigsaw_pretrain.storage import Storage


def verify(url: str, *, workers: int | None = None) -> list[Damage]:
    """All damage of the dataset below ``url``, by part; raises UserError where none was begun."""
    out = Storage(url)
    plan, workers = require_plan(out), workers or usable_cores()
    tasks = ((out.url, number, plan) for number in range(plan.parts))
    found: list[Damage] = []
    with local_executor(min(workers, plan.parts)) as executor:
        for damages in run_tasks(executor, inspect_part, tasks, 2 * workers):
            found += damages
    found += [Damage(None, f"{layout.SHARDS}/{name}", "is of no part of this dataset") for name in _strays(out, plan)]
    found += _inspect_plan_rows(out)
    # Other versions give manifests of other bytes; the shards can be verified by any.
    if not found and plan.versions == shaping_versions():
        found += _inspect_manifests(out, plan)
    return sorted(found, key=lambda damage: (damage.part is None, damage.part or 0, damage.file))


def inspect_part(task: tuple[str, int, PlanRecord]) -> list[Damage]:
    """The damage of one part: (output, part, the plan)."""
    url, number, plan = task
    out = Storage(url)
    name = layout.part_record(number)
    try:
        record = read_part(out, number)
        if record is None:
            return [Damage(number, name, "is missing: the part is not done")]
        if record.plan != plan.plan or record.versions != plan.versions:
            return [Damage(number, name, "is of another plan or other versions")]
        rows = pq.ParquetFile(memory_file(out.read(layout.part_rows(number))))
        if rows.num_row_groups != len(record.shards):
            return [Damage(number, layout.part_rows(number), "does not have a row group for each shard")]
        count, schema = rows.num_row_groups, crops_schema(plan.format_version)
        tables = [rows.read_row_group(i, use_threads=False).cast(schema) for i in range(count)]
    except UserError:
        return [Damage(number, name, "cannot be read")]
    except FileNotFoundError:
        return [Damage(number, layout.part_rows(number), "is missing")]
    except Exception as error:
        # pyarrow raises many kinds of errors for damaged files.
        return [Damage(number, layout.part_rows(number), f"cannot be read ({type(error).__name__})")]
    pixels = pixel_format(plan.options.get("pixels"), layout.PLAN)
    damages = (
        (shard, _inspect_shard(out, shard, rows.to_pylist(), pixels))
        for shard, rows in zip(record.shards, tables, strict=True)
    )
    return [Damage(number, f"{layout.SHARDS}/{shard.name}", what) for shard, what in damages if what]


def _inspect_shard(out: Storage, shard: ShardRecord, rows: list[dict[str, Any]], pixels: PixelFormat) -> str:
    """What is wrong with a shard, in words; nothing where it is whole."""
    try:
        data = out.read(f"{layout.SHARDS}/{shard.name}")
    except FileNotFoundError:
        return "is missing"
    if len(data) != shard.bytes:
        return f"has {len(data):,} bytes, not {shard.bytes:,}"
    if hashlib.sha256(data).hexdigest() != shard.sha256:
        return "has another SHA-256 than its record"
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            members = [(member.name, member.offset_data, member.size) for member in tar]
    except tarfile.TarError:
        return "is no tar"
    if [member for member in members if not member[0].endswith(".cls")] != [
        (f"{row['key']}.{pixels.member}", row["offset"], row["size"]) for row in rows
    ]:
        return "does not hold the crops of its rows"
    return next((f"{row['key']} {what}" for row in rows if (what := _inspect_crop(data, row, pixels))), "")


def _inspect_crop(data: bytes, row: dict[str, Any], form: PixelFormat) -> str:
    raw = data[row["offset"] : row["offset"] + row["size"]]
    left, top, right, bottom = (row.get(name, 0) for name in schema.MARGINS)
    expected = (row["bottom"] - row["top"] + top + bottom, row["right"] - row["left"] + left + right)
    if form != RGB8:
        whole = decode_member(raw, form, expected[1], expected[0])
        return "" if whole is not None else f"is no {form.member} of its row's size and of {form}"
    try:
        pixels = simplejpeg.decode_jpeg(raw, "RGB")
    except ValueError:
        return "cannot be decoded"
    return "" if pixels.shape[:2] == expected else "has another size than its row"


def _inspect_manifests(out: Storage, plan: PlanRecord) -> Iterable[Damage]:
    """What differs from the manifests that the parts give."""
    made, _ = manifests(out, plan, read_records(out, plan))
    for name, data in made.items():
        try:
            if out.read(name) != data:
                yield Damage(None, name, "is not what the parts give")
        except FileNotFoundError:
            yield Damage(None, name, "is missing")


def _inspect_plan_rows(out: Storage) -> Iterable[Damage]:
    try:
        schema.read_rows(out.read(layout.PLAN_SKIPPED)).cast(schema.SKIPPED)
    except FileNotFoundError:
        yield Damage(None, layout.PLAN_SKIPPED, "is missing")
    except Exception as error:
        yield Damage(None, layout.PLAN_SKIPPED, f"cannot be read ({type(error).__name__})")


def _strays(out: Storage, plan: PlanRecord) -> list[str]:
    """Shards by name that no part has; readers of the folder would take them for the dataset's."""
    strays = []
    for name in out.list(layout.SHARDS):
        try:
            group, part = layout.parse_shard_name(name)
            record = read_part(out, part) if part < plan.parts else None
        except (ValueError, UserError):
            continue
        if part >= plan.parts or (record is not None and group not in {shard.group for shard in record.shards}):
            strays.append(name)
    return strays
