"""Options that say how annotations and their images are read: declared once, for every command that takes both.

A module of its own, because commands of two stages take them and libraries need no click.
"""

import functools
from collections.abc import Callable
from typing import Any

import click

from jigsaw_pretrain.config import choices
from jigsaw_pretrain.formats.annotations.read import Exif, Ignored, Reading

annotations = click.option(
    "--annotations",
    required=True,
    metavar="FILE",
    help="Read the annotations in FILE: COCO JSON, CrowdHuman odgt, or a folder of Pascal VOC XML, YOLO "
    "txt or MOT files; a path or a URL.",
)
images = click.option(
    "--images",
    required=True,
    metavar="DIR",
    help="Look for the images in DIR, which their file names are relative to: a folder, zip or tar; a path or a URL.",
)
exif = click.option(
    "--exif",
    type=click.Choice(choices(Exif)),
    default="ignore",
    show_default=True,
    help="ignore takes the boxes as drawn on the stored pixels (COCO), apply as drawn on upright pictures.",
)
ignored = click.option(
    "--ignored",
    type=click.Choice(choices(Ignored)),
    default="skip",
    show_default=True,
    help="Say what becomes of objects that are marked as ignored (COCO's and CrowdHuman's `ignore`, VOC's "
    "`difficult`, MOT's flag 0). skip does not use them as objects, cuts no background over them, and "
    "treats them in AP as COCO's crowd regions. use treats them as any other object.",
)
split = click.option(
    "--split",
    metavar="NAME",
    help="Use this split of a YOLO or VOC dataset, such as train. All images are used by default.",
)
voc_origin = click.option(
    "--voc-origin",
    type=click.IntRange(0, 1),
    help="Count the pixels of Pascal VOC files from this number. By default prep works it out and reports it.",
)
nodata = click.option(
    "--nodata",
    metavar="VALUE",
    help="Take VALUE, such as -9999 or nan, for missing data in float images, beside the value that GDAL's "
    "tag says. It is left out of mean and std, and the image's mean fills it. none says that every "
    "value was measured. By default a value that looks like missing data is refused and named.",
)


def each(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of a Reading, one by one."""
    return exif(ignored(split(voc_origin(nodata(command)))))


def reading(command: Callable[..., Any]) -> Callable[..., Any]:
    """The same, of which the command gets a ``reading``."""

    @each
    @functools.wraps(command)
    def with_reading(
        *words: Any,
        exif: Exif,
        ignored: Ignored,
        split: str | None,
        voc_origin: int | None,
        nodata: str | None,
        **others: Any,
    ) -> Any:
        return command(*words, reading=Reading(exif, ignored, split, voc_origin, nodata=nodata), **others)

    return with_reading
