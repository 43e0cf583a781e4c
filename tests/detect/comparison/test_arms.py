"""The arms of a comparison."""

from pathlib import Path

import pytest

from jigsaw_pretrain.detect.comparison.arms import Arm, choose, read_arms
from jigsaw_pretrain.detect.recipe import DetectorRecipe
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.train.recipe import Recipe
from tests.helpers.settings import REPOSITORY


def test_arms_are_chosen_by_name() -> None:
    assert [arm.name for arm in choose("jigsaw,scratch", None)] == ["scratch", "jigsaw"]
    with pytest.raises(UserError, match="no arm 'jgsaw'"):
        choose("jgsaw", None)
    with pytest.raises(UserError, match="--imagenet FILE"):
        choose("imagenet", None)
    for names, file in ((",", None), (" ", Path("weights.pth"))):
        with pytest.raises(UserError, match="names no arm"):
            choose(names, file)


def test_arms_of_ones_own_stand_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        '[half]\npretrain = []\npretrain_steps = 0.5\ndata = "d"\n[gn]\npretrain = []\ndetect = ["model.norm=gn"]\n'
    )
    found = choose(f"jigsaw,{file},scratch", None)
    assert [arm.name for arm in found] == ["scratch", "jigsaw", "half", "gn"]
    assert found[2] == Arm("half", pretrain=(), pretrain_steps=0.5, data="d")
    # The same pre-training is shared, another one is not.
    assert found[3].pretraining(found) == "jigsaw" and found[2].pretraining(found) == "half"
    for text, said in (
        ("[a]\nsteps = 3\n", "unknown field `steps`"),
        ("[jigsaw]\n", "jigsaw is an arm of this program"),
        ('[a]\npretrain = []\nweights = "w"\n', "a has pretrain and weights"),
        ('[a]\ndata = "d"\n', "add pretrain = "),
        ('["a/b"]\n', "regex"),
        ("[a\n", "table per arm"),
        ("# none\n", "holds no arm"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=said):
            choose(str(file), None)
    with pytest.raises(UserError, match="cannot be read"):
        choose("none.toml", None)
    monkeypatch.chdir(tmp_path)
    assert "jigsaw-dcn" in {arm.name for arm in choose("figure-8.toml", None)}


@pytest.mark.parametrize("file", sorted((REPOSITORY / "recipes" / "arms").glob("*.toml")), ids=lambda file: file.stem)
def test_the_arms_of_the_papers_have_recipes_that_are_read(file: Path) -> None:
    for arm in read_arms(str(file)):
        assert arm.about
        own, detector = ((arm.pretrain_recipe, arm.pretrain), (arm.recipe, arm.detect))
        Recipe.load(own[0] and REPOSITORY / own[0], own[1] or ())
        DetectorRecipe.load(detector[0] and REPOSITORY / detector[0], detector[1])
