"""Randomness as a pure function of (seed, identity): keyed splitmix64 words.

Every random choice of prep and train is a word of a stream that is keyed by what the choice is for (an image and a
box, a lane and a position), so it depends on no worker, process, host or order of work. The arithmetic uses 64-bit
integers only and is the same on every machine; numpy promises less for its Generator methods. A million words take
about 30 ms. Not for cryptography.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
Words = int | npt.NDArray[np.integer]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(z: U64) -> U64:
    """splitmix64's finaliser: a bijection of 64-bit words in which every input bit moves half of the output bits."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _as_words(value: Words) -> U64:
    if isinstance(value, int):
        return np.array([value & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64)
    return value.astype(np.uint64, copy=False)


def derive_key(key: Words, *values: Words) -> U64:
    """Keys for ``values`` within the stream of ``key``: an array of uint64 as the broadcast of all arguments.

    ``derive_key(derive_key(k, a), b)`` equals ``derive_key(k, a, b)``; the order of the values matters. Scalars
    give one element.
    """
    state = _as_words(key)
    for value in values:
        state = _mix(state ^ _mix(_as_words(value) + _GOLDEN))
    return state


def key_of_text(seed: int, text: str) -> int:
    """The key of a named thing (an image's identity, a purpose) under ``seed``: the same on every machine."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int(derive_key(seed, int.from_bytes(digest, "little"))[0])


def keys_of_texts(seed: int, texts: Sequence[str]) -> U64:
    """``key_of_text`` of each text, at once: uint64 [len(texts)], a million in about a second."""
    hashed = b"".join(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest() for text in texts)
    return derive_key(seed, np.frombuffer(hashed, dtype="<u8"))


def random_u64(key: Words, count: int) -> U64:
    """The first ``count`` words of each key's stream: shape ``key.shape + (count,)``."""
    steps = (np.arange(1, count + 1, dtype=np.uint64)) * _GOLDEN
    return _mix(_as_words(key)[..., None] + steps)


def uniform(raw: U64) -> npt.NDArray[np.float64]:
    """Words as float64 in [0, 1): the top 53 bits, so the value is exact."""
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53


def randint(raw: U64, limit: Words) -> npt.NDArray[np.int64]:
    """Words as integers in [0, limit), limit up to 2**32: multiply-shift, its bias below limit / 2**32."""
    return (((raw >> np.uint64(32)) * _as_words(limit)) >> np.uint64(32)).astype(np.int64)


def permutation(key: Words, count: int) -> npt.NDArray[np.int64]:
    """A permutation of ``range(count)`` drawn from one key: the indices sorted by their words (ties by index)."""
    return np.argsort(random_u64(key, count).reshape(-1), kind="stable").astype(np.int64)
