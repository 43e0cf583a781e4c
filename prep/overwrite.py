"""Starting anew in an output that holds another dataset: ``--overwrite``.

Removes what prep wrote there and nothing else, by the names that the old plan tells, so that a listing that lags behind
leaves nothing; dataset.json first, the plan last, so that it can be cut short and begun again at any point.
"""

import re

from jigsaw_pretrain.formats import names
from jigsaw_pretrain.formats.errors import UserError
from jigsaw_pretrain.formats.groups import GROUPS
from jigsaw_pretrain.formats.storage import Storage
from jigsaw_pretrain.prep import markers
from jigsaw_pretrain.prep.records import read_plan

_OF_PART = re.compile(r"\d{6,}\.(json|parquet|running|failed)")


def remove_dataset(out: Storage) -> None:
    """Remove a dataset, finished or not, from ``out``."""
    out.remove(names.DATASET)
    try:
        plan = read_plan(out)
    except UserError:
        plan = None
    listed = (out.list(names.PARTS), out.list(names.SHARDS))
    known = range(plan.parts if plan else 0)
    records = {names.part_record(part) for part in known}
    rows = {names.part_rows(part) for part in known}
    for name in listed[0]:
        if _OF_PART.fullmatch(name):
            (records if name.endswith(".json") else rows).add(f"{names.PARTS}/{name}")
    shards = {f"{names.SHARDS}/{names.shard_name(group, part)}" for part in known for group in GROUPS}
    shards |= {f"{names.SHARDS}/{name}" for name in listed[1] if _is_shard(name)}
    # Records first: what has no record does not exist.
    for group in (records, rows, shards, {names.CROPS, names.SHARD_TABLE, names.SKIPPED, names.PLAN_SKIPPED}):
        for name in sorted(group):
            out.remove(name)
    markers.clear(out)
    out.remove(names.PLAN)
    out.sweep(names.SHARDS, names.MANIFESTS, names.PARTS)


def _is_shard(name: str) -> bool:
    try:
        names.parse_shard_name(name)
    except ValueError:
        return False
    return True
