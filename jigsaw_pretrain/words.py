"""Numbers as people read them: counts with their noun, AP in hundredths (tables of pages: html.number).

A module of its own, because every stage says numbers and none of them the same ones.
"""


def counted(number: int, one: str, many: str | None = None) -> str:
    """``1 class``, ``12 classes``; many: the plural where it is not ``one`` with an s."""
    return f"{number:,} {noun(number, one, many)}"


def noun(number: int, one: str, many: str | None = None) -> str:
    """The noun of a number that stands elsewhere, as on a page's tile: ``class`` of 1, ``classes`` of 12."""
    return one if number == 1 else many or one + "s"


def hundredths(value: float | None) -> str:
    """AP as papers have it, ``37.4`` for 0.374; a dash where there is none."""
    return "–" if value is None or value < 0 else f"{100 * value:.1f}"
