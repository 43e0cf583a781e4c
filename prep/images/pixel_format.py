"""``--pixels``: which pixel format a dataset gets, decided once, at the plan, from the headers of its images.

``auto`` looks at up to SAMPLE images that have boxes, drawn by keys of their identities, so every task of an array job
looks at the same ones; it ends at the first ordinary colour picture, so a dataset of them costs a few headers (0.2 ms
each locally, a request each from a store). What was decided is in plan.json; a run that goes on takes it from there.
"""

import numpy as np

from jigsaw_pretrain import rng
from jigsaw_pretrain.formats.annotations.skipped import BoxReason, Note
from jigsaw_pretrain.formats.annotations.table import Annotations
from jigsaw_pretrain.formats.images.missing import missing_files
from jigsaw_pretrain.formats.images.pixel_format import SAMPLE, PixelChoice, pixels_of_images
from jigsaw_pretrain.formats.images.source import ImageSource
from jigsaw_pretrain.formats.pixels import PixelFormat, named

AUTO = "auto"


def wanted(text: str) -> PixelFormat | None:
    """The format that ``--pixels`` names, None for auto; raises UserError."""
    return None if text == AUTO else named(text)


def choose_pixels(annotations: Annotations, source: ImageSource) -> PixelChoice:
    """The format of a dataset's images by a sample of them; raises UserError where they do not agree, StoreError."""
    return pixels_of_images(sample(annotations), source, "--pixels")


def missing_images(annotations: Annotations, source: ImageSource) -> Note | None:
    """A note where some of a sample of images are missing; raises UserError where all of them are."""
    missing, text = missing_files(sample(annotations), source)
    return Note("missing images", text, missing) if missing else None


def sample(annotations: Annotations) -> list[str]:
    """Files of images with usable boxes, in an order drawn from their identities."""
    usable = np.unique(annotations.image[annotations.reason == BoxReason.USABLE])
    usable = usable[usable >= 0]
    keys = rng.keys_of_texts(0, [annotations.ids[index] for index in usable])
    return [annotations.files[usable[place]] for place in np.argsort(keys, kind="stable")[:SAMPLE]]
