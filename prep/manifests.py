"""Finishing: the parts' rows become the dataset's manifests, last of all dataset.json.

Needs the output alone, in any process. Reads every part's record, and its rows once per group: a second for a million
crops, which are held as one compressed file (about 50 MB) in memory.
"""

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jigsaw_pretrain.config import Share, checked
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.annotations.skipped import count_reasons, skipped_table
from jigsaw_pretrain.formats.dataset import layout, schema
from jigsaw_pretrain.formats.dataset.dataset import MEND, MOST_BYTES, Description, drawn_context, memory_file
from jigsaw_pretrain.formats.dataset.schema import (
    BOX,
    EDGES,
    MARGINS,
    SHARDS,
    SKIPPED,
    DamagedTable,
    check_crops,
    crops_schema,
    open_table,
    read_group,
    table_bytes,
)
from jigsaw_pretrain.formats.jigsaw import GROUPS
from jigsaw_pretrain.formats.pixels import RGB8, PixelFormat, pixel_format
from jigsaw_pretrain.prep import records
from jigsaw_pretrain.prep.images.statistics import mean_and_std
from jigsaw_pretrain.prep.plan.crop_table import expected_boxes
from jigsaw_pretrain.prep.plan.forecast import CropSizes, Summary, count_crops
from jigsaw_pretrain.prep.plan.recipe import fitted_detector, fitted_recipe, is_unchanged, this_machine
from jigsaw_pretrain.prep.records import (
    PartRecord,
    PlanRecord,
    ShardRecord,
    check_agreement,
    check_place,
    read_parts,
    require_plan,
    shaping_versions,
    skip_limit,
)
from jigsaw_pretrain.storage.store import REMOTE_THREADS, Storage, location, map_ahead

CHECKED = ("label", "offset", "size", *EDGES, *MARGINS, *BOX)
"""The columns that ``check_crops`` looks at."""

logger = logging.getLogger(__name__)

_WHOLE, _FLOAT = re.compile(r"\d{1,60}"), re.compile(r"-?\d(\.\d{1,20})?(e[+-]\d{2})?|-?\d{1,20}(\.\d{1,20})?")


def finish(url: str | Path, max_skipped: float = 1.0) -> Summary:
    """Write crops.parquet, shards.parquet, skipped.parquet and dataset.json; the same bytes each time.

    Before them OUT/recipe.toml and OUT/detect.toml, which fit the crops and this machine's memory; one that was
    changed stays.

    Args:
        url: The output of the tasks of an array job: a folder or a URL.
        max_skipped: The largest share of the images, and of the boxes, that may be unusable, 0 to 1.

    Returns:
        The figures of the dataset.

    Raises:
        UserError: No plan or not every part is there, a record is of another plan or other versions, or too many images
            could not be used.
    """
    out = Storage(location(url, "url"))
    checked(max_skipped, Share, "max_skipped")
    check_place(out)
    plan = require_plan(out)
    check_agreement(out.describe(layout.PLAN), {"versions": plan.versions}, {"versions": shaping_versions()})
    records = read_records(out, plan)
    allowed = skip_limit(max_skipped, out, plan.images_listed, plan.positives)
    for record in records:
        allowed.add(record)
    made, summary = manifests(out, plan, records)
    if plan.positives is not None:
        allowed.add_boxes(plan.positives - (summary.crops - summary.negatives))
    allowed.check()
    _publish_recipes(out, summary)
    for name, data in made.items():
        out.publish(name, data)
    tidy(out)
    return summary


def _publish_recipes(out: Storage, summary: Summary) -> None:
    """Write OUT/recipe.toml and OUT/detect.toml; one that was changed stays as it is."""
    if not summary.crops:
        return
    machine = this_machine()
    for name, recipe in (
        (layout.RECIPE, fitted_recipe(summary, machine)),
        (layout.DETECT_RECIPE, fitted_detector(machine)),
    ):
        try:
            changed = not is_unchanged(out.read(name).decode(errors="replace"))
        except FileNotFoundError:
            changed = False
        if changed:
            logger.info("%s was changed since it was written, and stays", out.describe(name))
        else:
            out.publish(name, recipe.to_toml().encode())


def manifests(out: Storage, plan: PlanRecord, parts: list[PartRecord]) -> tuple[dict[str, bytes], Summary]:
    """The four files of a finished dataset by name, dataset.json last, and its figures."""
    shard_rows = [
        {"name": shard.name, "group": group, "part": record.part, "crops": shard.crops, "bytes": shard.bytes}
        | {"sha256": shard.sha256}
        for group in GROUPS
        for record in parts
        for shard in record.shards
        if shard.group == group
    ]
    statistics = _RowStatistics(drawn_context(plan.options))
    crops = table_bytes(crops_schema(plan.format_version), statistics.watch(_crop_tables(out, plan, parts)))
    shards = pa.Table.from_pylist(shard_rows, schema=SHARDS)
    skipped = pa.concat_tables(
        [
            records.read_skipped(out, layout.PLAN_SKIPPED),
            *(skipped_table(record.skipped) for record in parts if record.skipped),
        ]
    )
    summary = statistics.summary(plan, parts, skipped)
    made = {
        layout.CROPS: crops,
        layout.SHARD_TABLE: table_bytes(SHARDS, [shards]),
        layout.SKIPPED: table_bytes(SKIPPED, [skipped.combine_chunks()]),
        layout.DATASET: describe(plan, summary, hashlib.sha256(crops).hexdigest()).to_json(),
    }
    return made, summary


def tidy(out: Storage) -> None:
    """Remove what killed tasks left in a finished output: temporary files that nobody writes, and markers."""
    out.sweep(layout.SHARDS, layout.MANIFESTS, layout.PARTS)
    records.clear_markers(out)


def describe(plan: PlanRecord, summary: Summary, crops_sha256: str) -> Description:
    """dataset.json of a finished dataset."""
    return Description(
        format_version=plan.format_version,
        classes=plan.classes,
        background=len(plan.classes),
        seed=plan.seed,
        plan=plan.plan,
        options=plan.options,
        versions=plan.versions,
        totals=summary.totals(),
        crops_sha256=crops_sha256,
    )


def read_records(out: Storage, plan: PlanRecord) -> list[PartRecord]:
    """Every part's done record; raises UserError where some are missing or of another plan."""
    records, missing = [], []
    for number, record in enumerate(read_parts(out, range(plan.parts))):
        if record is None:
            missing.append(number)
            continue
        check_agreement(
            out.describe(layout.part_record(number)),
            {"plan": record.plan, "versions": record.versions},
            {"plan": plan.plan, "versions": plan.versions},
        )
        records.append(record)
    if missing:
        listed = ", ".join(str(number) for number in missing[:10]) + (", ..." if len(missing) > 10 else "")
        raise UserError(
            f"{out.describe('')}: {len(missing):,} of {plan.parts:,} parts are not done ({listed}). "
            "Run the same `jigsaw-prep shards` command again; it cuts what is missing."
        )
    return records


def _crop_tables(out: Storage, plan: PlanRecord, parts: list[PartRecord]) -> Iterator[tuple[str, pa.Table]]:
    """Group and rows of each shard: all of S by part, then T, then W; raises UserError for damaged rows."""
    row_groups = [
        (record.part, index, shard)
        for group in GROUPS
        for record in parts
        for index, shard in enumerate(record.shards)
        if shard.group == group
    ]

    def read(row_group: tuple[int, int, ShardRecord]) -> tuple[str, pa.Table]:
        part, index, shard = row_group
        name = layout.part_rows(part)
        try:
            return shard.group, part_rows(out.read(name, MOST_BYTES), plan, part, index, shard)
        except FileNotFoundError as error:
            raise UserError(f"{out.describe(name)} is missing. {MEND}") from error
        except DamagedTable as error:
            raise UserError(f"{out.describe(name)} {error}. {MEND}") from error

    return map_ahead(read, row_groups, 1 if out.is_local else REMOTE_THREADS)


def part_rows(raw: bytes, plan: PlanRecord, part: int, index: int, shard: ShardRecord) -> pa.Table:
    """The rows of a part's ``index``-th shard, from the bytes of the part's table; raises DamagedTable."""
    schema = crops_schema(plan.format_version)
    file = open_table(memory_file(raw), schema)
    if index >= file.metadata.num_row_groups:
        raise DamagedTable("is damaged: it does not have a row group for each shard")
    rows = read_group(file, schema, index, shard.crops)
    values = {name: rows.column(name).to_numpy() for name in CHECKED if name in schema.names}
    check_crops(values, shard.bytes, len(plan.classes))
    same = {"part": part, "shard": shard.name, "group": shard.group}
    for name, value in same.items():
        if not pc.all(pc.equal(rows.column(name), value)).as_py():
            raise DamagedTable(f"is damaged: row group {index} has another {name} than its shard")
    return rows


class _RowStatistics:
    """Gathers labels and sizes of the rows that pass through ``watch``."""

    def __init__(self, context: float | None) -> None:
        self._labels: list[np.ndarray] = []
        self._sizes: list[CropSizes] = []
        self._context = context

    def watch(self, tables: Iterator[tuple[str, pa.Table]]) -> Iterator[pa.Table]:
        for name, rows in tables:
            group = np.full(rows.num_rows, GROUPS.index(name), dtype=np.uint8)
            self._labels.append(rows.column("label").to_numpy())
            self._sizes.append(CropSizes.of(self._boxes(rows), _stacked(rows, schema.BOX), group))
            yield rows

    def _boxes(self, rows: pa.Table) -> np.ndarray:
        """Crops as they are trained on: int32 [n, 4]."""
        boxes = _stacked(rows, schema.EDGES)
        if self._context is None:
            return boxes
        outer = boxes + _stacked(rows, schema.MARGINS) * np.array([-1, -1, 1, 1], dtype=np.int32)
        return expected_boxes(boxes, _stacked(rows, schema.BOX), outer, self._context)

    def summary(self, plan: PlanRecord, records: list[PartRecord], skipped: pa.Table) -> Summary:
        labels, sizes = np.concatenate(self._labels or [np.empty(0, dtype=np.int64)]), CropSizes.joined(self._sizes)
        pixels = pixel_format(plan.options.get("pixels"), layout.PLAN)
        sums = [record.pixels for record in records if record.pixels is not None]
        for record in records:
            check_sums(record, pixels)
        return Summary(
            classes=plan.classes,
            counts=count_crops(labels, sizes.groups, len(plan.classes)),
            images=sum(record.images for record in records),
            images_listed=plan.images_listed,
            negatives_wanted=plan.negatives_wanted,
            parts=plan.parts,
            shards=sum(len(record.shards) for record in records),
            bytes=sum(record.bytes for record in records),
            skipped=count_reasons(skipped.column("reason").to_pylist()),
            slots=sizes.jigsaw().slots,
            sizes=sizes,
            encoded=_encoded(records) if plan.options.get("encode") == "lossless" else None,
            drawn_context=self._context,
            pixels=pixels,
            measured={} if pixels == RGB8 else mean_and_std(sums, pixels),
            filled=sum(one.missing for one in sums),
        )


def check_sums(record: PartRecord, pixels: PixelFormat) -> None:
    """Raise UserError where a part's sums of pixels are not those of the format."""
    number = _FLOAT if pixels.dtype == "float32" else _WHOLE
    texts = [] if record.pixels is None else [record.pixels.sums, record.pixels.squares]
    good = all(len(values) == pixels.channels and all(number.fullmatch(text) for text in values) for values in texts)
    if not good or (record.pixels is None) != (pixels == RGB8) or (record.pixels and record.pixels.count < 0):
        raise UserError(f"{layout.part_record(record.part)} is damaged (its sums of pixels). {MEND}")


def _encoded(records: list[PartRecord]) -> Counter[str]:
    """The crops of a lossless dataset that were encoded all the same, by reason."""
    found: Counter[str] = Counter()
    for record in records:
        found.update(record.encoded or {})
    return found


def _stacked(rows: pa.Table, columns: tuple[str, ...]) -> np.ndarray:
    """Columns side by side, [n, len(columns)]; null is NaN."""
    return np.stack([rows.column(name).to_numpy() for name in columns], axis=1)
