"""Starting anew in an output that holds another dataset: ``--overwrite``.

Removes what prep wrote there and nothing else, by the names that the old plan tells, so that a listing that lags behind
leaves nothing; dataset.json first, the plan last, so that it can be cut short and begun again at any point.
"""

import re

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.dataset import layout
from jigsaw_pretrain.formats.jigsaw import GROUPS
from jigsaw_pretrain.prep import markers
from jigsaw_pretrain.prep.records import read_plan
from jigsaw_pretrain.storage import Storage

_OF_PART = re.compile(r"\d{6,}\.(json|parquet|running|failed)")


def remove_dataset(out: Storage) -> None:
    """Remove a dataset, finished or not, from ``out``."""
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
        if _OF_PART.fullmatch(name):
            (records if name.endswith(".json") else rows).add(f"{layout.PARTS}/{name}")
    shards = {f"{layout.SHARDS}/{layout.shard_name(group, part)}" for part in known for group in GROUPS}
    shards |= {f"{layout.SHARDS}/{name}" for name in listed[1] if _is_shard(name)}
    # Records first: what has no record does not exist.
    for group in (records, rows, shards, {layout.CROPS, layout.SHARD_TABLE, layout.SKIPPED, layout.PLAN_SKIPPED}):
        for name in sorted(group):
            out.remove(name)
    markers.clear(out)
    out.remove(layout.PLAN)
    out.sweep(layout.SHARDS, layout.MANIFESTS, layout.PARTS)


def _is_shard(name: str) -> bool:
    try:
        layout.parse_shard_name(name)
    except ValueError:
        return False
    return True
