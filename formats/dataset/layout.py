"""Names of shards, members and records in a dataset: this is the only module that builds or reads them."""

import hashlib
import re
from pathlib import PurePosixPath

from jigsaw_pretrain.formats.jigsaw import GROUPS

SHARDS = "shards"
MANIFESTS = "manifests"
DATASET = f"{MANIFESTS}/dataset.json"
CROPS = f"{MANIFESTS}/crops.parquet"
SHARD_TABLE = f"{MANIFESTS}/shards.parquet"
SKIPPED = f"{MANIFESTS}/skipped.parquet"
PLAN = f"{MANIFESTS}/plan.json"
PARTS = f"{MANIFESTS}/parts"
RECIPE = "recipe.toml"
DETECT_RECIPE = "detect.toml"
PLAN_SKIPPED = f"{PARTS}/plan-skipped.parquet"

_SHARD = re.compile(rf"([{''.join(GROUPS)}])-(\d{{6,}})\.tar")

_PART = re.compile(r"(\d{6,15})(\.(?:json|parquet|running|failed))")


MOST_PARTS = 1_000_000
"""The most parts of a dataset."""


def shard_name(group: str, part: int) -> str:
    """``S-000017.tar`` for group S of part 17."""
    if group not in GROUPS or part < 0:
        raise ValueError(f"no shard of group {group!r} and part {part}")
    return f"{group}-{part:06d}.tar"


def parse_shard_name(name: str) -> tuple[str, int]:
    """Group and part of a shard's name; raises ValueError for any other name."""
    match = _SHARD.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} is not a shard's name (such as S-000017.tar)")
    return match[1], int(match[2])


def part_file(part: int, suffix: str) -> str:
    """Where a part's file of that suffix lies, such as ``manifests/parts/000017.running``."""
    return f"{PARTS}/{part:06d}{suffix}"


def split_part_name(name: str) -> tuple[int, str] | None:
    """Part and suffix of a file's name in PARTS; None for any other."""
    match = _PART.fullmatch(name)
    return (int(match[1]), match[2]) if match else None


def part_rows(part: int) -> str:
    """Where the manifest rows of a part lie: ``manifests/parts/000017.parquet``."""
    return part_file(part, ".parquet")


def part_record(part: int) -> str:
    """Where the done record of a part lies: ``manifests/parts/000017.json``. A part without one does not exist."""
    return part_file(part, ".json")


def image_id(file_name: str) -> str:
    """An image's identity: its relative path with forward slashes and without suffix."""
    path = PurePosixPath(file_name.replace("\\", "/"))
    return str(path.with_suffix("")) if path.suffix else str(path)


def image_hash(identity: str) -> str:
    """80 bits of the identity's BLAKE2b as 20 hexadecimal digits: what a crop's key calls its image.

    Paths may hold dots, slashes and any length, which tar member keys may not.
    """
    return hashlib.blake2b(identity.encode("utf-8", "surrogatepass"), digest_size=10).hexdigest()


def crop_key(identity: str, ordinal: int, background: bool) -> str:
    """A crop's key: image hash, ``p`` (positive) or ``n`` (negative), ordinal in the image: ``…-p00003``."""
    return f"{image_hash(identity)}-{'n' if background else 'p'}{ordinal:05d}"
