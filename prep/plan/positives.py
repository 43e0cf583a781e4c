"""Positives (section 3.1): which boxes are objects to cut out, and how far each is enlarged.

Every box that is finite, has an area and shares some of it with its image is one positive, except crowd and ignored
regions. Half a second for a million boxes.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from jigsaw_pretrain import rng
from jigsaw_pretrain.formats import boxes
from jigsaw_pretrain.formats.annotations.skipped import BoxReason, Skipped
from jigsaw_pretrain.formats.annotations.table import Annotations
from jigsaw_pretrain.formats.dataset.schema import LONGEST_SIDE
from jigsaw_pretrain.formats.jigsaw import aspect_groups
from jigsaw_pretrain.prep.plan.negatives import Flags, Ints


@dataclass(frozen=True)
class Positives:
    """k positives among n boxes.

    rows: int64 [k], indices of the boxes. crops: int32 [k, 4], left, top, right, bottom: enlarged, or where the trainer
    enlarges the ground truth. groups: uint8 [k], their aspect groups. enlarged: int32 [k, 2], width and height as
    enlarged here, which background crops follow. reason: uint8 [n], a BoxReason each. solid: bool [n], the boxes that
    cover some of their image, whether usable or not; extents: int32 [n, 4], what they cover (of positives: as far as
    they may ever be enlarged), zero elsewhere.
    """

    rows: Ints
    crops: boxes.Edges
    groups: npt.NDArray[np.uint8]
    enlarged: npt.NDArray[np.int32]
    reason: npt.NDArray[np.uint8]
    solid: Flags
    extents: boxes.Edges


def select(annotations: Annotations, keys: rng.U64, context: float, context_at: str = "prep") -> Positives:
    """Choose and enlarge; keys: uint64 [m], the stream of each image from which its boxes' shifts are drawn.

    context_at: ``prep`` for crops enlarged here, ``train`` for the boxes themselves, to be enlarged by the trainer.
    """
    image, xywh = annotations.image, annotations.xywh
    widths, heights = annotations.widths[image], annotations.heights[image]
    within = boxes.image_edges(widths, heights)
    finite = boxes.finite(xywh)
    with_area = finite & boxes.with_area(xywh)
    solid = with_area & boxes.inside(np.where(finite[:, None], xywh, 0), widths, heights)
    repeated = annotations.reason == BoxReason.REPEATED
    found = (annotations.reason != BoxReason.USABLE) & ~repeated
    reason = np.select(
        [found, annotations.crowd, annotations.ignored, ~finite, ~with_area, ~solid, repeated],
        [
            annotations.reason,
            BoxReason.CROWD,
            BoxReason.IGNORED,
            BoxReason.NOT_FINITE,
            BoxReason.DEGENERATE,
            BoxReason.OUTSIDE,
            BoxReason.REPEATED,
        ],
        BoxReason.USABLE,
    ).astype(np.uint8)

    rows = np.flatnonzero(reason == BoxReason.USABLE)
    shifts = rng.uniform(rng.random_u64(rng.derive_key(keys[image[rows]], annotations.ordinal[rows]), 4))
    crops = reached = boxes.enlarge(xywh[rows], shifts, context, within[rows])
    enlarged = crops[:, 2:] - crops[:, :2]
    sizes: npt.NDArray[Any] = enlarged
    if context_at == "train":
        crops = boxes.whole_boxes(xywh[rows], within[rows])
        reached = boxes.enlarge(xywh[rows], 1.0, context, within[rows])
        sizes = boxes.visible_sizes(xywh[rows], widths[rows], heights[rows])
    extents = np.zeros((len(xywh), 4), dtype=np.int32)
    extents[solid] = boxes.whole_boxes(xywh[solid], within[solid])
    # Where an object's place is unknown, it may be anywhere in its image: there is no background.
    sides = np.where(finite[:, None], xywh, 0)[:, 2:]
    placeless = (sides < 0).any(axis=1) | (sides == 0).all(axis=1)
    extents[placeless] = within[placeless]
    solid |= placeless
    extents[rows] = reached
    encodable = (reached[:, 2:] - reached[:, :2]).max(axis=1, initial=0) <= LONGEST_SIDE
    reason[rows[~encodable]] = BoxReason.TOO_LONG
    groups = aspect_groups(sizes[:, 0], sizes[:, 1])
    return Positives(rows[encodable], crops[encodable], groups[encodable], enlarged[encodable], reason, solid, extents)


def unused(annotations: Annotations, reason: npt.NDArray[np.uint8]) -> list[Skipped]:
    """A row for each box that is no positive, in the boxes' order."""
    return [
        Skipped(
            annotations.ids[annotations.image[row]],
            annotations.files[annotations.image[row]],
            int(annotations.annotation_id[row]) if annotations.has_id[row] else None,
            int(annotations.ordinal[row]),
            "plan",
            BoxReason(reason[row]).text,
        )
        for row in np.flatnonzero(reason != BoxReason.USABLE)
    ]
