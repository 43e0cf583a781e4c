"""Context drawn by the trainer: how far each crop reaches beyond its object, anew each time it is drawn.

Of datasets prepped with ``--context-at train``, whose members hold all the context there may be. The formula is prep's
(formats.context). Vectorised: 70 us a step and 0.6 us a jigsaw; decoding the larger members costs 0.3 ms a jigsaw.
"""

import numpy as np
import numpy.typing as npt

from jigsaw_pretrain.formats.boxes import MEAN_SHIFT, draw_crops
from jigsaw_pretrain.train.data.reader import Crops


def enlarged(crops: Crops, shifts: npt.NDArray[np.float64], context: float) -> Crops:
    """Crops (IN_CONTEXT [...], as read) with the part of their members that these shifts (float64 [..., 4]) show.

    Background crops stay as they are. Group and label are untouched: they are the box's.
    """
    left, top = crops["left"], crops["top"]
    first_x, first_y = left - crops["x"], top - crops["y"]
    boxes = np.stack([left, top, left + crops["width"], top + crops["height"]], axis=-1)
    members = np.stack([first_x, first_y, first_x + crops["stored_width"], first_y + crops["stored_height"]], axis=-1)
    drawn = draw_crops(boxes, crops["box"], shifts, context, members)
    found = crops.copy()
    found["left"], found["top"] = drawn[..., 0], drawn[..., 1]
    found["x"], found["y"] = drawn[..., 0] - first_x, drawn[..., 1] - first_y
    found["width"], found["height"] = drawn[..., 2] - drawn[..., 0], drawn[..., 3] - drawn[..., 1]
    return found


def halfway(crops: Crops, context: float) -> Crops:
    """The same with the context that a crop has on average: a fixed choice, where nothing is to be drawn."""
    return enlarged(crops, np.full((*crops.shape, 4), MEAN_SHIFT), context)
