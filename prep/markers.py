"""What ``prep status`` sees of unfinished parts: a marker while a part is being cut, another when its task failed.

Hints only, for people: nothing is decided by them, and a finished dataset has none. Two small requests a part.
"""

import contextlib
from collections.abc import Callable
from functools import partial

import msgspec

from jigsaw_pretrain.formats.dataset import layout
from jigsaw_pretrain.storage import Storage

RUNNING, FAILED = ".running", ".failed"


class Failure(msgspec.Struct, frozen=True):
    """The contents of a failed part's marker: the kind of error and its words, without paths."""

    reason: str


def begin(out: Storage, part: int) -> None:
    """Say that a part is being cut."""
    _quietly(lambda: out.publish(_name(part, RUNNING), b"{}\n"))


def end(out: Storage, part: int) -> None:
    """Take back what was said of a part."""
    for kind in (RUNNING, FAILED):
        _quietly(partial(out.remove, _name(part, kind)))


def fail(out: Storage, part: int, error: Exception) -> None:
    """Say that a part's task failed."""
    words = getattr(error, "strerror", None) or ""
    failure = Failure(f"{type(error).__name__} {words}".strip())
    _quietly(lambda: out.publish(_name(part, FAILED), msgspec.json.encode(failure) + b"\n"))
    _quietly(lambda: out.remove(_name(part, RUNNING)))


def clear(out: Storage) -> None:
    """Remove the markers that killed tasks left."""
    for name in out.list(layout.PARTS):
        if name.endswith((RUNNING, FAILED)):
            _quietly(partial(out.remove, f"{layout.PARTS}/{name}"))


def reason(out: Storage, part: int) -> str:
    """Why a part failed."""
    try:
        return msgspec.json.decode(out.read(_name(part, FAILED)), type=Failure).reason
    except (OSError, msgspec.MsgspecError):
        return "unknown"


def _name(part: int, kind: str) -> str:
    return f"{layout.PARTS}/{part:06d}{kind}"


def _quietly(action: Callable[[], None]) -> None:
    """A marker that cannot be written or removed is no reason to fail."""
    with contextlib.suppress(OSError):
        action()
