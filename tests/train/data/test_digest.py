"""Digests of batches: jigsaws in the order of lanes."""

import hashlib

import pytest

from jigsaw_pretrain.train.data.digest import batch_digest, digest_line, interleave


def pair(number: int) -> tuple[bytes, bytes]:
    return hashlib.sha256(b"i%d" % number).digest(), hashlib.sha256(b"p%d" % number).digest()


def test_interleave_puts_lanes_in_global_order() -> None:
    lanes, chunk = 6, 2
    everything = [[pair(lane * chunk + nth) for nth in range(chunk)] for lane in range(lanes)]
    flat = [digest for lane in everything for digest in lane]
    for world in (1, 2, 3, 6):
        per_rank = [[digest for lane in everything[rank::world] for digest in lane] for rank in range(world)]
        assert interleave(per_rank, world, lanes, chunk) == flat
    with pytest.raises(ValueError, match="do not make"):
        interleave([flat[:3], flat[3:]], 2, lanes, chunk)


def test_a_line_hashes_the_jigsaws_in_order() -> None:
    pairs = [pair(0), pair(1)]
    identity = hashlib.sha256(pairs[0][0] + pairs[1][0]).hexdigest()
    pixels = hashlib.sha256(pairs[0][1] + pairs[1][1]).hexdigest()
    assert batch_digest(pairs) == (identity, pixels)
    assert digest_line(7, pairs) == f"7 {identity} {pixels}"
    assert batch_digest(pairs[::-1]) != (identity, pixels)
