"""Reads MOT's ground truth: a folder of sequences, each with gt/gt.txt, img1/ and seqinfo.ini.

A line is frame, identity, left, top, width, height, consider flag, class, visibility; frames and pixels are counted
from 1. A flag of 0 marks a box as ignored: vehicles, distractors, occluders, people on vehicles. Classes are those of
the boxes that are considered (all where ignored boxes are used), by MOT16's names. 0.1 s for 100,000 boxes.

A module of its own, because each kind of annotations is.
"""

import configparser
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from jigsaw_pretrain.config import as_number
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.annotations.skipped import Note
from jigsaw_pretrain.formats.annotations.table import BoxList, ImageEntry, ReadTable

TRUTH, INFO = "gt/gt.txt", "seqinfo.ini"

CLASSES = (
    *("pedestrian", "person on vehicle", "car", "bicycle", "motorbike", "non motorized vehicle", "static person"),
    *("distractor", "occluder", "occluder on the ground", "occluder full", "reflection", "crowd"),
)
"""By number, from 1."""


MOST_FRAMES = 5_000_000
"""Images of all sequences, each of which takes some 200 bytes of memory; at 30 a second they last two days."""


@dataclass(frozen=True)
class _Info:
    """What a seqinfo.ini says of a sequence: where its images are, how many there are, and their size in pixels."""

    folder: str
    suffix: str
    frames: int
    width: int | None
    height: int | None


def is_truth(path: str) -> bool:
    """Whether a file is a sequence's ground truth."""
    return path == TRUTH or path.endswith(f"/{TRUTH}")


def is_of_mot(path: str) -> bool:
    """Whether a file is one of those that are read."""
    return is_truth(path) or PurePosixPath(path).name == INFO


def read_mot(files: Mapping[str, bytes], source: str, keep_ignored: bool, detailed: bool = False) -> ReadTable:
    """Classes, image entries and boxes of sequences by their files' paths; raises UserError.

    keep_ignored: whether the classes of ignored boxes are classes of the dataset.
    """
    found: list[tuple[int, tuple[float, float, float, float], int, bool]] = []
    entries: list[ImageEntry] = []
    for path in sorted(path for path in files if is_truth(path)):
        place = path[: -len(TRUTH)]
        where = f"{source}/{path}"
        frame_of = dict[int, int]()
        info = _info(files.get(f"{place}{INFO}", b""), f"{source}/{place}{INFO}")
        folder, suffix = f"{place}{info.folder}", info.suffix
        lines = list(_lines(files[path], where))
        if len(entries) + info.frames > MOST_FRAMES:
            raise UserError(
                f"{source}/{place}{INFO}: with its seqLength of {info.frames:,} there are more than {MOST_FRAMES:,} "
                "images: correct it, or name fewer sequences"
            )
        for frame in sorted({*range(1, info.frames + 1), *(line[0] for line in lines)}):
            frame_of[frame] = len(entries)
            entries.append(ImageEntry(f"{folder}/{frame:06d}{suffix}", info.width, info.height))
        found += [(frame_of[frame], box, number, ignored) for frame, box, number, ignored in lines]
    used = sorted({number for _, _, number, ignored in found if keep_ignored or not ignored})
    boxes = BoxList()
    for entry, box, number, ignored in found:
        # An ignored box of no class is never an object.
        boxes.add(entry, box, used.index(number) if number in used else 0, ignored)
    return ReadTable([CLASSES[number - 1] for number in used], entries, boxes.columns(detailed), notes=_copies(files))


def _copies(files: Mapping[str, bytes]) -> list[Note]:
    """Sequences that are one: MOT17 has each three times, for three detectors."""
    first: dict[bytes, str] = {}
    copies = [path for path in sorted(files) if is_truth(path) and first.setdefault(files[path], path) != path]
    if not copies:
        return []
    text = (
        "the same ground truth as another sequence's, so each object is there several times: name a folder of one each"
    )
    return [Note("repeated sequences", text, tuple(copies))]


def _lines(raw: bytes, where: str) -> Iterator[tuple[int, tuple[float, float, float, float], int, bool]]:
    """Frame, box in pixels from 0, class from 1 and whether it is ignored, of each line; raises UserError."""
    for number, text in enumerate(raw.decode("utf-8-sig", "replace").splitlines(), 1):
        if not text.strip():
            continue
        remedy = (
            "A line of MOT's ground truth is frame, identity, left, top, width, height, a flag of 0 or 1, a class from "
            f"1 to {len(CLASSES)}, visibility. Correct the line, or convert the sequences to COCO JSON."
        )
        try:
            values = [as_number(value) for value in text.split(",")]
        except ValueError:
            raise UserError(f"{where}, line {number}: not numbers separated by commas. {remedy}") from None
        if len(values) < 7 or not values[0].is_integer() or values[0] < 1:
            raise UserError(f"{where}, line {number}: no frame with a box and a flag. {remedy}")
        if values[6] not in (0, 1):
            raise UserError(f"{where}, line {number}: the flag is {values[6]:g} (a score of detections?). {remedy}")
        # The first year of MOT has -1 in place of classes: all are pedestrians.
        kind = values[7] if len(values) > 7 and values[7] != -1 else 1
        if kind not in range(1, len(CLASSES) + 1):
            raise UserError(f"{where}, line {number}: {kind:g} is no class of MOT. {remedy}")
        yield int(values[0]), (values[2] - 1, values[3] - 1, values[4], values[5]), int(kind), values[6] == 0


def _info(raw: bytes, where: str) -> _Info:
    """What a seqinfo.ini says, which may be empty; raises UserError."""
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(raw.decode("utf-8-sig", "replace"))
    except configparser.Error as error:
        raise UserError(f"{where} is no INI file ({str(error).splitlines()[0]}). Copy it again.") from error
    values = dict(parser["Sequence"]) if parser.has_section("Sequence") else {}

    def whole(key: str) -> int | None:
        text = values.get(key.lower(), "")
        if text and not (text.isascii() and text.isdecimal() and len(text) < 16):
            raise UserError(f"{where}: {key} {text[:40]!r} is not a whole number: correct it, or remove the line")
        return int(text) if text else None

    return _Info(
        values.get("imdir", "img1"),
        values.get("imext", ".jpg"),
        whole("seqLength") or 0,
        whole("imWidth"),
        whole("imHeight"),
    )
