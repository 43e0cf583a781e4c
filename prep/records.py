"""The state of a run on disk: the plan's record, the parts' done records, markers, and the limit of skipped images.

``manifests/plan.json`` is written before the first part and says what the dataset will be; every part's done record
carries the plan's digest and the versions of what shapes bytes. Whoever meets a record of another plan or of other
versions refuses it and says what differs: parts of two plans never mix. ``remove_dataset`` (``--overwrite``) starts
anew.

Markers are what ``prep status`` sees of unfinished parts: one while a part is being cut, another when its task failed.
They are hints for people: nothing is decided by them, and a finished dataset has none. They cost two small requests per
part.

``SkipLimit`` (``--max-skipped``) ends a run of which too many images or boxes are unusable: a dataset of which a tenth
is missing is a mistake in the command, not in the data; one of which a thousandth is broken is normal. Boxes of images
that cannot be used are lost too. What was done when the limit is passed is kept. The limit shapes no bytes and is not
recorded: it may be another one when the run goes on.
"""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from jigsaw_pretrain.errors import UserError, redacted
from jigsaw_pretrain.formats.annotations.skipped import BoxReason, Skipped, count_reasons, most_common, skipped_table
from jigsaw_pretrain.formats.dataset import layout, schema
from jigsaw_pretrain.formats.dataset.dataset import (
    MEND,
    MOST_BYTES,
    MOST_CROPS,
    MOST_SHARD_BYTES,
    READABLE,
    Classes,
    Count,
    Dataset,
    Sha256,
    check_options,
    json_bytes,
    open_dataset,
)
from jigsaw_pretrain.formats.images.source import MISSING
from jigsaw_pretrain.formats.jigsaw import GROUPS
from jigsaw_pretrain.prep.images.statistics import PixelSums
from jigsaw_pretrain.prep.plan.plan import PLAN_VERSION, Plan
from jigsaw_pretrain.storage.files import check_own_folders
from jigsaw_pretrain.storage.store import REMOTE_THREADS, Entry, Storage, location, map_ahead

SHAPING = ("numpy", "pillow", "pyarrow", "simplejpeg")
"""The packages whose versions shape the bytes of shards and manifests."""

RUNNING, FAILED = ".running", ".failed"

RECENT_PARTS = 100
PAUSE_SECONDS = 1800.0
"""A gap between two parts that is longer is a pause of the run, not its speed."""

LOST_SECONDS = 900.0
"""A part that was begun longer ago is most likely that of a killed task."""

LEFT_OUT = (BoxReason.CROWD, BoxReason.IGNORED, BoxReason.REPEATED)
"""Boxes that are rightly left out, so not counted as lost."""

MOST_WITHOUT = 50
"""The largest percentage of unusable images or boxes that going on without them is suggested for."""

MAX_SKIPPED = 0.01
"""The share of the images, and of the boxes, that may be unusable, by default."""


class PlanRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The contents of plan.json; manifests/README.md defines each field."""

    plan_version: int = 1
    format_version: int
    plan: Sha256
    seed: int
    options: dict[str, Any]
    versions: dict[str, str]
    classes: Classes
    parts: Annotated[int, msgspec.Meta(ge=1, le=layout.MOST_PARTS)]
    images: Count
    images_listed: Count
    crops: Count
    positives: Count | None = None
    negatives_wanted: Count


class ShardRecord(msgspec.Struct, frozen=True):
    """A published shard of a part."""

    name: str
    group: str
    crops: Annotated[int, msgspec.Meta(ge=1, le=MOST_CROPS)]
    bytes: Annotated[int, msgspec.Meta(ge=1, le=MOST_SHARD_BYTES)]
    sha256: Sha256


class PartRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The done record of a part: its shards, and what could not be used of its images.

    encoded: of a lossless dataset, the crops that were encoded all the same, by reason. pixels: the sums of its crops'
    pixels, of what is not 8-bit RGB in JPEG members.
    """

    part: int
    plan: str
    versions: dict[str, str]
    images: Count
    crops: Count
    shards: list[ShardRecord]
    skipped: list[Skipped]
    encoded: dict[str, Count] | None = None
    pixels: PixelSums | None = None

    @property
    def bytes(self) -> int:
        """Bytes of the part's shards."""
        return sum(shard.bytes for shard in self.shards)


def shaping_versions() -> dict[str, str]:
    """The versions, here and now, of what shapes bytes."""
    return {name: _version(name) for name in SHAPING}


_version = cache(metadata.version)
"""The version of an installed package; looking it up takes 2 ms."""


def plan_record(plan: Plan) -> PlanRecord:
    """What plan.json says of a plan made here."""
    return PlanRecord(
        plan_version=PLAN_VERSION,
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
        positives=plan.positives,
        negatives_wanted=plan.wanted_negatives,
    )


def recorded_options(options: dict[str, Any], annotations_sha256: str) -> dict[str, Any]:
    """The options of a record: all that shapes the data, the annotations by their SHA-256 and never by a path."""
    return {**options, "annotations_sha256": annotations_sha256}


def read_plan(out: Storage) -> PlanRecord | None:
    """The plan that ``out`` was begun with; None where none was. Raises UserError for a damaged record."""
    where = out.describe(layout.PLAN)
    try:
        plan = msgspec.json.decode(out.read(layout.PLAN, MOST_BYTES), type=PlanRecord)
        if plan.format_version not in READABLE:
            raise UserError(f"{where} is of format version {plan.format_version}, which this program does not know.")
        check_options(plan.options, where)
    except FileNotFoundError:
        return None
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise UserError(
            f"{where} is damaged ({str(error)[:200]}). Start anew with `jigsaw-prep shards --overwrite`."
        ) from error
    return plan


def check_place(out: Storage) -> None:
    """Raise UserError where a folder of a dataset that is written to is a link."""
    if out.is_local:
        check_own_folders(out.local_path(""), (layout.SHARDS, layout.MANIFESTS, layout.PARTS))


def require_plan(out: Storage) -> PlanRecord:
    """The plan that ``out`` was begun with; raises UserError where there is none."""
    plan = read_plan(out)
    if plan is None:
        raise UserError(
            f"{out.describe(layout.PLAN)} is missing: nothing was begun there. Run `jigsaw-prep shards` first."
        )
    return plan


def finished_dataset(out: Storage, plan: PlanRecord) -> Dataset | None:
    """The dataset that ``out`` holds; None where it is not finished, is damaged or is of another plan."""
    try:
        dataset = open_dataset(out.url)
    except UserError:
        return None
    return dataset if dataset.description.plan == plan.plan else None


def check_shards(out: Storage, dataset: Dataset) -> None:
    """Raise UserError where a shard is not there with its size."""
    listed = {entry.name: entry.bytes for entry in out.entries(layout.SHARDS)}
    for shard in dataset.shards:
        name = f"{layout.SHARDS}/{shard.name}"
        # A store may list late.
        if listed.get(shard.name) != shard.bytes and (out.is_local or out.size(name) != shard.bytes):
            raise UserError(
                f"{out.describe(name)} is missing or does not have {shard.bytes:,} bytes. Run `jigsaw-prep verify "
                "--repair`, or start anew with --overwrite."
            )


def publish_plan(out: Storage, plan: Plan) -> None:
    """Write what the plan skipped, then its record: where the record is, the rest is too."""
    out.publish(layout.PLAN_SKIPPED, _plan_rows(plan))
    out.publish(layout.PLAN, json_bytes(plan_record(plan)))


def repair_plan_rows(out: Storage, plan: Plan) -> None:
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
        record = msgspec.json.decode(out.read(layout.part_record(number), MOST_BYTES), type=PartRecord)
        if record.part != number:
            raise ValueError(f"it is of part {record.part}")
        # A name leads to a file: it is the one that layout gives, or none.
        groups = [shard.group for shard in record.shards if shard.name == layout.shard_name(shard.group, number)]
        if len(groups) < len(record.shards) or groups != [group for group in GROUPS if group in groups]:
            raise ValueError("its shards are not those of a part")
        if record.crops != sum(shard.crops for shard in record.shards):
            raise ValueError("its shards do not have its crops")
        return record
    except FileNotFoundError:
        return None
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        name = out.describe(layout.part_record(number))
        raise UserError(
            f"{name} is damaged ({str(error)[:200]}). Remove it; the same command then cuts the part again."
        ) from error


def read_parts(out: Storage, numbers: Iterable[int]) -> Iterator[PartRecord | None]:
    """``read_part`` of each number in order, from a store many at once."""
    return map_ahead(partial(read_part, out), numbers, 1 if out.is_local else REMOTE_THREADS)


def check_agreement(where: str, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raise UserError where a record at ``where`` differs from what is expected, naming each difference."""
    told = differences(found, expected)
    if told:
        raise UserError(
            f"{where} was made differently: {'; '.join(told)}. Give the same options, annotations and package versions "
            "(requirements.lock) to go on with it, or start anew with --overwrite or another --out."
        )


def check_plan_version(out: Storage, plan: PlanRecord) -> None:
    """Raise UserError where the output was begun by a program whose plans are others."""
    if plan.plan_version != PLAN_VERSION:
        raise UserError(
            f"{out.describe(layout.PLAN)} is of plan version {plan.plan_version}, and this program makes plans of "
            f"version {PLAN_VERSION}, which may use other boxes of the same annotations. What is finished stays as it "
            "is and trains as before; go on with the version of jigsaw-pretrain that began it, or start anew with "
            "--overwrite or another --out."
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


class Failure(msgspec.Struct, frozen=True):
    """The contents of a failed part's marker: the kind of error and its words, without paths."""

    reason: str


def mark_begun(out: Storage, part: int) -> None:
    """Say that a part is being cut."""
    _quietly(lambda: out.publish(layout.part_file(part, RUNNING), b"{}\n"))


def mark_ended(out: Storage, part: int) -> None:
    """Take back what was said of a part."""
    for kind in (RUNNING, FAILED):
        _quietly(partial(out.remove, layout.part_file(part, kind)))


def mark_failed(out: Storage, part: int, error: Exception) -> None:
    """Say that a part's task failed."""
    words = getattr(error, "strerror", None) or ""
    failure = Failure(f"{type(error).__name__} {words}".strip())
    _quietly(lambda: out.publish(layout.part_file(part, FAILED), msgspec.json.encode(failure) + b"\n"))
    _quietly(lambda: out.remove(layout.part_file(part, RUNNING)))


def clear_markers(out: Storage, parts: Collection[int] | None = None) -> None:
    """Remove the markers that killed tasks left, of these parts or of all."""
    mine = None if parts is None else {layout.part_file(part, kind) for part in parts for kind in (RUNNING, FAILED)}
    for name in out.list(layout.PARTS):
        if name.endswith((RUNNING, FAILED)) and (mine is None or f"{layout.PARTS}/{name}" in mine):
            _quietly(partial(out.remove, f"{layout.PARTS}/{name}"))


def failure_reason(out: Storage, part: int) -> str:
    """Why a part failed."""
    try:
        return msgspec.json.decode(out.read(layout.part_file(part, FAILED), MOST_BYTES), type=Failure).reason
    except (OSError, msgspec.MsgspecError):
        return "unknown"


def _quietly(action: Callable[[], None]) -> None:
    """A marker that cannot be written or removed is no reason to fail."""
    with contextlib.suppress(OSError):
        action()


@dataclass(frozen=True)
class RunStatus:
    """How far a run has got: ``parts`` with ``crops``, those done, running, lost (begun long ago) and failed (why).

    parts_per_second: None where too few are done to tell. missing: images of which there was no file, where all parts
    are done.
    """

    parts: int
    crops: int
    done: int
    running: int
    lost: int
    failed: dict[int, str]
    parts_per_second: float | None
    finished: bool
    missing: int = 0

    @property
    def seconds_left(self) -> float | None:
        """The time left at the present speed."""
        return (self.parts - self.done) / self.parts_per_second if self.parts_per_second else None


def status(url: str | Path, now: float | None = None) -> RunStatus:
    """How far the run of an output is at a Unix time (None: now); raises UserError where none was begun.

    Costs one listing and a few small reads.
    """
    out = Storage(location(url, "url"))
    plan, now = require_plan(out), time.time() if now is None else now
    entries = list(out.entries(layout.PARTS))
    records = _suffixed(entries, ".json")
    done = records.keys() & set(range(plan.parts))
    begun, failed = (
        {part: entry for part, entry in sorted(_suffixed(entries, kind).items()) if part not in done}
        for kind in (RUNNING, FAILED)
    )
    lost = [entry for entry in begun.values() if entry.written is not None and now - entry.written > LOST_SECONDS]
    written = (records[number].written for number in done)
    finished = finished_dataset(out, plan)
    missing = 0
    if finished is not None:
        missing = missing_of(finished)
    elif len(done) == plan.parts:
        missing = sum(len(missing_files_of(record)) for record in read_parts(out, done) if record is not None)
    return RunStatus(
        parts=plan.parts,
        crops=plan.crops,
        done=len(done),
        running=len(begun) - len(lost),
        lost=len(lost),
        failed={number: failure_reason(out, number) for number in failed},
        parts_per_second=_speed(sorted(moment for moment in written if moment is not None)),
        finished=finished is not None,
        missing=missing,
    )


def missing_of(dataset: Dataset) -> int:
    """Images of a finished dataset of which there was no file when its parts were cut."""
    return int(dataset.description.totals.get("skipped", {}).get(MISSING, 0))


def missing_files_of(record: PartRecord) -> list[str]:
    """The images of a part of which there was no file when it was cut."""
    return [row.image_file for row in record.skipped if row.image_file and row.reason.startswith(MISSING)]


def _suffixed(entries: Iterable[Entry], suffix: str) -> dict[int, Entry]:
    """Those of the files of parts that have a suffix, by part."""
    named = ((layout.split_part_name(entry.name), entry) for entry in entries)
    return {found[0]: entry for found, entry in named if found is not None and found[1] == suffix}


def _speed(moments: list[float]) -> float | None:
    """Parts per second since the last pause; None where fewer than two tell."""
    recent = moments[-RECENT_PARTS:]
    start = len(recent) - 1
    while start > 0 and recent[start] - recent[start - 1] < PAUSE_SECONDS:
        start -= 1
    count, span = len(recent) - 1 - start, recent[-1] - recent[start] if recent else 0.0
    return count / span if count > 0 and span > 0 else None


@dataclass(frozen=True)
class Damage:
    """Something that is not as it should be: the part to cut again (None: only manifests), the file, and what."""

    part: int | None
    file: str
    what: str


def remove_dataset(out: Storage) -> None:
    """Remove a dataset, finished or not, from ``out``: what prep wrote there and nothing else.

    The names come from the old plan too, so that a listing that lags behind leaves nothing; dataset.json goes first and
    the plan last, so that a removal that was cut short can be done again.
    """
    out.remove(layout.DATASET)
    try:
        plan = read_plan(out)
    except UserError:
        plan = None
    listed = (out.list(layout.PARTS), out.list(layout.SHARDS))
    known = range(plan.parts if plan else 0)
    records = {layout.part_record(part) for part in known}
    rows = {layout.part_rows(part) for part in known}
    for name in listed[0]:
        if layout.split_part_name(name):
            (records if name.endswith(".json") else rows).add(f"{layout.PARTS}/{name}")
    shards = {f"{layout.SHARDS}/{layout.shard_name(group, part)}" for part in known for group in GROUPS}
    shards |= {f"{layout.SHARDS}/{name}" for name in listed[1] if _is_shard_file(name)}
    # Records first: what has no record does not exist.
    for group in (records, rows, shards, {layout.CROPS, layout.SHARD_TABLE, layout.SKIPPED, layout.PLAN_SKIPPED}):
        for name in sorted(group):
            out.remove(name)
    clear_markers(out)
    out.remove(layout.PLAN)
    out.sweep(layout.SHARDS, layout.MANIFESTS, layout.PARTS)


def _is_shard_file(name: str) -> bool:
    try:
        layout.parse_shard_name(name)
    except ValueError:
        return False
    return True


@dataclass
class _Tally:
    """How many of the ``total`` things that there are cannot be used, by reason."""

    what: str
    total: int
    lost: Counter[str]


class SkipLimit:
    """Counts unusable images and boxes of one output; raises UserError as soon as they are more than the share.

    images, boxes: those that the plan could use; lost_images, lost_boxes: those that it could not, by reason. boxes_of:
    the boxes that the plan could use of each image, by its identity.
    """

    def __init__(
        self,
        share: float,
        out: Storage,
        images: int,
        lost_images: Counter[str],
        boxes: int,
        lost_boxes: Counter[str],
        boxes_of: Mapping[str, int],
    ) -> None:
        self.share = share
        self._out = out.url
        self._images = _Tally("images", images + lost_images.total(), Counter(lost_images))
        self._boxes = _Tally("boxes", boxes + lost_boxes.total(), Counter(lost_boxes))
        self._boxes_of = boxes_of

    def check(self) -> None:
        """Raise UserError where too many images or boxes are unusable."""
        for tally in (self._images, self._boxes):
            lost = tally.lost.total()
            if lost > self.share * tally.total:
                share = int(100 * lost / tally.total) + 1
                gone = tally.lost[MISSING] > lost / 2
                remedies = [
                    "If --images is wrong, the same command with another one looks again at what was missing"
                    if gone
                    else "Mend the images and run `jigsaw-prep retry-skipped "
                    f"--out {redacted(self._out)} --annotations FILE --images DIR`",
                    "correct the annotations and start anew with --overwrite",
                ]
                # Who goes on without most of a dataset has another one than was meant.
                if share <= MOST_WITHOUT:
                    remedies.append(f"go on without: the same command with a larger --max-skipped, such as {share}%")
                raise UserError(
                    f"{lost:,} of {tally.total:,} {tally.what} cannot be used, more than --max-skipped "
                    f"{100 * self.share:.4g}%: {most_common(tally.lost)}. What was done is kept. `jigsaw-prep doctor` "
                    f"names some. {', or '.join(remedies)}."
                )

    def add(self, record: PartRecord) -> None:
        """Count in a part, its boxes where they are known."""
        for row in record.skipped:
            (reason,) = count_reasons([row.reason])
            self._images.lost[reason] += 1
            self._boxes.lost[reason] += self._boxes_of.get(row.image_id or "", 0)

    def add_boxes(self, count: int) -> None:
        """Count in boxes that were lost with their images."""
        self._boxes.lost["of images that cannot be used"] += count

    def watch(self, records: Iterable[PartRecord]) -> Iterator[PartRecord]:
        """The records as they come, each counted and checked."""
        for record in records:
            self.add(record)
            yield record
            self.check()


def skip_limit(
    share: float, out: Storage, images: int, boxes: int | None, boxes_of: Mapping[str, int] | None = None
) -> SkipLimit:
    """The limit of an output that has a plan; images, boxes: those that the plan could use (None: not counted)."""
    table = read_skipped(out, layout.PLAN_SKIPPED)
    of_boxes = pc.or_(
        pc.is_null(table.column("image_file")),
        pc.or_(pc.is_valid(table.column("annotation_id")), pc.is_valid(table.column("ordinal"))),
    )
    reasons = table.column("reason")
    lost = Counter() if boxes is None else count_reasons(reasons.filter(of_boxes).to_pylist())
    for reason in LEFT_OUT:
        lost.pop(reason.text, None)
    broken = count_reasons(reasons.filter(pc.invert(of_boxes)).to_pylist())
    return SkipLimit(share, out, images, broken, boxes or 0, lost, boxes_of or {})


def read_skipped(out: Storage, name: str) -> pa.Table:
    """The rows of a table of skipped things; raises UserError where it is missing or damaged."""
    try:
        return schema.read_table(out.read(name, schema.MOST_TABLE_BYTES), schema.SKIPPED)
    except FileNotFoundError as error:
        raise UserError(f"{out.describe(name)} is missing. {MEND}") from error
    except schema.DamagedTable as error:
        raise UserError(f"{out.describe(name)} {error}. {MEND}") from error
