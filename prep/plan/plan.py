"""The plan: every crop of a dataset, from its annotations and the seed alone, before a pixel is decoded.

A million boxes take some seconds and about 1 GB. Everything is keyed by image identity and ordinal, and the images are
put into an order drawn from those keys, so the plan does not depend on the order of the annotation file's images.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import msgspec
import numpy as np

from jigsaw_pretrain import rng
from jigsaw_pretrain.config import check_fields
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats import boxes
from jigsaw_pretrain.formats.annotations.read import Exif, Ignored, Reading, VocOrigin
from jigsaw_pretrain.formats.annotations.skipped import Note, Skipped, count_reasons, most_common
from jigsaw_pretrain.formats.annotations.table import Annotations
from jigsaw_pretrain.formats.dataset.dataset import (
    EXTENDED,
    FORMAT_VERSION,
    Context,
    ContextAt,
    CropsPerPart,
    Encoding,
    JpegQuality,
    NegativesPerPositive,
    Subsampling,
    drawn_context,
)
from jigsaw_pretrain.formats.jigsaw import GROUPS
from jigsaw_pretrain.formats.pixels import RGB8, PixelFormat, missing_value, pixel_format
from jigsaw_pretrain.prep.plan import negatives, positives
from jigsaw_pretrain.prep.plan.checks import box_notes
from jigsaw_pretrain.prep.plan.cost import crop_bytes, cutting_seconds
from jigsaw_pretrain.prep.plan.crop_table import CropTable, ImageTable, expected_boxes, join, member_boxes
from jigsaw_pretrain.prep.plan.forecast import CropSizes, Summary, count_crops
from jigsaw_pretrain.prep.plan.negatives import Ints

PLAN_VERSION = 2
"""Raised whenever the same annotations, options and seed would give other crops or parts.

2: ignored and repeated boxes are no objects, polygons stand in for boxes that are missing, VOC's pixels begin where the
files say, and no background is cut where an object's place is unknown.
"""

BYTES_PER_PART = 64 << 20

# What a draw is for, so that no two uses share words.
_ORDER, _ENLARGE, _NEGATIVE, _MEMBER = 1, 2, 3, 4


@dataclass(frozen=True)
class PlanOptions:
    """Every option that shapes the data, apart from the seed; section 3.1's values by default.

    negatives_per_positive: background crops for each object crop. context: how many times as wide and as high a box may
    become. crops_per_part: the most crops in a part (images are not divided). jpeg_quality, subsampling: of the crops.
    exif, ignored, split, voc_origin: how the annotations are to be understood (Reading). encode: ``pixels`` decodes
    images and encodes crops, ``lossless`` makes crops of the JPEGs' own blocks where it can (prep/crops.py).
    context_at: who draws how far a box is enlarged, ``prep`` once (the paper's way) or ``train`` anew each time.
    pixels: of the crops; None has the images decide (prep/images/pixel_format.py), before a plan is made. nodata: the
    value that marks missing data in float images, as text (``-9999``, ``nan``), ``none`` where all are measurements;
    None to look for one (formats/images/nodata.py).
    """

    negatives_per_positive: NegativesPerPositive = 0.1
    context: Context = 2.0
    crops_per_part: CropsPerPart = 4000
    jpeg_quality: JpegQuality = 95
    subsampling: Subsampling = "444"
    exif: Exif = "ignore"
    encode: Encoding = "pixels"
    context_at: ContextAt = "prep"
    pixels: PixelFormat | None = RGB8
    ignored: Ignored = "skip"
    split: str | None = None
    voc_origin: VocOrigin | None = None
    nodata: str | None = None

    def __post_init__(self) -> None:
        """Refuse words and numbers that are none of these, and a nodata that is no number."""
        check_fields(self)
        missing_value(self.nodata)

    @property
    def missing_value(self) -> float | None:
        """What marks missing data, where it was named."""
        return missing_value(self.nodata)

    @property
    def reading(self) -> Reading:
        """How the annotations are to be understood."""
        return Reading(self.exif, self.ignored, self.split, self.voc_origin, nodata=self.nodata)

    def to_dict(self) -> dict[str, Any]:
        """The options as plan.json and dataset.json hold them; one that came later only where it is not its default.

        So a dataset of version 1 stays what it was begun as, for every program that knows its options.
        """
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        chosen = {name: value for name, value in held.items() if name in _FIRST or value != _DEFAULTS[name]}
        return {name: value.to_dict() if isinstance(value, PixelFormat) else value for name, value in chosen.items()}

    @property
    def stored(self) -> PixelFormat:
        """The crops' pixel format, which is decided."""
        assert self.pixels is not None
        return self.pixels

    @property
    def format_version(self) -> int:
        """The dataset's format version: 1 where it has nothing that came later."""
        return FORMAT_VERSION if self.to_dict().keys() - _READ == _FIRST else EXTENDED

    @property
    def drawn_context(self) -> float | None:
        """The context that the trainer draws from; None where prep draws it."""
        return drawn_context(self.to_dict())


_FIRST = {"negatives_per_positive", "context", "crops_per_part", "jpeg_quality", "subsampling", "exif"}
"""The options of format version 1."""

_READ = {"ignored", "split", "voc_origin"}
"""Later options that decide what is read and change nothing of how it is stored."""

_DEFAULTS = {field.name: field.default for field in fields(PlanOptions)}


def options_of(recorded: Mapping[str, Any], where: str) -> PlanOptions:
    """The options that plan.json records; raises UserError for what this program does not know."""
    known = {name: value for name, value in recorded.items() if name in _DEFAULTS}
    pixels = pixel_format(recorded.get("pixels"), where)
    try:
        return PlanOptions(**known | {"pixels": pixels})
    except UserError as error:
        raise UserError(f"{where} is damaged ({error.message}). Prep the dataset again.") from error


@dataclass(frozen=True)
class Plan:
    """All crops of a dataset, and the parts they are cut in.

    first_image, first_crop: int64 [parts + 1], where each part's images and crops begin. listed_images: the images of
    the annotation file, with or without crops. wanted_negatives: as many as were asked for. annotations_sha256: of the
    annotation file. digest: SHA-256 of all that shapes shards and rows. notes: what else the user should know.
    """

    options: PlanOptions
    seed: int
    classes: tuple[str, ...]
    images: ImageTable
    crops: CropTable
    first_image: Ints
    first_crop: Ints
    listed_images: int
    wanted_negatives: int
    skipped: tuple[Skipped, ...]
    annotations_sha256: str
    digest: str
    notes: tuple[Note, ...] = ()

    @property
    def background(self) -> int:
        """C: the label of background crops."""
        return len(self.classes)

    @property
    def positives(self) -> int:
        """How many crops are of objects."""
        return int(np.count_nonzero(self.crops.label < self.background))

    def positives_of_images(self) -> dict[str, int]:
        """How many crops of objects each image has, by its identity."""
        images = self.crops.image[self.crops.label < self.background]
        return dict(zip(self.images.ids, np.bincount(images, minlength=len(self.images)).tolist(), strict=True))

    @property
    def part_count(self) -> int:
        """The number of parts."""
        return len(self.first_image) - 1

    def part(self, number: int) -> tuple[ImageTable, CropTable]:
        """Images and crops of one part, the crops' image indices relative to its images."""
        first, last = int(self.first_image[number]), int(self.first_image[number + 1])
        crops = self.crops.take(slice(int(self.first_crop[number]), int(self.first_crop[number + 1])))
        return self.images.cut(first, last), replace(crops, image=crops.image - first)

    def summary(self) -> Summary:
        """The figures of the dataset that the plan gives, its bytes and time estimated."""
        crops, context = self.crops, self.options.drawn_context
        cut = member_boxes(crops, self.images, context)
        sizes = CropSizes.of(expected_boxes(crops.boxes, crops.xywh, cut, context), crops.xywh, crops.group)
        pixels = boxes.areas(cut)
        part_of_crop = np.repeat(np.arange(self.part_count), np.diff(self.first_crop))
        options = self.options
        sizes_in_bytes = crop_bytes(pixels, options.jpeg_quality, options.subsampling, options.stored)
        image_pixels = int((self.images.widths * self.images.heights).sum())
        return Summary(
            classes=self.classes,
            counts=count_crops(crops.label, crops.group, len(self.classes)),
            images=len(self.images),
            images_listed=self.listed_images,
            negatives_wanted=self.wanted_negatives,
            parts=self.part_count,
            shards=len(np.unique(part_of_crop * len(GROUPS) + crops.group)),
            bytes=int(sizes_in_bytes.sum()),
            skipped=count_reasons(row.reason for row in self.skipped),
            slots=sizes.jigsaw().slots,
            sizes=sizes,
            seconds=cutting_seconds(
                len(self.images), image_pixels, len(crops), int(pixels.sum()), options.encode == "lossless"
            ),
            drawn_context=context,
            pixels=options.stored,
        )


def make_plan(annotations: Annotations, options: PlanOptions, seed: int) -> Plan:
    """Plan every crop. Raises UserError where no box can be used."""
    ordered, keys = shuffle(annotations, seed)
    chosen = positives.select(ordered, rng.derive_key(keys, _ENLARGE), options.context, options.context_at)
    skipped = (*ordered.skipped, *positives.unused(ordered, chosen.reason))
    notes = (*ordered.notes, *box_notes(ordered))
    if not len(chosen.rows):
        counts = count_reasons(row.reason for row in skipped)
        told = "".join(f" {note.line()}." for note in notes if note.grave)
        raise UserError(
            f"The annotation file holds no box that can be used; not used: {most_common(counts)}.{told} "
            "Check that --annotations is the file of these images."
        )
    touched = negatives.obstacles(
        ordered.image[chosen.solid], chosen.extents[chosen.solid], ordered.widths, ordered.heights
    )
    due = negatives.shares(np.bincount(ordered.image[chosen.rows], minlength=len(keys)), options.negatives_per_positive)
    empty = negatives.place(touched, rng.derive_key(keys, _NEGATIVE), due, chosen.enlarged)
    images, crops = join(ordered, chosen, empty, rng.derive_key(keys, _MEMBER))
    first_image, first_crop = parts(crops, images, options)
    return Plan(
        options=options,
        seed=seed,
        classes=ordered.classes,
        images=images,
        crops=crops,
        first_image=first_image,
        first_crop=first_crop,
        listed_images=len(ordered.ids),
        wanted_negatives=empty.wanted,
        skipped=skipped,
        annotations_sha256=ordered.sha256,
        notes=notes,
        digest=digest(options, seed, ordered.classes, images, crops, first_crop, skipped),
    )


def shuffle(annotations: Annotations, seed: int) -> tuple[Annotations, rng.U64]:
    """The annotations, images in an order drawn from their identities and boxes sorted along; each image's key."""
    keys = rng.keys_of_texts(seed, annotations.ids)
    drawn = rng.derive_key(keys, _ORDER)
    order = np.argsort(drawn)
    if len(np.unique(drawn)) < len(drawn):
        order = np.array(sorted(range(len(drawn)), key=lambda index: (drawn[index], annotations.ids[index])))
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    image = rank[annotations.image]
    boxes = np.lexsort((annotations.ordinal, image))
    columns = ("ordinal", "xywh", "label", "annotation_id", "has_id", "crowd", "ignored", "reason")
    ordered = replace(
        annotations,
        ids=tuple(annotations.ids[index] for index in order),
        files=tuple(annotations.files[index] for index in order),
        widths=annotations.widths[order],
        heights=annotations.heights[order],
        image_ids=(),
        details=None,
        image=image[boxes],
        **{name: getattr(annotations, name)[boxes] for name in columns},
    )
    return ordered, keys[order]


def parts(crops: CropTable, images: ImageTable, options: PlanOptions) -> tuple[Ints, Ints]:
    """Where parts begin, among images and among crops, each with the end appended: as full as the limits let them."""
    cut = member_boxes(crops, images, options.drawn_context)
    weights = crop_bytes(boxes.areas(cut), options.jpeg_quality, options.subsampling, options.stored)
    ends = np.searchsorted(crops.image, np.arange(len(images)), side="right")
    loads = np.diff(np.r_[0, np.cumsum(weights)][ends], prepend=0).tolist()
    counts = np.diff(ends, prepend=0).tolist()
    starts, crops_held, bytes_held = [0], 0, 0
    for index, (count, load) in enumerate(zip(counts, loads, strict=True)):
        full = crops_held + count > options.crops_per_part or bytes_held + load > BYTES_PER_PART
        if full and crops_held:
            starts.append(index)
            crops_held = bytes_held = 0
        crops_held += count
        bytes_held += load
    first_image = np.array([*starts, len(images)], dtype=np.int64)
    return first_image, np.r_[0, ends][first_image].astype(np.int64)


def digest(
    options: PlanOptions,
    seed: int,
    classes: tuple[str, ...],
    images: ImageTable,
    crops: CropTable,
    first_crop: Ints,
    skipped: tuple[Skipped, ...],
) -> str:
    """SHA-256 of everything in the plan that shapes shards, rows or skipped things."""
    choices = {"plan_version": PLAN_VERSION, "options": options.to_dict(), "seed": seed, "classes": classes}
    found = hashlib.sha256(msgspec.json.encode([choices, images.ids, images.files, skipped], order="deterministic"))
    arrays = (images.widths, images.heights, first_crop, *(getattr(crops, column.name) for column in fields(crops)))
    for array in arrays:
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        found.update(np.ascontiguousarray(little).data.cast("B"))
    return found.hexdigest()
