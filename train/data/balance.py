"""Class balance: rare classes drawn more often, by taking some crops of a unit repeatedly and others less (--balance).

A unit keeps its length, so positions, passes and resuming are as without; within it a crop is taken in proportion to
its class's weight, evenly (each floor or ceiling of its expected times), decided by the pass and the unit alone. With
weights 1 / f for a class of frequency f (uniform) every class is drawn about equally often, with 1 / sqrt(f) (sqrt)
rare ones gain half of that on a logarithmic scale; no crop weighs more than max_repeat times another. The background is
a class like any other. Balanced is each shard within itself: what a shard lacks no weight brings, and a shard of a few
classes stays one. About 0.2 ms a unit of 4,000 crops.

None is the paper's way, and better where the frequencies are those that detection will meet; prefer sqrt for
long-tailed datasets.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.dataset.dataset import Dataset
from jigsaw_pretrain.rng import derive_key, permutation, randint
from jigsaw_pretrain.train.streams import StreamOptions

I64 = npt.NDArray[np.int64]

UNIT_WEIGHT = 1024
"""The weight of the commonest class: weights are whole numbers, so that every machine draws the same."""


def class_weights(counts: Sequence[int], balance: str, max_repeat: int) -> I64 | None:
    """Weight of each label, int64 [labels], from how many crops each has; None where all weigh the same."""
    if balance == "none":
        return None
    present = np.maximum(np.asarray(counts, dtype=np.float64), 1)
    ratio = present.max() / present
    if balance == "sqrt":
        ratio = np.sqrt(ratio)
    return np.rint(np.minimum(ratio, max_repeat) * UNIT_WEIGHT).astype(np.int64)


def weights_of(dataset: Dataset, options: StreamOptions) -> I64 | None:
    """The weights of a dataset's labels; raises UserError where its manifest does not count them."""
    if options.balance == "none":
        return None
    counts = dataset.description.totals.get("by_label")
    if not isinstance(counts, list) or len(counts) != dataset.label_count:
        raise UserError(
            f"{dataset.url.rstrip('/')}/manifests/dataset.json does not count crops by label, which --balance "
            f"{options.balance} needs: prep the dataset again with this version, or use --balance none"
        )
    return class_weights(counts, options.balance, options.max_repeat)


def balanced(weights: I64, key: int) -> I64:
    """Which of a unit's crops (weights [n], in drawing order) are drawn instead, in drawing order: int64 [n]."""
    count = len(weights)
    edges = np.cumsum(weights)
    # Equally spaced points over the summed weights, from one drawn start; scaled by the count to stay whole numbers.
    start = int(randint(derive_key(key, 0), int(edges[-1]))[0])
    points = start + np.arange(count, dtype=np.int64) * edges[-1]
    chosen = np.searchsorted(edges * count, points, side="right")
    return chosen[permutation(derive_key(key, 1), count)]
