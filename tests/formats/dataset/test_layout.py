"""Names of shards, images and crops."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jigsaw_pretrain.formats.dataset import layout


@given(st.sampled_from("STW"), st.integers(0, 2_000_000))
def test_shard_names_round_trip(group: str, part: int) -> None:
    assert layout.parse_shard_name(layout.shard_name(group, part)) == (group, part)


@pytest.mark.parametrize("name", ["S-1.tar", "X-000001.tar", "S-000001.tar.gz", "S-000001", "", "S--00001.tar"])
def test_other_names_are_no_shards(name: str) -> None:
    with pytest.raises(ValueError, match="not a shard"):
        layout.parse_shard_name(name)


def test_identity_is_the_path_without_suffix() -> None:
    assert layout.image_id("train/a.b.jpg") == "train/a.b"
    assert layout.image_id("x\\y.png") == "x/y"
    assert layout.image_id("plain") == "plain"
    key = layout.crop_key("train/a.b", 3, False)
    assert key.endswith("-p00003")
    assert "." not in key
    assert "/" not in key
    assert layout.crop_key("train/a.b", 3, True) == key.replace("-p", "-n")
