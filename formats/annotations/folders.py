"""Finds what belongs together in people's folders of YOLO labels: class names, label files, splits.

Class names stand in a data.yaml, or one to a line in classes.txt or obj.names (labelImg, Label Studio, CVAT). Labels
lie where YOLO's trainers look: where the image's path says ``images``, the label's says ``labels``, by real paths; else
beside the images, else in the folder that was named. A Note names every file that is not looked at. One listing of
each folder; names files are read, labels are not.
"""

import contextlib
import os
import posixpath
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from jigsaw_pretrain.errors import UserError, redacted
from jigsaw_pretrain.formats.annotations.skipped import SEVERAL_SPLITS, Note
from jigsaw_pretrain.storage.retries import StoreError
from jigsaw_pretrain.storage.store import Storage

MOST_BYTES = 1 << 28
"""The most of one of many files: labels, XML, lists, a data.yaml."""

PREFERRED = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
SPLITS = ("train", "val", "test", "minival")
_SAME = {"valid": "val", "validation": "val"}
_LISTS = ("classes.txt", "obj.names", "_darknet.labels", "predefined_classes.txt")
_LABELS_OF = {"images": "labels", "Images": "Labels", "IMAGES": "LABELS"}
"""The folder of labels that stands beside a folder of images."""
_NO_LABELS = ("readme.txt", "requirements.txt", "license.txt", "readme.roboflow.txt", "readme.dataset.txt")


@dataclass(frozen=True)
class Names:
    """What a names file says: the classes in label order, and of a data.yaml also the form of lines and the splits.

    kpt_shape: (k, d) of pose labels. task: what Ultralytics calls the lines' form, where it is said. splits: paths of
    each split as written. base: what these are relative to, as written.
    """

    file: str
    raw: bytes
    classes: tuple[str, ...]
    kpt_shape: tuple[int, int] | None = None
    task: str | None = None
    splits: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    base: str | None = None


@dataclass(frozen=True)
class Labels:
    """Where label files lie: their paths below ``storage``, all beginning with ``prefix``.

    swap: the part below the prefix says ``labels`` where the image's path says ``images``.
    """

    storage: Storage
    prefix: str
    paths: tuple[str, ...]
    swap: bool = False


def is_hidden(path: str) -> bool:
    """Whether a path is of hidden or resource files, which are nobody's data: ._a.jpg, .DS_Store, __MACOSX/..."""
    parts = PurePosixPath(path).parts
    return any(part.startswith(".") or part == "__MACOSX" for part in parts) or parts[-1:] in (
        ("Thumbs.db",),
        ("desktop.ini",),
    )


def has_suffix(path: str, suffix: str) -> bool:
    """Whether a path ends with a suffix, in small letters or capitals."""
    return path.lower().endswith(suffix)


def listing_notes(links: Sequence[str], paths: Sequence[str]) -> list[Note]:
    """What of a listing is not looked at: links that lead out, hidden files."""
    notes = []
    if links:
        text = "links to folders that lead out of the named folder are not followed; name the folder they lead to"
        notes.append(Note("links not followed", text, tuple(links)))
    hidden = tuple(path for path in paths if is_hidden(path))
    if hidden:
        notes.append(Note("hidden files", "hidden and resource files are not looked at", hidden, grave=False))
    return notes


def find_names(folder: Storage, paths: Sequence[str], chosen: str | None = None) -> Names | None:
    """The names file of a folder: ``chosen``, or the one that there is; None where there is none. Raises UserError."""
    if chosen is not None and not chosen.lower().endswith((".yaml", ".yml")):
        return _from_list(folder, chosen)
    if chosen is not None:
        return names_of_yaml(folder.read(chosen, MOST_BYTES), chosen, folder.describe(chosen))
    found, failed = [], None
    for path in (path for path in paths if "/" not in path and path.lower().endswith((".yaml", ".yml"))):
        try:
            names = names_of_yaml(folder.read(path, MOST_BYTES), path, folder.describe(path))
        except UserError as error:
            failed = failed if failed and path not in PREFERRED else error
            continue
        if names is not None:
            found.append(names)
    preferred = [names for names in found if names.file.lower() in PREFERRED]
    if len(found) == 1 or len(preferred) == 1:
        return (preferred or found)[0]
    if found:
        return _agreeing(folder, found)
    lists = [path for path in paths if is_class_list(path) and path.count("/") <= 1]
    if lists:
        return _agreeing(folder, [_from_list(folder, path) for path in sorted(lists, key=lambda path: path.count("/"))])
    if failed is not None:
        raise failed
    return None


def is_class_list(path: str) -> bool:
    """Whether a file is a list of class names by its name."""
    name = PurePosixPath(path).name.lower()
    return name in _LISTS or name.endswith(".names")


def _agreeing(folder: Storage, found: Sequence[Names]) -> Names:
    if any(names.classes != found[0].classes for names in found):
        named = ", ".join(names.file for names in found)
        raise UserError(
            f"{folder.describe('')} holds several files with class names: {named}. Name the right one with "
            "--annotations."
        )
    return found[0]


def _from_list(folder: Storage, path: str) -> Names:
    where, raw = folder.describe(path), folder.read(path, MOST_BYTES)
    try:
        # Of text, Python ends lines at U+0085 and U+2028 too, and every later class would be another one.
        lines = [line.decode("utf-8").strip() for line in raw.removeprefix(BOM_UTF8).splitlines()]
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 text. Write one class name per line.") from error
    while lines and not lines[-1]:
        lines.pop()
    if not lines or not all(lines):
        raise UserError(f"{where} has {'an empty line' if lines else 'no line'}. Write one class name per line.")
    data = str(PurePosixPath(path).with_name("obj.data"))
    splits: dict[str, tuple[str, ...]] = {}
    if folder.exists(data):
        pairs = (line.partition("=") for line in folder.read(data, MOST_BYTES).decode("utf-8", "replace").splitlines())
        for key, _, value in pairs:
            key = _SAME.get(key.strip(), key.strip())
            if key in SPLITS and value.strip():
                splits[key] = (value.strip(),)
    return Names(path, raw, tuple(lines), splits=splits)


def names_of_yaml(raw: bytes, path: str, where: str) -> Names | None:
    """The names of a data.yaml; None where it is YAML of another kind. Raises UserError."""
    try:
        found = yaml.safe_load(raw)
        # A class called ``no`` or ``010`` is no truth value and no 8: names are taken as they are written.
        written = yaml.load(raw, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{where} is not YAML ({reason}). It needs the class names under `names`.") from error
    names: Any = found.get("names") if isinstance(found, dict) else None
    if isinstance(names, str):
        raise UserError(
            f"{where}: `names` is {names[:80]!r}, and a list of class names is needed. If that is a file with one name "
            "per line, name it with --annotations, or write its lines under `names`."
        )
    if not isinstance(names, list | dict):
        return None
    written = written.get("names", names)
    names = dict(enumerate(written)) if isinstance(written, list) else written
    repeated = _repeated(raw)
    if repeated is not None:
        raise UserError(f"{where}: {repeated!r} stands there twice, and either could be meant. Remove one of them.")
    if not names or not all(str(key).isdecimal() and int(key) < 10**6 for key in names):
        raise UserError(f"{where}: `names` must give each class, numbered from 0, a name.")
    if not all(isinstance(name, str) and name.strip() for name in names.values()):
        raise UserError(f"{where}: `names` holds something that is no name. Give each class a name.")
    numbered = {int(key): name.strip() for key, name in names.items()}
    classes = tuple(numbered.get(label, f"class {label}") for label in range(max(numbered) + 1))
    count = found.get("nc")
    if count is not None and str(count) != str(len(classes)):
        raise UserError(
            f"{where}: `nc` says {str(count)[:40]} classes and `names` gives {len(classes)}: labels could mean others. "
            "Correct the one that is wrong."
        )
    shape = found.get("kpt_shape")
    if shape is not None and not (
        isinstance(shape, list | tuple)
        and len(shape) == 2
        and all(isinstance(one, int) for one in shape)
        and shape[0] > 0
        and shape[1] in (2, 3)
    ):
        raise UserError(f"{where}: `kpt_shape` must be the number of keypoints and 2 or 3, such as [17, 3].")
    splits = {}
    for key, value in found.items():
        key = _SAME.get(str(key), str(key))
        values = value if isinstance(value, list) else [value]
        if key in SPLITS and value:
            if not all(isinstance(one, str) for one in values):
                raise UserError(f"{where}: `{key}` must be a path, or a list of paths. Correct it, or remove it.")
            splits[key] = tuple(values)
    base = found.get("path") if isinstance(found.get("path"), str) else None
    task = found.get("task") if isinstance(found.get("task"), str) else None
    return Names(path, raw, classes, tuple(shape) if shape else None, task, splits, base)


def _repeated(raw: bytes) -> str | None:
    """What stands twice in a data.yaml, a key or the number of a class; YAML readers take the last in silence."""
    root = yaml.compose(raw, Loader=yaml.BaseLoader)
    pairs = root.value if isinstance(root, yaml.MappingNode) else []
    named = [value for key, value in pairs if key.value == "names"]
    classes = [pair for value in named[:1] if isinstance(value, yaml.MappingNode) for pair in value.value]
    counts = (
        Counter(_SAME.get(str(key.value), str(key.value)) for key, _ in pairs),
        Counter(str(key.value) for key, _ in classes),
    )
    return next((key for one in counts for key, count in one.items() if count > 1), None)


def is_label(path: str) -> bool:
    """Whether a file may be a label by its name."""
    name = PurePosixPath(path).name.lower()
    return name.endswith(".txt") and name not in _NO_LABELS and not is_class_list(path) and not is_hidden(path)


def find_labels(folder: Storage, paths: Sequence[str], images: str) -> Labels | None:
    """Where the labels of the images below ``images`` lie; None where there are none."""
    named, root = real_root(folder), real_root(Storage(images))
    listings: dict[str, tuple[Storage, Sequence[str]]] = {named: (folder, paths)}

    def below(place: str, swap: bool = False) -> Labels | None:
        """The label files below a folder, given by its real path or URL."""
        if place == named or place.startswith(f"{named}/"):
            storage, listed, prefix = folder, paths, place[len(named) :].lstrip("/")
        else:
            if place not in listings:
                listings[place] = _listed(place)
            (storage, listed), prefix = listings[place], ""
        prefix = f"{prefix}/" if prefix else ""
        found = tuple(path for path in listed if path.startswith(prefix) and is_label(path))
        if swap:
            found = tuple(path for path in found if "labels" in PurePosixPath(path[len(prefix) :]).parts[:-1])
        return Labels(storage, prefix, found, swap) if found else None

    steps = root.split("/")
    places = [nth for nth in range(len(steps) - 1, -1, -1) if steps[nth] in _LABELS_OF]
    swapped = ["/".join([*steps[:nth], _LABELS_OF[steps[nth]], *steps[nth + 1 :]]) for nth in places]
    inside = steps[places[0] + 1 :] if places else []
    last = steps[-1]
    nearby = ["/".join([named, "labels", *inside]), "/".join([named, *inside])] if places else []
    nearby += [f"{named}/labels/{last}", f"{named}/labels", f"{named}/{last}"]
    for place in swapped:
        if (found := below(place)) is not None:
            return found
    if (found := below(root, swap=True)) is not None:
        return found
    if (found := below(root)) is not None and _has_pictures(found):
        return found
    for place in (*nearby, root, named):
        if (found := below(place)) is not None:
            return found
    return None


def _has_pictures(labels: Labels) -> bool:
    """Whether pictures lie beside some of the labels."""
    stems = {str(PurePosixPath(path).with_suffix("")) for path in labels.paths}
    beside = (path for path in labels.storage.find() if not is_label(path))
    return any(str(PurePosixPath(path).with_suffix("")) in stems for path in beside)


def real_root(storage: Storage) -> str:
    """The root's real path, or its URL."""
    return os.path.realpath(storage.root) if storage.is_local else redacted(storage.url).rstrip("/")


def _listed(place: str) -> tuple[Storage, Sequence[str]]:
    try:
        storage = Storage(place)
        return storage, () if storage.is_local and not Path(place).is_dir() else storage.find()
    except (StoreError, FileNotFoundError, UserError):
        return Storage(place), ()


def image_stem(label: str, labels: Labels) -> str:
    """The path, below the image folder and without suffix, of the image that a label file belongs to."""
    stem = PurePosixPath(label[len(labels.prefix) :]).with_suffix("")
    if not labels.swap:
        return str(stem)
    parts = list(stem.parts)
    nth = len(parts) - 2 - parts[-2::-1].index("labels")
    parts[nth] = "images"
    return "/".join(parts)


@dataclass(frozen=True)
class SplitMembers:
    """The images of a split, and what its lists name that is no image below the image root."""

    files: list[str]
    absent: tuple[str, ...]


def split_members(names: Names, folder: Storage, split: str, root: str, files: Sequence[str]) -> SplitMembers:
    """The images of a split, of the ``files`` below the real path ``root``; raises UserError where it is not there."""
    entries = names.splits.get(_SAME.get(split, split))
    where = folder.describe(names.file)
    if entries is None:
        there = ", ".join(names.splits) or "none"
        raise UserError(f"{where} states no split {split!r} (it states: {there}). Name one of these with --split.")
    chosen: set[str] = set()
    absent: list[str] = []
    for entry in entries:
        mine, others = _of_entry(names, folder, entry, root, files)
        chosen |= mine
        absent += others
    return SplitMembers([file for file in files if file in chosen], tuple(absent))


def _ways(names: Names, entry: str) -> list[str]:
    """Where an entry of a split may lie, relative to the names file's folder."""
    plain = entry.replace("\\", "/")
    bases = [names.base, ""] if names.base else [""]
    ways = [posixpath.join(base, way) for base in bases for way in (plain, plain.removeprefix("../"))]
    # CVAT writes paths that begin with the folder ``data``, in which the files used to lie.
    return [*ways, plain.partition("/")[2]] if "/" in plain else ways


def _of_entry(
    names: Names, folder: Storage, entry: str, root: str, files: Sequence[str]
) -> tuple[set[str], Sequence[str]]:
    """The files that an entry of a split means, a folder's or those of a list, and what the list names beside them.

    Raises UserError where it is not there.
    """
    ways = _ways(names, entry)
    looked_for = ways[0]
    if folder.is_local:
        here = (Path(real_root(folder)) / names.file).parent
        found = next(((here / way).resolve() for way in ways if (here / way).exists()), None)
        if found is not None and found.is_dir():
            return {file for file in files if f"{root}/{file}".startswith(f"{found}/")}, ()
        if found is not None:
            return _of_list(found.read_text(encoding="utf-8", errors="replace"), files)
        looked_for = os.path.normpath(here / ways[0])
    elif not entry.lower().endswith(".txt"):
        tail = entry.replace("\\", "/").lstrip("./").rstrip("/")
        return {file for file in files if f"/{tail}/" in f"{root}/{file}"}, ()
    else:
        for name in (posixpath.normpath(posixpath.join(posixpath.dirname(names.file), way)) for way in ways):
            if not name.startswith(("/", "..")):
                with contextlib.suppress(FileNotFoundError):
                    return _of_list(folder.read(name, MOST_BYTES).decode("utf-8", "replace"), files)
    raise UserError(
        f"{folder.describe(names.file)} states {entry!r} as a split, which is not there (looked for {looked_for}). "
        "Correct the path, or leave --split out to use every image."
    )


def _of_list(text: str, files: Sequence[str]) -> tuple[set[str], list[str]]:
    """The files that the lines of a list name, and the lines that name none."""
    known, members, absent = set(files), set(), []
    for line in filter(None, map(str.strip, text.splitlines())):
        # Lists come from other machines: the end of a path tells the image.
        steps = line.replace("\\", "/").split("/")
        tails = ("/".join(steps[nth:]) for nth in range(len(steps)))
        file = next((tail for tail in tails if tail in known), None)
        if file is None:
            absent.append(line)
        else:
            members.add(file)
    return members, absent


def split_note(names: Names, folder: Storage, root: str, files: Sequence[str]) -> Note | None:
    """That images of several splits are used together, where that is so."""
    used = {}
    for split in names.splits:
        try:
            count = len(split_members(names, folder, split, root, files).files)
        except UserError:
            continue
        if count:
            used[split] = count
    if len(used) < 2:
        return None
    text = (
        f"images of several splits are used together, held-out ones included. Give --split NAME to use one, as "
        f"{names.file} states them"
    )
    return Note(SEVERAL_SPLITS, text, [f"{split} ({count:,})" for split, count in used.items()])
