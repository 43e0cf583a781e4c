"""Annotations as a COCO document, and parts of one: what `prep split` and `detect subset` write.

A part of a COCO file keeps every field of the entries and boxes that it has. Annotations of another kind become a
document that is read as they are: what is no object stays, for no background is cut over it. A box without a place has
``bbox`` null, one of no known class a category that the document does not have. Seconds for a million boxes.
"""

import json
from collections.abc import Mapping, Set
from typing import Any

import numpy as np

from jigsaw_pretrain.formats.annotations.coco import listed_name
from jigsaw_pretrain.formats.annotations.read import RawAnnotations
from jigsaw_pretrain.formats.annotations.table import Annotations, Key, clean_name

Document = Mapping[str, Any]


def coco_document(raw: RawAnnotations, found: Annotations, first: int = 1) -> Document:
    """The COCO file as it stands, or annotations of another kind as COCO JSON.

    Args:
        raw: what was read.
        found: the same as a table, with details.
        first: the number of the first category, where the annotations number none.
    """
    return json.loads(raw.files[""]) if raw.kind == "coco" else _written(found, first)


def entry_name(entry: Document) -> str:
    """The image that an entry lists: its cleaned file name, by which repeated entries are one."""
    written = listed_name(entry.get("file_name"), entry.get("coco_url"))
    return clean_name(written)[0] or written


def part(document: Document, ids: Set[Key], inside: bool = True) -> dict[str, Any]:
    """The document with the images of these ids alone, or with all but them; boxes of no image stay with the latter."""
    entries = [entry for entry in document["images"] if (entry["id"] in ids) == inside]
    boxes = [one for one in document["annotations"] if (one.get("image_id") in ids) == inside]
    return {**document, "images": entries, "annotations": boxes}


def _written(found: Annotations, first: int) -> dict[str, Any]:
    """Annotations of another kind as COCO JSON."""
    assert found.details is not None
    unknown = first + len(found.classes)
    placed: list[bool] = np.isfinite(found.xywh).all(axis=1).tolist()  # type: ignore[assignment]
    boxes: list[dict[str, Any]] = []
    for row, (image, label, is_placed) in enumerate(
        zip(found.image.tolist(), found.label.tolist(), placed, strict=True)
    ):
        box: dict[str, Any] = {
            "id": row + 1,
            "image_id": image + 1,
            "category_id": first + label if label >= 0 else unknown,
            "bbox": found.xywh[row].tolist() if is_placed else None,
            "iscrowd": int(found.crowd[row]),
        }
        if is_placed:
            box["area"] = float(found.xywh[row, 2] * found.xywh[row, 3])
        if found.ignored[row]:
            box["ignore"] = 1
        # A box without a place would be given its polygon's.
        if is_placed and found.details.segmentations[row]:
            box["segmentation"] = found.details.segmentations[row]
        boxes.append(box)
    sizes = zip(found.files, found.widths.tolist(), found.heights.tolist(), strict=True)
    return {
        "images": [
            {"id": nth + 1, "file_name": file, "width": width, "height": height}
            for nth, (file, width, height) in enumerate(sizes)
        ],
        "annotations": boxes,
        "categories": [{"id": first + nth, "name": name} for nth, name in enumerate(found.classes)],
    }
