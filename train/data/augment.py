"""Augmentation draws: what chance decides for each crop of a jigsaw, keyed by (seed, lane, position, region).

One call draws for a whole chunk, about 60 us however many crops; a crop's draws depend on nothing but its key, so no
worker, batch size or earlier position can change them. What the draws mean in pixels is window.py's business.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from jigsaw_pretrain.formats.jigsaw import REGIONS
from jigsaw_pretrain.rng import U64, derive_key, key_of_text, random_u64, uniform
from jigsaw_pretrain.train.streams import StreamOptions


@dataclass(frozen=True)
class Draws:
    """Draws for n jigsaws: every array is [n, 4], by region.

    ratio: float64, the resize ratio (1 for the fits that have none). flip: bool. across, down: uint64 words that decide
    the place in each axis; None for the centre. substitute: uint64 words that choose a crop where the slot's own group
    gives none. shifts: float64 [n, 4, 4], how far left, top, right and bottom of the object's box move outwards, of the
    most that they may, where the trainer draws the context, without augmentation too; None where prep did.
    """

    ratio: npt.NDArray[np.float64]
    flip: npt.NDArray[np.bool_]
    across: U64 | None
    down: U64 | None
    substitute: U64
    shifts: npt.NDArray[np.float64] | None = None


def draw(
    options: StreamOptions,
    lanes: npt.NDArray[np.int64],
    positions: npt.NDArray[np.int64],
    with_shifts: bool = False,
) -> Draws:
    """The draws of the jigsaws at ``positions`` [n] of ``lanes`` [n]; with_shifts: of the context as well."""
    key = key_of_text(options.seed, "augment")
    # Words of a stream do not depend on how many are drawn: the context's come last.
    raw = random_u64(
        derive_key(key, lanes[:, None], positions[:, None], np.arange(len(REGIONS))), 9 if with_shifts else 5
    )
    shifts = uniform(raw[..., 5:]) if with_shifts else None
    ratio = np.ones(raw.shape[:-1])
    if not options.augment:
        return Draws(ratio, np.zeros(ratio.shape, dtype=bool), None, None, raw[..., 4], shifts)
    if options.fit == "crop":
        ratio = options.resize_low + uniform(raw[..., 0]) * (options.resize_high - options.resize_low)
    return Draws(ratio, uniform(raw[..., 1]) < options.flip, raw[..., 2], raw[..., 3], raw[..., 4], shifts)
