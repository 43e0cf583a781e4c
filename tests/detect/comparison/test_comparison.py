"""Comparisons that are refused before they begin."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jigsaw_pretrain.detect.comparison.arms import Arm, choose
from jigsaw_pretrain.detect.comparison.comparison import Comparison, Settings
from jigsaw_pretrain.errors import UserError

SETTINGS = Settings(
    annotations="a",
    images="b",
    val_annotations="c",
    val_images="d",
    data="e",
    arms=("neck",),
    seeds=(0, 1),
    rates=(0.02, 0.04, 0.08),
    recipe=None,
    sets=(),
    pretrain_recipe=None,
    pretrain_sets=(),
    imagenet=None,
    workers=0,
    device="cpu",
    gpus=1,
)


@pytest.mark.parametrize(
    ("changed", "refused"),
    [
        ({"sets": ("model.name=faster-rcnn-c4",)}, "neck: .*has no pyramid for a neck's weights"),
        ({"sets": ("model.backbone=resnet18", "model.name=retinanet")}, "jigsaw: .*of resnet50 and .*of resnet18"),
        ({"pretrain_sets": ("loss.tua=0.5",), "sets": ("model.name=retinanet",)}, "jigsaw: .*tua"),
    ],
)
def test_settings_that_any_arm_cannot_have_are_refused_before_the_first_one_trains(
    tmp_path: Path, changed: dict[str, Any], refused: str
) -> None:
    comparison = Comparison(tmp_path / "out", replace(SETTINGS, **changed), choose("scratch,jigsaw,neck", None))
    with pytest.raises(UserError, match=refused):
        comparison.prepare()
    assert not (tmp_path / "out").exists()


def test_an_arms_file_and_dataset_are_looked_for_before_the_first_one_trains(tmp_path: Path) -> None:
    settings = replace(SETTINGS, sets=("model.name=retinanet",))
    for arm in (Arm("own", pretrain=(), data=str(tmp_path / "none")), Arm("own", weights=tmp_path / "none.pth")):
        with pytest.raises(UserError, match="own: .*none"):
            Comparison(tmp_path / "out", settings, [*choose("scratch", None), arm]).prepare()


@pytest.mark.parametrize("noted", ["", "[1]", "[" * 50_000, '{"definitions": 7}', '{"annotations": NaN}'])
def test_a_comparisons_damaged_notes_are_named(tmp_path: Path, noted: str) -> None:
    comparison = Comparison(tmp_path, replace(SETTINGS, sets=("model.name=retinanet",)), choose("scratch", None))
    (tmp_path / "settings.json").write_text(noted)
    with pytest.raises(UserError, match="settings.json is damaged"):
        comparison.prepare()


def test_trainings_are_counted(tmp_path: Path) -> None:
    arms = choose("scratch,jigsaw,neck,neck-backbone-only", None)
    # Two pre-trainings, four arms and scratch trained longer, over two seeds each; three rates of each arm.
    assert Comparison(tmp_path, SETTINGS, arms).trainings == (2 + 4 + 1) * 2 + 4 * 3
