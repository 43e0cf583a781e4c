"""Crops and images as columns: what a plan is made of, and what a part's task takes along.

About 120 bytes per crop. Numpy columns rather than objects, so that a million crops are planned, hashed, sliced and
sent to a worker in milliseconds. What is stored of each crop (``member_boxes``) follows from the columns alone, so a
part's task and the plan's totals compute it for themselves: the crop, or in a dataset of ``--context-at train`` the
object with all the context that the trainer may draw.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from jigsaw_pretrain import rng
from jigsaw_pretrain.formats.annotations.table import Annotations
from jigsaw_pretrain.formats.boxes import MEAN_SHIFT, Edges, Floats, draw_crops, image_edges
from jigsaw_pretrain.formats.jigsaw import aspect_groups
from jigsaw_pretrain.prep.plan.negatives import Ints, Negatives
from jigsaw_pretrain.prep.plan.positives import Positives


@dataclass(frozen=True)
class ImageTable:
    """Images that have crops, m of them: identity, file, and size in pixels (int64 [m])."""

    ids: tuple[str, ...]
    files: tuple[str, ...]
    widths: Ints
    heights: Ints

    def __len__(self) -> int:
        """The number of images."""
        return len(self.ids)

    def cut(self, first: int, last: int) -> "ImageTable":
        """Images ``first`` to ``last`` (excluded)."""
        return ImageTable(
            self.ids[first:last], self.files[first:last], self.widths[first:last], self.heights[first:last]
        )


@dataclass(frozen=True)
class CropTable:
    """Crops, n of them, sorted by image, positives before negatives, ordinal.

    image: int64 [n], index into the images that stand beside it. ordinal: int64 [n]. label: int64 [n], C for the
    background. group: uint8 [n], an index into GROUPS. boxes: int32 [n, 4], left, top, right, bottom in pixels.
    annotation_id, has_id: int64 and bool [n]. xywh: float64 [n, 4], the ground-truth box, NaN for background.
    member: uint64 [n]; a shard's members stand in ascending order of it.
    """

    image: Ints
    ordinal: Ints
    label: Ints
    group: npt.NDArray[np.uint8]
    boxes: Edges
    annotation_id: Ints
    has_id: npt.NDArray[np.bool_]
    xywh: Floats
    member: rng.U64

    def __len__(self) -> int:
        """The number of crops."""
        return len(self.image)

    def take(self, rows: Any) -> "CropTable":
        """Some of the crops: a slice, indices or flags."""
        return CropTable(**{column.name: getattr(self, column.name)[rows] for column in fields(self)})

    @property
    def sizes(self) -> npt.NDArray[np.int32]:
        """Width and height in pixels: int32 [n, 2]."""
        return self.boxes[:, 2:] - self.boxes[:, :2]


def join(annotations: Annotations, chosen: Positives, empty: Negatives, keys: rng.U64) -> tuple[ImageTable, CropTable]:
    """The images with crops, and all crops; keys: uint64 [m], the stream that orders each image's crops in shards."""
    rows, count = chosen.rows, len(empty.image)
    boxes = np.concatenate([chosen.crops, empty.boxes])
    sizes = empty.boxes[:, 2:] - empty.boxes[:, :2]
    image = np.concatenate([annotations.image[rows], empty.image])
    ordinal = np.concatenate([annotations.ordinal[rows], empty.ordinal])
    is_empty = np.repeat([False, True], [len(rows), count])
    crops = CropTable(
        image=image,
        ordinal=ordinal,
        label=np.concatenate([annotations.label[rows], np.full(count, len(annotations.classes))]),
        group=np.concatenate([chosen.groups, aspect_groups(sizes[:, 0], sizes[:, 1])]),
        boxes=boxes,
        annotation_id=np.concatenate([annotations.annotation_id[rows], np.zeros(count, dtype=np.int64)]),
        has_id=np.concatenate([annotations.has_id[rows], np.zeros(count, dtype=bool)]),
        xywh=np.concatenate([annotations.xywh[rows], np.full((count, 4), np.nan)]),
        member=rng.derive_key(keys[image], is_empty.astype(np.int64), ordinal),
    ).take(np.lexsort((ordinal, is_empty, image)))
    used, renumbered = np.unique(crops.image, return_inverse=True)
    images = ImageTable(
        tuple(annotations.ids[index] for index in used),
        tuple(annotations.files[index] for index in used),
        annotations.widths[used],
        annotations.heights[used],
    )
    return images, replace(crops, image=renumbered.astype(np.int64))


def member_boxes(crops: CropTable, images: ImageTable, drawn_context: float | None) -> Edges:
    """What is cut out for each crop, of pixels of its image: int32 [n, 4], left, top, right, bottom.

    drawn_context: the context that the trainer draws from; None where prep draws it, and members are the crops.
    """
    if drawn_context is None:
        return crops.boxes
    whole = image_edges(images.widths[crops.image], images.heights[crops.image])
    return draw_crops(crops.boxes, crops.xywh, 1.0, drawn_context, whole)


def margins(boxes: Edges, outer: Edges) -> Edges:
    """How far ``outer`` boxes extend beyond those that they hold, on each side: int32 [n, 4]."""
    return (boxes - outer) * np.array([1, 1, -1, -1], dtype=np.int32)


def expected_boxes(boxes: Edges, xywh: Floats, outer: Edges, drawn_context: float | None) -> Edges:
    """Crops as the trainer draws them, those of the mean enlargement: int32 [n, 4].

    boxes: of the rows. xywh: the ground truth, NaN for background. outer: of the members.
    """
    return boxes if drawn_context is None else draw_crops(boxes, xywh, MEAN_SHIFT, drawn_context, outer)


def expected_sizes(boxes: Edges, xywh: Floats, outer: Edges, drawn_context: float | None) -> npt.NDArray[np.int32]:
    """Width and height of ``expected_boxes``: int32 [n, 2]."""
    expected = expected_boxes(boxes, xywh, outer, drawn_context)
    return expected[:, 2:] - expected[:, :2]
