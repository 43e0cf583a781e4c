"""Background boxes (section 3.1): as many as asked for, sized like the positives, touching no labelled thing.

Each image is due a share of the negatives by its positives. A negative draws its size from the dataset's enlarged
positives and tries random places in its image; where none is free it is handed on, with its size, to other images
(the emptier the likelier), later with other sizes too, until what is left hardly finds a place: that is the shortfall.
Every draw is keyed by the image it was due to, its number there and the round.

Vectorised: 100,000 negatives among a million boxes take some seconds. The places tried are compared with all boxes of
their image, or looked up in the image's summed occupancy where that is less work (thousands of boxes in one image).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from jigsaw_pretrain import rng
from jigsaw_pretrain.formats.boxes import Edges, areas
from jigsaw_pretrain.rng import U64

PLACES = 16
"""How many places a negative tries in one image."""

SAME_SIZE_ROUNDS = 9
ROUNDS = 33
HOPELESS = 0.005
MANY = 1000
"""Where more than MANY are left and a round places less than the share HOPELESS of them, sizes are drawn anew from then
on, and the second time it is the last round: a dataset without background costs two rounds, not all."""

EFFORT = 100
"""Comparisons of a negative with the boxes of an image, for each box of the dataset: crowded datasets end there, half
of it with the sizes first drawn."""

Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

_PAIRS_AT_ONCE = 1 << 19
_NEGATIVES_AT_ONCE = 1 << 17


@dataclass(frozen=True)
class Obstacles:
    """What negatives must not touch, by image: boxes int32 [n, 4] sorted by image, first box of each image in starts.

    starts: int64 [m + 1]. widths, heights: int64 [m], of the images.
    """

    boxes: Edges
    starts: Ints
    widths: Ints
    heights: Ints


@dataclass(frozen=True)
class Negatives:
    """Placed negatives, k of them, sorted by image and ordinal: image int64 [k], ordinal int64 [k], int32 [k, 4]."""

    image: Ints
    ordinal: Ints
    boxes: Edges
    wanted: int


def obstacles(image: Ints, boxes: Edges, widths: Ints, heights: Ints) -> Obstacles:
    """Sort boxes (int32 [n, 4]) by their images (int64 [n])."""
    order = np.argsort(image, kind="stable")
    starts = np.searchsorted(image[order], np.arange(len(widths) + 1))
    return Obstacles(boxes[order], starts.astype(np.int64), widths, heights)


def shares(positives: Ints, per_positive: float) -> Ints:
    """How many negatives each image is due: int64 [m] for positives by image; they sum to round(per_positive * all)."""
    reached = np.floor(np.cumsum(positives) * per_positive + 0.5).astype(np.int64)
    return np.diff(reached, prepend=0)


def place(found: Obstacles, image_keys: U64, due: Ints, sizes: npt.NDArray[np.int32]) -> Negatives:
    """Place ``due`` (int64 [m]) negatives with sizes drawn from ``sizes`` (int32 [n, 2], width and height).

    image_keys: uint64 [m], the stream that each image's negatives are drawn from.
    """
    wanted = int(due.sum())
    owner = np.repeat(np.arange(len(due)), due)
    number = np.arange(wanted) - np.repeat(np.cumsum(due) - due, due)
    keys = rng.derive_key(image_keys[owner], number)
    likelihood = np.cumsum(_free_area(found))

    image, size = owner.copy(), np.zeros((wanted, 2), dtype=np.int32)
    boxes = np.zeros((wanted, 4), dtype=np.int32)
    placed_in_round = np.full(wanted, -1)
    same_size, effort = True, (10 << 20) + EFFORT * len(found.boxes)
    spent, counts = 0, np.diff(found.starts)
    for turn in range(ROUNDS if len(sizes) else 0):
        left = np.flatnonzero(placed_in_round < 0)
        if not len(left):
            break
        for some in np.array_split(left, len(left) // _NEGATIVES_AT_ONCE + 1):
            raw = rng.random_u64(rng.derive_key(keys[some], turn), 2 + 2 * PLACES)
            if turn:
                image[some] = np.searchsorted(likelihood, rng.uniform(raw[:, 0]) * likelihood[-1], side="right")
            if not turn or not same_size:
                size[some] = sizes[rng.randint(raw[:, 1], len(sizes))]
            free, corners = _try(found, image[some], size[some], raw[:, 2:])
            done = some[free]
            boxes[done] = np.concatenate([corners[free], corners[free] + size[done]], axis=1)
            placed_in_round[done] = turn
            spent += int(counts[image[some]].sum())
        placed = np.count_nonzero(placed_in_round[left] >= 0)
        hopeless = len(left) > MANY and placed < HOPELESS * len(left)
        if (hopeless and not same_size) or spent > effort:
            break
        same_size = same_size and not hopeless and turn + 1 < SAME_SIZE_ROUNDS and 2 * spent < effort

    kept = np.flatnonzero(placed_in_round >= 0)
    # Ordinals follow the round first, so that an image's own negatives come before those handed on to it.
    order = kept[np.lexsort((kept, placed_in_round[kept], image[kept]))]
    first = np.searchsorted(image[order], image[order], side="left")
    return Negatives(image[order], np.arange(len(order)) - first, boxes[order], wanted)


def _free_area(found: Obstacles) -> npt.NDArray[np.float64]:
    """About how many pixels of each image are free, never quite none: float64 [m]."""
    covered = np.cumsum(np.r_[0, areas(found.boxes)])
    whole = found.widths * found.heights
    return np.maximum(whole - np.diff(covered[found.starts]), whole // 50 + 1).astype(np.float64)


def _try(found: Obstacles, image: Ints, size: npt.NDArray[np.int32], raw: U64) -> tuple[Flags, npt.NDArray[np.int32]]:
    """Whether each negative finds a free place, and the first one found, left and top: bool [k], int32 [k, 2]."""
    room = np.stack([found.widths[image], found.heights[image]], axis=1) - size + 1
    fits = (room > 0).all(axis=1)
    limit = np.maximum(room, 1)
    left = rng.randint(raw[:, :PLACES], limit[:, :1]).astype(np.int32)
    top = rng.randint(raw[:, PLACES:], limit[:, 1:]).astype(np.int32)
    counts = np.diff(found.starts)
    tries = np.bincount(image[fits], minlength=len(counts))
    dense = tries * counts * PLACES > 4 * found.widths * found.heights + 100_000

    free = np.zeros(left.shape, dtype=bool)
    free[fits] = True
    by_pairs = np.flatnonzero(fits & ~dense[image] & (counts[image] > 0))
    for chunk in _chunks(by_pairs, counts[image[by_pairs]]):
        free[chunk] = _free_by_pairs(found, image[chunk], left[chunk], top[chunk], size[chunk])
    by_map = np.flatnonzero(fits & dense[image])
    by_map = by_map[np.argsort(image[by_map], kind="stable")]
    for group in np.split(by_map, np.flatnonzero(np.diff(image[by_map])) + 1) if len(by_map) else []:
        free[group] = _free_by_map(found, int(image[group[0]]), left[group], top[group], size[group])
    first = free.argmax(axis=1)
    rows = np.arange(len(free))
    return free[rows, first], np.stack([left[rows, first], top[rows, first]], axis=1)


def _chunks(rows: Ints, costs: Ints) -> list[Ints]:
    """Cut rows where their costs add up to about as many pairs as memory should hold at once."""
    if not len(rows):
        return []
    number = np.cumsum(costs) // _PAIRS_AT_ONCE
    return np.split(rows, np.flatnonzero(np.diff(number)) + 1)


def _free_by_pairs(
    found: Obstacles, image: Ints, left: npt.NDArray[np.int32], top: npt.NDArray[np.int32], size: npt.NDArray[np.int32]
) -> Flags:
    """Compare every place with every box of its image, which has at least one: bool [k, PLACES]."""
    counts = np.diff(found.starts)[image]
    starts = np.cumsum(counts) - counts
    row = np.repeat(np.arange(len(image)), counts)
    box = found.boxes[np.arange(len(row)) - np.repeat(starts - found.starts[image], counts)]
    size_of = size[row]
    overlap = left[row] < box[:, 2:3]
    overlap &= left[row] > box[:, 0:1] - size_of[:, 0:1]
    overlap &= top[row] < box[:, 3:4]
    overlap &= top[row] > box[:, 1:2] - size_of[:, 1:2]
    return ~np.logical_or.reduceat(overlap, starts, axis=0)


def _free_by_map(
    found: Obstacles, image: int, left: npt.NDArray[np.int32], top: npt.NDArray[np.int32], size: npt.NDArray[np.int32]
) -> Flags:
    """Look every place up in one image's summed occupancy: bool [k, PLACES]."""
    width, height = int(found.widths[image]), int(found.heights[image])
    boxes = found.boxes[found.starts[image] : found.starts[image + 1]]
    cover = np.zeros((height + 1, width + 1), dtype=np.int32)
    for rows, cols, sign in ((1, 0, 1), (3, 2, 1), (1, 2, -1), (3, 0, -1)):
        np.add.at(cover, (boxes[:, rows], boxes[:, cols]), sign)
    covered = (cover.cumsum(axis=0, dtype=np.int32).cumsum(axis=1, dtype=np.int32)[:height, :width] > 0).astype(
        np.int32
    )
    total = np.zeros((height + 1, width + 1), dtype=np.int32)
    total[1:, 1:] = covered.cumsum(axis=0, dtype=np.int32).cumsum(axis=1, dtype=np.int32)
    right, bottom = left + size[:, 0:1], top + size[:, 1:2]
    return (total[bottom, right] - total[top, right] - total[bottom, left] + total[top, left]) == 0
