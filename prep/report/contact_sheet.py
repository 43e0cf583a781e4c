"""Contact sheets: many crops on one picture, each with its object's box drawn inside it.

The picture's edge is the crop (the enlarged box; where the trainer draws the context, the member with all of it), the
line within it the ground-truth box; a background crop has none.
A sheet of 24 takes about 30 ms and 60 KB. Crops are fetched one range each, so a sheet of a remote dataset costs one
request per crop: fine for a page, not for reading a dataset.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.dataset import layout
from jigsaw_pretrain.formats.dataset.dataset import MEND
from jigsaw_pretrain.formats.pixels import RGB8, DisplayRange, decode_member, displayed
from jigsaw_pretrain.storage.store import Storage

OBJECT = (230, 159, 0)
CELL = 132
GAP = 6


@dataclass(frozen=True)
class CropRow:
    """What a sheet needs of a row of crops.parquet; ``box`` is x, y, width, height in the image, None: background.

    margins: how far the stored member extends beyond the crop: left, top, right, bottom.
    """

    shard: str
    offset: int
    size: int
    label: int
    group: str
    left: int
    top: int
    right: int
    bottom: int
    box: tuple[float, float, float, float] | None
    margins: tuple[int, int, int, int] = (0, 0, 0, 0)


def thumbnail(storage: Storage, crop: CropRow, cell: int = CELL, display: DisplayRange | None = None) -> Image.Image:
    """The crop scaled to fit a cell, with the object's box; raises UserError for a crop that cannot be read.

    display: how members that are no JPEG are shown.
    """
    name = f"{layout.SHARDS}/{crop.shard}"
    try:
        raw = storage.read_range(name, crop.offset, crop.size)
    except FileNotFoundError as error:
        raise UserError(f"{storage.describe(name)} is missing. {MEND}") from error
    member = Image.fromarray(_shown(raw, crop, display, storage.describe(name)))
    margins = crop.margins
    image = member.crop((margins[0], margins[1], member.width - margins[2], member.height - margins[3]))
    scale = min(cell / image.width, cell / image.height, 4.0)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    image = image.resize(size, Image.Resampling.LANCZOS)
    if crop.box is not None:
        x, y = (crop.box[0] - crop.left) * scale, (crop.box[1] - crop.top) * scale
        right = min(x + crop.box[2] * scale, size[0] - 1)
        bottom = min(y + crop.box[3] * scale, size[1] - 1)
        outline = (max(0, x), max(0, y), max(0, x, right), max(0, y, bottom))
        draw = ImageDraw.Draw(image)
        draw.rectangle(outline, outline=(0, 0, 0), width=3)
        draw.rectangle(outline, outline=OBJECT, width=1)
    return image


def _shown(raw: bytes, crop: CropRow, display: DisplayRange | None, where: str) -> npt.NDArray[np.uint8]:
    left, top, right, bottom = crop.margins
    width, height = crop.right - crop.left + left + right, crop.bottom - crop.top + top + bottom
    pixels = RGB8 if display is None else display.pixels
    whole = decode_member(raw, pixels, width, height)
    if whole is None:
        raise UserError(f"{where} holds a crop that is no {pixels.member} of {width}x{height} pixels. {MEND}")
    return whole if display is None else displayed(whole, display.pixels, display.mean, display.std)


def sheet(
    storage: Storage, crops: Sequence[CropRow], columns: int, cell: int = CELL, display: DisplayRange | None = None
) -> bytes:
    """A transparent WebP of the crops in rows of ``columns``, each centred in its cell."""
    columns = max(1, min(columns, len(crops)))
    rows = -(-len(crops) // columns)
    pitch = cell + GAP
    page = Image.new("RGBA", (columns * pitch - GAP, max(1, rows) * pitch - GAP), (0, 0, 0, 0))
    for i, crop in enumerate(crops):
        small = thumbnail(storage, crop, cell, display)
        at = (i % columns) * pitch + (cell - small.width) // 2, (i // columns) * pitch + (cell - small.height) // 2
        page.paste(small, at)
    sink = io.BytesIO()
    page.save(sink, "WEBP", quality=82)
    return sink.getvalue()
