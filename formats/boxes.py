"""Boxes (section 3.1): enlargement by the context, rounding, clipping, visible size and area.

One formula serves both stages. Prep enlarges each box once, for all; in a dataset of ``--context-at train`` the trainer
does, anew for each draw, from members that hold all the context there may be. Pure functions over columns: a million
boxes take about 50 ms. Boxes come as ``x, y, width, height`` (float, annotation files) and as ``left, top, right,
bottom`` (whole pixels, right and bottom excluded: crops).
"""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Edges = npt.NDArray[np.int32]
Limits = npt.NDArray[np.integer]
Flags = npt.NDArray[np.bool_]
Sizes = npt.NDArray[np.int64]

MEAN_SHIFT = 0.5
"""The mean of shifts uniform in [0, 1): with it a box has its average context."""


FARTHEST = float(1 << 31)
"""A coordinate of this many pixels or more is not valid; no dataset holds such a row."""


def finite(xywh: Floats) -> Flags:
    """Whether a box's numbers and edges are finite, and of a size that pixels have: bool [n] for float64 [n, 4]."""
    with np.errstate(over="ignore", invalid="ignore"):
        return (np.abs(np.concatenate([xywh, xywh[:, :2] + xywh[:, 2:]], axis=1)) < FARTHEST).all(axis=1)


def with_area(xywh: Floats) -> Flags:
    """Whether a box has a positive width and height, also next to its own coordinates: bool [n]."""
    with np.errstate(over="ignore", invalid="ignore"):
        x, y, width, height = xywh.T
        return (width > 0) & (height > 0) & (x + width > x) & (y + height > y)


def inside(xywh: Floats, widths: Sizes, heights: Sizes) -> Flags:
    """Whether a finite box shares a positive area with its image of ``widths`` x ``heights`` pixels: bool [n]."""
    x, y, width, height = xywh.T
    with np.errstate(over="ignore", invalid="ignore"):
        return (x < widths) & (y < heights) & (x + width > 0) & (y + height > 0)


def image_edges(widths: Sizes, heights: Sizes) -> Sizes:
    """Left, top, right and bottom of images of these sizes: int64 [n, 4]."""
    zero = np.zeros_like(widths)
    return np.stack([zero, zero, widths, heights], axis=1)


def enlarge(xywh: Floats, shifts: Floats | float, context: float, within: Limits) -> Edges:
    """Boxes whose corners move outwards, as whole pixels: int32 [..., 4], left, top, right, bottom.

    xywh: boxes that are finite, with an area and inside (see above), float64 [..., 4]. shifts: float64 [..., 4], 0 to
    1, how far left, top, right and bottom move, as a share of the most that they may, which is (context - 1) / 2 of the
    width or height: at context 2 a box grows to up to twice its size. Left and top are rounded down, right and bottom
    up, and all are cut off at the edges ``within`` (integers [..., 4]): of the image, or of the member that holds all
    of the context. Each result has at least one pixel.
    """
    x, y, width, height = (xywh[..., i] for i in range(4))
    first_x, first_y, end_x, end_y = (within[..., i] for i in range(4))
    reach = (context - 1) / 2 * np.broadcast_to(shifts, xywh.shape)
    with np.errstate(over="ignore"):
        return np.stack(
            [
                np.clip(np.floor(x - reach[..., 0] * width), first_x, end_x),
                np.clip(np.floor(y - reach[..., 1] * height), first_y, end_y),
                np.clip(np.ceil(x + width + reach[..., 2] * width), first_x, end_x),
                np.clip(np.ceil(y + height + reach[..., 3] * height), first_y, end_y),
            ],
            axis=-1,
        ).astype(np.int32)


def whole_boxes(xywh: Floats, within: Limits) -> Edges:
    """The smallest boxes of whole pixels that hold finite boxes, cut off at the edges ``within``: int32 [..., 4]."""
    return enlarge(xywh, 0.0, 1.0, within)


def draw_crops(crops: Edges, xywh: Floats, shifts: Floats | float, context: float, members: Limits) -> Edges:
    """What is shown of each member for these shifts, in pixels of the image: int32 [..., 4].

    crops: the rows' own edges, [..., 4]. xywh: the ground truth, NaN for background, which has no context to draw: it
    stays as it is. members: the edges of what is stored.
    """
    known = ~np.isnan(xywh[..., :1])
    return np.where(known, enlarge(np.where(known, xywh, 0.0), shifts, context, members), crops)


def visible_sizes(xywh: Floats, widths: Sizes, heights: Sizes) -> Floats:
    """Width and height of the part of each box that lies within its image: float64 [n, 2], positive.

    Of a box that does not leave its image they are its own, to the last bit.
    """
    begin, size, room = xywh[:, :2], xywh[:, 2:], np.stack([widths, heights], axis=1)
    end = begin + size
    leaves = (begin < 0) | (end > room)
    return np.where(leaves, np.minimum(end, room) - np.maximum(begin, 0), size)


def areas(crops: Edges) -> Sizes:
    """Pixels of each crop: int64 [n]."""
    wide = crops.astype(np.int64)
    return (wide[:, 2] - wide[:, 0]) * (wide[:, 3] - wide[:, 1])
