"""Reads annotations of any kind from a path or URL: COCO JSON, Pascal VOC XML, YOLO txt, CrowdHuman odgt, MOT gt.txt.

The content decides which kind it is, never the name. The files are read and hashed once;
``listed`` then turns them into Annotations, opening images only for sizes that the annotations do not tell (YOLO never
does). Notes name what is not looked at.
"""

import hashlib
import re
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, fields, replace
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from jigsaw_pretrain.config import check_fields
from jigsaw_pretrain.errors import UserError, redacted
from jigsaw_pretrain.formats.annotations import folders
from jigsaw_pretrain.formats.annotations.coco import read_coco
from jigsaw_pretrain.formats.annotations.crowdhuman import is_crowdhuman, read_crowdhuman
from jigsaw_pretrain.formats.annotations.folders import Labels, Names
from jigsaw_pretrain.formats.annotations.mot import is_of_mot, is_truth, read_mot
from jigsaw_pretrain.formats.annotations.skipped import SEVERAL_SPLITS, Note
from jigsaw_pretrain.formats.annotations.table import Annotations, ImageEntry, ReadTable, assemble, clean_name
from jigsaw_pretrain.formats.annotations.voc import CLASSES_FILE, read_voc
from jigsaw_pretrain.formats.annotations.yolo import SUFFIXES, is_numeric, read_yolo
from jigsaw_pretrain.formats.images.decode import ImageError
from jigsaw_pretrain.formats.images.source import ImageSource
from jigsaw_pretrain.formats.pixels import missing_value
from jigsaw_pretrain.storage.store import LOCAL_THREADS, REMOTE_THREADS, Storage, map_ahead

KINDS = (
    "COCO JSON, a folder of Pascal VOC XML files, a folder of YOLO txt files with a data.yaml or classes.txt, an odgt "
    "file of CrowdHuman, or a folder of MOT's sequences"
)


@dataclass(frozen=True)
class YoloFolder:
    """Where the files of YOLO lie: the named folder, its names file, and the labels."""

    folder: Storage
    names: Names
    labels: Labels


@dataclass(frozen=True)
class RawAnnotations:
    """Annotations as bytes: kind is ``coco``, ``voc``, ``yolo``, ``crowdhuman`` or ``mot``; files by path.

    The one file of COCO or CrowdHuman has the path "".

    source: what to call them in messages. sha256: of all that was read, names and contents. yolo: of YOLO. splits: of
    VOC, the text of each list in ImageSets/Main by its name. notes: what was not looked at.
    """

    kind: str
    source: str
    files: dict[str, bytes]
    sha256: str
    yolo: YoloFolder | None = None
    splits: Callable[[], dict[str, str]] | None = None
    notes: tuple[Note, ...] = ()


Exif = Literal["ignore", "apply"]

Ignored = Literal["skip", "use"]

VocOrigin = Annotated[int, msgspec.Meta(ge=0, le=1)]


@dataclass(frozen=True)
class Reading:
    """How annotations and their images are to be understood.

    exif: ``ignore`` for boxes on pixels as stored, ``apply`` for boxes on upright pictures. ignored: ``skip`` what the
    annotations mark as ignored (COCO's and CrowdHuman's ``ignore``, VOC's ``difficult``, MOT's flag 0), which is then
    no object and no background, or ``use`` it as any other object. split: the split of a YOLO or VOC dataset to
    use, None for all of them. voc_origin: from which number VOC's pixels are counted, None to find out. detailed: keep
    areas and segmentations, which detectors need. nodata: what marks missing data in float images, as text (``-9999``,
    ``nan``), ``none`` where all are measurements; None to look for one (formats/images/nodata.py).
    """

    exif: Exif = "ignore"
    ignored: Ignored = "skip"
    split: str | None = None
    voc_origin: VocOrigin | None = None
    detailed: bool = False
    nodata: str | None = None

    def __post_init__(self) -> None:
        """Refuse words and numbers that are none of these, and a nodata that is no number."""
        check_fields(self)
        missing_value(self.nodata)

    def words(self) -> list[str]:
        """The options of a command that reads so too, as they are typed."""
        return [
            word for name, value in self.differences().items() for word in (f"--{name.replace('_', '-')}", str(value))
        ]

    def differences(self) -> dict[str, Any]:
        """What is not the default's, by name; ``detailed`` says how much is kept, not how it is understood."""
        usual = Reading()
        found = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "detailed"}
        return {name: value for name, value in found.items() if value != getattr(usual, name)}


def read_annotations(url: str, images: str) -> RawAnnotations:
    """Read ``url``; ``images``, the image root, tells which of several folders of YOLO labels is meant.

    Raises UserError.
    """
    folder, _, name = url.replace("\\", "/").rstrip("/").rpartition("/")
    parent = Storage(folder or ("/" if url.startswith("/") else "."))
    shown = redacted(url)
    try:
        if name in ("", ".", ".."):
            raise IsADirectoryError(url)
        raw = parent.read(name)
    except (IsADirectoryError, FileNotFoundError) as error:
        whole = Storage(url)
        paths, links = whole.survey()
        if not paths:
            kind = "is an empty folder" if isinstance(error, IsADirectoryError) else "no such file or folder"
            raise UserError(f"{shown}: {kind}. Name the annotations with --annotations: {KINDS}.") from error
        return _read_folder(whole, paths, links, url, images)
    except OSError as error:
        raise UserError(
            f"{shown} cannot be read ({error.strerror or error}). Check its permissions and that it is whole."
        ) from error
    begins = raw.lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    if folders.is_class_list(name) or (
        begins not in (b"{", b"[", b"", b"<") and name.lower().endswith((".yaml", ".yml"))
    ):
        paths, links = parent.survey()
        return _read_yolo(parent, paths, links, folders.find_names(parent, paths, name), images)
    if begins == b"<":
        raise UserError(f"{shown} is one XML file. Name the folder of Pascal VOC files with --annotations.")
    if name.lower().endswith(".txt"):
        raise UserError(f"{shown} is one txt file. Name the folder of the labels with --annotations: {KINDS}.")
    if name.lower().endswith(".odgt") or is_crowdhuman(raw):
        return RawAnnotations("crowdhuman", shown, {"": raw}, hashlib.sha256(raw).hexdigest())
    return RawAnnotations("coco", shown, {"": raw}, hashlib.sha256(raw).hexdigest())


def listed(raw: RawAnnotations, images: ImageSource, reading: Reading) -> Annotations:
    """The annotations of what was read, sizes that they do not tell taken from the images. Raises UserError."""
    if raw.kind == "yolo":
        read = _yolo_table(raw, images, reading)
    elif raw.kind == "voc":
        left_out, notes = _voc_split(raw, reading.split)
        listing = images.files if images.can_list else None
        read = read_voc(raw.files, raw.source, listing, reading.voc_origin, reading.detailed, left_out)
        read = replace(read, notes=(*read.notes, *notes))
    elif raw.kind == "mot":
        read = read_mot(raw.files, raw.source, reading.ignored == "use", reading.detailed)
    elif raw.kind == "crowdhuman":
        read = read_crowdhuman(raw.files[""], raw.source, reading.detailed)
    else:
        read = read_coco(raw.files[""], raw.source, reading.detailed)
    if reading.split is not None and raw.kind not in ("yolo", "voc"):
        raise UserError(
            f"{raw.source} states no splits. Leave --split out, and name the split's own file or folder with "
            "--annotations."
        )
    if reading.voc_origin is not None and raw.kind != "voc":
        raise UserError(f"{raw.source} is no Pascal VOC dataset: leave --voc-origin out.")
    entries = with_sizes(
        _as_unpacked(read.entries, images) if raw.kind == "coco" else read.entries, images, reading.exif
    )
    sized = replace(read, entries=entries, notes=(*raw.notes, *read.notes))
    found = assemble(sized, raw.sha256, reading.ignored == "use")
    _refuse_percent(found, raw.source)
    return found


PERCENT_BOXES, PERCENT_SIDE = 50, 400
"""So many boxes of images whose sides are so long do not all lie in the first 100 pixels by chance."""


def _refuse_percent(found: Annotations, source: str) -> None:
    """Raise UserError where all boxes are within 0..100 of large images, as those in percent are."""
    rows = (found.image >= 0) & np.isfinite(found.xywh).all(axis=1) & (found.xywh[:, 2:] > 0).all(axis=1)
    boxes, images = found.xywh[rows], found.image[rows]
    if len(boxes) < PERCENT_BOXES or min(found.widths[images].min(), found.heights[images].min()) < PERCENT_SIDE:
        return
    ends = (boxes[:, :2] + boxes[:, 2:]).max(axis=0)
    if boxes.min() >= 0 and (ends <= 100.5).all() and (ends > 80).all():
        raise UserError(
            f"{source}: all {len(boxes):,} boxes lie within 100 x 100 pixels of images of {PERCENT_SIDE} pixels and "
            "more: they are percentages, where pixels are expected. Multiply them by the image's size / 100."
        )


def with_sizes(entries: Sequence[ImageEntry], images: ImageSource, exif: str) -> list[ImageEntry]:
    """The entries, those without width and height measured in their files' headers."""
    wanted = [
        index
        for index, entry in enumerate(entries)
        if entry.trouble is None and (entry.width is None or entry.height is None)
    ]
    names = [clean_name(entries[index].file_name) for index in wanted]
    usable = [(index, file) for index, (file, trouble) in zip(wanted, names, strict=True) if trouble is None]
    found = images.measure([file for _, file in usable], exif) if usable else []
    completed = list(entries)
    for (index, _), size in zip(usable, found, strict=True):
        entry = entries[index]
        if isinstance(size, str):
            completed[index] = replace(entry, trouble=size)
        else:
            completed[index] = replace(entry, width=size[0], height=size[1])
    return completed


def _as_unpacked(entries: Sequence[ImageEntry], images: ImageSource) -> Sequence[ImageEntry]:
    """Objects365 lists ``images/v1/patch0/x.jpg`` and unpacks to ``patch0/x.jpg``: the names that are there."""
    parts = [_OBJECTS365.fullmatch(entry.file_name) for entry in entries]
    if not entries or not all(parts):
        return entries
    try:
        images.read(entries[0].file_name)
    except ImageError:
        return [replace(entry, file_name=part[1]) for entry, part in zip(entries, parts, strict=True) if part]
    return entries


_OBJECTS365 = re.compile(r"images/v\d+/(patch\d+/[^/]+)")


def _yolo_table(raw: RawAnnotations, images: ImageSource, reading: Reading) -> ReadTable:
    """YOLO's labels with the images that they belong to."""
    yolo = raw.yolo
    assert yolo is not None
    listing = images.survey()
    notes = folders.listing_notes(listing[1], listing[0])
    files: Sequence[str] = [file for file in listing[0] if not folders.is_hidden(file)]
    root = folders.real_root(Storage(images.url))
    labels: dict[str, tuple[str, bytes]] = {}
    for path, data in raw.files.items():
        stem = folders.image_stem(path, replace(yolo.labels, prefix=""))
        where = yolo.labels.storage.describe(f"{yolo.labels.prefix}{path}")
        if stem in labels:
            raise UserError(f"{labels[stem][0]} and {where} are two label files of one image. Remove one of them.")
        labels[stem] = where, data
    pictures = [file for file in files if PurePosixPath(file).suffix.lower() in SUFFIXES]
    if reading.split is not None:
        members = folders.split_members(yolo.names, yolo.folder, reading.split, root, pictures)
        chosen = members.files
        if not chosen:
            raise UserError(
                f"{redacted(images.url)} holds no image of the split {reading.split!r} that "
                f"{yolo.folder.describe(yolo.names.file)} states: name the folder that holds it with --images."
            )
        stems = {str(PurePosixPath(file).with_suffix("")) for file in chosen}
        others = tuple(file for file in pictures if file not in set(chosen))
        known = {str(PurePosixPath(file).with_suffix("")) for file in pictures}
        lost = tuple(where for stem, (where, data) in labels.items() if stem not in known and is_numeric(data))
        if lost:
            notes.append(Note("labels without an image", "of this split or another: not used", lost))
        if members.absent:
            text = f"the list of the split {reading.split!r} names them, and they are not below --images"
            notes.append(Note("images of the split that are not there", text, members.absent))
        labels = {stem: label for stem, label in labels.items() if stem in stems}
        files = chosen
        if others:
            notes.append(Note("images of other splits", f"not used, as --split {reading.split} asks", others, False))
    elif (note := folders.split_note(yolo.names, yolo.folder, root, pictures)) is not None:
        notes.append(note)

    def measure(some: Sequence[str]) -> list[tuple[int, int] | str]:
        return images.measure(some, reading.exif)

    read = read_yolo(yolo.names, labels, files, measure, reading.detailed)
    return replace(read, notes=(*notes, *read.notes))


def _voc_split(raw: RawAnnotations, split: str | None) -> tuple[Set[str], list[Note]]:
    """The XML files that are not of a split that ImageSets states, none where none is asked for; raises UserError."""
    lists = raw.splits() if raw.splits is not None else {}
    ids = {name: {_listed_id(line) for line in text.splitlines() if line.strip()} for name, text in lists.items()}
    stems = {path: str(PurePosixPath(path).with_suffix("")) for path in raw.files if path.lower().endswith(".xml")}
    if split is None:
        counts = {name: sum(stem in ids[name] for stem in stems.values()) for name in ids}
        used = [f"{name} ({count:,})" for name, count in counts.items() if count]
        if len(used) < 2:
            return set(), []
        text = "images of several splits are used together, held-out ones included. Give --split NAME for one"
        return set(), [Note(SEVERAL_SPLITS, text, used)]
    if split not in ids:
        raise UserError(
            f"{raw.source} states no split {split!r} (ImageSets/Main states: {', '.join(ids) or 'none'}). Name one of "
            "these with --split."
        )
    others = tuple(path for path, stem in stems.items() if stem not in ids[split])
    absent = tuple(sorted(ids[split] - set(stems.values())))
    notes = [Note("images of other splits", f"not used, as --split {split} asks", others, False)] if others else []
    if absent:
        text = f"ImageSets/Main/{split}.txt lists them, and no XML file is there"
        notes.append(Note("images without XML", text, absent))
    return set(others), notes


def _is_of_one_class(name: str, text: str) -> bool:
    """Whether a list of ImageSets is of one class (aeroplane_train), and so no split: it marks every image."""
    lines = [line.split() for line in text.splitlines() if line.strip()]
    return "_" in name and all(len(words) > 1 and words[-1] in _MARKS for words in lines)


_MARKS = ("1", "0", "-1")
"""Whether an image of a list of one class shows it; 0: hard to see."""


def _listed_id(line: str) -> str:
    """The image that a line of ImageSets names; a mark after it says whether it shows a class."""
    name = line.strip()
    front, _, mark = name.rpartition(" ")
    return front.strip() if front and mark in _MARKS else name


def _read_folder(folder: Storage, paths: Sequence[str], links: Sequence[str], url: str, images: str) -> RawAnnotations:
    shown = redacted(url)
    visible = [path for path in paths if not folders.is_hidden(path)]
    if any(map(is_truth, visible)):
        return _read_mot(folder, paths, links)
    is_voc = any(folders.has_suffix(path, ".xml") for path in visible)
    # A list of classes beside XML files is theirs.
    names = folders.find_names(folder, [path for path in visible if not (is_voc and folders.is_class_list(path))])
    if names is not None:
        return _read_yolo(folder, paths, links, names, images)
    if is_voc:
        return _read_voc(folder, paths, links, url)
    if any(folders.is_label(path) for path in visible):
        # A folder of labels alone: its class names lie beside it.
        parent = Storage(_parent(folder))
        beside = [entry.name for entry in parent.entries("")]
        names = folders.find_names(parent, [name for name in beside if _is_names_file(name)])
        if names is not None:
            return _read_yolo(folder, paths, links, names, images, parent)
        raise UserError(
            f"{shown} holds txt files and no data.yaml and no classes.txt. Put one there: a data.yaml with the class "
            "names under `names`, or a classes.txt with one name per line."
        )
    documents = [path for path in visible if folders.has_suffix(path, ".json")]
    if documents:
        raise UserError(f"{shown} is a folder. Name the JSON file in it with --annotations, such as {documents[0]}.")
    swapped = " --annotations and --images look exchanged." if images.lower().endswith(".json") else ""
    raise UserError(f"{shown} holds no annotations that are known.{swapped} Name {KINDS} with --annotations.")


def _parent(folder: Storage) -> str:
    return folders.real_root(folder).rpartition("/")[0] or "/"


def _is_names_file(name: str) -> bool:
    return name.lower().endswith((".yaml", ".yml")) or folders.is_class_list(name)


def _read_mot(folder: Storage, paths: Sequence[str], links: Sequence[str]) -> RawAnnotations:
    chosen = [path for path in paths if is_of_mot(path) and not folders.is_hidden(path)]
    files = _read_all(folder, chosen)
    others = tuple(
        path
        for path in paths
        if path not in files and not folders.is_hidden(path) and PurePosixPath(path).suffix.lower() not in SUFFIXES
    )
    notes = (*folders.listing_notes(links, paths), *_others(others))
    return RawAnnotations("mot", folder.describe("").rstrip("/"), files, _hash(files), notes=notes)


def _read_voc(folder: Storage, paths: Sequence[str], links: Sequence[str], url: str) -> RawAnnotations:
    whole, all_paths = folder, paths
    inner = [path for path in paths if path.startswith("Annotations/")]
    if any(folders.has_suffix(path, ".xml") for path in inner):
        folder = Storage(f"{url.rstrip('/')}/Annotations")
        paths = [path.removeprefix("Annotations/") for path in inner]
    visible = [path for path in paths if not folders.is_hidden(path)]
    chosen = [path for path in visible if folders.has_suffix(path, ".xml") or path == CLASSES_FILE]
    files = _read_all(folder, chosen)
    within = "ImageSets/Main/"
    if folder is whole and folders.real_root(folder).rpartition("/")[2] == "Annotations":
        whole = Storage(_parent(folder))
        all_paths = [f"{within}{name}" for name in whole.list("ImageSets/Main")]
    lists = [path for path in all_paths if path.startswith(within) and folders.has_suffix(path, ".txt")]

    def splits() -> dict[str, str]:
        read = _read_all(whole, lists)
        texts = {path.removeprefix(within)[:-4]: raw.decode("utf-8", "replace") for path, raw in read.items()}
        return {name: text for name, text in texts.items() if not _is_of_one_class(name, text)}

    notes = folders.listing_notes(links, paths)
    others = tuple(path for path in visible if path not in files and PurePosixPath(path).suffix.lower() not in SUFFIXES)
    notes += _others(others)
    where = folder.describe("").rstrip("/")
    return RawAnnotations("voc", where, files, _hash(files), splits=splits, notes=tuple(notes))


def _read_yolo(
    folder: Storage,
    paths: Sequence[str],
    links: Sequence[str],
    names: Names | None,
    images: str,
    beside: Storage | None = None,
) -> RawAnnotations:
    """Read label files; beside: the folder of the names file, where it is another one."""
    if names is None:
        raise UserError(f"{folder.describe('')}: the file has no `names`. Name {KINDS} with --annotations.")
    holder = beside or folder
    labels = folders.find_labels(folder, paths, images)
    if labels is None:
        said = (
            f" Links that lead out of it are not followed: {', '.join(links[:3])}; name the data itself."
            if links
            else ""
        )
        raise UserError(f"{folder.describe('')} holds no YOLO label files (txt) for {redacted(images)}.{said}")
    files = _read_all(labels.storage, labels.paths)
    sha256 = _hash({names.file: names.raw, **files})
    stripped = {path.removeprefix(labels.prefix): data for path, data in files.items()}
    notes = folders.listing_notes(links, [path for path in paths if PurePosixPath(path).suffix.lower() not in SUFFIXES])
    used = set(labels.paths) if labels.storage is folder else set()
    others = tuple(
        path
        for path in paths
        if path not in used
        and path != names.file
        and not folders.is_hidden(path)
        and PurePosixPath(path).suffix.lower() not in SUFFIXES
    )
    notes += _others(others)
    source = holder.describe(names.file)
    return RawAnnotations("yolo", source, stripped, sha256, yolo=YoloFolder(holder, names, labels), notes=tuple(notes))


def _others(paths: tuple[str, ...]) -> list[Note]:
    """What else lies in the named folder."""
    if not paths:
        return []
    return [Note("files not looked at", "neither labels nor pictures of these images", paths, grave=False)]


def _read_all(folder: Storage, paths: Sequence[str]) -> dict[str, bytes]:
    """Small files, many at once."""
    threads = LOCAL_THREADS if folder.is_local else REMOTE_THREADS
    return dict(zip(paths, map_ahead(lambda path: folder.read(path, folders.MOST_BYTES), paths, threads), strict=True))


def _hash(files: dict[str, bytes]) -> str:
    found = hashlib.sha256()
    for path in sorted(files):
        found.update(f"{path}\0{hashlib.sha256(files[path]).hexdigest()}\n".encode("utf-8", "surrogateescape"))
    return found.hexdigest()
