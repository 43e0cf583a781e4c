"""Splits a dataset's annotations into a training and a validation file, before anything is prepped.

Validation images must stay out of pre-training: a backbone that has seen them makes a detector's AP look better than it
is. What is drawn is a group of images: one image alone, all of a folder (frames of one video), or all with the same
value of a key that COCO's image entries have (a patient, a camera). The place of a group in the draw follows from the
seed and its name alone, so few images change sides as a dataset grows (none where the validation images are listed).
COCO files keep every field; of VOC and YOLO the two files are COCO JSON. Seconds for a million boxes. Prefer the split
that a dataset states (`--split`) where there is one.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from jigsaw_pretrain import rng
from jigsaw_pretrain.config import Share, checked
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.annotations.coco import listed_name
from jigsaw_pretrain.formats.annotations.read import RawAnnotations, Reading, listed, read_annotations
from jigsaw_pretrain.formats.annotations.skipped import BoxReason
from jigsaw_pretrain.formats.annotations.table import Annotations, clean_name
from jigsaw_pretrain.formats.images.source import ImageSource
from jigsaw_pretrain.storage.store import Storage, location

TRAIN, VAL = "train.json", "val.json"

FOLDER = "folder"
"""The group of an image that is its folder."""

Document = Mapping[str, Any]


@dataclass(frozen=True)
class Split:
    """Two files of annotations, and what they hold.

    images, boxes: of the training and the validation file. left_out: boxes of neither file (not finite, or of an
    unknown category; of VOC and YOLO only: a COCO file's stay where their image goes, or in the training file).
    """

    train: Path
    val: Path
    images: tuple[int, int]
    boxes: tuple[int, int]
    left_out: int


def split(
    annotations: str | Path,
    images: str | Path,
    out: str | Path,
    *,
    share: float = 0.1,
    seed: int = 0,
    group: str | None = None,
    held_out: Sequence[str] | None = None,
    reading: Reading | None = None,
) -> Split:
    """Write OUT/train.json and OUT/val.json; where one of them is there as it would be written, the other one.

    So the same call goes on where it was cut short between the two.

    Args:
        annotations: COCO JSON, CrowdHuman odgt, or a folder of Pascal VOC XML, YOLO txt or MOT files; path or URL.
        images: What the file names are relative to: a folder, zip or tar; a path or a URL.
        out: The folder of the two files; they may not both be there.
        share: The share of the images that is validated on, 0 to 1; whole groups, so it is met or passed.
        seed: Another seed draws other images.
        group: What stays together beside an image: ``folder``, or a key of COCO's image entries.
        held_out: The validation images by name, in place of a draw.
        reading: How the annotations are to be understood.

    Raises:
        UserError: For annotations that cannot be read, a group that some image lacks, an unknown image in ``held_out``,
            and where one of the files would be empty, both are there, or one is that holds something else.
    """
    annotations, images = location(annotations, "annotations"), location(images, "images")
    folder = Path(location(out, "out"))
    checked(share, Share, "share")
    checked(seed, int, "seed")
    checked(group, str | None, "group")
    if isinstance(held_out, str):
        raise UserError(f"held_out must be a list of names, not {held_out}")
    there = [name for name in (VAL, TRAIN) if (folder / name).exists() or (folder / name).is_symlink()]
    if len(there) == 2:
        raise _already_there(folder / TRAIN)
    source = ImageSource(images)
    source.check()
    raw = read_annotations(annotations, images)
    found = listed(raw, source, replace(reading or Reading(), detailed=True))
    document = json.loads(raw.files[""]) if raw.kind == "coco" else _document(found)
    groups = _groups(document["images"], raw, group)
    chosen = _drawn(groups, share, seed) if held_out is None else _named(groups, held_out)
    if not 0 < len(chosen) < len(groups):
        side = TRAIN if chosen else VAL
        raise UserError(
            f"{raw.source}: {side} would hold no image ({len(groups)} images, {len(set(groups.values()))} groups). "
            "Choose another share, other groups, or other images."
        )
    parts = _part(document, chosen, inside=False), _part(document, chosen, inside=True)
    train, val = parts
    storage = Storage(folder)
    # Each file is whole or not there; what is there of another split, or of somebody else, stays what it is.
    contents = {VAL: json.dumps(val).encode(), TRAIN: json.dumps(train).encode()}
    for name in there:
        if not _holds(folder / name, contents[name]):
            raise _already_there(folder / name)
    storage.sweep("")
    for name, content in contents.items():
        if name not in there:
            storage.publish(name, content)
    boxes = len(train["annotations"]), len(val["annotations"])
    left_out = 0 if raw.kind == "coco" else len(found.label) - sum(boxes)
    return Split(folder / TRAIN, folder / VAL, (len(train["images"]), len(val["images"])), boxes, left_out)


def _holds(file: Path, content: bytes) -> bool:
    """Whether a file holds exactly these bytes."""
    return file.is_file() and file.stat().st_size == len(content) and file.read_bytes() == content


def _already_there(file: Path) -> UserError:
    return UserError(f"{file} is already there: name another folder with --out")


def _name(entry: Document) -> str:
    """The image that an entry lists: its cleaned file name, by which repeated entries are one."""
    written = listed_name(entry.get("file_name"), entry.get("coco_url"))
    return clean_name(written)[0] or written


def _groups(entries: Sequence[Document], raw: RawAnnotations, group: str | None) -> dict[str, str]:
    """The group of every image by its name; of an image that is listed again, the first entry's."""
    groups: dict[str, str] = {}
    for entry in entries:
        name = _name(entry)
        if group is None:
            found = name
        elif group == FOLDER:
            found = str(PurePosixPath(name).parent)
        elif group in entry:
            found = json.dumps(entry[group], sort_keys=True)
        else:
            known = sorted(set(entry) - {"id", "file_name", "width", "height"})
            raise UserError(
                f"{raw.source}: image {name} has no key {group!r}: name {FOLDER}, or a key that every image has"
                + (f" ({', '.join(known)})" if known else "")
            )
        groups.setdefault(name, found)
    return groups


def _drawn(groups: Mapping[str, str], share: float, seed: int) -> set[str]:
    """The images of as many groups, in the order of their draws, as reach the share."""
    sizes: dict[str, int] = {}
    for found in groups.values():
        sizes[found] = sizes.get(found, 0) + 1
    names = sorted(sizes)
    words = rng.uniform(rng.keys_of_texts(rng.key_of_text(seed, "validation split"), names))
    order = np.argsort(words, kind="stable").tolist()
    before = np.cumsum([0, *(sizes[names[nth]] for nth in order)])
    taken = {names[nth] for nth, count in zip(order, before[:-1], strict=True) if count < share * len(groups)}
    return {name for name, found in groups.items() if found in taken}


def _named(groups: Mapping[str, str], held_out: Sequence[str]) -> set[str]:
    """The images of a list; all of their groups."""
    wanted = {clean_name(name)[0] or name for name in held_out}
    if unknown := sorted(wanted - groups.keys()):
        told = ", ".join(unknown[:3]) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
        raise UserError(f"no image of the annotations is called {told}: name them as the annotations do")
    taken = {groups[name] for name in wanted}
    return {name for name, found in groups.items() if found in taken}


def _part(document: Document, chosen: set[str], inside: bool) -> dict[str, Any]:
    """The document with the chosen images alone, or with all but them; boxes of no image stay with the latter."""
    val_ids = {entry["id"] for entry in document["images"] if _name(entry) in chosen}
    entries = [entry for entry in document["images"] if (_name(entry) in chosen) == inside]
    boxes = [one for one in document["annotations"] if (one.get("image_id") in val_ids) == inside]
    return {**document, "images": entries, "annotations": boxes}


def _document(found: Annotations) -> dict[str, Any]:
    """Annotations of another kind as COCO JSON; boxes that are none, or of no known class, are left out."""
    assert found.details is not None
    unusable = (BoxReason.NOT_FINITE, BoxReason.UNKNOWN_CATEGORY)
    kept = np.flatnonzero(~np.isin(found.reason, unusable) & np.isfinite(found.xywh).all(axis=1) & (found.label >= 0))
    boxes: list[dict[str, Any]] = []
    for row in kept.tolist():
        box: dict[str, Any] = {
            "id": len(boxes) + 1,
            "image_id": int(found.image[row]) + 1,
            "category_id": int(found.label[row]) + 1,
            "bbox": found.xywh[row].tolist(),
            "area": float(found.xywh[row, 2] * found.xywh[row, 3]),
            "iscrowd": int(found.crowd[row]),
        }
        if found.ignored[row]:
            box["ignore"] = 1
        if found.details.segmentations[row]:
            box["segmentation"] = found.details.segmentations[row]
        boxes.append(box)
    sizes = zip(found.files, found.widths.tolist(), found.heights.tolist(), strict=True)
    return {
        "images": [
            {"id": nth + 1, "file_name": file, "width": width, "height": height}
            for nth, (file, width, height) in enumerate(sizes)
        ],
        "annotations": boxes,
        "categories": [{"id": nth + 1, "name": name} for nth, name in enumerate(found.classes)],
    }
