"""Annotations as columns: the table that every reader fills and the plan is made from.

A reader (coco.py, voc.py, yolo.py and others) turns files into image entries and box columns; ``assemble`` does what
all kinds of annotations need: file names are checked and brought to one form, entries that name one file become one
image, every image gets its identity and every box its ordinal. About a second for a million boxes. Readers of formats
that hold boxes in many small files gather them one by one in a BoxList.

Identity. An image's identity is its relative path without suffix. Where two files of a dataset differ in their suffix
only (``a/x.jpg`` and ``a/x.png``), the identity of each of them is its whole path, so that both are used and their
crops' keys differ. One file that is named by several entries of the same size is one image: its boxes are those of all
entries, in the order of the file. An entry that repeats a file with another size loses its boxes to skipped.parquet.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from jigsaw_pretrain.formats.annotations import skipped
from jigsaw_pretrain.formats.annotations.skipped import (
    ENORMOUS,
    NO_SIZE,
    OF_UNUSABLE_IMAGE,
    UNKNOWN_IMAGE,
    BoxReason,
    Note,
    Skipped,
)
from jigsaw_pretrain.formats.dataset import layout
from jigsaw_pretrain.formats.pixels import MAX_PIXELS

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Key = int | float | str
"""An id as a file gives it."""

NOWHERE = (float("nan"),) * 4
"""Stands in place of a box that cannot be used."""


@dataclass(frozen=True)
class ImageEntry:
    """An image as an annotation file lists it: the name as written, width and height in pixels where given.

    trouble: why the image cannot be used, where the reader knows. id: the file's own, where it has one.
    """

    file_name: str
    width: float | None
    height: float | None
    trouble: str | None = None
    id: Key | None = None


@dataclass(frozen=True)
class BoxDetails:
    """What detectors need of n boxes and prep does not.

    areas: float64 [n] in square pixels, NaN where the file has none. segmentations: polygons or an RLE of each, as COCO
    writes them, None where there is none.
    """

    areas: Floats
    segmentations: Sequence[Any]


@dataclass(frozen=True)
class BoxColumns:
    """All boxes of a file in its order, n of them.

    entry: int64 [n], index into the image entries, -1 where the image is unknown. xywh: float64 [n, 4] in pixels, not
    finite where it is no box. label: int64 [n], -1 where the category is unknown. annotation_id: int64 [n], 0 where
    has_id (bool [n]) is False. crowd: bool [n]. ignored: bool [n], marked by the file as no object to learn or to count
    (COCO's ``ignore``, VOC's ``difficult``). reason: uint8 [n], BoxReason codes that the reader found. details: where
    they were asked for.
    """

    entry: Ints
    xywh: Floats
    label: Ints
    annotation_id: Ints
    has_id: npt.NDArray[np.bool_]
    crowd: npt.NDArray[np.bool_]
    ignored: npt.NDArray[np.bool_]
    reason: npt.NDArray[np.uint8]
    details: BoxDetails | None = None


class BoxList:
    """Collects boxes in order and turns them into columns; such boxes have no annotation ids."""

    def __init__(self) -> None:
        self._entry: list[int] = []
        self._xywh: list[tuple[float, float, float, float]] = []
        self._label: list[int] = []
        self._ignored: list[bool] = []
        self._crowd: list[bool] = []
        self._polygons: list[list[float] | None] = []

    def add(
        self,
        entry: int,
        xywh: tuple[float, float, float, float],
        label: int,
        ignored: bool = False,
        polygon: list[float] | None = None,
        crowd: bool = False,
    ) -> None:
        """Add a box of an image entry; label -1: of an unknown category. polygon: x and y in turn, in pixels."""
        self._crowd.append(crowd)
        self._entry.append(entry)
        self._xywh.append(xywh)
        self._label.append(label)
        self._ignored.append(ignored)
        self._polygons.append(polygon)

    def columns(self, detailed: bool = False) -> BoxColumns:
        """All boxes."""
        count = len(self._entry)
        label = np.array(self._label, dtype=np.int64)
        return BoxColumns(
            entry=np.array(self._entry, dtype=np.int64),
            xywh=np.array(self._xywh, dtype=np.float64).reshape(count, 4),
            label=label,
            annotation_id=np.zeros(count, dtype=np.int64),
            has_id=np.zeros(count, dtype=bool),
            crowd=np.array(self._crowd, dtype=bool),
            ignored=np.array(self._ignored, dtype=bool),
            reason=np.where(label < 0, BoxReason.UNKNOWN_CATEGORY, BoxReason.USABLE).astype(np.uint8),
            details=self._details() if detailed else None,
        )

    def _details(self) -> BoxDetails:
        return BoxDetails(np.full(len(self._entry), np.nan), [one and [one] for one in self._polygons])


@dataclass(frozen=True)
class ReadTable:
    """What a reader found: class names in label order, image entries and boxes.

    category_ids: the classes' own numbers, where the file has some. notes: what the user should know of the reading.
    """

    classes: Sequence[str]
    entries: Sequence[ImageEntry]
    boxes: BoxColumns
    category_ids: Sequence[int | float] = ()
    notes: Sequence[Note] = ()


@dataclass(frozen=True)
class Annotations:
    """A detection dataset's annotations, m images and n boxes, as the plan takes them.

    classes: names in label order. ids, files: identity and relative path of each image, files unique. widths, heights:
    int64 [m]. image: int64 [n], index of each box's image. ordinal: int64 [n], the box's place among all boxes of its
    image. The other columns are BoxColumns' own. skipped: what could not be used at all. sha256: of the file as read.
    image_ids: the file's own id of each image, its identity where the file has none; other_ids: of entries that repeat
    an image, the image's. category_ids: of the classes, their labels where the file has none. notes: what was not
    looked at, and what looks like a mistake.
    """

    classes: tuple[str, ...]
    ids: tuple[str, ...]
    files: tuple[str, ...]
    widths: Ints
    heights: Ints
    image: Ints
    ordinal: Ints
    xywh: Floats
    label: Ints
    annotation_id: Ints
    has_id: npt.NDArray[np.bool_]
    crowd: npt.NDArray[np.bool_]
    ignored: npt.NDArray[np.bool_]
    reason: npt.NDArray[np.uint8]
    skipped: tuple[Skipped, ...]
    sha256: str
    image_ids: tuple[Key, ...] = ()
    other_ids: Mapping[Key, Key] = field(default_factory=dict)
    category_ids: tuple[int | float, ...] = ()
    details: BoxDetails | None = None
    notes: tuple[Note, ...] = ()


def assemble(read: ReadTable, sha256: str, keep_ignored: bool = False) -> Annotations:
    """Check names, merge repeated images, give identities and ordinals (see the module).

    keep_ignored: use what the file marks as ignored as any other object.
    """
    classes, entries, boxes = read.classes, read.entries, read.boxes
    skipped: list[Skipped] = []
    index_of: dict[str, int] = {}
    files: list[str] = []
    sizes: list[tuple[int, int]] = []
    own_ids: list[Key | None] = []
    other_ids: dict[Key, Key] = {}
    image_of_entry = np.full(len(entries) + 1, -1, dtype=np.int64)
    conflicting = np.zeros(len(entries) + 1, dtype=bool)
    for position, entry in enumerate(entries):
        file, trouble = clean_name(entry.file_name)
        trouble = trouble or entry.trouble
        size = None if trouble else whole_size(entry)
        if size is None:
            trouble = trouble or NO_SIZE
        elif size[0] * size[1] > MAX_PIXELS:
            trouble = f"{ENORMOUS}: {size[0]}x{size[1]}, at most {MAX_PIXELS:,}"
        if trouble or size is None:
            skipped.append(Skipped(layout.image_id(file), file, None, None, "plan", str(trouble)))
            continue
        index = index_of.setdefault(file, len(files))
        if index == len(files):
            files.append(file)
            sizes.append(size)
            own_ids.append(entry.id)
        elif entry.id is not None:
            other_ids[entry.id] = own_ids[index]  # type: ignore[assignment]
        image_of_entry[position] = index
        conflicting[position] = size != sizes[index]

    unknown = boxes.entry < 0
    for row in np.flatnonzero(unknown):
        number = int(boxes.annotation_id[row]) if boxes.has_id[row] else None
        skipped.append(Skipped(None, None, number, None, "plan", UNKNOWN_IMAGE))
    image = image_of_entry[boxes.entry]
    keep = image >= 0
    places = ordinals(boxes.entry) if (keep | unknown).sum() < len(keep) else boxes.entry
    for row in np.flatnonzero(~keep & ~unknown):
        file = clean_name(entries[boxes.entry[row]].file_name)[0]
        number = int(boxes.annotation_id[row]) if boxes.has_id[row] else None
        skipped.append(Skipped(layout.image_id(file), file, number, int(places[row]), "plan", OF_UNUSABLE_IMAGE))
    reason = np.where(conflicting[boxes.entry] & keep & (boxes.reason == 0), BoxReason.CONFLICT, boxes.reason)
    usable = keep & (reason == BoxReason.USABLE) & ~boxes.crowd & (keep_ignored | ~boxes.ignored)
    rows = np.flatnonzero(usable)
    reason[rows[repeats(image[rows], boxes.label[rows], boxes.xywh[rows])]] = BoxReason.REPEATED
    ids = identities(files)
    widths, heights = np.array(sizes, dtype=np.int64).reshape(-1, 2).T
    return Annotations(
        # Half of a surrogate pair, which JSON can spell, is no text: no file could hold such a name.
        classes=tuple(name.encode("utf-8", "replace").decode("utf-8") for name in classes),
        ids=tuple(ids),
        files=tuple(files),
        widths=widths,
        heights=heights,
        image=image[keep],
        ordinal=ordinals(image[keep]),
        xywh=boxes.xywh[keep],
        label=boxes.label[keep],
        annotation_id=boxes.annotation_id[keep],
        has_id=boxes.has_id[keep],
        crowd=boxes.crowd[keep],
        ignored=boxes.ignored[keep] & (not keep_ignored),
        reason=reason[keep].astype(np.uint8),
        skipped=tuple(skipped),
        sha256=sha256,
        image_ids=tuple(identity if own is None else own for own, identity in zip(own_ids, ids, strict=True)),
        other_ids=other_ids,
        category_ids=tuple(read.category_ids) or tuple(range(len(classes))),
        notes=tuple(read.notes),
        details=boxes.details
        and BoxDetails(
            boxes.details.areas[keep], [boxes.details.segmentations[row] for row in np.flatnonzero(keep).tolist()]
        ),
    )


def repeats(image: Ints, label: Ints, xywh: Floats) -> npt.NDArray[np.bool_]:
    """Whether each box has the image, label and numbers of one before it: bool [n]."""
    columns = np.column_stack([image.astype(np.float64), label.astype(np.float64), xywh + 0.0])
    mixed = np.zeros(len(columns), dtype=np.uint64)
    for column in np.ascontiguousarray(columns.T):
        mixed = (mixed ^ column.view(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    order = np.argsort(mixed, kind="stable")
    same = (columns[order[1:]] == columns[order[:-1]]).all(axis=1)
    found = np.zeros(len(columns), dtype=bool)
    found[order[1:][same]] = True
    return found


def clean_name(file_name: str) -> tuple[str, str | None]:
    """A file name in one form (forward slashes, no ``.`` parts), and why it cannot be used, if so.

    A name that is absolute, a URL, or climbs out of the image folder by ``..`` is refused: nothing outside the folder
    that the user named is ever read.
    """
    slashed = file_name.replace("\\", "/")
    shown = slashed.encode("utf-8", "backslashreplace").decode("utf-8")
    if not slashed.strip() or shown != slashed or any(ord(letter) < 32 or ord(letter) == 127 for letter in slashed):
        printable = shown.encode("unicode_escape").decode("ascii")
        return printable, skipped.UNREADABLE_NAME
    path = PurePosixPath(slashed)
    if path.is_absolute() or "://" in slashed or ".." in path.parts or not path.name or slashed[1:3] == ":/":
        return slashed, skipped.UNSAFE_NAME
    return str(path), None


def whole_size(entry: ImageEntry) -> tuple[int, int] | None:
    """Width and height as positive integers; None where they are not."""
    if entry.width is None or entry.height is None:
        return None
    if not (1 <= entry.width < 2**31 and 1 <= entry.height < 2**31):
        return None
    width, height = int(entry.width), int(entry.height)
    return (width, height) if width == entry.width and height == entry.height else None


def identities(files: Sequence[str]) -> list[str]:
    """The identity of each file (unique relative paths): without suffix where that is unique, else the whole path."""
    found = [layout.image_id(file) for file in files]
    while len(set(found)) < len(found):
        sharing = defaultdict(list)
        for index, identity in enumerate(found):
            sharing[identity].append(index)
        for group in sharing.values():
            if len(group) > 1:
                for index in group:
                    found[index] = files[index]
    return found


def ordinals(image: Ints) -> Ints:
    """Each box's place among the boxes of its image, in the order given: int64 [n]."""
    order = np.argsort(image, kind="stable")
    grouped = image[order]
    starts = np.flatnonzero(np.r_[True, grouped[1:] != grouped[:-1]]) if len(grouped) else np.empty(0, np.int64)
    run = np.repeat(starts, np.diff(np.r_[starts, len(grouped)]))
    result = np.empty(len(image), dtype=np.int64)
    result[order] = np.arange(len(grouped)) - run
    return result
