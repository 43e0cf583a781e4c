"""Options that several commands of the detection stage share, as decorators of click."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from jigsaw_pretrain.config import choices
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.annotations.read import Reading
from jigsaw_pretrain.train.recipe import Device

DEVICES = choices(Device)

_exif = click.option(
    "--exif",
    type=click.Choice(("ignore", "apply")),
    default="ignore",
    show_default=True,
    help="ignore: boxes refer to stored pixels (COCO). apply: boxes were drawn on upright pictures, as in prep.",
)
_ignored = click.option(
    "--ignored",
    type=click.Choice(("skip", "use")),
    default="skip",
    show_default=True,
    help="What is marked as ignored or difficult. skip: no object, in AP as COCO's crowd. use: an object as any other.",
)
_split = click.option(
    "--split", metavar="NAME", help="Split of a YOLO or VOC dataset to use, such as train. [default: all]"
)
_voc_origin = click.option(
    "--voc-origin",
    type=click.IntRange(0, 1),
    help="From which number VOC files count pixels. [default: found out, and told]",
)


def reading(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say how annotations are to be understood, as prep has them; the command takes a ``Reading``."""

    @_exif
    @_ignored
    @_split
    @_voc_origin
    @functools.wraps(command)
    def with_reading(
        *words: Any, exif: str, ignored: str, split: str | None, voc_origin: int | None, **others: Any
    ) -> Any:
        return command(*words, reading=Reading(exif, ignored, split, voc_origin), **others)

    return with_reading


def check_weights(file: str, option: str) -> None:
    """Raise UserError where no weights file and no run's folder of that name is there; a URL is looked at later."""
    if "://" not in file and not Path(file).exists():
        raise UserError(f"{option} {file} is missing: name a weights file, or the folder of a run")
