"""Ground truth as detectors need it, from annotations of any kind that prep takes too (formats/annotations/).

Images with their boxes, labels, crowd flags and segmentations. Labels are 0..C-1 in ascending category id, as
everywhere in this project. What cannot be trained on (a box that is not finite, or has no area inside its image, or a
category that nobody defines) is left out of training and counted; ground truth for AP keeps every finite box as it
stands. A million boxes take seconds.

Crowd regions and what the annotations mark as ignored are no objects to learn. For AP both are COCO's crowd regions: a
detection that lies on one counts neither for nor against the detector. Regions of no category (COCO's ``category_id``
-1) are crowd regions of every class.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from jigsaw_pretrain import rng
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.annotations.coco import rle_runs
from jigsaw_pretrain.formats.annotations.document import coco_document, part
from jigsaw_pretrain.formats.annotations.read import KINDS, RawAnnotations, Reading, listed, read_annotations
from jigsaw_pretrain.formats.annotations.skipped import BoxReason
from jigsaw_pretrain.formats.annotations.table import Annotations, Key
from jigsaw_pretrain.formats.boxes import FARTHEST
from jigsaw_pretrain.formats.images.missing import ASKED, missing_files
from jigsaw_pretrain.formats.images.source import ImageSource
from jigsaw_pretrain.words import counted

logger = logging.getLogger(__name__)

NO_LABEL = -1
"""The label of regions of no category."""


@dataclass(frozen=True)
class ImageRecord:
    """One image and what can be trained on in it.

    boxes: float64 [n, 4], left, top, right, bottom in pixels, cut to the image. labels: int64 [n], 0..C-1, or NO_LABEL
    of a region of no category. crowd: bool [n], regions that are no single object, or that the annotations mark as
    ignored. segmentations: one polygon list or RLE per box, None where there is none.
    """

    id: Key
    file_name: str
    width: int
    height: int
    boxes: npt.NDArray[np.float64]
    labels: npt.NDArray[np.int64]
    crowd: npt.NDArray[np.bool_]
    segmentations: tuple[Any, ...]


@dataclass(frozen=True)
class GroundTruth:
    """Annotations of any kind, read for a detector.

    source: what to call them in messages. categories: (id, name) in label order; the label is the id where the
    annotations number no categories. truth: the ground truth as pycocotools wants it, with ids made unique from 1
    (COCOeval takes an id of 0 for "unmatched", and ids repeat in the wild); beside it, under ``regions``, those of no
    category, which coco_eval.score makes crowd regions of the classes that are detected. unusable: boxes left out of
    training. other_ids: ids of entries that list an image again, and the image's. exif, nodata: as of Reading.
    """

    source: str
    images: tuple[ImageRecord, ...]
    categories: tuple[tuple[int, str], ...]
    truth: dict[str, Any]
    unusable: int
    other_ids: Mapping[Key, Key] = field(default_factory=dict)
    exif: str = "ignore"
    nodata: str | None = None

    @property
    def classes(self) -> list[str]:
        """What to call the classes, in label order."""
        return class_names(self.categories)

    @property
    def objects(self) -> int:
        """How many boxes there are to learn."""
        return sum(int(np.count_nonzero(~record.crowd)) for record in self.images)

    @property
    def regions(self) -> int:
        """How many boxes are crowd regions, or marked as ignored: no objects to learn."""
        return sum(int(np.count_nonzero(record.crowd)) for record in self.images)

    @property
    def segmented(self) -> float:
        """The share of the objects to learn that come with a segmentation, 0 to 1 (1 where there is none)."""
        given = [
            one is not None
            for record in self.images
            for one, crowd in zip(record.segmentations, record.crowd.tolist(), strict=True)
            if not crowd
        ]
        return sum(given) / len(given) if given else 1.0


def class_names(categories: Sequence[tuple[int, str]]) -> list[str]:
    """What to call each of some categories, all by other names: its name, with its id where others have that name."""
    often = Counter(name for _, name in categories)
    shown = [name if often[name] == 1 else f"{name} (category {number})" for number, name in categories]
    if len(set(shown)) == len(shown):
        return shown
    return [f"{name} (category {number})" for number, name in categories]


def check_places(annotations: str, images: str | None, option: str = "--annotations") -> None:
    """Raise UserError where a local path of a dataset is not there, at once; a URL is looked at when it is read."""
    if "://" not in annotations and not Path(annotations).exists():
        raise UserError(f"{annotations}: no such file or folder. Name the annotations with {option}: {KINDS}.")
    if images is not None:
        ImageSource(images).check()


def check_images(annotations: GroundTruth, images: str, option: str = "--images") -> None:
    """Look at the headers of a sample of the images, before anything is trained or evaluated.

    Raises UserError where one is not there, cannot be read, or is of another size than the annotations say.
    """
    source = ImageSource(images)
    order = rng.permutation(rng.key_of_text(0, "images whose files are looked at"), len(annotations.images))
    records = [annotations.images[place] for place in order[:ASKED]]
    files = [record.file_name for record in records]
    missing, said = missing_files(files, source, option)
    if missing:
        raise UserError(f"{said}. Check {option}, or take such images out of the annotations.")
    for record, found in zip(records, source.measure(files, annotations.exif), strict=True):
        if found != (record.width, record.height):
            wanted = f"{record.width}x{record.height}"
            why = found if isinstance(found, str) else f"its size is {found[0]}x{found[1]}, annotations say {wanted}"
            raise UserError(
                f"{source.describe().rstrip('/')}/{record.file_name} cannot be used ({why}): replace it, or take it "
                "out of the annotations"
            )


POLYGONS = "polygons [[x, y, x, y, x, y, ...]], or a run-length encoding {size: [height, width], counts} of the image"
"""What a segmentation may be."""


def mask_trouble(segmentation: Any, height: int, width: int) -> str | None:
    """Why a segmentation is no mask of an image of that size; None where it is one."""
    if segmentation is None:
        return "has no segmentation"
    if isinstance(segmentation, list):
        return None if _are_polygons(segmentation) else "has a segmentation that is no list of polygons"
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        return "has a segmentation that is neither polygons nor a run-length encoding"
    if segmentation["size"] != [height, width]:
        return f"has a mask of size {segmentation['size']}, and its image is of [{height}, {width}] (height, width)"
    try:
        runs = rle_runs(segmentation["counts"])
        whole = sum(runs) == height * width and min(runs) >= 0
    except (TypeError, ValueError, AttributeError, OverflowError):
        whole = False
    return None if whole else "has a run-length encoding that does not cover its image"


def _are_polygons(segmentation: list[Any]) -> bool:
    """Whether pycocotools reads a list as polygons: it takes a first one of two points for a box."""
    for polygon in segmentation:
        if not isinstance(polygon, list) or len(polygon) % 2:
            return False
        if not all(type(one) in (int, float) and abs(one) < FARTHEST for one in polygon):
            return False
    return bool(segmentation) and len(segmentation[0]) >= 6


def check_masks(truth: GroundTruth, needed: bool) -> None:
    """Raise UserError where a segmentation is no mask, or where ``needed`` and a box has none."""
    sizes = {record.id: record for record in truth.images}
    wrong: list[str] = []
    for one in (*truth.truth["annotations"], *truth.truth["regions"]):
        segmentation, record = one.get("segmentation"), sizes.get(one["image_id"])
        # The box of a region of no category is its mask. Of a subset the other images are not looked at.
        if record is None or (segmentation is None and not (needed and "category_id" in one)):
            continue
        if (trouble := mask_trouble(segmentation, record.height, record.width)) is not None:
            wrong.append(f"the box {one['bbox']} of {record.file_name} {trouble}")
    if wrong:
        others = f" (and {len(wrong) - 1:,} more)" if len(wrong) > 1 else ""
        remedy = "annotate masks, or leave --kind segm out" if needed else f"write {POLYGONS}"
        raise UserError(f"{truth.source}: {wrong[0]}{others}: {remedy}")


def read_ground_truth(annotations: str, images: str | None, reading: Reading | None = None) -> GroundTruth:
    """Read annotations of any kind.

    Args:
        annotations: COCO JSON, CrowdHuman odgt, or a folder of Pascal VOC XML, YOLO txt or MOT files; path or URL.
        images: What the file names are relative to: a folder, zip or tar; a path or a URL. None where only COCO's own
            sizes are needed.
        reading: How the annotations are to be understood.

    Raises:
        UserError: They cannot be read, list no image or no category, or hold a box of an unknown image or category.
    """
    return _ground_truth(*_listed(annotations, images, reading))


def _listed(
    annotations: str, images: str | None, reading: Reading | None
) -> tuple[RawAnnotations, Annotations, Reading]:
    """What was read, the same as a table with details, and how it was read."""
    reading = replace(reading or Reading(), detailed=True)
    source = ImageSource(images or ".")
    if images is not None:
        source.check()
    raw = read_annotations(annotations, images or ".")
    if raw.kind in ("yolo", "crowdhuman") and images is None:
        raise UserError(f"{raw.source} does not give the sizes of its images, which are needed: give --images")
    return raw, listed(raw, source, reading), reading


def _ground_truth(raw: RawAnnotations, found: Annotations, reading: Reading) -> GroundTruth:
    for note in found.notes:
        logger.log(logging.WARNING if note.grave else logging.INFO, note.line())
    if not found.files:
        raise UserError(f"{raw.source} lists no image that can be used: check it with `jigsaw-prep doctor`")
    if not found.classes:
        raise UserError(f"{raw.source} lists no categories: add them")
    if any(number != int(number) for number in found.category_ids):
        raise UserError(f"{raw.source} has a category id that is no whole number: give each category a whole number")
    boxes, crowd = _boxes(found), found.crowd | found.ignored
    regions = _regions(found)
    usable = (found.reason == BoxReason.USABLE) & ((found.label >= 0) | regions) & _with_area(boxes)
    order = np.argsort(found.image, kind="stable")
    starts = np.searchsorted(found.image[order], np.arange(len(found.files) + 1))
    details = found.details
    assert details is not None
    records = []
    for index, rows in enumerate(np.split(order, starts[1:-1])):
        rows = rows[usable[rows]]
        records.append(
            ImageRecord(
                found.image_ids[index],
                found.files[index],
                int(found.widths[index]),
                int(found.heights[index]),
                boxes[rows],
                found.label[rows],
                crowd[rows],
                tuple(details.segmentations[row] for row in rows.tolist()),
            )
        )
    categories = tuple((int(number), name) for number, name in zip(found.category_ids, found.classes, strict=True))
    unusable = len(usable) - int(usable.sum()) + sum(row.image_file is None for row in found.skipped)
    truth = _truth(found, crowd, records, categories)
    return GroundTruth(
        raw.source, tuple(records), categories, truth, unusable, found.other_ids, reading.exif, reading.nodata
    )


def _regions(found: Annotations) -> npt.NDArray[np.bool_]:
    """Which boxes are crowd regions of no category: bool [n]."""
    return (found.label < 0) & found.crowd & (found.reason == BoxReason.USABLE)


def _boxes(found: Annotations) -> npt.NDArray[np.float64]:
    """Left, top, right, bottom of every box, cut to its image; zeros where it is no box."""
    finite = np.isfinite(found.xywh.sum(axis=1))
    corners = np.concatenate((found.xywh[:, :2], found.xywh[:, :2] + found.xywh[:, 2:]), axis=1)
    limits = np.stack([found.widths, found.heights, found.widths, found.heights], axis=1)[found.image]
    return np.clip(np.where(finite[:, None], corners, 0), 0, limits)


def _with_area(boxes: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    return (boxes[:, 2] - boxes[:, 0] >= 1e-2) & (boxes[:, 3] - boxes[:, 1] >= 1e-2)


def _areas(found: Annotations, kept: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """The boxes' areas: the file's, or the polygon's or box's where it has none, 0, or a share of the image."""
    assert found.details is not None
    given, whole = found.details.areas, found.xywh[:, 2] * found.xywh[:, 3]
    with np.errstate(invalid="ignore"):
        wrong = ~np.isnan(given) & ((given <= 0) | ((given <= 1) & (whole > 2)))
    areas = np.where(np.isnan(given) | wrong, whole, given)
    for row in kept[wrong[kept]].tolist():
        polygons = found.details.segmentations[row]
        if isinstance(polygons, list):
            areas[row] = sum(_polygon_area(np.array(one, dtype=np.float64)) for one in polygons) or whole[row]
    if wrong[kept].any():
        logger.warning(
            "%d boxes have an area of 0 or in shares of their image: it is computed from the polygon or box",
            wrong[kept].sum(),
        )
    return areas


def _polygon_area(polygon: npt.NDArray[np.float64]) -> float:
    """The area of a polygon, x and y in turn."""
    if polygon.ndim != 1 or len(polygon) < 6 or len(polygon) % 2:
        return 0.0
    x, y = polygon[::2], polygon[1::2]
    return float(abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2)


def _truth(
    found: Annotations,
    crowd: npt.NDArray[np.bool_],
    records: Sequence[ImageRecord],
    categories: Sequence[tuple[int, str]],
) -> dict[str, Any]:
    """The ground truth for COCOeval: every finite box of a known category, areas filled in where the file has none.

    Beside it the finite regions of no category.
    """
    assert found.details is not None
    in_numbers, of_none = np.isfinite(found.xywh).all(axis=1), _regions(found)
    kept = np.flatnonzero(in_numbers & ((found.label >= 0) | of_none))
    areas = _areas(found, kept)
    annotations: list[dict[str, Any]] = []
    regions: list[dict[str, Any]] = []
    for row in kept.tolist():
        record = {
            "image_id": records[found.image[row]].id,
            "bbox": found.xywh[row].tolist(),
            "area": float(areas[row]),
            "iscrowd": int(crowd[row]),
        }
        if found.details.segmentations[row]:
            record["segmentation"] = found.details.segmentations[row]
        if of_none[row]:
            regions.append(record)
        else:
            of_class = {"id": len(annotations) + 1, "category_id": categories[found.label[row]][0]}
            annotations.append(of_class | record)
    return {
        "images": [
            {"id": one.id, "file_name": one.file_name, "width": one.width, "height": one.height} for one in records
        ],
        "annotations": annotations,
        "regions": regions,
        "categories": [{"id": number, "name": name} for number, name in categories],
    }


def subset(truth: GroundTruth, count: int | None, seed: int) -> GroundTruth:
    """The same with ``count`` of its images to train on (all where None), drawn by keys of their names, in their order.

    A smaller count's images are among a larger one's of the same seed, whatever the order of the images in the file.
    """
    if count is None or count >= len(truth.images):
        return truth
    keys = rng.keys_of_texts(seed, [PurePosixPath(one.file_name).with_suffix("").as_posix() for one in truth.images])
    places = np.sort(np.argsort(keys, kind="stable")[:count])
    return replace(truth, images=tuple(truth.images[int(place)] for place in places))


@dataclass(frozen=True)
class SubsetDocument:
    """Some of the images as COCO JSON.

    images_left_out: those that cannot be used, which are not drawn. left_out: boxes of these, or of no listed image.
    """

    document: Mapping[str, Any]
    images_left_out: int
    left_out: int


def subset_document(annotations: str, images: str, reading: Reading | None, count: int, seed: int) -> SubsetDocument:
    """The images that ``subset`` takes of these annotations, with all that is said of them.

    Raises UserError as read_ground_truth does.
    """
    raw, found, reading = _listed(annotations, images, reading)
    files = {record.file_name for record in subset(_ground_truth(raw, found, reading), count, seed).images}
    # Categories are numbered as read_ground_truth numbers them.
    document = coco_document(raw, found, first=0)
    if raw.kind == "coco":
        own = {one for one, file in zip(found.image_ids, found.files, strict=True) if file in files}
        ids = own | {other for other, first in found.other_ids.items() if first in own}
    else:
        ids = {entry["id"] for entry in document["images"] if entry["file_name"] in files}
    unusable = sum(row.is_image for row in found.skipped)
    return SubsetDocument(part(document, ids), unusable, len(found.skipped) - unusable)


def require_objects(validation: GroundTruth) -> None:
    """Raise UserError where there is nothing to judge a detector by."""
    if not validation.objects:
        raise UserError(
            f"{validation.source} has no object to judge by in {counted(len(validation.images), 'image')}: name other "
            "annotations, or none for no AP"
        )


def require_same_classes(training: GroundTruth, validation: GroundTruth) -> None:
    """Raise UserError unless both number the same classes in the same way."""
    if training.categories != validation.categories:
        ours, theirs = dict(training.categories), dict(validation.categories)
        number = sorted(set(training.categories) ^ set(validation.categories))[0][0]
        first = f"id {number}, {theirs.get(number, 'absent')!r} against {ours.get(number, 'absent')!r}"
        raise UserError(
            f"{validation.source} and {training.source} do not define the same categories (first difference: "
            f"{first}): give both the same list"
        )
