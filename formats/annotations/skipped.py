"""Why an image or annotation was not used: the reasons, and the rows of skipped.parquet.

Reasons are short and fixed, so that a table can count them; what is particular to one case follows a colon.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import pyarrow as pa

from jigsaw_pretrain.formats.dataset import schema


class BoxReason(IntEnum):
    """Why a box is no positive, as codes of a column; 0 is a usable box."""

    USABLE = 0
    CROWD = 1
    NOT_FINITE = 2
    DEGENERATE = 3
    OUTSIDE = 4
    UNKNOWN_CATEGORY = 5
    HUGE_ID = 6
    CONFLICT = 7
    TOO_LONG = 8
    IGNORED = 9
    REPEATED = 10

    @property
    def text(self) -> str:
        """The reason as skipped.parquet states it."""
        return _BOX_TEXTS[self]


_BOX_TEXTS = {
    BoxReason.USABLE: "usable",
    BoxReason.CROWD: "crowd region",
    BoxReason.NOT_FINITE: "box is not four finite numbers",
    BoxReason.DEGENERATE: "box has no area",
    BoxReason.OUTSIDE: "box lies outside the image",
    BoxReason.UNKNOWN_CATEGORY: "category is not in the annotation file",
    BoxReason.HUGE_ID: "annotation id is beyond 64 bits",
    BoxReason.CONFLICT: "image is listed twice with different sizes",
    BoxReason.IGNORED: "marked as ignored or difficult",
    BoxReason.REPEATED: "same box and class as another of its image",
    BoxReason.TOO_LONG: "crop is longer than a JPEG can be (65,500 pixels)",
}

OF_UNUSABLE_IMAGE = "image of the box cannot be used"
UNKNOWN_IMAGE = "image is not in the annotation file"
UNSAFE_NAME = "file name leaves the image folder"
UNREADABLE_NAME = "file name is empty or holds control characters"
NO_SIZE = "image has no usable width and height in the annotation file"
ENORMOUS = "image has too many pixels"


@dataclass(frozen=True)
class Skipped:
    """A thing that was not used: an image (no annotation_id, no ordinal) or one annotation of it.

    stage: ``plan`` (found in the annotations) or ``cut`` (found in the image file).
    """

    image_id: str | None
    image_file: str | None
    annotation_id: int | None
    ordinal: int | None
    stage: str
    reason: str

    @property
    def is_image(self) -> bool:
        """Whether it is an image, and not an annotation."""
        return self.image_id is not None and self.ordinal is None and self.annotation_id is None


EXAMPLES = 3
"""How many of the things that a note is about are named, unless all are asked for."""


SEVERAL_SPLITS = "splits"
"""The check of the note that images of several splits are used together; its things are ``name (images)``."""


@dataclass(frozen=True)
class Note:
    """Something about a dataset that its user should know, other than a row of skipped.parquet.

    check: a few words that name it. text: what it means and what to do. things: files or boxes that it is about, all of
    them. grave: it costs data or is likely a mistake.
    """

    check: str
    text: str
    things: Sequence[str] = ()
    grave: bool = True

    def line(self) -> str:
        """The note as one line."""
        some = ", ".join(self.things[:EXAMPLES])
        count = f"{len(self.things):,} " if len(self.things) > 1 else ""
        rest = "; `jigsaw-prep doctor --all` lists all of them" if len(self.things) > EXAMPLES else ""
        return f"{count}{self.check}: {self.text}" + (f" (such as {some}{rest})" if some else "")


def skipped_table(rows: Iterable[Skipped]) -> pa.Table:
    """The rows as a table of schema.SKIPPED, in the order given."""
    listed = list(rows)
    return pa.table(
        {field.name: [getattr(row, field.name) for row in listed] for field in schema.SKIPPED},
        schema=schema.SKIPPED,
    )


def count_reasons(reasons: Iterable[str]) -> Counter[str]:
    """How often each reason occurs, what follows a colon left out."""
    return Counter(reason.split(":")[0] for reason in reasons)


def most_common(reasons: Counter[str]) -> str:
    """The reasons with their counts, the most common first, for a message."""
    return ", ".join(f"{reason} ({count:,})" for reason, count in reasons.most_common(3)) or "none is listed"
