"""Members of a dataset whose context the trainer draws (``--context-at train``): all of it, where a row has the box.

Follows from the plan's columns alone, so a part's task and the plan's totals compute it for themselves. Of a dataset of
``--context-at prep`` (drawn_context None) members are the crops.
"""

import numpy as np
import numpy.typing as npt

from jigsaw_pretrain.formats import boxes
from jigsaw_pretrain.formats.boxes import MEAN_SHIFT, draw_crops
from jigsaw_pretrain.prep.plan.crop_table import Crops, Images


def member_boxes(crops: Crops, images: Images, drawn_context: float | None) -> boxes.Edges:
    """What is cut out for each crop, of pixels of its image: int32 [n, 4], left, top, right, bottom."""
    if drawn_context is None:
        return crops.boxes
    whole = np.zeros((len(crops), 4), dtype=np.int64)
    whole[:, 2], whole[:, 3] = images.widths[crops.image], images.heights[crops.image]
    return boxes.draw_crops(crops.boxes, crops.xywh, np.ones(crops.xywh.shape), drawn_context, whole)


def margins(boxes: boxes.Edges, outer: boxes.Edges) -> npt.NDArray[np.int32]:
    """How far ``outer`` boxes extend beyond those that they hold, on each side: int32 [n, 4]."""
    return (boxes - outer) * np.array([1, 1, -1, -1], dtype=np.int32)


def expected_sizes(
    boxes: boxes.Edges, xywh: boxes.Floats, outer: boxes.Edges, drawn_context: float | None
) -> npt.NDArray[np.int32]:
    """Width and height of crops as the trainer draws them, those of the mean enlargement: int32 [n, 2].

    boxes: of the rows. xywh: the ground truth, NaN for background. outer: of the members.
    """
    if drawn_context is not None:
        shifts = np.full(xywh.shape, MEAN_SHIFT)
        boxes = draw_crops(boxes, xywh, shifts, drawn_context, outer)
    return boxes[:, 2:] - boxes[:, :2]
