"""Digests: one line per step that says which crops, how placed, and which pixels a global batch holds.

The identity digest covers crop keys, labels and every augmentation parameter and is the same on all machines; the
pixels digest is the same under one requirements.lock and class of processor. Both hash the jigsaws' own digests in
global lane order, so any number of ranks and workers prints the same lines. About 0.2 ms a jigsaw beyond assembling it.
"""

import hashlib
from collections.abc import Iterator, Sequence

from jigsaw_pretrain.train.data.batch import BatchSource
from jigsaw_pretrain.train.recipe import DataOptions

Pair = tuple[bytes, bytes]


def interleave(per_rank: Sequence[Sequence[Pair]], world: int, lanes: int, chunk: int) -> list[Pair]:
    """The jigsaws' digests in global lane order from each rank's, in its own lane order.

    Lane ``l`` is the ``l // world``-th of rank ``l % world`` and has ``chunk`` jigsaws. Raises ValueError where the
    ranks' lists are not lanes * chunk / world long.
    """
    if len(per_rank) != world or any(len(part) * world != lanes * chunk for part in per_rank):
        raise ValueError(f"{[len(part) for part in per_rank]} digests do not make {lanes} lanes of {chunk} jigsaws")
    ordered: list[Pair] = []
    for lane in range(lanes):
        first = lane // world * chunk
        ordered += per_rank[lane % world][first : first + chunk]
    return ordered


def batch_digest(pairs: Sequence[Pair]) -> tuple[str, str]:
    """The (identity, pixels) digests of a batch as hexadecimal sha256, from its jigsaws' in global lane order."""
    identity, pixels = zip(*pairs, strict=True)
    return hashlib.sha256(b"".join(identity)).hexdigest(), hashlib.sha256(b"".join(pixels)).hexdigest()


def digest_line(step: int, pairs: Sequence[Pair]) -> str:
    """``step identity-sha256 pixels-sha256`` of a global batch, without a newline."""
    return f"{step} {' '.join(batch_digest(pairs))}"


def digest_lines(loaders: Sequence[BatchSource], options: DataOptions) -> Iterator[str]:
    """The lines of a run whose ranks are ``loaders``, made with digests; ends when they end, and closes them."""
    try:
        for batches in zip(*loaders, strict=True):
            per_rank = [batch.digests or () for batch in batches]
            pairs = interleave(per_rank, len(loaders), options.lane_count, options.chunk)
            yield digest_line(batches[0].step, pairs)
    finally:
        for loader in loaders:
            loader.close()
