"""Which images form batch ``step``: a pure function of (seed, step), so resuming needs the step alone.

Each epoch is its own permutation, cut into batches of images that lie or that stand (padding both to one size wastes
up to half of a batch), with mixed ones from what is left over; what does not fill a batch is left to the next epoch's
permutation. An epoch of 118,287 images is ordered in about 20 ms and kept until the next.
"""

import numpy as np
import numpy.typing as npt

from jigsaw_pretrain import rng


class Order:
    """Batches of indices into ``lying`` (bool [n]: wider than high)."""

    def __init__(self, lying: npt.NDArray[np.bool_], batch: int, seed: int) -> None:
        self._lying = lying
        self._batch = batch
        self._key = rng.key_of_text(seed, "detector's order of images")
        self.per_epoch = max(1, len(lying) // batch)
        self._epoch = -1
        self._batches: npt.NDArray[np.int64] = np.zeros((0, batch), dtype=np.int64)

    def batch(self, step: int) -> npt.NDArray[np.int64]:
        """The image indices of one global batch, int64 [batch]."""
        epoch = step // self.per_epoch
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._order(epoch)
        return self._batches[step % self.per_epoch]

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        count = len(self._lying)
        key = rng.derive_key(self._key, epoch)
        order = rng.permutation(rng.derive_key(key, 0), count)
        if count < self._batch:
            return np.resize(order, (1, self._batch))
        groups, left = [], []
        for side in (True, False):
            of_side = order[self._lying[order] == side]
            whole = len(of_side) // self._batch * self._batch
            groups.append(of_side[:whole].reshape(-1, self._batch))
            left.append(of_side[whole:])
        rest = np.concatenate(left)
        groups.append(rest[: len(rest) // self._batch * self._batch].reshape(-1, self._batch))
        batches = np.concatenate(groups)
        return batches[rng.permutation(rng.derive_key(key, 1), len(batches))]
