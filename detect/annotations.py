"""COCO JSON as the detector needs it: images with their boxes, labels, crowd flags and segmentations.

Decoded with msgspec into typed records, so an error names the place in the file; files with NaN tokens, which msgspec
refuses whole, go through the standard library. A million boxes take seconds. Labels are 0..C-1 in ascending category
id, as everywhere in this project. What cannot be trained on (a box that is not finite, or has no area inside its
image) is left out of training and counted; ground truth for AP keeps every finite box as it stands.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from jigsaw_pretrain.errors import UserError


class _Image(msgspec.Struct):
    id: int | str
    file_name: str
    width: int
    height: int


class _Annotation(msgspec.Struct):
    image_id: int | str
    category_id: int
    bbox: list[float]
    iscrowd: int = 0
    area: float | None = None
    segmentation: Any = None


class _Category(msgspec.Struct):
    id: int
    name: str


class _Document(msgspec.Struct):
    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[_Category]


@dataclass(frozen=True)
class ImageRecord:
    """One image and what can be trained on in it.

    boxes: float64 [n, 4], left, top, right, bottom in pixels, cut to the image. labels: int64 [n], 0..C-1.
    crowd: bool [n]. segmentations: one polygon list or RLE per box, None where there is none.
    """

    id: int | str
    file_name: str
    width: int
    height: int
    boxes: npt.NDArray[np.float64]
    labels: npt.NDArray[np.int64]
    crowd: npt.NDArray[np.bool_]
    segmentations: tuple[Any, ...]


@dataclass(frozen=True)
class GroundTruth:
    """A COCO file, read.

    categories: (id, name) in label order. truth: the ground truth as pycocotools wants it, with ids made unique from 1
    (COCOeval takes an id of 0 for "unmatched", and ids repeat in the wild). unusable: boxes left out of training.
    """

    path: Path
    images: tuple[ImageRecord, ...]
    categories: tuple[tuple[int, str], ...]
    truth: dict[str, Any]
    unusable: int

    @property
    def classes(self) -> list[str]:
        """Class names in label order."""
        return [name for _, name in self.categories]

    @property
    def segmented(self) -> float:
        """The share of the trainable boxes that come with a segmentation, 0 to 1 (1 where there is no box)."""
        given = [one is not None for record in self.images for one in record.segmentations]
        return sum(given) / len(given) if given else 1.0


def read_ground_truth(path: Path) -> GroundTruth:
    """Read a COCO JSON file; raises UserError that names the file and the place where it is not one."""
    document = _decode(path)
    if not document.images:
        raise UserError(f"{path} lists no images: give a COCO file with images, annotations and categories")
    if not document.categories:
        raise UserError(f"{path} lists no categories: give a COCO file with images, annotations and categories")
    categories = tuple(sorted((one.id, one.name) for one in document.categories))
    label_of = {category: label for label, (category, _) in enumerate(categories)}
    if len(label_of) != len(categories):
        raise UserError(f"{path} gives one category id to several categories: make the ids unique")
    by_image: dict[int | str, list[_Annotation]] = {image.id: [] for image in document.images}
    if len(by_image) != len(document.images):
        raise UserError(f"{path} gives one image id to several images: make the ids unique")
    for index, one in enumerate(document.annotations):
        if one.image_id not in by_image or one.category_id not in label_of or len(one.bbox) != 4:
            raise UserError(
                f"{path}: annotations[{index}] has an image_id ({one.image_id!r}), category_id ({one.category_id}) or "
                "bbox that the file does not define: correct or remove it"
            )
        by_image[one.image_id].append(one)
    images = tuple(_image_record(image, by_image[image.id], label_of) for image in document.images)
    unusable = len(document.annotations) - sum(len(record.labels) for record in images)
    return GroundTruth(path, images, categories, _truth(document), unusable)


def _decode(path: Path) -> _Document:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): name a COCO annotation file") from error
    try:
        return msgspec.json.decode(raw, type=_Document)
    except msgspec.ValidationError as error:
        raise UserError(f"{path} is not a COCO detection file ({error})") from error
    except msgspec.DecodeError:
        try:
            return msgspec.convert(json.loads(raw), type=_Document)
        except (ValueError, msgspec.ValidationError) as error:
            raise UserError(f"{path} is not a COCO detection file ({error})") from error


def _image_record(image: _Image, found: Sequence[_Annotation], label_of: dict[int, int]) -> ImageRecord:
    """The image with the boxes that have an area inside it."""
    raw = np.array([one.bbox for one in found], dtype=np.float64).reshape(-1, 4)
    finite = np.isfinite(raw.sum(axis=1))
    corners = np.concatenate((raw[:, :2], raw[:, :2] + raw[:, 2:]), axis=1)
    limits = np.array([image.width, image.height, image.width, image.height], dtype=np.float64)
    boxes = np.clip(np.where(finite[:, None], corners, 0), 0, limits)
    usable = finite & (boxes[:, 2] - boxes[:, 0] >= 1e-2) & (boxes[:, 3] - boxes[:, 1] >= 1e-2)
    kept = [one for one, good in zip(found, usable, strict=True) if good]
    return ImageRecord(
        image.id,
        image.file_name,
        image.width,
        image.height,
        boxes[usable],
        np.array([label_of[one.category_id] for one in kept], dtype=np.int64),
        np.array([bool(one.iscrowd) for one in kept], dtype=np.bool_),
        tuple(one.segmentation or None for one in kept),
    )


def _truth(document: _Document) -> dict[str, Any]:
    """The ground truth for COCOeval: every finite box, areas filled in where the file has none."""
    annotations: list[dict[str, Any]] = []
    for one in document.annotations:
        if not np.isfinite(one.bbox).all():
            continue
        area = one.bbox[2] * one.bbox[3] if one.area is None else one.area
        record = {
            "id": len(annotations) + 1,
            "image_id": one.image_id,
            "category_id": one.category_id,
            "bbox": list(one.bbox),
            "area": area,
            "iscrowd": one.iscrowd,
        }
        if one.segmentation:
            record["segmentation"] = one.segmentation
        annotations.append(record)
    return {
        "images": [msgspec.to_builtins(image) for image in document.images],
        "annotations": annotations,
        "categories": [msgspec.to_builtins(one) for one in document.categories],
    }


def require_same_classes(training: GroundTruth, validation: GroundTruth) -> None:
    """Raise UserError unless both files number the same classes in the same way."""
    if training.categories != validation.categories:
        ours, theirs = dict(training.categories), dict(validation.categories)
        odd = sorted(set(training.categories) ^ set(validation.categories))[0]
        raise UserError(
            f"{validation.path} and {training.path} do not define the same categories (first difference: id {odd[0]}, "
            f"{theirs.get(odd[0], 'absent')!r} against {ours.get(odd[0], 'absent')!r}): give both the same list"
        )
