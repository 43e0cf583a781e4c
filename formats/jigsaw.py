"""Aspect groups S, T and W (section 3.2): which slot of the jigsaw a crop can fill.

A crop's own width and height decide, after enlargement and truncation; where the trainer draws the enlargement, its
object's box. Vectorised over a million crops in milliseconds; the scalar form is for one crop at a time.
"""

import numpy as np
import numpy.typing as npt

GROUPS = ("S", "T", "W")
"""The groups in the order of their codes 0, 1, 2 and of the shards' names."""

TALL_BELOW = 0.5
WIDE_ABOVE = 1.5


def aspect_groups(widths: npt.ArrayLike, heights: npt.ArrayLike) -> npt.NDArray[np.uint8]:
    """Group codes (indices into GROUPS) of crops ``widths`` by ``heights`` pixels: T < 0.5 <= S <= 1.5 < W.

    Compares products, not quotients, so that integer sizes on a limit are decided exactly.
    Raises ValueError for a size that is not positive.
    """
    width, height = np.asarray(widths), np.asarray(heights)
    if not (np.all(width > 0) and np.all(height > 0)):
        raise ValueError("aspect groups are defined for positive widths and heights only")
    return np.where(2 * width < height, 1, np.where(2 * width > 3 * height, 2, 0)).astype(np.uint8)


def aspect_group(width: float, height: float) -> str:
    """The group of one crop: 'T' below 0.5, 'S' from 0.5 to 1.5 (both included), 'W' above."""
    return GROUPS[int(aspect_groups(width, height))]
