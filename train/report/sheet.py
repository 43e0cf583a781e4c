"""A sheet of jigsaws as the trainer sees them: regions outlined, each with its class, in a colour of its aspect group.

Two seconds for sixteen, most of it starting torch. For looking at data before a run; what a run really drew is
`pretrain --log-digest`'s business.
"""

import logging
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from jigsaw_pretrain.fonts import fitted
from jigsaw_pretrain.formats.dataset.dataset import Dataset, require_dataset
from jigsaw_pretrain.formats.jigsaw import Region, Template
from jigsaw_pretrain.formats.pixels import displayed
from jigsaw_pretrain.train.data.loader import JigsawLoader
from jigsaw_pretrain.train.data.remote import ReadOptions
from jigsaw_pretrain.train.recipe import DataOptions

log = logging.getLogger(__name__)

COLOURS = ((255, 196, 61), (92, 200, 255), (146, 232, 142), (232, 146, 232), (240, 240, 240))
"""Colours of the groups, by their codes, that stay apart for most colour-blind readers."""

_PAGE = (24, 26, 30)
_SHOWN = 448
_GAP = 16


def preview(dataset: Dataset, options: DataOptions, count: int = 16, access: ReadOptions | None = None) -> Image.Image:
    """Draw the first jigsaws of a run as the trainer sees them, regions outlined and labelled.

    Args:
        dataset: what the run is on.
        options: a recipe's section ``data``.
        count: jigsaws.
        access: how shards at a URL are read.
    """
    require_dataset(dataset)
    loader = JigsawLoader(dataset, options, workers=0, access=access)
    for note in loader.notes:
        log.info("%s", note)
    batch = loader.first(count)
    shown = displayed(batch.images.numpy(), dataset.pixels, *dataset.measured)
    return sheet(shown, batch.labels.tolist(), batch.groups.tolist(), options.template, dataset.classes)


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
    letters = max(11, round(side / 27))
    for nth, pixels in enumerate(images):
        tile = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
        pen = ImageDraw.Draw(tile, "RGBA")
        for region, label, code in zip(template.regions, labels[nth], groups[nth], strict=True):
            name = classes[label] if label < len(classes) else "background"
            _mark(pen, region, scale, name, COLOURS[code % len(COLOURS)], letters)
        page.paste(tile, (_GAP + nth % columns * (side + _GAP), _GAP + nth // columns * (side + _GAP)))
    return page


def _mark(
    pen: ImageDraw.ImageDraw, region: Region, scale: int, text: str, colour: tuple[int, int, int], letters: int
) -> None:
    """Outline one region and write its label on a dark plate in its lower left corner, folded where it is narrow."""
    left, top = region.left * scale, region.top * scale
    right, bottom = left + region.width * scale - 1, top + region.height * scale - 1
    pen.rectangle((left, top, right, bottom), outline=colour, width=2)
    margin = 4
    room = right - left - 3 * margin
    lines: list[str] = []
    for word in text.split(" "):
        together = f"{lines[-1]} {word}" if lines else word
        if lines and fitted(together, letters)[1].getlength(together) > room:
            lines.append(word)
        else:
            lines[-1:] = [together]
    for line in reversed(lines[: max(1, (bottom - top) // (2 * letters))]):
        line, font = fitted(line, letters, room)
        height = sum(font.getmetrics())
        plate = (left + 2, bottom - height - margin, left + 2 + font.getlength(line) + 2 * margin, bottom - 2)
        pen.rectangle(plate, fill=(0, 0, 0, 170))
        pen.text((left + 2 + margin, bottom - 2 - margin // 2), line, fill=colour, font=font, anchor="ld")
        bottom -= height
