"""Checks that every byte of a dataset is what its records say, and that every crop can be read; says what is not.

Reads all of it: shards are hashed, their members compared with the rows, every crop decoded and measured, and the
manifests made again in memory and compared. About 1 ms per crop on one core. ``repair`` of prep/pipeline.py
makes good what was found.
"""

import hashlib
import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
from msgspec import UNSET

from jigsaw_pretrain.config import Count, checked
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.dataset import layout
from jigsaw_pretrain.formats.dataset.dataset import MOST_BYTES, open_dataset
from jigsaw_pretrain.formats.dataset.schema import EDGES, MARGINS, DamagedTable
from jigsaw_pretrain.formats.images.archive import next_member
from jigsaw_pretrain.formats.pixels import PixelFormat, decode_member, pixel_format
from jigsaw_pretrain.prep import records
from jigsaw_pretrain.prep.executors import local_executor, run_tasks, usable_cores
from jigsaw_pretrain.prep.manifests import check_sums, manifests, part_rows, read_records
from jigsaw_pretrain.prep.records import Damage, PlanRecord, ShardRecord, read_part, require_plan, shaping_versions
from jigsaw_pretrain.storage.store import Storage, location


def verify(url: str | Path, *, workers: int | None = None) -> list[Damage]:
    """All damage of the dataset below ``url``, by part; raises UserError where none was begun."""
    out = Storage(location(url, "url"))
    checked(workers, Count | None, "workers")
    plan, workers = require_plan(out), workers or usable_cores()
    tasks = ((out.url, number, plan) for number in range(plan.parts))
    found: list[Damage] = []
    with local_executor(min(workers, plan.parts)) as executor:
        for damages in run_tasks(executor, inspect_part, tasks, 2 * workers):
            found += damages
    found += [Damage(None, f"{layout.SHARDS}/{name}", "is of no part of this dataset") for name in _strays(out, plan)]
    found += _inspect_plan_rows(out)
    # Other versions give manifests of other bytes; the shards can be verified by any.
    if not found:
        found += _inspect_manifests(out, plan) if plan.versions == shaping_versions() else _inspect_dataset(out, plan)
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
        pixels = pixel_format(plan.options.get("pixels"), layout.PLAN)
        check_sums(record, pixels)
    except (UserError, OSError):
        return [Damage(number, name, "cannot be read")]
    name = layout.part_rows(number)
    try:
        raw = out.read(name, MOST_BYTES)
        tables = [part_rows(raw, plan, number, index, shard) for index, shard in enumerate(record.shards)]
    except FileNotFoundError:
        return [Damage(number, name, "is missing")]
    except DamagedTable as error:
        return [Damage(number, name, str(error))]
    except OSError as error:
        return [Damage(number, name, f"cannot be read ({error.strerror or error})")]
    damages = (
        (shard, _inspect_shard(out, shard, rows, pixels)) for shard, rows in zip(record.shards, tables, strict=True)
    )
    return [Damage(number, f"{layout.SHARDS}/{shard.name}", what) for shard, what in damages if what]


def _inspect_shard(out: Storage, shard: ShardRecord, rows: pa.Table, pixels: PixelFormat) -> str:
    """What is wrong with a shard, in words; nothing where it is whole."""
    name = f"{layout.SHARDS}/{shard.name}"
    try:
        with out.regular_file(name).open("rb") if out.is_local else io.BytesIO(out.read(name, shard.bytes)) as file:
            return _inspect_file(file, shard, rows, pixels)
    except (FileNotFoundError, NotADirectoryError):
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"


def _inspect_file(file: io.BufferedReader | io.BytesIO, shard: ShardRecord, rows: pa.Table, pixels: PixelFormat) -> str:
    length = file.seek(0, io.SEEK_END)
    if length != shard.bytes:
        return f"has {length:,} bytes, not {shard.bytes:,}"
    file.seek(0)
    if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
        return "has another SHA-256 than its record"
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            members = []
            while (member := next_member(tar)) is not None:
                members.append((member.name, member.offset_data, member.size))
    except (tarfile.TarError, ValueError, OverflowError, EOFError):
        return "is no tar"
    listed = rows.select([name for name in ("key", "offset", "size", *EDGES, *MARGINS) if name in rows.column_names])
    crops = listed.to_pylist()
    if [member for member in members if not member[0].endswith(".cls")] != [
        (f"{row['key']}.{pixels.member}", row["offset"], row["size"]) for row in crops
    ]:
        return "does not hold the crops of its rows"
    for row in crops:
        file.seek(row["offset"])
        left, top, right, bottom = (row.get(name, 0) for name in MARGINS)
        width, height = row["right"] - row["left"] + left + right, row["bottom"] - row["top"] + top + bottom
        if decode_member(file.read(row["size"]), pixels, width, height) is None:
            return f"{row['key']} is no {pixels.member} of its row's size and of {pixels}"
    return ""


def _inspect_manifests(out: Storage, plan: PlanRecord) -> Iterable[Damage]:
    """What differs from the manifests that the parts give."""
    made, _ = manifests(out, plan, read_records(out, plan))
    for name, data in made.items():
        try:
            if out.read(name, len(data)) != data:
                yield Damage(None, name, "is not what the parts give")
        except FileNotFoundError:
            yield Damage(None, name, "is missing")
        except OSError as error:
            yield Damage(None, name, f"cannot be read ({error.strerror or error})")


def _inspect_dataset(out: Storage, plan: PlanRecord) -> Iterable[Damage]:
    """What is wrong with the manifests by themselves."""
    try:
        dataset = open_dataset(out.url)
        if dataset.description.plan != plan.plan:
            yield Damage(None, layout.DATASET, "is of another plan")
        found = hashlib.sha256(out.read(layout.CROPS, dataset.most_index_bytes)).hexdigest()
        if dataset.description.crops_sha256 not in (UNSET, found):
            yield Damage(None, layout.CROPS, "has another SHA-256 than dataset.json says")
        records.read_skipped(out, layout.SKIPPED)
    except (UserError, OSError) as error:
        yield Damage(None, layout.DATASET, str(error))


def _inspect_plan_rows(out: Storage) -> Iterable[Damage]:
    try:
        records.read_skipped(out, layout.PLAN_SKIPPED)
    except (UserError, OSError):
        yield Damage(None, layout.PLAN_SKIPPED, "is missing or cannot be read")


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
