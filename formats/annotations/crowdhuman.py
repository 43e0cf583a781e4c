"""Reads CrowdHuman: an odgt file, a JSON object per line with an image's ID and its ``gtboxes``.

The full-body box (``fbox``) of a ``person`` is an object. ``extra: {ignore: 1}`` marks it as ignored; a ``mask`` is a
region that is no single object. Images are called ID.jpg, and their sizes come from their headers. A second for 470,000
boxes.

A module of its own, because each kind of annotations is.
"""

from typing import Any

import msgspec

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.annotations.table import NOWHERE, BoxList, ImageEntry, ReadTable

MASK = "mask"
"""The tag of regions that are no single object."""


class OdgtBox(msgspec.Struct, gc=False):
    """An entry of ``gtboxes``."""

    tag: str
    fbox: tuple[float, float, float, float] | None = None
    extra: dict[str, Any] | None = None


class OdgtLine(msgspec.Struct, gc=False):
    """A line: an image."""

    ID: str
    gtboxes: list[OdgtBox]


def is_crowdhuman(raw: bytes) -> bool:
    """Whether the first line is of an odgt file, whatever its name is."""
    first = raw.lstrip(b"\xef\xbb\xbf \t\r\n").partition(b"\n")[0]
    return first.startswith(b"{") and b'"gtboxes"' in first


def read_crowdhuman(raw: bytes, source: str, detailed: bool = False) -> ReadTable:
    """Classes (the tags in use, sorted), image entries and boxes; raises UserError naming the line."""
    images: list[OdgtLine] = []
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        if not line.strip():
            continue
        try:
            images.append(msgspec.json.decode(line, type=OdgtLine))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise UserError(
                f"{source}, line {number}: not a record of CrowdHuman ({str(error)[:160]}). A line is a JSON object "
                "with ID and gtboxes, each of these with tag and fbox (x, y, width, height). Download or export it "
                "again."
            ) from error
    classes = sorted({box.tag for image in images for box in image.gtboxes} - {MASK})
    boxes = BoxList()
    for nth, image in enumerate(images):
        for box in image.gtboxes:
            ignored = (box.extra or {}).get("ignore") not in (None, 0, False, "0")
            label = classes.index(box.tag) if box.tag != MASK else 0
            boxes.add(nth, box.fbox or NOWHERE, label, ignored, crowd=box.tag == MASK)
    entries = [ImageEntry(f"{image.ID}.jpg", None, None, id=image.ID) for image in images]
    return ReadTable(classes, entries, boxes.columns(detailed))
