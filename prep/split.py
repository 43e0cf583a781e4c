"""Splits a dataset's annotations into a training and a validation file, before anything is prepped.

Validation images must stay out of pre-training: a backbone that has seen them makes a detector's AP look better than it
is. What is drawn is a group of images: one image alone, all of a folder (frames of one video), or all with the same
value of a key that COCO's image entries have (a patient, a camera). The place of a group in the draw follows from the
seed and its name alone, so few images change sides as a dataset grows (none where the validation images are listed).
COCO files keep every field; of other kinds the two files are COCO JSON (formats/annotations/document.py). Seconds for a
million boxes. Prefer the split that a dataset states (`--split`) where there is one.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np

from jigsaw_pretrain import rng
from jigsaw_pretrain.config import Share, checked
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.annotations.document import Document, coco_document, entry_name, part
from jigsaw_pretrain.formats.annotations.read import RawAnnotations, Reading, listed, read_annotations
from jigsaw_pretrain.formats.annotations.table import clean_name
from jigsaw_pretrain.formats.images.source import ImageSource
from jigsaw_pretrain.storage.files import holds
from jigsaw_pretrain.storage.store import Storage, location

TRAIN, VAL = "train.json", "val.json"

FOLDER = "folder"
"""The group of an image that is its folder."""


@dataclass(frozen=True)
class Split:
    """Two files of annotations, and what they hold.

    images, boxes: of the training and the validation file. left_out, images_left_out: boxes and images of neither file,
    because the image cannot be used (of other kinds than COCO only: a COCO file's stay where their image goes, or in
    the training file).
    """

    train: Path
    val: Path
    images: tuple[int, int]
    boxes: tuple[int, int]
    left_out: int
    images_left_out: int = 0


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
    there = [name for name in (VAL, TRAIN) if os.path.lexists(folder / name)]
    if len(there) == 2:
        raise _already_there(folder / TRAIN)
    source = ImageSource(images)
    source.check()
    raw = read_annotations(annotations, images)
    found = listed(raw, source, replace(reading or Reading(), detailed=True))
    document = coco_document(raw, found)
    groups = _groups(document["images"], raw, group)
    chosen = _drawn(groups, share, seed) if held_out is None else _named(groups, held_out)
    if not 0 < len(chosen) < len(groups):
        side = TRAIN if chosen else VAL
        raise UserError(
            f"{raw.source}: {side} would hold no image ({len(groups)} images, {len(set(groups.values()))} groups). "
            "Choose another share, other groups, or other images."
        )
    ids = {entry["id"] for entry in document["images"] if entry_name(entry) in chosen}
    parts = part(document, ids, inside=False), part(document, ids)
    train, val = parts
    storage = Storage(folder)
    # Each file is whole or not there; what is there of another split, or of somebody else, stays what it is.
    contents = {VAL: json.dumps(val).encode(), TRAIN: json.dumps(train).encode()}
    for name in there:
        if not holds(folder / name, contents[name]):
            raise _already_there(folder / name)
    storage.sweep("")
    for name, content in contents.items():
        if name not in there:
            storage.publish(name, content)
    boxes = len(train["annotations"]), len(val["annotations"])
    lost = () if raw.kind == "coco" else found.skipped
    left_out = sum(not row.is_image for row in lost)
    images_of = len(train["images"]), len(val["images"])
    return Split(folder / TRAIN, folder / VAL, images_of, boxes, left_out, len(lost) - left_out)


def _already_there(file: Path) -> UserError:
    return UserError(f"{file} is already there: name another folder with --out")


def _groups(entries: Sequence[Document], raw: RawAnnotations, group: str | None) -> dict[str, str]:
    """The group of every image by its name; of an image that is listed again, the first entry's."""
    groups: dict[str, str] = {}
    for entry in entries:
        name = entry_name(entry)
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
