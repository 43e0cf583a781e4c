"""Attacks on a dataset by rule: each field of each JSON, each column of each table, each file, with a hostile value.

``attack`` draws one with hypothesis and does it to a folder; it says what it did.
"""

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

LONG = "x" * 100_000
HOSTILE: tuple[Any, ...] = (
    None, True, -1, 0, 1.5, 2**31, 2**62, 2**63 - 1, 2**64, 1e308, float("nan"), float("inf"), "", LONG, "../../victim",
    "/etc/passwd", "..", "a\0b", "\x1b[31m", "<script>alert(1)</script>", [], [None] * 3, {}, {"a": 1}, [[[]]],
)  # fmt: skip
"""What stands where something else should."""

FILES = ("missing", "empty", "cut", "garbage", "grown", "folder", "fifo", "dangling link", "loop")
COLUMNS = ("missing", "null", "type", "negative", "zero", "huge", "max", "nan", "long", "separators", "markup", "fewer")


def _paths(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every field of a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [above, *(path for key, one in inside for path in _paths(one, (*above, key)))]


def _replace(value: Any, path: tuple[Any, ...], new: Any, remove: bool) -> Any:
    if not path:
        return new
    if len(path) == 1 and remove:
        value.pop(path[0])
    else:
        value[path[0]] = _replace(value[path[0]], path[1:], new, remove)
    return value


def attack_json(path: Path, draw: st.DataObject) -> str:
    """One field of a JSON file is missing or another value."""
    content = json.loads(path.read_text())
    field = draw.draw(st.sampled_from(_paths(content)), label="field")
    remove = bool(field) and draw.draw(st.booleans(), label="remove")
    new = draw.draw(st.sampled_from(HOSTILE), label="value")
    path.write_text(json.dumps(_replace(content, field, new, remove)))
    return f"{path.name} {field} {'removed' if remove else repr(new)[:40]}"


def attack_table(path: Path, draw: st.DataObject) -> str:
    """One column of a Parquet file is missing or holds other values; the row groups stay as they are, or one goes."""
    file = pq.ParquetFile(path)
    groups = [file.read_row_group(index) for index in range(file.num_row_groups)] or [file.read()]
    name = draw.draw(st.sampled_from(groups[0].column_names), label="column")
    kind = draw.draw(st.sampled_from(COLUMNS), label="kind")
    if kind == "fewer":
        groups = groups[:-1] if draw.draw(st.booleans(), label="groups") else [groups[0].slice(1), *groups[1:]]
    else:
        groups = [_harm(table, name, kind) for table in groups]
    with pq.ParquetWriter(path, groups[0].schema if groups else file.schema_arrow) as writer:
        for table in groups:
            writer.write_table(table)
    return f"{path.name} {name} {kind}"


def _harm(table: pa.Table, name: str, kind: str) -> pa.Table:
    place, count = table.column_names.index(name), table.num_rows
    old = table.schema.field(name).type
    if kind == "missing":
        return table.remove_column(place)
    if kind == "null":
        new = pa.nulls(count, old)
    elif kind == "type":
        new = pa.array([b"\xff\xfe"] * count, pa.binary()) if pa.types.is_integer(old) else pa.array([7] * count)
    else:
        values: dict[str, Any] = {
            **{"negative": -1, "zero": 0, "huge": 2**62, "max": 2**63 - 1, "nan": float("nan")},
            **{"long": LONG, "separators": "../../../victim", "markup": "<script>alert(1)</script>"},
        }
        value = values[kind]
        fitting = isinstance(value, str) == pa.types.is_string(old) and not (value != value and old != pa.float64())
        bits = {pa.int32(): 31}.get(old, 63)
        if fitting and isinstance(value, int) and value >= 2**bits:
            value = 2**bits - 1
        value = float(value) if fitting and old == pa.float64() else value
        new = pa.array([value] * count, old if fitting else None)
    return table.set_column(place, pa.field(name, new.type), new)


def attack_file(path: Path, draw: st.DataObject) -> str:
    """A file is missing, damaged, or is none."""
    kind = draw.draw(st.sampled_from(FILES), label="kind")
    data = path.read_bytes()
    path.unlink()
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut":
        path.write_bytes(data[: draw.draw(st.integers(0, len(data) - 1), label="cut")])
    elif kind == "grown":
        path.write_bytes(data + bytes(1000))
    elif kind == "garbage":
        place = draw.draw(st.integers(0, len(data) - 1), label="place")
        noise = draw.draw(st.binary(min_size=1, max_size=64), label="noise")
        path.write_bytes(data[:place] + noise + data[place + len(noise) :])
    elif kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "dangling link":
        path.symlink_to("/nowhere/at/all")
    elif kind == "loop":
        path.symlink_to(path.name)
    return f"{path.name} {kind}"


def attack(folder: Path, draw: st.DataObject) -> str:
    """Do one attack to a folder; says what was done."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    ways = {"json": attack_json, "table": attack_table, "file": attack_file}
    suffixes = {"json": ".json", "table": ".parquet", "file": ""}
    chosen = {way: [path for path in files if path.name.endswith(suffix)] for way, suffix in suffixes.items()}
    way = draw.draw(st.sampled_from([way for way in ways if chosen[way]]), label="way")
    return ways[way](draw.draw(st.sampled_from(chosen[way]), label="path"), draw)
