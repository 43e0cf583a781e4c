"""Attacks by rule on datasets and runs: each field of each JSON, each column of each table, each tensor, each file.

``attack`` draws one with hypothesis and does it to a folder; it says what it did. ``withstands`` runs a command
on what was attacked, and asserts what has to hold whatever the folder holds.
"""

import contextlib
import io
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from hypothesis import strategies as st
from matplotlib.figure import Figure

from tests.helpers.settings import SOAK

LONG = "x" * 100_000
HOSTILE: tuple[Any, ...] = (
    None, True, -1, 0, 1.5, 100_000, 2**31, 2**62, 2**63 - 1, 2**64, 1e308, float("nan"), float("inf"), "", LONG,
    "../../victim", "/etc/passwd", "..", "a\0b", "\x1b[31m", "<script>alert(1)</script>", [], [None] * 3, {},
    {"a": 1}, [[[]]],
)  # fmt: skip
"""What stands where something else should."""

FILES = (
    "missing",
    "empty",
    "cut",
    "garbage",
    "grown",
    "folder",
    "fifo",
    "dangling link",
    "loop",
    "link out",
    "link to a new file",
)
HANG_SECONDS, MOST_MEMORY = 30.0, 2 << 30
"""What one command may take at most, and how much memory beyond what the process had."""

TENSORS = (
    *("removed", "nan", "shape", "huge", "meta", "type", "sparse", "complex", "value"),
    *("double", "float8", "quantized", "itself"),
)
COLUMNS = ("missing", "null", "type", "negative", "zero", "huge", "max", "nan", "long", "separators", "markup", "fewer")


def _paths(value: Any, above: tuple[Any, ...] = (), seen: frozenset[int] = frozenset()) -> list[tuple[Any, ...]]:
    """The way to every field of a JSON value, but to those in a list or dict that is twice in one that holds it."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found, here = [above], set(seen)
    for key, one in inside:
        if id(one) not in here or not isinstance(one, dict | list):
            here.add(id(one))
            found += _paths(one, (*above, key), frozenset(here))
    return found


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
        path.write_bytes(data[: draw.draw(st.integers(0, max(0, len(data) - 1)), label="cut")])
    elif kind == "grown":
        path.write_bytes(data + bytes(1000))
    elif kind == "garbage":
        place = draw.draw(st.integers(0, max(0, len(data) - 1)), label="place")
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
    elif kind.startswith("link"):
        around = next((folder for folder in path.parents if (folder / "victim").exists()), path.parent)
        path.symlink_to(around / ("victim" if kind == "link out" else "unmade"))
    return f"{path.name} {kind}"


def attack_lines(path: Path, draw: st.DataObject) -> str:
    """One field of one line of a file of JSON lines is missing or another value, or a line is none."""
    lines = path.read_bytes().split(b"\n")
    place = draw.draw(st.integers(0, max(0, len(lines) - 2)), label="line")
    alone = path.with_name("line.json")
    alone.write_bytes(lines[place])
    done = attack_json(alone, draw)
    lines[place] = alone.read_bytes()
    alone.unlink()
    path.write_bytes(b"\n".join(lines))
    return f"{path.name} line {place} {done}"


def _doubled() -> list[Any]:
    """A list of two lists, each of which holds one list twice, and so on: few bytes in a file, endless as text."""
    found: list[Any] = []
    for _ in range(40):
        found = [found, found]
    return found


def attack_tensors(path: Path, draw: st.DataObject) -> str:
    """One value in what torch.save wrote is missing or another one."""
    import torch

    content = torch.load(path, weights_only=True)
    field = draw.draw(st.sampled_from(_paths(content)), label="field")
    old: Any = content
    for step in field:
        old = old[step]
    kind = draw.draw(st.sampled_from(TENSORS), label="kind")
    shape = old.shape if isinstance(old, torch.Tensor) else (2,)
    new = {
        "nan": lambda: torch.full(shape, float("nan")),
        "shape": lambda: torch.zeros(3, 1, 2),
        # A few bytes that claim to be a terabyte.
        "huge": lambda: torch.zeros(1).expand(1 << 19, 1 << 19),
        "meta": lambda: torch.zeros(shape, device="meta"),
        "type": lambda: torch.zeros(shape, dtype=torch.int16),
        "sparse": lambda: torch.zeros(shape).to_sparse(),
        "complex": lambda: torch.zeros(shape, dtype=torch.complex64),
        # Beyond what float32 holds.
        "double": lambda: torch.full(shape, 1e300, dtype=torch.float64),
        "float8": lambda: torch.zeros(shape, dtype=torch.float8_e4m3fn),
        "quantized": lambda: torch.quantize_per_tensor(torch.zeros(shape), 0.1, 0, torch.qint8),
        "itself": _doubled,
    }.get(kind, lambda: draw.draw(st.sampled_from(HOSTILE), label="value"))
    torch.save(_replace(content, field, new(), kind == "removed"), path)
    return f"{path.name} {field} {kind}"


def attack(folder: Path, draw: st.DataObject) -> str:
    """Do an attack to a folder, or two; says what was done."""
    done = _attack_once(folder, draw)
    if draw.draw(st.booleans(), label="another"):
        # What the first attack damaged may be nothing that the second can read.
        with contextlib.suppress(Exception):
            done += f", {_attack_once(folder, draw)}"
    return done


def _attack_once(folder: Path, draw: st.DataObject) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    ways: dict[str, tuple[Callable[[Path, st.DataObject], str], tuple[str, ...]]] = {
        "json": (attack_json, (".json",)),
        "lines": (attack_lines, (".jsonl",)),
        "table": (attack_table, (".parquet",)),
        "tensors": (attack_tensors, (".pt", ".pth")),
        "file": (attack_file, ("",)),
    }
    chosen = {way: [path for path in files if path.name.endswith(suffixes)] for way, (_, suffixes) in ways.items()}
    way = draw.draw(st.sampled_from([way for way in ways if chosen[way]]), label="way")
    return ways[way][0](draw.draw(st.sampled_from(chosen[way]), label="path"), draw)


KEYS = (
    "../x",
    "../../victim",
    "/victim",
    "//abs",
    "checkpoints/../../victim",
    "run.json/",
    "looks/..",
    ".",
    "..",
    "a\\b",
)
"""Keys that a store may list and no path may have."""

POINTERS = (
    *("", "../..", "../../victim", "/etc/passwd", "step-99999999.pt", "step-00000001.pt", "step-1.pt", "run.json"),
    *(LONG, "step-00000002.pt\n\n", "\0", "\x1b[31m", "<script>alert(1)</script>", "\udcff"),
)
"""What a store's ``checkpoints/newest`` says."""


def in_store(folder: Path, url: str, draw: st.DataObject) -> str:
    """Put the files of a folder into a store in memory (``memory://NAME/...``), with a key that leads elsewhere.

    A run gets a pointer to its newest checkpoint, which may lead elsewhere too. Says what was added.
    """
    store = MemoryFileSystem.store
    store.clear()
    root = url.removeprefix("memory:/")
    for path in folder.rglob("*"):
        if path.is_file():
            key = f"{root}/{path.relative_to(folder).as_posix()}"
            store[key] = MemoryFile(MemoryFileSystem(), key, path.read_bytes())
    added = {draw.draw(st.sampled_from(KEYS), label="key"): b"hostile"}
    if (folder / "checkpoints").is_dir():
        names = sorted(path.name for path in (folder / "checkpoints").iterdir())
        pointer = draw.draw(st.sampled_from([*names[-1:], *POINTERS]), label="newest")
        added["checkpoints/newest"] = pointer.encode(errors="surrogateescape")
    for name, content in added.items():
        key = f"{root}/{name}"
        store[key] = MemoryFile(MemoryFileSystem(), key, content)
    return f" with {sorted(added)} {str(added.get('checkpoints/newest', b''))[:40]}"


@contextlib.contextmanager
def undrawn() -> Iterator[pytest.MonkeyPatch]:
    """Figures of pages are made and not drawn, which takes most of a small run's time; `make soak` draws them."""

    def save(figure: Figure, sink: io.IOBase, **_: object) -> None:
        sink.write("<svg ></svg>" if isinstance(sink, io.StringIO) else b"")

    with pytest.MonkeyPatch.context() as patch:
        if not SOAK:
            patch.setattr(Figure, "savefig", save)
            # What draws a run's page meanwhile, in a process of its own that imports torch.
            patch.setattr("jigsaw_pretrain.train.report.page._DRAW", "")
        yield patch


class Hanging(BaseException):
    """A command took longer than HANG_SECONDS."""


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Raise Hanging after HANG_SECONDS; assert that the process did not grow by MOST_MEMORY meanwhile.

    Seconds in which it could run and had no core are not counted: a machine with much else to do hangs nothing.

    The peak is measured, and no limit set: that of the address space (RLIMIT_AS) counts what is reserved and never
    used, of which torch has several times as much as of memory, and where it is met native code aborts or waits.
    """

    begun, without = time.monotonic(), _coreless_seconds()

    def ring(*_: object) -> None:
        left = HANG_SECONDS - (time.monotonic() - begun) + (_coreless_seconds() - without)
        if left <= 0:
            raise Hanging
        signal.setitimer(signal.ITIMER_REAL, max(left, 0.1))

    before = _peak_memory()
    former = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
    assert _peak_memory() - before < MOST_MEMORY


def _coreless_seconds() -> float:
    """How long this process's first thread has waited for a core; 0 where the system does not tell."""
    path = Path("/proc/self/schedstat")
    return int(path.read_text().split()[1]) / 1e9 if path.exists() else 0.0


def _peak_memory() -> int:
    """The most bytes that this process has held since the last call; 0 where the system does not tell."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return 0
    peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    reset.write_text("5")
    return int(peak.split()[1]) << 10


def listing(folder: Path, without: Sequence[Path] = ()) -> dict[str, bytes]:
    """Every path below a folder but for some folders and what is in them: a file's bytes, and nothing of others."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if not any(path == own or own in path.parents for own in without):
            found[str(path)] = path.read_bytes() if path.is_file() else b""
    return found


def withstands(
    done: str, command: click.Command, arguments: Sequence[object], around: Path, own: Sequence[Path]
) -> Result:
    """Run a command on what was attacked: it ends in time, well or with one line, and touches its own folders alone.

    Args:
        done: what was done, for the message.
        command: of click.
        arguments: of the command.
        around: a folder in which everything lies.
        own: the folders therein that the command may write to.
    """
    before = listing(around, own)
    with bounded():
        # In colour, so that nothing is taken from what a terminal would be sent.
        result = CliRunner().invoke(command, [str(one) for one in arguments], color=True)
    what = f"{done}: {command.name} {' '.join(str(one) for one in arguments)}"
    clean = result.exception is None or isinstance(result.exception, SystemExit)
    assert clean and result.exit_code in (0, 1, 2), f"{what}: {result.exception!r}"
    errors = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert len(errors) == (result.exit_code == 2), f"{what}: {result.output[-2000:]}"
    assert "Traceback" not in result.output, f"{what}: {result.output[-2000:]}"
    assert all(one.isprintable() or one in "\n\r" for one in result.output), f"{what}: {result.output[-2000:]!r}"
    assert max(map(len, [*errors, ""])) < 2000, f"{what}: {errors[0][:200]}"
    assert listing(around, own) == before, what
    return result
