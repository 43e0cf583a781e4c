"""Random words keyed by identity."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jigsaw_pretrain import rng

WORD = st.integers(0, 2**64 - 1)
MASK = 2**64 - 1


def _splitmix64(state: int, count: int) -> list[int]:
    """The published algorithm (Steele, Lea and Flood 2014) in plain integers."""
    out = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        out.append(z ^ (z >> 31))
    return out


@given(WORD, st.integers(1, 20))
def test_words_are_splitmix64(key: int, count: int) -> None:
    assert rng.random_u64(key, count).reshape(-1).tolist() == _splitmix64(key, count)


def test_known_first_word_of_key_zero() -> None:
    assert int(rng.random_u64(0, 1)[0, 0]) == 0xE220A8397B1DCDAF


@given(WORD, WORD, WORD)
def test_fold_is_a_chain_and_minds_the_order(key: int, a: int, b: int) -> None:
    assert rng.derive_key(rng.derive_key(key, a), b) == rng.derive_key(key, a, b)
    if a != b:
        assert rng.derive_key(key, a, b) != rng.derive_key(key, b, a)


def test_fold_broadcasts() -> None:
    keys = rng.derive_key(7, np.arange(3)[:, None], np.arange(4)[None, :])
    assert keys.shape == (3, 4)
    assert len(np.unique(keys)) == 12
    assert keys[2, 1] == rng.derive_key(7, 2, 1)[0]


@given(WORD, st.integers(0, 300))
def test_permutation_is_one(key: int, count: int) -> None:
    assert sorted(rng.permutation(key, count).tolist()) == list(range(count))


def test_uniform_and_below_are_even() -> None:
    raw = rng.random_u64(rng.derive_key(1), 200_000).reshape(-1)
    values = rng.uniform(raw)
    assert values.min() >= 0
    assert values.max() < 1
    assert abs(values.mean() - 0.5) < 0.005
    counts = np.bincount(rng.randint(raw, 7), minlength=7)
    assert len(counts) == 7
    assert abs(counts / len(raw) - 1 / 7).max() < 0.005


def test_text_keys_differ_by_seed_and_text() -> None:
    keys = {rng.key_of_text(seed, text) for seed in range(3) for text in ("a", "b", "ä", "a/b")}
    assert len(keys) == 12
