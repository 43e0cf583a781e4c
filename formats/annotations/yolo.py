"""Reads YOLO labels: one txt file per image, lines of ``class x y width height`` as shares of it; data.yaml has names.

A label file belongs to the image of the same path and stem; an image without one is background, where its folder has
label files at all. Sizes come from the images' headers (0.2 ms each locally). Lines of more than five numbers are
polygons; their bounds are taken, as YOLO's own trainers do. Numbers that lie within a thousandth of a whole pixel are
whole: six or ten decimals cannot say it better, and whole boxes then give the very crops of the COCO file.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import yaml

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.annotations.table import NOWHERE, BoxList, ImageEntry, ReadTable

SUFFIXES = frozenset(
    f".{name}"
    for name in ("bmp", "jpeg", "jpg", "jpe", "jfif", "png", "ppm", "pgm", "tif", "tiff", "webp", "jp2", "npy")
)
"""What makes a file an image here; COCO and VOC name their images, YOLO leaves them to be found."""

WHOLE = 1e-3

Size = tuple[int, int]
Measure = Callable[[Sequence[str]], Sequence[Size | str]]
Box = tuple[float, float, float, float]
Line = tuple[int, Box, list[float] | None]


def class_names(raw: bytes, source: str) -> list[str] | None:
    """The names of a data.yaml in label order; None where it is YAML of another kind. Raises UserError."""
    try:
        found = yaml.safe_load(raw)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{source} is not YAML ({reason}). It needs the class names under `names`.") from error
    names: Any = found.get("names") if isinstance(found, dict) else None
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict):
        return None
    if not names or not all(isinstance(key, int) and 0 <= key < 10**6 for key in names):
        raise UserError(f"{source}: `names` must give each class, numbered from 0, a name.")
    if not all(isinstance(name, str | int | float) for name in names.values()):
        raise UserError(f"{source}: `names` holds something that is no name. Give each class a name.")
    return [str(names.get(label, f"class {label}")) for label in range(max(names) + 1)]


def read_yolo(
    classes: Sequence[str],
    labels: Mapping[str, bytes],
    images: Sequence[str],
    measure: Measure,
    detailed: bool = False,
) -> ReadTable:
    """Class names, image entries and boxes.

    labels: label files by path below their folder; images: files below the image folder; measure: gives the
    width and height of each file, or the reason why it has none.
    """
    text_of = {_stem(path): raw for path, raw in labels.items()}
    labelled = {str(PurePosixPath(stem).parent) for stem in text_of}
    files = sorted(file for file in images if PurePosixPath(file).suffix.lower() in SUFFIXES)
    stems = {_stem(file) for file in files}
    files = [file for file in files if str(PurePosixPath(file).parent) in labelled]
    missing = [f"{stem}.jpg" for stem in sorted(text_of.keys() - stems)]
    entries: list[ImageEntry] = []
    boxes = BoxList()
    for file, size in zip(files, measure(files), strict=True):
        number = len(entries)
        if isinstance(size, str):
            entries.append(ImageEntry(file, None, None, size))
            continue
        entries.append(ImageEntry(file, *size))
        for label, box, polygon in _lines(text_of.get(_stem(file), b""), size):
            boxes.add(number, box, label if label < len(classes) else -1, polygon=polygon)
    entries += [ImageEntry(file, None, None, "image file is missing") for file in missing]
    return ReadTable(list(classes), entries, boxes.columns(detailed))


def _stem(path: str) -> str:
    return str(PurePosixPath(path).with_suffix(""))


def _lines(raw: bytes, size: Size) -> list[Line]:
    """Label, box and polygon in pixels of each line; a line that is none keeps its place with a box that is none."""
    found = []
    for line in raw.decode("utf-8-sig", "replace").splitlines():
        words = line.split()
        if words:
            found.append(_line(words, size))
    return found


def _line(words: list[str], size: Size) -> Line:
    try:
        values = [float(word) for word in words]
    except ValueError:
        return -1, NOWHERE, None
    label = int(values[0]) if values[0] >= 0 and values[0].is_integer() and values[0] < 2**31 else -1
    width, height = size
    if len(values) == 5:
        x, y, w, h = values[1] * width, values[2] * height, values[3] * width, values[4] * height
        return label, _whole((x - w / 2, y - h / 2, w, h)), None
    if len(values) >= 7 and len(values) % 2:
        xs, ys = [value * width for value in values[1::2]], [value * height for value in values[2::2]]
        polygon = [value for point in zip(xs, ys, strict=True) for value in point]
        return label, _whole((min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys))), polygon
    return label, NOWHERE, None


def _whole(box: Box) -> Box:
    left, top, width, height = (_near(value) for value in box)
    return left, top, width, height


def _near(value: float) -> float:
    if not abs(value) < 2**53:
        return value
    return float(round(value)) if abs(value - round(value)) < WHOLE else value
