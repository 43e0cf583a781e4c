"""A sheet of jigsaws as the trainer sees them: regions outlined, each with its class and aspect group.

Two seconds for sixteen, most of it starting torch. For looking at data before a run; what a run really drew is
`pretrain --log-digest`'s business.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.jigsaw import GROUPS, Region, Template
from jigsaw_pretrain.formats.pixels import display_note, displayed
from jigsaw_pretrain.train.data.access import access_from, access_options
from jigsaw_pretrain.train.data.loader import JigsawLoader
from jigsaw_pretrain.train.streams import FITS, StreamOptions

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont

COLOURS = {"S": (255, 196, 61), "T": (92, 200, 255), "W": (146, 232, 142)}
"""Colours of the groups that stay apart for most colour-blind readers."""

_PAGE = (24, 26, 30)
_SHOWN = 448
_GAP = 16


def sheet(
    images: npt.NDArray[np.uint8],
    labels: Sequence[Sequence[int]],
    groups: Sequence[Sequence[int]],
    template: Template,
    classes: Sequence[str],
) -> Image.Image:
    """Draw jigsaws, uint8 [n, size, size, 3], side by side; labels and group codes are [n, 4] by region."""
    scale = max(1, round(_SHOWN / template.size))
    side = template.size * scale
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    page = Image.new("RGB", (columns * (side + _GAP) + _GAP, rows * (side + _GAP) + _GAP), _PAGE)
    font = ImageFont.load_default(max(11, round(side / 30)))
    for nth, pixels in enumerate(images):
        tile = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
        pen = ImageDraw.Draw(tile, "RGBA")
        for region, label, code in zip(template.regions, labels[nth], groups[nth], strict=True):
            name = classes[label] if label < len(classes) else "background"
            _mark(pen, region, scale, f"{GROUPS[code]}  {name}", COLOURS[GROUPS[code]], font)
        page.paste(tile, (_GAP + nth % columns * (side + _GAP), _GAP + nth // columns * (side + _GAP)))
    return page


def _mark(
    pen: ImageDraw.ImageDraw, region: Region, scale: int, text: str, colour: tuple[int, int, int], font: Font
) -> None:
    """Outline one region and write its label on a dark plate in its lower left corner."""
    left, top = region.left * scale, region.top * scale
    right, bottom = left + region.width * scale - 1, top + region.height * scale - 1
    pen.rectangle((left, top, right, bottom), outline=colour, width=2)
    margin = 4
    text = shortened(text, right - left - 4 * margin, font)
    _, _, width, _ = font.getbbox(text)
    _, _, _, height = font.getbbox("Tg")
    plate = (left + 2, bottom - height - 2 * margin, left + 2 + width + 2 * margin, bottom - 2)
    pen.rectangle(plate, fill=(0, 0, 0, 170))
    pen.text((left + 2 + margin, bottom - height - margin - 1), text, fill=colour, font=font)


def shortened(text: str, room: float, font: Font) -> str:
    """``text``, cut and marked so where it is wider than ``room`` pixels."""
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(text + "…") > room:
        text = text[:-1]
    return text.rstrip() + "…"


@click.command()
@click.option("--data", required=True, metavar="OUT", help="The prepped dataset: a folder or URL.")
@click.option("--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help="The picture to write.")
@click.option("--count", default=16, show_default=True, type=click.IntRange(1, 400), help="How many jigsaws.")
@click.option("--seed", default=0, show_default=True, help="Seed of the run.")
@click.option("--size", default=224, show_default=True, help="Side of a jigsaw in pixels.")
@click.option("--split", default=64, show_default=True, help="Where the template is cut.")
@click.option("--fit", type=click.Choice(FITS), default="crop", show_default=True, help="How a crop meets its region.")
@access_options
@click.option("--augment/--no-augment", default=True, show_default=True, help="Augment as in training.")
def preview(
    data: str, out: Path, count: int, seed: int, size: int, split: int, fit: str, augment: bool, **access_settings: Any
) -> None:
    """Draw a sheet of jigsaws as the trainer sees them, regions outlined and labelled."""
    access = access_from(**access_settings)
    dataset, template = access.open_dataset(data), Template(size, split)
    options = StreamOptions(seed=seed, batch=count, fit=fit, augment=augment)
    loader = JigsawLoader(dataset, template, options, workers=0, stop_step=1, access=access)
    for note in loader.notes:
        click.echo(note, err=True)
    batch = next(iter(loader))
    shown = displayed(batch.images.numpy(), dataset.pixels, *dataset.measured)
    page = sheet(shown, batch.labels.tolist(), batch.groups.tolist(), template, dataset.classes)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        page.save(out)
    except (OSError, ValueError) as error:
        raise UserError(f"{out}: cannot write the picture ({error}): choose another file, such as sheet.png") from error
    click.echo(" ".join(filter(None, (f"{out}: {count} jigsaws", display_note(dataset.pixels)))))
