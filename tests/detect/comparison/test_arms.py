"""The arms of a comparison."""

import pytest

from jigsaw_pretrain.detect.comparison.arms import choose
from jigsaw_pretrain.errors import UserError


def test_arms_are_chosen_by_name() -> None:
    assert [arm.name for arm in choose("jigsaw,scratch", None)] == ["scratch", "jigsaw"]
    with pytest.raises(UserError, match="no arm 'jgsaw'"):
        choose("jgsaw", None)
    with pytest.raises(UserError, match="--imagenet FILE"):
        choose("imagenet", None)
