"""Reads YOLO labels: one txt file per image, lines of ``class x y width height`` as shares of it.

A label file belongs to the image of the same path and stem; an image without one is background, where its folder has
label files at all. Sizes come from the images' headers (0.2 ms each locally). Numbers that lie within a thousandth of a
whole pixel are whole: six or ten decimals cannot say it better, and whole boxes then give the very crops of the COCO
file.

Lines of other forms are told by all lines together. Polygons and oriented boxes (pairs of x and y after the class):
their bounds are taken, as YOLO's own trainers do. Pose lines (a box, then keypoints of two or three numbers), by
data.yaml's ``kpt_shape``, or where all lines have one count of numbers and the keypoints lie in their boxes: the box is
taken. What could be either, and every other form (pixels, commas, names, a sixth number), is refused with file and
line: read as the nearest known form it would put boxes on the wrong places.
"""

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from urllib.parse import unquote

import numpy as np

from jigsaw_pretrain.config import as_number
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.annotations.folders import Names, is_hidden
from jigsaw_pretrain.formats.annotations.skipped import Note
from jigsaw_pretrain.formats.annotations.table import NOWHERE, BoxList, Floats, ImageEntry, ReadTable

SUFFIXES = frozenset(
    f".{name}"
    for name in ("bmp", "jpeg", "jpg", "jpe", "jfif", "png", "ppm", "pgm", "tif", "tiff", "webp", "jp2", "avif", "npy")
)
"""What makes a file an image here; COCO and VOC name their images, YOLO leaves them to be found."""

WHOLE = 1e-3

FAR = 1.5
"""Shares of an image beyond this are none: boxes may leave their image, but not by half of it."""

MOSTLY = 0.95
"""The share of the lines that must agree with a form that nobody states."""

Size = tuple[int, int]
Measure = Callable[[Sequence[str]], Sequence[Size | str]]
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Line:
    """A line of a label file: the file and the line's number, for messages, and its numbers (not finite: damaged)."""

    where: str
    number: int
    values: tuple[float, ...]

    def refuse(self, what: str, remedy: str) -> UserError:
        """The error for a line of a form that is not read."""
        return UserError(f"{self.where}, line {self.number}: {what}. {remedy}")


def read_yolo(
    names: Names,
    labels: Mapping[str, tuple[str, bytes]],
    images: Sequence[str],
    measure: Measure,
    detailed: bool = False,
) -> ReadTable:
    """Class names, image entries and boxes.

    labels: by the path without suffix of the image that each belongs to, what to call the label file, and its bytes.
    images: files below the image folder; measure: gives the width and height of each file, or the reason why it has
    none. Raises UserError for lines of forms that are not read.
    """
    pictures, notes = _pictures(images, labels)
    labelled = {str(PurePosixPath(stem).parent) for stem in labels}
    files = [file for file in pictures if str(PurePosixPath(file).parent) in labelled]
    if len(files) < len(pictures):
        others = tuple(file for file in pictures if str(PurePosixPath(file).parent) not in labelled)
        text = "images in folders without any label file are not used"
        notes.append(Note("images without labels", text, others))
    stems = {stem_of(file) for file in pictures}
    lost, texts, strays = [], [], dict[str, str]()
    lines: dict[str, list[Line]] = {}
    for stem, (where, raw) in sorted(labels.items()):
        if stem in stems:
            lines[stem] = list(_lines(where, raw, names))
        elif not is_numeric(raw):
            texts.append(where)
        else:
            lost.append(f"{stem}.jpg")
            if raw.strip():
                strays[stem] = where
    _refuse_near(strays, [file for file in pictures if stem_of(file) not in lines])
    if strays and pictures and not lines:
        raise _of_other_folders(next(iter(strays.values())), pictures, names)
    if texts:
        notes.append(Note("files not looked at", "text that belongs to no image", tuple(texts), grave=False))
    form = line_form([line for found in lines.values() for line in found], names)
    notes += form.notes
    classes, entries, boxes = len(names.classes), list[ImageEntry](), BoxList()
    for file, size in zip(files, measure(files), strict=True):
        number = len(entries)
        if isinstance(size, str):
            entries.append(ImageEntry(file, None, None, size))
            continue
        entries.append(ImageEntry(file, *size))
        for line in lines.get(stem_of(file), ()):
            box, polygon = form.box(line, size)
            label = line.values[0]
            known = 0 <= label < classes and label == int(label)
            boxes.add(number, box, int(label) if known else -1, polygon=polygon)
    entries += [ImageEntry(file, None, None, "image file is missing") for file in lost]
    return ReadTable(list(names.classes), entries, boxes.columns(detailed), notes=notes)


def stem_of(path: str) -> str:
    """A path without its suffix."""
    return str(PurePosixPath(path).with_suffix(""))


def _refuse_near(strays: Mapping[str, str], unlabelled: Sequence[str]) -> None:
    """Refuse a label of no image where an image without label has nearly its name: it would pass for background.

    strays: by the path that the image would have, without suffix, what to call the label file.
    """
    near = {_near_name(stem_of(file)): file for file in unlabelled} if strays else {}
    for stem, where in strays.items():
        # Some programs call the label of x.jpg x.jpg.txt.
        plain = stem_of(stem) if PurePosixPath(stem).suffix.lower() in SUFFIXES else stem
        file = near.get(_near_name(plain))
        if file is not None:
            raise UserError(
                f"{where} belongs to no image, and {file}, which has nearly its name, has no label. Rename one of "
                "them: capitals, accents and %-signs must agree, and .txt stands in place of the image's suffix."
            )


def _of_other_folders(label: str, pictures: Sequence[str], names: Names) -> UserError:
    """The error for labels none of which belongs to an image, as their folders' paths differ."""
    stem = PurePosixPath(label).stem
    file = next((one for one in pictures if PurePosixPath(one).stem == stem), pictures[0])
    return UserError(
        f"{label} belongs to no image, nor does any other label, and {file} and all others have none: the folders do "
        "not fit. A label lies at its image's path with `labels` in place of `images`; or name the folder that "
        f"holds the labels alone with --annotations (it may lie beside {PurePosixPath(names.file).name}), and the one "
        "that they are relative to with --images."
    )


def _near_name(path: str) -> str:
    return unicodedata.normalize("NFC", unquote(path)).casefold()


def _pictures(files: Sequence[str], labels: Mapping[str, object]) -> tuple[list[str], list[Note]]:
    """The images among files, sorted, one for each stem; raises UserError where a label could be of two."""
    notes: list[Note] = []
    found: dict[str, str] = {}
    copies, others = [], []
    for file in sorted(file for file in files if not is_hidden(file)):
        suffix = PurePosixPath(file).suffix.lower()
        if suffix not in SUFFIXES:
            if suffix in _OTHER_PICTURES:
                others.append(file)
            continue
        stem = stem_of(file)
        first = found.setdefault(stem, file)
        if first == file:
            continue
        arrays = [one for one in (first, file) if one.lower().endswith(".npy")]
        if len(arrays) == 1:
            found[stem] = first if arrays[0] == file else file
            copies.append(arrays[0])
        elif stem in labels:
            raise UserError(
                f"{first} and {file} are two pictures of one name, and a label file could be of either. Remove or "
                "rename one of them."
            )
        else:
            found[file] = file
    if copies:
        text = "arrays beside a picture of the same name are taken for its copies and not used"
        notes.append(Note("files not looked at", text, tuple(copies), grave=False))
    if others:
        text = "pictures of kinds that are not read; convert them to PNG or JPEG"
        notes.append(Note("files not looked at", text, tuple(others)))
    return sorted(found.values()), notes


_OTHER_PICTURES = (".heic", ".heif", ".gif", ".dng", ".mpo", ".raw", ".cr2", ".nef", ".jxl", ".svg", ".exr", ".npz")


def is_numeric(raw: bytes) -> bool:
    """Whether a file is empty or begins as a label does: with a line of a number."""
    if not raw.strip():
        return True
    words = raw.decode("utf-8-sig", "replace").split(None, 1)
    try:
        as_number(words[0].rstrip(","))
    except (ValueError, IndexError):
        return False
    return True


def _lines(where: str, raw: bytes, names: Names) -> Iterator[Line]:
    """The lines of a label file; raises UserError for words that are no numbers."""
    for number, text in enumerate(raw.decode("utf-8-sig", "replace").splitlines(), 1):
        words = text.split()
        if not words:
            continue
        try:
            yield Line(where, number, tuple(map(as_number, words)))
        except ValueError:
            line = Line(where, number, ())
            if "," in text or ";" in text:
                raise line.refuse(
                    "numbers are set apart or written with commas", "Write them with points, set apart by spaces."
                ) from None
            named = next((label for label, name in enumerate(names.classes) if text.startswith(name)), None)
            if named is not None:
                what = f"begins with the name of a class in place of its number, which is {named}"
                raise line.refuse(what, f"Write classes as numbers, as {names.file} counts them from 0.") from None
            shown = text.strip()[:40].encode("unicode_escape").decode("ascii")
            raise line.refuse(f"{shown!r} is no label of YOLO", "Correct or remove the line.") from None


@dataclass(frozen=True)
class LineForm:
    """What the numbers of lines mean. keypoints: those after a box belong to keypoints, else to a polygon."""

    keypoints: bool
    notes: tuple[Note, ...] = ()

    def box(self, line: Line, size: Size) -> tuple[Box, list[float] | None]:
        """The box of a line in pixels, and its polygon; for a damaged line a box without numbers."""
        values = line.values
        width, height = size
        if len(values) < 5:
            return NOWHERE, None
        if len(values) == 5 or self.keypoints:
            x, y, w, h = values[1] * width, values[2] * height, values[3] * width, values[4] * height
            return _whole((x - w / 2, y - h / 2, w, h)), None
        xs, ys = [value * width for value in values[1::2]], [value * height for value in values[2::2]]
        polygon = [value for point in zip(xs, ys, strict=True) for value in point]
        return _whole((min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys))), polygon


def line_form(lines: Sequence[Line], names: Names) -> LineForm:
    """The form of a dataset's lines; raises UserError where they have none that is known, or could have two."""
    _check_labels(lines, names)
    counts = Counter(len(line.values) for line in lines)
    longer = sorted(count for count in counts if count > 5)
    form = LineForm(keypoints=False)
    if names.kpt_shape is not None or names.task == "pose":
        form = _stated_pose(lines, names, longer)
    elif longer:
        form = _found_form(lines, counts, names)
    for line in lines:
        places = line.values[1:5] if form.keypoints or len(line.values) == 5 else line.values[1:]
        if any(FAR < abs(value) < np.inf for value in places):
            value = next(value for value in places if FAR < abs(value) < np.inf)
            raise line.refuse(
                f"{value:g} is no share of an image (pixels in place of shares?)",
                "Divide x and width by the image's width, y and height by its height.",
            )
    return form


def _check_labels(lines: Sequence[Line], names: Names) -> None:
    """Refuse classes that are counted from 1."""
    used = Counter(line.values[0] for line in lines)
    last = len(names.classes)
    if last > 1 and used[last] and not used[0] and all(1 <= label <= last for label in used):
        line = next(line for line in lines if line.values[0] == last)
        raise line.refuse(
            f"class {last} of {last}: classes run from 1 to {last}, and {names.file} counts its names from 0",
            "Subtract 1 from every class, or add a name for class 0.",
        )


def _stated_pose(lines: Sequence[Line], names: Names, longer: Sequence[int]) -> LineForm:
    length = 5 + names.kpt_shape[0] * names.kpt_shape[1] if names.kpt_shape else (longer[0] if longer else 5)
    for line in lines:
        if len(line.values) > 5 and len(line.values) != length:
            said = f"kpt_shape {list(names.kpt_shape)}" if names.kpt_shape else "the other lines"
            raise line.refuse(
                f"{len(line.values)} numbers, where {said} of {names.file} makes {length}",
                "Correct `kpt_shape`, or the line.",
            )
    return LineForm(keypoints=True)


def _found_form(lines: Sequence[Line], counts: Counter[int], names: Names) -> LineForm:
    """The form of lines that are longer than a box, told by all of them."""
    long = [line for line in lines if len(line.values) > 5]
    six = next((line for line in long if len(line.values) == 6), None)
    if six is not None:
        raise six.refuse(
            "six numbers, where a label has five (a confidence of predictions, an angle, a track?)",
            "Write class, x, y, width and height only; oriented boxes as four corners.",
        )
    length = len(long[0].values)
    # Plain boxes among them say nothing of what the longer ones are.
    one_count = set(counts) <= {length} | set(range(6))
    polygons = (names.task in ("segment", "obb")) or not one_count
    if not polygons and _is_pose(long, length, 3):
        return _pose_note(length, 3)
    if not polygons and _is_pose(long, length, 2):
        if _is_polygon(long):
            raise long[0].refuse(
                f"{length} numbers on every line may be a polygon or a box with {(length - 5) // 2} keypoints",
                f"Say which in {names.file}: `kpt_shape: [{(length - 5) // 2}, 2]`, or `task: segment`.",
            )
        return _pose_note(length, 2)
    odd = next((line for line in long if len(line.values) % 2 == 0), None)
    if odd is not None:
        raise odd.refuse(
            f"{len(odd.values)} numbers are neither a box nor pairs of a polygon after the class",
            f"If keypoints follow each box, give their `kpt_shape` in {names.file}.",
        )
    return LineForm(keypoints=False)


def _pose_note(length: int, numbers: int) -> LineForm:
    count = (length - 5) // numbers
    text = f"lines are read as a box with {count} keypoints of {numbers} numbers, and the box is taken"
    return LineForm(keypoints=True, notes=(Note("pose labels", text, grave=False),))


def _is_pose(lines: Sequence[Line], length: int, numbers: int) -> bool:
    """Whether lines of one length are boxes whose keypoints of 2 or 3 numbers lie in them."""
    if (length - 5) % numbers:
        return False
    values = np.array([line.values for line in lines], dtype=np.float64)
    x, y, w, h = (values[:, nth : nth + 1] for nth in range(1, 5))
    points = values[:, 5:].reshape(len(values), -1, numbers)
    if numbers == 3 and not np.isin(points[..., 2], (0, 1, 2)).all():
        return False
    shown = (points[..., 0] > 0) | (points[..., 1] > 0)
    near = (np.abs(points[..., 0] - x) <= 0.55 * w) & (np.abs(points[..., 1] - y) <= 0.55 * h)
    fits = (x - w / 2 >= -0.02) & (x + w / 2 <= 1.02) & (y - h / 2 >= -0.02) & (y + h / 2 <= 1.02)
    if numbers == 3:
        # Visibility is proof enough, and annotators set keypoints beside their boxes.
        return bool(fits.mean() >= MOSTLY)
    return bool(fits.mean() >= MOSTLY and (not shown.any() or near[shown].mean() >= MOSTLY))


def _is_polygon(lines: Sequence[Line]) -> bool:
    """Whether the second pair of numbers lies where the other pairs do, as a polygon's would."""
    points = np.array([line.values[1:] for line in lines], dtype=np.float64).reshape(len(lines), -1, 2)
    others: Floats = np.delete(points, 1, axis=1)
    low, high = others.min(axis=1), others.max(axis=1)
    reach = (high - low).max(axis=1, keepdims=True)
    near = ((points[:, 1] >= low - reach) & (points[:, 1] <= high + reach)).all(axis=1)
    return bool(near.mean() >= MOSTLY)


def _whole(box: Box) -> Box:
    left, top, width, height = (_near(value) for value in box)
    return left, top, width, height


def _near(value: float) -> float:
    if not abs(value) < 2**53:
        return value
    return float(round(value)) if abs(value - round(value)) < WHOLE else value
