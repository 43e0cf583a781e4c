"""Comparisons that are refused before they begin."""

from pathlib import Path

import pytest

from jigsaw_pretrain.detect.comparison.arms import choose
from jigsaw_pretrain.detect.comparison.comparison import Comparison, Settings
from jigsaw_pretrain.errors import UserError


def test_an_arm_with_a_neck_needs_a_pyramid(tmp_path: Path) -> None:
    settings = Settings(
        annotations="a",
        images="b",
        val_annotations="c",
        val_images="d",
        data="e",
        arms=("neck",),
        seeds=(0,),
        rates=(0.02,),
        recipe=None,
        sets=("model.name=faster-rcnn-c4",),
        pretrain_recipe=None,
        pretrain_sets=(),
        imagenet=None,
        workers=0,
        device="cpu",
        gpus=1,
    )
    with pytest.raises(UserError, match="has no pyramid for a neck's weights: --set model.name=faster-rcnn-fpn"):
        Comparison(tmp_path / "out", settings, choose("neck", None)).prepare()
    assert not (tmp_path / "out").exists()
