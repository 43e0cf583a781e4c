"""Reads Pascal VOC: a folder of XML files, one per image.

About 0.1 ms per file. Classes are the names in use, sorted, or the lines of ``classes.txt`` beside the files. Boxes are
xmin, ymin, xmax, ymax: counted from 1 with both ends included, as VOC's own are, unless a 0 occurs among all files'
xmin and ymin, which no such file can hold: then they are edges counted from 0, as many exporters write them. An
object's parts are no objects. Files that declare entities are refused, so that none can grow beyond its size.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from xml.etree import ElementTree

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.annotations.table import NOWHERE, BoxList, ImageEntry, ReadTable

CLASSES_FILE = "classes.txt"

Corners = tuple[float, float, float, float]


@dataclass(frozen=True)
class _Object:
    name: str
    corners: Corners | None
    difficult: bool


def read_voc(files: Mapping[str, bytes], source: str, detailed: bool = False) -> ReadTable:
    """Class names, image entries and boxes of XML files by their paths below ``source``; raises UserError."""
    entries: list[ImageEntry] = []
    objects: list[list[_Object]] = []
    for path in sorted(files):
        if path.endswith(".xml"):
            entry, found = _read(path, files[path], f"{source}/{path}")
            entries.append(entry)
            objects.append(found)
    classes = _classes(files, objects, source)
    label_of = {name: label for label, name in enumerate(classes)}
    known = [thing.corners for found in objects for thing in found if thing.corners is not None]
    from_zero = any(corners[0] == 0 or corners[1] == 0 for corners in known)
    boxes = BoxList()
    for index, found in enumerate(objects):
        for thing in found:
            boxes.add(index, _xywh(thing.corners, from_zero), label_of.get(thing.name, -1), thing.difficult)
    return ReadTable(classes, entries, boxes.columns(detailed))


def _read(path: str, raw: bytes, where: str) -> tuple[ImageEntry, list[_Object]]:
    """The image of one file and its objects."""
    plain = raw.replace(b"\0", b"")
    if b"<!DOCTYPE" in plain or b"<!ENTITY" in plain:
        raise UserError(f"{where} declares a document type or entities, which VOC files do not. Remove the file.")
    try:
        root = ElementTree.fromstring(raw)
    except (ElementTree.ParseError, ValueError, LookupError, RecursionError) as error:
        raise UserError(f"{where} is not whole XML ({error}). Export it again, or remove it.") from error
    if root.tag != "annotation":
        raise UserError(
            f"{where} is no Pascal VOC file: it begins with <{root.tag[:40]}>, not <annotation>. Remove it."
        )
    name = (root.findtext("filename") or "").strip()
    if "/" not in name.replace("\\", "/"):
        name = str(PurePosixPath(path).parent / name) if name else ""
    size = [_number(root.findtext(f"size/{side}")) for side in ("width", "height")]
    # VOC files written without opening the image say 0.
    width, height = (value if value else None for value in size)
    objects = [
        _Object(
            (thing.findtext("name") or "").strip(),
            _corners(thing.find("bndbox")),
            (thing.findtext("difficult") or "").strip().lower() in ("1", "true", "yes"),
        )
        for thing in root.iter("object")
    ]
    return ImageEntry(name, width, height), objects


def _corners(box: ElementTree.Element | None) -> Corners | None:
    if box is None:
        return None
    values = [_number(box.findtext(side)) for side in ("xmin", "ymin", "xmax", "ymax")]
    if any(value is None for value in values):
        return None
    left, top, right, bottom = (value for value in values if value is not None)
    return left, top, right, bottom


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text is not None else None
    except ValueError:
        return None


def _xywh(corners: Corners | None, from_zero: bool) -> Corners:
    if corners is None:
        return NOWHERE
    left, top, right, bottom = corners
    if not from_zero:
        left, top = left - 1, top - 1
    return left, top, right - left, bottom - top


def _classes(files: Mapping[str, bytes], objects: list[list[_Object]], source: str) -> list[str]:
    if CLASSES_FILE not in files:
        return sorted({thing.name for found in objects for thing in found if thing.name})
    try:
        names = [line.strip() for line in files[CLASSES_FILE].decode("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"{source}/{CLASSES_FILE} is not UTF-8 text. Write one class name per line.") from error
    if len(set(names)) < len(names):
        raise UserError(f"{source}/{CLASSES_FILE} names a class twice. Write each class name once.")
    return names
