"""The pixel format of a set of images, told by the headers of some of them: of a dataset, and of what a detector reads.

Looking ends at the first ordinary colour picture, so a dataset of them costs a few headers (0.2 ms each locally, a
request each from a store).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.images.decode import ImageError
from jigsaw_pretrain.formats.images.source import ImageSource
from jigsaw_pretrain.formats.pixels import RGB8, PixelFormat, lossless
from jigsaw_pretrain.storage.store import map_ahead

SAMPLE = 256
"""Images looked at."""

Form = tuple[int, str]


@dataclass(frozen=True)
class PixelChoice:
    """What auto decided, and what to tell of it: nothing for ordinary pictures."""

    pixels: PixelFormat
    note: str = ""


def pixels_of_images(files: Sequence[str], source: ImageSource, option: str) -> PixelChoice:
    """The format of images by a sample of them.

    Args:
        files: the sample's names.
        source: where they are.
        option: what names a format in place of this choice, such as ``--pixels``; for messages.

    Raises:
        UserError: they do not agree.
        StoreError: the source cannot be read.
    """
    forms: Counter[Form] = Counter()
    for form in map_ahead(lambda file: _form(source, file), files, source.threads):
        if form is not None:
            forms[form] += 1
        if form == (3, "uint8"):
            break
    if not forms:
        return PixelChoice(RGB8)
    if (3, "uint8") in forms:
        deep = [form for form in forms if form[1] != "uint8"]
        note = f"some images hold more than 8-bit RGB ({_said(deep)}) and lose it; {option} names another format"
        return PixelChoice(RGB8, note if deep else "")
    chosen = max(forms, key=lambda form: (form[0], lossless(*form).itemsize))
    if set(forms) - {chosen} - ({(chosen[0], "uint8")} if chosen[1] == "uint16" else set()):
        counted = ", ".join(f"{_said([form])} ({count:,})" for form, count in forms.most_common(4))
        raise UserError(
            f"the images are of several forms: {counted}, of {forms.total():,} looked at. A dataset has only one: "
            f"name it with {option}=1xuint16 or the like; images of other forms are then skipped"
        )
    pixels = lossless(*chosen)
    note = f"pixels are kept as the images have them: {pixels}, as {pixels.member}"
    if pixels.channels == 1 and pixels.dtype == "uint8":
        note += f"; for 8-bit RGB, which networks with three input channels take, give {option}=rgb8"
    return PixelChoice(pixels, note)


def _said(forms: list[Form]) -> str:
    return " and ".join(f"{channels} x {dtype}" for channels, dtype in sorted(forms))


def _form(source: ImageSource, file: str) -> Form | None:
    """None where the image cannot be read, or not without loss: cutting tells why."""
    try:
        return source.raster(file).form
    except ImageError:
        return None
