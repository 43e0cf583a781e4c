"""The annotations of a dataset as a table: identities, ordinals, and names that are safe."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jigsaw_pretrain.formats.annotations.table import clean_name, identities, ordinals


@given(st.lists(st.integers(0, 5), max_size=40))
def test_ordinals_against_a_count(values: list[int]) -> None:
    expected = [values[:place].count(value) for place, value in enumerate(values)]
    assert ordinals(np.array(values, dtype=np.int64)).tolist() == expected


def test_files_that_differ_in_their_suffix_keep_it() -> None:
    assert identities(["a/x.jpg", "a/x.png", "b.c/y.jpg"]) == ["a/x.jpg", "a/x.png", "b.c/y"]
    assert identities(["x.jpg", "x.png", "x.jpg.bmp"]) == ["x.jpg", "x.png", "x.jpg.bmp"]


@given(st.lists(st.from_regex(r"[ab](\.[ab]){0,3}", fullmatch=True), unique=True, max_size=12))
def test_identities_are_unique(files: list[str]) -> None:
    assert len(set(identities(files))) == len(files)


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("a/b.jpg", True),
        ("a\\b.jpg", True),
        ("a/./b.jpg", True),
        ("..b.jpg", True),
        ("../b.jpg", False),
        ("a/../../b.jpg", False),
        ("/etc/passwd", False),
        ("C:/b.jpg", False),
        ("C:\\b.jpg", False),
        ("https://host/b.jpg", False),
        ("a\x00b.jpg", False),
        ("a\nb.jpg", False),
        ("\ud800.jpg", False),
        ("", False),
        (".", False),
    ],
)
def test_names_that_leave_the_folder_are_refused(name: str, safe: bool) -> None:
    cleaned, trouble = clean_name(name)
    assert (trouble is None) == safe
    cleaned.encode("utf-8")
