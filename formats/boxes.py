"""Context: how far a crop reaches beyond its ground-truth box (section 3.1), by the one formula of prep and training.

Prep enlarges each box once, for all; in a dataset of ``--context-at train`` the trainer does, anew for each draw, from
members that hold all the context there may be. Pure functions over columns: a million boxes take about 50 ms.

Boxes: enlargement, rounding, clipping, intersection (section 3.1). Pure functions over columns.

A million boxes take about 50 ms. Boxes come as ``x, y, width, height`` (float, annotation files) and as
``left, top, right, bottom`` (whole pixels, right and bottom excluded: crops).
"""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Edges = npt.NDArray[np.int32]
Limits = npt.NDArray[np.integer]

MEAN_SHIFT = 0.5
"""Of shifts that are uniform in [0, 1): with it a box has the context that it has on average."""
Flags = npt.NDArray[np.bool_]
Sizes = npt.NDArray[np.int64]


def enlarge(xywh: Floats, shifts: Floats, context: float, within: Limits) -> Edges:
    """Boxes whose corners move outwards, as whole pixels: int32 [..., 4], left, top, right, bottom.

    xywh: finite boxes with an area, float64 [..., 4]. shifts: float64 [..., 4], 0 to 1, how far left, top, right and
    bottom move, as a share of the most that they may, which is (context - 1) / 2 of the width or height: at context 2 a
    box grows to up to twice its size. Left and top are rounded down, right and bottom up, and all are cut off at the
    edges ``within`` (integers [..., 4]): of the image, or of the member that holds all of the context.
    """
    x, y, width, height = (xywh[..., i] for i in range(4))
    reach = (context - 1) / 2 * shifts
    with np.errstate(over="ignore"):
        edges = (
            x - reach[..., 0] * width,
            y - reach[..., 1] * height,
            x + width + reach[..., 2] * width,
            y + height + reach[..., 3] * height,
        )
    return whole_pixels(edges, within)


def whole_pixels(edges: tuple[Floats, Floats, Floats, Floats], within: Limits) -> Edges:
    """The smallest boxes of whole pixels that hold ``edges`` (left, top, right, bottom), cut off: int32 [..., 4]."""
    left, top, right, bottom = edges
    first_x, first_y, end_x, end_y = (within[..., i] for i in range(4))
    return np.stack(
        [
            np.clip(np.floor(left), first_x, end_x),
            np.clip(np.floor(top), first_y, end_y),
            np.clip(np.ceil(right), first_x, end_x),
            np.clip(np.ceil(bottom), first_y, end_y),
        ],
        axis=-1,
    ).astype(np.int32)


def draw_crops(crops: Edges, xywh: Floats, shifts: Floats, context: float, members: Limits) -> Edges:
    """What is shown of each member for these shifts, in pixels of the image: int32 [..., 4].

    crops: the rows' own edges, [..., 4]. xywh: the ground truth, NaN for background, which has no context to draw: it
    stays as it is. members: the edges of what is stored.
    """
    known = ~np.isnan(xywh[..., :1])
    return np.where(known, enlarge(np.where(known, xywh, 0.0), shifts, context, members), crops)


def finite(xywh: Floats) -> Flags:
    """Whether all of a box's edges are finite: bool [n] for float64 [n, 4]."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.isfinite(np.concatenate([xywh, xywh[:, :2] + xywh[:, 2:]], axis=1)).all(axis=1)


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


def enlarge_in_image(xywh: Floats, shifts: Floats, context: float, widths: Sizes, heights: Sizes) -> Edges:
    """Boxes whose corners move outwards, as whole pixels of their images: int32 [n, 4], left, top, right, bottom.

    shifts: float64 [n, 4] in [0, 1), how far left, top, right and bottom move, as a share of the most that they may,
    which is (context - 1) / 2 of the width or height: at context 2 a box grows to up to twice its size. Left and top
    are rounded down, right and bottom up, and all are cut off at the image's edges. Boxes must be finite, with an area
    and inside (see above); each result then has at least one pixel.
    """
    return enlarge(xywh, shifts, context, _image_edges(widths, heights))


def whole_boxes(xywh: Floats, widths: Sizes, heights: Sizes) -> Edges:
    """The smallest boxes of whole pixels that hold finite boxes, within their images: int32 [n, 4]."""
    x, y, width, height = xywh.T
    return whole_pixels((x, y, x + width, y + height), _image_edges(widths, heights))


def visible_sizes(xywh: Floats, widths: Sizes, heights: Sizes) -> Floats:
    """Width and height of the part of each box that lies within its image: float64 [n, 2], positive.

    Of a box that does not leave its image they are its own, to the last bit.
    """
    begin, size, room = xywh[:, :2], xywh[:, 2:], np.stack([widths, heights], axis=1)
    end = begin + size
    leaves = (begin < 0) | (end > room)
    return np.where(leaves, np.minimum(end, room) - np.maximum(begin, 0), size)


def _image_edges(widths: Sizes, heights: Sizes) -> Sizes:
    """Left, top, right and bottom of images of these sizes: int64 [n, 4]."""
    none = np.zeros_like(widths)
    return np.stack([none, none, widths, heights], axis=1)


def areas(crops: Edges) -> Sizes:
    """Pixels of each crop: int64 [n]."""
    wide = crops.astype(np.int64)
    return (wide[:, 2] - wide[:, 0]) * (wide[:, 3] - wide[:, 1])
