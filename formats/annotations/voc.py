"""Reads Pascal VOC: a folder of XML files, one per image.

About 0.1 ms per file. Classes are the names in use, sorted, or the lines of ``classes.txt`` beside the files. An
object's parts are no objects; truncated objects are objects, difficult ones are marked as ignored. Files that declare
entities are refused, so that none can grow beyond its size.

Which image. ``<filename>`` says so, and often is out of date, as pictures are renamed or flipped and the tag stays.
Where a picture of the XML file's own stem is there and the tag names another one, the stem wins. Two files for one
picture are refused: the boxes of one of them belong to another picture.

Where pixels begin. Pascal VOC counts them from 1, both ends of a box included; labelImg and most own writers from 0.
All files together decide: they are counted from 0 where a 0 occurs, which VOC cannot hold, or a fraction, or where
labelImg's ``<path>`` stands in them and no VOC database is named; else from 1. ``origin`` says it where that is wrong.
Either way xmax and ymax are the right and bottom edge.
"""

from codecs import BOM_UTF8
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from xml.etree import ElementTree

from jigsaw_pretrain.config import as_number
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.annotations.folders import is_hidden
from jigsaw_pretrain.formats.annotations.skipped import Note
from jigsaw_pretrain.formats.annotations.table import NOWHERE, BoxList, ImageEntry, ReadTable, clean_name

CLASSES_FILE = "classes.txt"

_TAGS = frozenset(("annotation", "filename", "size", "object", "name", "difficult", "bndbox", "xmin", "xmax"))

Corners = tuple[float, float, float, float]


@dataclass(frozen=True)
class _Object:
    name: str
    corners: Corners | None
    difficult: bool


@dataclass(frozen=True)
class _File:
    """One XML file: its path, its image and objects, and who wrote it (``voc``, ``labelimg`` or nobody known).

    capitals: whether tags of Pascal VOC are written with capitals.
    """

    path: str
    entry: ImageEntry
    objects: list[_Object]
    writer: str
    capitals: bool


def read_voc(
    files: Mapping[str, bytes],
    source: str,
    images: Callable[[], Sequence[str]] | None = None,
    origin: int | None = None,
    detailed: bool = False,
    left_out: Set[str] = frozenset(),
) -> ReadTable:
    """Class names, image entries and boxes of XML files by their paths below ``source``; raises UserError.

    images: lists the files below the image folder, where they can be listed. origin: from which number pixels are
    counted, where the user says it. left_out: files that are not used; their classes are classes of the dataset, so
    that labels are the same in every split.
    """
    read = [_read(path, files[path], f"{source}/{path}") for path in sorted(files) if path.lower().endswith(".xml")]
    notes: list[Note] = []
    if capitals := tuple(one.path for one in read if one.capitals):
        text = "tags with capitals (<Object>) are read as Pascal VOC's own, which are small letters"
        notes.append(Note("VOC tags", text, capitals))
    if images is not None:
        read = _matched(read, images(), source, notes)
    _refuse_twins(read, source)
    classes = _classes(files, [one.objects for one in read], source)
    label_of = {name: label for label, name in enumerate(classes)}
    start, note = _origin(read, origin)
    if note is not None:
        notes.append(note)
    read = [one for one in read if one.path not in left_out]
    boxes = BoxList()
    for index, one in enumerate(read):
        for thing in one.objects:
            boxes.add(index, _xywh(thing.corners, start), label_of.get(thing.name, -1), thing.difficult)
    return ReadTable(classes, [one.entry for one in read], boxes.columns(detailed), notes=notes)


def _matched(read: Sequence[_File], images: Sequence[str], source: str, notes: list[Note]) -> list[_File]:
    """The files with the pictures that they belong to, of those that are there."""
    by_stem: dict[str, list[str]] = {}
    for file in images:
        if not is_hidden(file) and not file.lower().endswith((".xml", ".txt")):
            by_stem.setdefault(str(PurePosixPath(file).with_suffix("")), []).append(file)
    there = {file for found in by_stem.values() for file in found}
    matched, stale = [], []
    for one in read:
        named = one.entry.file_name.replace("\\", "/")
        own = str(PurePosixPath(one.path).with_suffix(""))
        stem = str(PurePosixPath(named).with_suffix("")) if named else ""
        found = by_stem.get(own, []) if own != stem or named not in there else []
        if not found and named not in there:
            # The XML files of a dataset may lie below a folder of their own, which the pictures do not share.
            found = by_stem.get(own.partition("/")[2], [])
        # A picture beats an array of the same name, which is its copy.
        found = [file for file in found if not file.lower().endswith(".npy")] or found
        if len(found) > 1:
            raise UserError(
                f"{source}/{one.path} could belong to {' or '.join(found)}, and its <filename> is "
                f"{named or 'empty'!r}. Remove or rename one of the pictures."
            )
        if found:
            if named and PurePosixPath(named).name != PurePosixPath(found[0]).name:
                stale.append(f"{one.path} (says {PurePosixPath(named).name})")
            one = replace(one, entry=replace(one.entry, file_name=found[0]))
        matched.append(one)
    if stale:
        text = "the <filename> names another picture than the file's own name, whose picture is there and is taken"
        notes.append(Note("stale file names", text, tuple(stale)))
    return matched


def _refuse_twins(read: Sequence[_File], source: str) -> None:
    first: dict[str, str] = {}
    for one in read:
        name = clean_name(one.entry.file_name)[0]
        if one.entry.file_name and first.setdefault(name, one.path) != one.path:
            raise UserError(
                f"{source}/{first[name]} and {source}/{one.path} both belong to the picture {name}. Remove one of "
                "them, or correct its <filename>."
            )


def _origin(read: Sequence[_File], said: int | None) -> tuple[int, Note | None]:
    """From which number pixels are counted, and what to tell of that."""
    known = [thing.corners for one in read for thing in one.objects if thing.corners is not None]
    if said is not None or not known:
        return 1 if said is None else said, None
    if any(corners[0] <= 0 or corners[1] <= 0 for corners in known):
        start, why = 0, "a box begins at 0"
    elif any(one.writer == "voc" for one in read):
        start, why = 1, "the files are of a VOC database"
    elif any(value != int(value) for corners in known for value in corners if abs(value) < 2**53):
        start, why = 0, "some coordinates are fractions"
    elif all(one.writer == "labelimg" for one in read if one.objects):
        start, why = 0, "labelImg wrote the files"
    else:
        start, why = 1, "no box begins at 0"
    text = f"pixels are taken as counted from {start}, as {why}; --voc-origin {1 - start} says otherwise"
    return start, Note("VOC origin", text, grave=False)


def _read(path: str, raw: bytes, where: str) -> _File:
    """The image of one file and its objects."""
    plain = raw.replace(b"\0", b"")
    if b"<!DOCTYPE" in plain or b"<!ENTITY" in plain:
        raise UserError(f"{where} declares a document type or entities, which VOC files do not. Remove the file.")
    try:
        root = ElementTree.fromstring(raw)
    except (ElementTree.ParseError, ValueError, LookupError, RecursionError) as error:
        raise UserError(f"{where} is not whole XML ({error}). Export it again, or remove it.") from error
    capitals = False
    for element in root.iter():
        # Of a namespace the name alone counts.
        tag = element.tag.rpartition("}")[2]
        element.tag = tag.lower()
        capitals |= tag != element.tag and element.tag in _TAGS
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
            _is_difficult(thing.findtext("difficult") or "", where),
        )
        for thing in root.iter("object")
    ]
    database = (root.findtext("source/database") or "").upper()
    writer = "voc" if "VOC" in database else "labelimg" if root.find("path") is not None else ""
    return _File(path, ImageEntry(name, width, height), objects, writer, capitals)


def _is_difficult(text: str, where: str) -> bool:
    """Whether an object is marked as difficult; raises UserError for a mark of no known meaning."""
    word = text.strip().lower()
    if word in ("1", "1.0", "true", "yes"):
        return True
    if word in ("", "0", "0.0", "false", "no", "unspecified"):
        return False
    raise UserError(f"{where}: <difficult> is {text.strip()[:40]!r}, and 0 or 1 is needed. Correct it.")


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
        return as_number(text) if text is not None else None
    except ValueError:
        return None


def _xywh(corners: Corners | None, origin: int) -> Corners:
    if corners is None:
        return NOWHERE
    left, top, right, bottom = corners
    left, top = left - origin, top - origin
    return left, top, right - left, bottom - top


def _classes(files: Mapping[str, bytes], objects: list[list[_Object]], source: str) -> list[str]:
    if CLASSES_FILE not in files:
        return sorted({thing.name for found in objects for thing in found if thing.name})
    try:
        lines = files[CLASSES_FILE].removeprefix(BOM_UTF8).splitlines()
        names = [name for line in lines if (name := line.decode("utf-8").strip())]
    except UnicodeDecodeError as error:
        raise UserError(f"{source}/{CLASSES_FILE} is not UTF-8 text. Write one class name per line.") from error
    if len(set(names)) < len(names):
        raise UserError(f"{source}/{CLASSES_FILE} names a class twice. Write each class name once.")
    return names
