"""Reads COCO JSON: images, boxes and categories, straight into typed records.

msgspec skips polygons and everything else that is not asked for: a million boxes of a 600 MB file take about 3 s and
1 GB, and its errors carry the JSON path. Detectors ask for areas and segmentations too (``detailed``). A file with NaN,
Infinity or out-of-range numbers, which JSON does not know but exporters write, is read by the standard library instead:
five times slower, the same records.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import msgspec
import numpy as np

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.annotations.skipped import BoxReason, Note
from jigsaw_pretrain.formats.annotations.table import (
    Annotations,
    BoxColumns,
    BoxDetails,
    ImageEntry,
    Key,
    ReadTable,
    assemble,
)

Number = int | float

NO_CATEGORY = -1
"""The category of regions to ignore where no category has that id."""


class CocoImage(msgspec.Struct, gc=False):
    """An entry of ``images``; LVIS has coco_url in place of file_name."""

    id: Key
    file_name: str | None = None
    width: Number | None = None
    height: Number | None = None
    coco_url: str | None = None


class CocoAnnotation(msgspec.Struct, gc=False):
    """An entry of ``annotations``; mot_conf and extra are those of MOT and CrowdHuman, whose files were converted."""

    image_id: Key
    category_id: Number
    bbox: tuple[float, ...] | None = None
    id: Key | None = None
    iscrowd: int | bool | None = 0
    ignore: int | bool | None = 0
    mot_conf: Any = None
    extra: Any = None


class CocoObject(CocoAnnotation, gc=False):
    """An entry of ``annotations`` with what detectors need."""

    area: Number | None = None
    segmentation: Any = None


class CocoCategory(msgspec.Struct, gc=False):
    """An entry of ``categories``."""

    id: Number
    name: str


class CocoFile(msgspec.Struct, gc=False):
    """The three lists of a COCO file that prep reads."""

    images: list[CocoImage]
    annotations: list[CocoAnnotation]
    categories: list[CocoCategory]


class CocoDetails(msgspec.Struct):
    """A COCO file with what detectors need."""

    images: list[CocoImage]
    annotations: list[CocoObject]
    categories: list[CocoCategory]


Form = TypeVar("Form", CocoFile, CocoDetails)


def read_coco(raw: bytes, source: str, detailed: bool = False) -> ReadTable:
    """Classes, image entries and boxes of a COCO file; raises UserError naming ``source``.

    Labels 0..C-1 go to the categories in ascending id, used or not.
    """
    coco: CocoFile | CocoDetails = decode(raw, source, CocoDetails) if detailed else decode(raw, source)
    if any(map(_has_no_box, coco.annotations)):
        details = coco if isinstance(coco, CocoDetails) else decode(raw, source, CocoDetails)
        for one in details.annotations:
            if one.segmentation and _has_no_box(one):
                one.bbox = bounds(one.segmentation)
        coco = details
    label_of, classes = labels(coco.categories, source)
    entry_of = entry_index(coco.images, source)
    entries = [ImageEntry(file_name_of(image), image.width, image.height, id=image.id) for image in coco.images]
    boxes = columns(coco.annotations, entry_of, label_of)
    notes = [*_other_types(coco.annotations, entry_of), *_ignored_regions(coco.annotations, label_of)]
    return ReadTable(classes, entries, boxes if detailed else replace(boxes, details=None), list(label_of), notes)


def _has_no_box(one: CocoAnnotation) -> bool:
    """Whether an annotation lacks its box, or has zeros in its place."""
    return not one.bbox or not any(one.bbox)


def bounds(segmentation: Any) -> tuple[float, ...] | None:
    """The box of polygons or of an RLE; None where they are none."""
    try:
        if isinstance(segmentation, dict):
            return _bounds_of_runs(rle_runs(segmentation["counts"]), int(segmentation["size"][0]))
        points = np.array([value for polygon in segmentation for value in polygon], dtype=np.float64).reshape(-1, 2)
        low, high = points.min(axis=0), points.max(axis=0)
        return (*low.tolist(), *(high - low).tolist())
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError):
        return None


def rle_runs(counts: Any) -> list[int]:
    """The lengths of an RLE's runs, of zeros and ones in turn; as text COCO packs them by 5 bits, as differences."""
    if isinstance(counts, list):
        return [int(count) for count in counts]
    runs: list[int] = []
    value = shift = 0
    for letter in counts.encode() if isinstance(counts, str) else counts:
        bits = letter - 48
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return runs


def _bounds_of_runs(runs: list[int], height: int) -> tuple[float, ...] | None:
    """The box of the ones of an RLE, which runs down the columns of a mask of that height."""
    ends = np.cumsum(np.array(runs, dtype=np.int64))
    first, last = ends[:-1:2], ends[1::2] - 1
    first, last = first[: len(last)][last >= first[: len(last)]], last[last >= first[: len(last)]]
    if not len(first) or height < 1:
        return None
    left, right = int(first.min()) // height, int(last.max()) // height + 1
    within = first // height == last // height
    top = int((first[within] % height).min()) if within.all() else 0
    bottom = int((last[within] % height).max()) + 1 if within.all() else height
    return float(left), float(top), float(right - left), float(bottom - top)


def _other_types(annotations: Sequence[CocoAnnotation], entry_of: dict[Key, int]) -> list[Note]:
    """Boxes whose image_id is an image's, but for its type."""
    lost = [a for a in annotations if a.image_id not in entry_of]
    written = {str(key) for key in entry_of} if lost else set()
    other = tuple(f"{a.image_id!r}" for a in lost if str(a.image_id) in written)
    if not other:
        return []
    text = "boxes name their images by text where the images have numbers, or the other way round: write both alike"
    return [Note("image_id of another type", text, other)]


def _ignored_regions(annotations: Sequence[CocoAnnotation], label_of: dict[Number, int]) -> list[Note]:
    """The note that category -1 was read as no category."""
    regions = tuple(f"annotation {a.id}" for a in annotations if a.category_id == NO_CATEGORY)
    if not regions or NO_CATEGORY in label_of:
        return []
    text = (
        "category_id -1, which is no category, marks regions to ignore (as conversions of MOT do): no background there"
    )
    return [Note("ignored regions", text, regions, grave=False)]


def _is_ignored(one: CocoAnnotation) -> bool:
    """Whether an annotation is marked as ignored, as COCO, CrowdHuman (``extra``) or MOT (``mot_conf`` 0) do."""
    if one.ignore:
        return True
    if isinstance(one.extra, dict) and one.extra.get("ignore") not in (None, 0, "0", False):
        return True
    return one.mot_conf is not None and one.mot_conf in (0, "0")


def _refuse_repeated(raw: bytes, source: str) -> None:
    """Raise UserError where a list stands there twice, of which JSON's readers take the last in silence."""
    counts = Counter(_LISTS.findall(raw))
    if max(counts.values(), default=0) < 2:
        return
    try:
        pairs = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=list)
    except (ValueError, RecursionError):
        return  # what is wrong with it the typed reader says
    found = Counter(pair[0] for pair in pairs if isinstance(pair, tuple)) if isinstance(pairs, list) else Counter[str]()
    repeated = [name for name in ("images", "annotations", "categories") if found[name] > 1]
    if repeated:
        raise UserError(
            f"{source}: {repeated[0]!r} stands there {found[repeated[0]]} times, and either could be meant. Join them."
        )


_LISTS = re.compile(rb'"(images|annotations|categories)"\s*:')


def decode(raw: bytes, source: str, form: type[Form] = CocoFile) -> Form:  # type: ignore[assignment]
    """The typed records; falls back to the standard library for numbers that JSON does not have."""
    shape = (
        "COCO JSON is an object with the lists images, annotations and categories, numbers not in quotes, boxes as "
        "[x, y, width, height]"
    )
    _refuse_repeated(raw, source)
    try:
        return msgspec.json.decode(raw, type=form)
    except RecursionError as error:
        raise UserError(f"{source}: nested too deeply to be an annotation file. {shape}.") from error
    except (msgspec.DecodeError, UnicodeDecodeError):
        # Only the second reader can tell a wrong file from one with NaN tokens, a byte order mark or 1e999.
        pass
    try:
        polygons = None if form is CocoDetails else _without_polygons
        loose = json.loads(raw.decode("utf-8-sig"), object_hook=polygons)
        return msgspec.convert(loose, form)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{source} is not whole JSON: line {error.lineno} column {error.colno}: {error.msg}. "
            "Export or copy it again."
        ) from error
    except msgspec.ValidationError as error:
        if isinstance(loose, dict) and "categories" in loose and "annotations" not in loose:
            shape += (
                "; one that lists categories alone, as Label Studio's notes.json, stands beside labels: name its folder"
            )
        raise UserError(f"{source} is not a COCO annotation file: {error}. {shape}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{source} is not UTF-8 text ({error.reason} at byte {error.start}). {shape}.") from error
    except (RecursionError, ValueError) as error:
        raise UserError(f"{source} cannot be read as JSON ({error}). {shape}.") from error


def _without_polygons(record: dict[str, Any]) -> dict[str, Any]:
    record.pop("segmentation", None)
    return record


def labels(categories: list[CocoCategory], source: str) -> tuple[dict[Number, int], list[str]]:
    """Label of each category id, and the names by label."""
    name_of: dict[Number, str] = {}
    for category in categories:
        if name_of.setdefault(category.id, category.name) != category.name:
            raise UserError(
                f"{source}: category id {category.id} is given to {name_of[category.id]!r} and {category.name!r}. "
                "Give each category an id of its own."
            )
    if any(number != number for number in name_of):
        raise UserError(f"{source}: a category's id is NaN. Give each category a whole number as id.")
    ordered = sorted(name_of)
    return {number: label for label, number in enumerate(ordered)}, [name_of[number] for number in ordered]


def entry_index(images: list[CocoImage], source: str) -> dict[Key, int]:
    """Position of each image id; raises UserError where one id is two files', as its boxes could be either's."""
    index: dict[Key, int] = {}
    for position, image in enumerate(images):
        first = index.setdefault(image.id, position)
        if first != position and file_name_of(images[first]) != file_name_of(image):
            raise UserError(
                f"{source}: image id {image.id!r} is given to {file_name_of(images[first])!r} and "
                f"{file_name_of(image)!r}. Give each image an id of its own."
            )
    return index


def file_name_of(image: CocoImage) -> str:
    """The image's file name, as ``listed_name`` tells it."""
    return listed_name(image.file_name, image.coco_url)


def listed_name(file_name: str | None, coco_url: str | None) -> str:
    """The file name of an image entry; for LVIS the last folder and name of its URL, as COCO's archives unpack."""
    if file_name is None and coco_url:
        return "/".join(coco_url.split("/")[-2:])
    return file_name or ""


def columns(annotations: Sequence[CocoAnnotation], entry_of: dict[Key, int], label_of: dict[Number, int]) -> BoxColumns:
    """The annotations as columns, in the file's order."""
    count = len(annotations)
    nowhere = (np.nan,) * 4
    boxes = [a.bbox if a.bbox is not None and len(a.bbox) == 4 else nowhere for a in annotations]
    xywh = np.array(boxes, dtype=np.float64).reshape(count, 4)
    label = np.fromiter((label_of.get(a.category_id, -1) for a in annotations), np.int64, count)
    has_id = np.fromiter((isinstance(a.id, int) for a in annotations), np.bool_, count)
    huge = np.fromiter((isinstance(a.id, int) and not -(2**63) <= a.id < 2**63 for a in annotations), np.bool_, count)
    has_id &= ~huge
    numbers = (a.id if known else 0 for a, known in zip(annotations, has_id, strict=True))
    crowd = np.fromiter((bool(a.iscrowd) for a in annotations), np.bool_, count)
    reason = np.zeros(count, dtype=np.uint8)
    reason[label < 0] = BoxReason.UNKNOWN_CATEGORY
    if NO_CATEGORY not in label_of:
        regions = np.fromiter((a.category_id == NO_CATEGORY for a in annotations), np.bool_, count)
        reason[regions] = BoxReason.USABLE
        crowd |= regions
    reason[huge] = BoxReason.HUGE_ID
    return BoxColumns(
        entry=np.fromiter((entry_of.get(a.image_id, -1) for a in annotations), np.int64, count),
        xywh=xywh,
        label=label,
        annotation_id=np.fromiter(numbers, np.int64, count),
        has_id=has_id,
        crowd=crowd,
        ignored=np.fromiter(map(_is_ignored, annotations), np.bool_, count),
        reason=reason,
        details=_details(annotations),
    )


def _details(annotations: Sequence[CocoAnnotation]) -> BoxDetails | None:
    objects = [a for a in annotations if isinstance(a, CocoObject)]
    if len(objects) < len(annotations):
        return None
    areas = np.array([np.nan if a.area is None else a.area for a in objects], dtype=np.float64)
    return BoxDetails(areas, [a.segmentation or None for a in objects])


def parse(raw: bytes, source: str, sha256: str) -> Annotations:
    """Annotations from a COCO file's bytes; ``source`` names the file in messages. Raises UserError."""
    return assemble(read_coco(raw, source), sha256)
