"""Reads annotations of any kind from a path or URL: COCO JSON, Pascal VOC XML, YOLO txt with data.yaml.

The content decides which kind it is, never the name. The files are read and hashed once;
``listed`` then turns them into Annotations, opening images only for sizes that the annotations do not tell (YOLO never
does).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.annotations.coco import read_coco
from jigsaw_pretrain.formats.annotations.table import Annotations, ImageEntry, assemble, clean_name
from jigsaw_pretrain.formats.annotations.voc import CLASSES_FILE, read_voc
from jigsaw_pretrain.formats.annotations.yolo import class_names, read_yolo
from jigsaw_pretrain.formats.images.source import ImageSource
from jigsaw_pretrain.storage import LOCAL_THREADS, REMOTE_THREADS, Storage, map_ahead, redacted

KINDS = "COCO JSON, a folder of Pascal VOC XML files, or a folder of YOLO txt files with a data.yaml"


@dataclass(frozen=True)
class RawAnnotations:
    """Annotations as bytes: kind is ``coco``, ``voc`` or ``yolo``; files by path ("" for the one file of COCO).

    source: what to call them in messages. classes: of YOLO. sha256: of all that was read, names and contents.
    """

    kind: str
    source: str
    files: dict[str, bytes]
    sha256: str
    classes: tuple[str, ...] = ()


def read_annotations(url: str, images: str) -> RawAnnotations:
    """Read ``url``; ``images``, the image root, tells which of several folders of YOLO labels is meant.

    Raises UserError.
    """
    folder, _, name = url.replace("\\", "/").rstrip("/").rpartition("/")
    parent = Storage(folder or ("/" if url.startswith("/") else "."))
    shown = redacted(url)
    try:
        raw = parent.read(name)
    except (IsADirectoryError, FileNotFoundError) as error:
        whole = Storage(url)
        paths = whole.find()
        if not paths:
            kind = "is an empty folder" if isinstance(error, IsADirectoryError) else "no such file or folder"
            raise UserError(f"{shown}: {kind}. Name the annotations with --annotations: {KINDS}.") from error
        return _read_folder(whole, paths, url, images)
    except OSError as error:
        raise UserError(f"{shown} cannot be read ({error}). Check its permissions and that it is whole.") from error
    if raw.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] not in (b"{", b"[", b"", b"<") and name.endswith((".yaml", ".yml")):
        return _read_yolo(parent, parent.find(), name, folder, images)
    if raw.lstrip()[:1] == b"<":
        raise UserError(f"{shown} is one XML file. Name the folder of Pascal VOC files with --annotations.")
    return RawAnnotations("coco", shown, {"": raw}, hashlib.sha256(raw).hexdigest())


@dataclass(frozen=True)
class Reading:
    """How annotations are to be understood.

    exif: ``ignore`` for boxes on pixels as stored, ``apply`` for boxes on upright pictures. ignored: ``skip`` what the
    annotations mark as ignored (COCO's ``ignore``, VOC's ``difficult``), which is then no object and no background, or
    ``use`` it as any other object. detailed: keep areas and segmentations, which detectors need.
    """

    exif: str = "ignore"
    ignored: str = "skip"
    detailed: bool = False


def listed(raw: RawAnnotations, images: ImageSource, reading: Reading) -> Annotations:
    """The annotations of what was read, sizes that they do not tell taken from the images. Raises UserError."""
    detailed = reading.detailed
    if raw.kind == "yolo":
        read = read_yolo(
            raw.classes, raw.files, images.files(), lambda files: images.measure(files, reading.exif), detailed
        )
    elif raw.kind == "voc":
        read = read_voc(raw.files, raw.source, detailed)
    else:
        read = read_coco(raw.files[""], raw.source, detailed)
    sized = replace(read, entries=with_sizes(read.entries, images, reading.exif))
    return assemble(sized, raw.sha256, reading.ignored == "use")


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


def _read_folder(folder: Storage, paths: Sequence[str], url: str, images: str) -> RawAnnotations:
    recipe = next((path for path in paths if "/" not in path and path.endswith((".yaml", ".yml"))), None)
    if recipe is not None and class_names(folder.read(recipe), folder.describe(recipe)) is not None:
        return _read_yolo(folder, paths, recipe, url, images)
    inner = [path for path in paths if path.startswith("Annotations/")]
    if inner and any(path.endswith(".xml") for path in inner):
        folder = Storage(f"{url.rstrip('/')}/Annotations")
        paths = [path.removeprefix("Annotations/") for path in inner]
    chosen = [path for path in paths if path.endswith(".xml") or path == CLASSES_FILE]
    shown = redacted(url)
    if any(path.endswith(".xml") for path in chosen):
        files = _read_all(folder, chosen)
        return RawAnnotations("voc", folder.describe("").rstrip("/"), files, _hash(files))
    documents = [path for path in paths if path.endswith(".json")]
    if documents:
        raise UserError(f"{shown} is a folder. Name the JSON file in it with --annotations, such as {documents[0]}.")
    if any(path.endswith(".txt") for path in paths):
        raise UserError(f"{shown} holds txt files and no data.yaml. Put one there, with the class names under `names`.")
    raise UserError(f"{shown} holds no annotations that are known. Name {KINDS} with --annotations.")


def _read_yolo(folder: Storage, paths: Sequence[str], recipe: str, url: str, images: str) -> RawAnnotations:
    raw = folder.read(recipe)
    names = class_names(raw, folder.describe(recipe))
    if names is None:
        raise UserError(f"{folder.describe(recipe)} has no `names`. Name {KINDS} with --annotations.")
    prefix = _label_folder(paths, url, images)
    chosen = [path for path in paths if path.startswith(prefix) and _is_label(path)]
    if not chosen:
        raise UserError(f"{redacted(url)} holds no YOLO label files (txt) for {redacted(images)}.")
    files = _read_all(folder, chosen)
    sha256 = _hash({recipe: raw, **files})
    stripped = {path.removeprefix(prefix): data for path, data in files.items()}
    return RawAnnotations("yolo", folder.describe(recipe), stripped, sha256, tuple(names))


def _label_folder(paths: Sequence[str], url: str, images: str) -> str:
    """Below which of the paths the images' labels lie: where ``images`` says images, that folder is named labels."""
    inside = images.replace("\\", "/").rstrip("/").removeprefix(url.rstrip("/") + "/").split("/")
    candidates = []
    if "images" in inside:
        place = len(inside) - 1 - inside[::-1].index("images")
        rest = inside[place + 1 :]
        before = inside[:place] if images.startswith(url.rstrip("/") + "/") else []
        candidates = [[*before, "labels", *rest], ["labels", *rest], rest]
    candidates += [["labels", inside[-1]], ["labels"], [inside[-1]]]
    for candidate in candidates:
        prefix = "".join(f"{step}/" for step in candidate)
        if prefix and any(path.startswith(prefix) and _is_label(path) for path in paths):
            return prefix
    return ""


def _is_label(path: str) -> bool:
    name = PurePosixPath(path)
    return name.suffix == ".txt" and name.name.lower() not in ("classes.txt", "readme.txt", "requirements.txt")


def _read_all(folder: Storage, paths: Sequence[str]) -> dict[str, bytes]:
    """Small files, many at once."""
    threads = LOCAL_THREADS if folder.is_local else REMOTE_THREADS
    return dict(zip(paths, map_ahead(folder.read, paths, threads), strict=True))


def _hash(files: dict[str, bytes]) -> str:
    found = hashlib.sha256()
    for path in sorted(files):
        found.update(f"{path}\0{hashlib.sha256(files[path]).hexdigest()}\n".encode("utf-8", "surrogateescape"))
    return found.hexdigest()
