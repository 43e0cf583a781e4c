"""What a dataset amounts to: counts, bytes, slot fill, what was not used. Of a plan, or of what was cut.

The same figures make the plan's table, the final table and the totals of dataset.json.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from jigsaw_pretrain.formats import boxes
from jigsaw_pretrain.formats.annotations.skipped import count_reasons
from jigsaw_pretrain.formats.jigsaw import GROUPS
from jigsaw_pretrain.formats.pixels import RGB8, PixelFormat
from jigsaw_pretrain.prep.plan import cost
from jigsaw_pretrain.prep.plan.context import expected_sizes, member_boxes
from jigsaw_pretrain.prep.plan.fill import Slot, slot_fill, warnings
from jigsaw_pretrain.prep.plan.plan import Plan


@dataclass(frozen=True)
class Summary:
    """Figures of a dataset with C classes.

    counts: int64 [C + 1, 3], crops by label (background last) and group. images: those with crops. bytes: of the
    shards, estimated for a plan. negatives_wanted: as many as were asked for. seconds: one core's time, estimated; None
    once it is known. encoded: of a lossless dataset, the crops that were encoded all the same, by reason; else None.
    drawn_context: where the trainer draws the context, how much at most; the slots are then filled with crops of the
    mean context. pixels: of the crops. measured: their ``mean`` and ``std``, of what is not 8-bit RGB.
    """

    classes: Sequence[str]
    counts: npt.NDArray[np.int64]
    images: int
    images_listed: int
    negatives_wanted: int
    parts: int
    shards: int
    bytes: int
    skipped: Mapping[str, int]
    slots: Sequence[Slot]
    seconds: float | None = None
    encoded: Mapping[str, int] | None = None
    drawn_context: float | None = None
    pixels: PixelFormat = RGB8
    measured: Mapping[str, Sequence[float]] = field(default_factory=dict)

    @property
    def crops(self) -> int:
        """All crops."""
        return int(self.counts.sum())

    @property
    def negatives(self) -> int:
        """Background crops."""
        return int(self.counts[-1].sum())

    @property
    def by_group(self) -> list[int]:
        """Crops of S, T and W."""
        return [int(count) for count in self.counts.sum(axis=0)]

    def warnings(self) -> list[str]:
        """What the user should know, in plain words."""
        said = warnings(self.by_group, self.slots)
        if self.negatives < self.negatives_wanted:
            missing = self.negatives_wanted - self.negatives
            said.append(
                f"{missing:,} of {self.negatives_wanted:,} background crops are missing: the images are too full of "
                "objects to hold more, or could not be read."
            )
        return said

    def totals(self) -> dict[str, Any]:
        """The totals of dataset.json (manifests/README.md)."""
        # What is of lossless datasets alone is told of them alone: others keep their bytes.
        encoded = {} if self.encoded is None else {"encoded": dict(sorted(self.encoded.items()))}
        return encoded | {
            "images": self.images,
            "images_listed": self.images_listed,
            "crops": self.crops,
            "positives": self.crops - self.negatives,
            "negatives": self.negatives,
            "negatives_wanted": self.negatives_wanted,
            "by_group": dict(zip(GROUPS, self.by_group, strict=True)),
            "by_label": [int(count) for count in self.counts.sum(axis=1)],
            "parts": self.parts,
            "shards": self.shards,
            "bytes": self.bytes,
            "skipped": dict(sorted(self.skipped.items())),
            "slot_fill": {slot.name: round(slot.fill, 3) for slot in self.slots},
            **{name: list(values) for name, values in self.measured.items()},
        }


def count_crops(labels: npt.ArrayLike, groups: npt.ArrayLike, classes: int) -> npt.NDArray[np.int64]:
    """Crops by label and group: int64 [classes + 1, 3]."""
    cell = np.asarray(labels, dtype=np.int64) * len(GROUPS) + np.asarray(groups, dtype=np.int64)
    return np.bincount(cell, minlength=(classes + 1) * len(GROUPS)).reshape(classes + 1, len(GROUPS))


def planned(plan: Plan) -> Summary:
    """The figures of a plan, its bytes and time estimated."""
    crops, context = plan.crops, plan.options.drawn_context
    cut = member_boxes(crops, plan.images, context)
    sizes = expected_sizes(crops.boxes, crops.xywh, cut, context)
    pixels = boxes.areas(cut)
    part_of_crop = np.repeat(np.arange(plan.part_count), np.diff(plan.first_crop))
    options = plan.options
    sizes_in_bytes = cost.crop_bytes(pixels, options.jpeg_quality, options.subsampling, options.stored)
    image_pixels = int((plan.images.widths * plan.images.heights).sum())
    return Summary(
        classes=plan.classes,
        counts=count_crops(crops.label, crops.group, len(plan.classes)),
        images=len(plan.images),
        images_listed=plan.listed_images,
        negatives_wanted=plan.wanted_negatives,
        parts=plan.part_count,
        shards=len(np.unique(part_of_crop * len(GROUPS) + crops.group)),
        bytes=int(sizes_in_bytes.sum()),
        skipped=count_reasons(row.reason for row in plan.skipped),
        slots=slot_fill(sizes[:, 0], sizes[:, 1], crops.group),
        seconds=cost.cutting_seconds(
            len(plan.images), image_pixels, len(crops), int(pixels.sum()), plan.options.encode == "lossless"
        ),
        drawn_context=context,
        pixels=options.stored,
    )
