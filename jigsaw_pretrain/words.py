"""Numbers as people read them: measured ones to three digits, settings as given, counts with their noun, AP.

A module of its own, because every stage prints numbers, each its own.
"""

import math
from collections.abc import Mapping
from typing import Any


def counted(number: int, one: str, many: str | None = None) -> str:
    """``1 class``, ``12 classes``; many: the plural where it is not ``one`` with an s."""
    return f"{number:,} {noun(number, one, many)}"


def noun(number: int, one: str, many: str | None = None) -> str:
    """The noun of a number that stands elsewhere, as on a page's tile: ``class`` of 1, ``classes`` of 12."""
    return one if number == 1 else many or one + "s"


def hundredths(value: float | None) -> str:
    """AP as papers have it, ``37.4`` for 0.374; a dash where there is none."""
    return "–" if value is None or value < 0 else f"{100 * value:.1f}"


def number(value: Any) -> str:
    """A value as a reader wants it: thousands apart, measured ones to three digits, a dash where there is none."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return "–"
        # Whole numbers from where the three digits end, so that no digit is lost and none is invented.
        return f"{value:,.0f}" if value == 0 or abs(value) >= 99.95 else f"{value:#.3g}"
    return "–" if value is None else setting(value)


def setting(value: Any) -> str:
    """The value of an option as it was given; ``none`` where it has none, a list's or a table's one after the other."""
    if isinstance(value, list | tuple):
        return ", ".join(map(setting, value)) or "none"
    if isinstance(value, Mapping):
        return setting([f"{name} {setting(one)}" for name, one in value.items()])
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value is None else str(value)
