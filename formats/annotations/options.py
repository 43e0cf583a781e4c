"""Options that say how annotations and their images are read: declared once, for every command that takes both.

A module of its own, because commands of two stages take them and libraries need no click.
"""

import functools
from collections.abc import Callable
from typing import Any

import click

from jigsaw_pretrain.formats.annotations.read import Reading

annotations = click.option(
    "--annotations",
    required=True,
    metavar="FILE",
    help="COCO JSON, CrowdHuman odgt, or a folder of Pascal VOC XML, YOLO txt or MOT files; a path or a URL.",
)
images = click.option(
    "--images",
    required=True,
    metavar="DIR",
    help="What the file names are relative to: a folder, zip or tar; a path or a URL.",
)
exif = click.option(
    "--exif",
    type=click.Choice(("ignore", "apply")),
    default="ignore",
    show_default=True,
    help="ignore: boxes refer to stored pixels (COCO). apply: boxes were drawn on upright pictures.",
)
ignored = click.option(
    "--ignored",
    type=click.Choice(("skip", "use")),
    default="skip",
    show_default=True,
    help="What the annotations mark as ignored (COCO's and CrowdHuman's `ignore`, VOC's `difficult`, MOT's flag 0). "
    "skip: no object, no background over it, in AP as COCO's crowd. use: an object as any other.",
)
split = click.option(
    "--split", metavar="NAME", help="The split of a YOLO or VOC dataset to use, such as train; all images by default."
)
voc_origin = click.option(
    "--voc-origin",
    type=click.IntRange(0, 1),
    help="From which number Pascal VOC files count pixels; found out by default, and told.",
)
nodata = click.option(
    "--nodata",
    metavar="VALUE",
    help="What marks missing data in float images, such as -9999 or nan, beside the value that GDAL's tag says: left "
    "out of mean and std, and filled by the image's mean. none: every value was measured. By default a value that "
    "looks like it is refused, with its name.",
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
        exif: str,
        ignored: str,
        split: str | None,
        voc_origin: int | None,
        nodata: str | None,
        **others: Any,
    ) -> Any:
        return command(*words, reading=Reading(exif, ignored, split, voc_origin, nodata=nodata), **others)

    return with_reading
