"""``--pixels``: which pixel format a dataset gets, decided once, at the plan, from the headers of its images.

``auto`` looks at up to SAMPLE images that have boxes, drawn by keys of their identities, so every task of an array job
looks at the same ones; it ends at the first ordinary colour picture, so a dataset of them costs a few headers (0.2 ms
each locally, a request each from a store). What was decided is in plan.json; a run that goes on takes it from there.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from jigsaw_pretrain import rng
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.annotations.skipped import BoxReason
from jigsaw_pretrain.formats.annotations.table import Annotations
from jigsaw_pretrain.formats.images.decode import ImageError
from jigsaw_pretrain.formats.images.source import ImageSource
from jigsaw_pretrain.formats.pixels import RGB8, PixelFormat, lossless, named
from jigsaw_pretrain.storage import map_ahead

AUTO = "auto"
SAMPLE = 256
Form = tuple[int, str]


@dataclass(frozen=True)
class PixelChoice:
    """What auto decided, and what to tell of it: nothing for ordinary pictures."""

    pixels: PixelFormat
    note: str = ""


def wanted(text: str) -> PixelFormat | None:
    """The format that ``--pixels`` names, None for auto; raises UserError."""
    return None if text == AUTO else named(text)


def choose_pixels(annotations: Annotations, source: ImageSource) -> PixelChoice:
    """The format of a dataset's images by a sample of them; raises UserError where they do not agree, StoreError."""
    forms: Counter[Form] = Counter()
    for form in map_ahead(lambda file: _form(source, file), sample(annotations), source.threads):
        if form is not None:
            forms[form] += 1
        if form == (3, "uint8"):
            break
    if not forms:
        return PixelChoice(RGB8)
    if (3, "uint8") in forms:
        deep = [form for form in forms if form[1] != "uint8"]
        note = f"some images hold more than 8-bit RGB ({_said(deep)}) and lose it; --pixels names another format"
        return PixelChoice(RGB8, note if deep else "")
    chosen = max(forms, key=lambda form: (form[0], lossless(*form).itemsize))
    if set(forms) - {chosen} - ({(chosen[0], "uint8")} if chosen[1] == "uint16" else set()):
        counted = ", ".join(f"{_said([form])} ({count:,})" for form, count in forms.most_common(4))
        raise UserError(
            f"the images are of several forms: {counted}, of {forms.total():,} looked at. A dataset has one: name it "
            "with --pixels, such as --pixels 1xuint16; images of another are then skipped"
        )
    pixels = lossless(*chosen)
    note = f"pixels are kept as the images have them: {pixels}, as {pixels.member}"
    if pixels.channels == 1 and pixels.dtype == "uint8":
        note += "; for 8-bit RGB, which networks with three input channels take, give --pixels rgb8"
    return PixelChoice(pixels, note)


def _said(forms: list[Form]) -> str:
    return " and ".join(f"{channels} x {dtype}" for channels, dtype in sorted(forms))


def sample(annotations: Annotations) -> list[str]:
    """Files of images with usable boxes, in an order drawn from their identities."""
    usable = np.unique(annotations.image[annotations.reason == BoxReason.USABLE])
    usable = usable[usable >= 0]
    keys = rng.keys_of_texts(0, [annotations.ids[index] for index in usable])
    return [annotations.files[usable[place]] for place in np.argsort(keys, kind="stable")[:SAMPLE]]


def _form(source: ImageSource, file: str) -> Form | None:
    """None where the image cannot be read, or not without loss: cutting tells why."""
    try:
        return source.raster(file).form
    except ImageError:
        return None
