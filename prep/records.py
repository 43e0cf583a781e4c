"""The state of a run on disk: the plan's record and the parts' done records, and what must agree between them.

``manifests/plan.json`` is written before the first part and says what the dataset will be; every part's done record
carries the plan's digest and the versions of what shapes bytes. Whoever meets a record of another plan or of other
versions refuses it and says what differs: parts of two plans never mix.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from importlib import metadata
from typing import Any

import msgspec

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.annotations.skipped import Skipped, skipped_table
from jigsaw_pretrain.formats.dataset import layout, schema
from jigsaw_pretrain.prep.images.statistics import PixelSums
from jigsaw_pretrain.prep.plan.plan import Plan
from jigsaw_pretrain.storage import REMOTE_THREADS, Storage, map_ahead

SHAPING = ("numpy", "pillow", "pyarrow", "simplejpeg")
"""The packages whose versions shape the bytes of shards and manifests."""


class PlanRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The contents of plan.json; manifests/README.md defines each field."""

    format_version: int
    plan: str
    seed: int
    options: dict[str, Any]
    versions: dict[str, str]
    classes: list[str]
    parts: int
    images: int
    images_listed: int
    crops: int
    negatives_wanted: int


class ShardRecord(msgspec.Struct, frozen=True):
    """A published shard of a part."""

    name: str
    group: str
    crops: int
    bytes: int
    sha256: str


class PartRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The done record of a part: its shards, and what could not be used of its images.

    encoded: of a lossless dataset, the crops that were encoded all the same, by reason. pixels: the sums of its crops'
    pixels, of what is not 8-bit RGB in JPEG members.
    """

    part: int
    plan: str
    versions: dict[str, str]
    images: int
    crops: int
    shards: list[ShardRecord]
    skipped: list[Skipped]
    encoded: dict[str, int] | None = None
    pixels: PixelSums | None = None

    @property
    def bytes(self) -> int:
        """Bytes of the part's shards."""
        return sum(shard.bytes for shard in self.shards)


def shaping_versions() -> dict[str, str]:
    """The versions, here and now, of what shapes bytes."""
    return {name: metadata.version(name) for name in SHAPING}


def plan_record(plan: Plan) -> PlanRecord:
    """What plan.json says of a plan made here."""
    return PlanRecord(
        format_version=plan.options.format_version,
        plan=plan.digest,
        seed=plan.seed,
        options=recorded_options(plan.options.to_dict(), plan.annotations_sha256),
        versions=shaping_versions(),
        classes=list(plan.classes),
        parts=plan.part_count,
        images=len(plan.images),
        images_listed=plan.listed_images,
        crops=len(plan.crops),
        negatives_wanted=plan.wanted_negatives,
    )


def recorded_options(options: dict[str, Any], annotations_sha256: str) -> dict[str, Any]:
    """The options of a record: all that shapes the data, the annotations by their SHA-256 and never by a path."""
    return {**options, "annotations_sha256": annotations_sha256}


def encode(record: msgspec.Struct) -> bytes:
    """A record's bytes: keys sorted, two spaces of indent, a final newline."""
    return msgspec.json.format(msgspec.json.encode(record, order="deterministic"), indent=2) + b"\n"


def read_plan(out: Storage) -> PlanRecord | None:
    """The plan that ``out`` was begun with; None where none was. Raises UserError for a damaged record."""
    try:
        return msgspec.json.decode(out.read(layout.PLAN), type=PlanRecord)
    except FileNotFoundError:
        return None
    except msgspec.MsgspecError as error:
        raise UserError(
            f"{out.describe(layout.PLAN)} is damaged ({error}). Remove the shards and manifests there and start anew."
        ) from error


def publish_plan(out: Storage, plan: Plan) -> None:
    """Write what the plan skipped, then its record: where the record is, the rest is too."""
    out.publish(layout.PLAN_SKIPPED, _plan_rows(plan))
    out.publish(layout.PLAN, encode(plan_record(plan)))


def mend_plan_rows(out: Storage, plan: Plan) -> None:
    """Write what the plan skipped once more, where it was lost or damaged."""
    rows = _plan_rows(plan)
    try:
        same = out.read(layout.PLAN_SKIPPED) == rows
    except FileNotFoundError:
        same = False
    if not same:
        out.publish(layout.PLAN_SKIPPED, rows)


def _plan_rows(plan: Plan) -> bytes:
    return schema.table_bytes(schema.SKIPPED, [skipped_table(plan.skipped)])


def read_part(out: Storage, number: int) -> PartRecord | None:
    """The done record of a part; None where the part is not done. Raises UserError for a damaged record."""
    try:
        return msgspec.json.decode(out.read(layout.part_record(number)), type=PartRecord)
    except FileNotFoundError:
        return None
    except msgspec.MsgspecError as error:
        name = out.describe(layout.part_record(number))
        raise UserError(
            f"{name} is damaged ({error}). Remove it; the same command then cuts the part again."
        ) from error


def read_parts(out: Storage, numbers: Iterable[int]) -> Iterator[PartRecord | None]:
    """``read_part`` of each number in order, from a store many at once."""
    return map_ahead(partial(read_part, out), numbers, 1 if out.is_local else REMOTE_THREADS)


def check_agreement(where: str, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raise UserError where a record at ``where`` differs from what is expected, naming each difference."""
    told = differences(found, expected)
    if told:
        raise UserError(
            f"{where} was made otherwise: {'; '.join(told)}. Give the same options, annotations and package versions "
            "(requirements.lock) to go on with it, or start anew with --overwrite or another --out."
        )


def differences(found: dict[str, Any], expected: dict[str, Any], prefix: str = "") -> list[str]:
    """``name was X, now Y`` for each entry that differs, entries of nested mappings by their own names."""
    told: list[str] = []
    for name in sorted(found.keys() | expected.keys()):
        before, now = found.get(name), expected.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            told += differences(before, now, "" if name == "options" else f"{name}.")
        elif before != now:
            told.append(f"{prefix}{name} was {_short(before)}, now {_short(now)}")
    return told


def _short(value: Any) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"
