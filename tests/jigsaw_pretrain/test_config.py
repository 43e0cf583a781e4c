"""Configurations: sections of typed keys from TOML and settings."""

import json
import math
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jigsaw_pretrain.config import Config, Count, Positive, Record, Share, choices, describe, reference
from jigsaw_pretrain.detect.recipe import DetectorRecipe
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.train.recipe import Recipe
from tests.helpers.settings import REPOSITORY

Fruit = Literal["apple", "pear", "none"]


class Basket(Record, frozen=True, kw_only=True):
    """What is in it."""

    fruit: Fruit = "apple"
    """Kind of fruit."""

    count: Count | None = None
    """How many."""

    weights: Annotated[tuple[Positive, ...], msgspec.Meta(min_length=1)] = (1.0,)
    """Kilograms of each,
    in order."""


class Route(Record, frozen=True, kw_only=True):
    """Where it goes."""

    to: str = "home"
    """Where."""

    share: Share = 0.5
    """How much of it."""

    fast: bool = False
    """Whether to hurry."""


class Errand(Config, frozen=True, kw_only=True):
    """A basket and its route."""

    basket: Basket = Basket()
    route: Route = Route()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.route.fast and self.basket.count == 99:
            raise UserError("route.fast = true is too much for basket.count = 99")


def test_settings_are_laid_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text('[basket]\nfruit = "pear"\ncount = 3\nweights = [1, 2.5]\n\n[route]\nfast = true\n')
    found = Errand.load(file, ["basket.count = 4", "route.to=the old mill", 'route.to="x"', "route.share=1"])
    assert found.basket == Basket(fruit="pear", count=4, weights=(1.0, 2.5))
    assert found.route == Route(to="x", share=1.0, fast=True)
    assert isinstance(found.route.share, float) and isinstance(found.basket.weights[0], float)
    assert Errand.load(file, ["basket.count=none"]).basket.count is None
    assert Errand.load(None, ["basket.fruit=none"]).basket.fruit == "none"
    assert found.updated("route.to=mill").route.to == "mill"


@given(
    st.builds(
        Errand,
        basket=st.builds(
            Basket,
            fruit=st.sampled_from(choices(Fruit)),
            count=st.none() | st.integers(1, 10**9),
            weights=st.lists(st.floats(1e-300, 1e9), min_size=1).map(tuple),
        ),
        route=st.builds(
            Route,
            to=st.text(st.characters(codec="utf-8", exclude_characters="\x7f")),
            share=st.floats(0, 1),
            fast=st.just(False),
        ),
    )
)
def test_a_configuration_survives_its_toml_and_its_json(tmp_path_factory: pytest.TempPathFactory, one: Errand) -> None:
    file = tmp_path_factory.getbasetemp() / "again.toml"
    file.write_text(one.to_toml(), encoding="utf-8", newline="")
    assert Errand.load(file) == one
    assert Errand.from_dict(json.loads(json.dumps(one.to_dict())), "run.json") == one
    assert one.differences(one) == []


def test_differences_name_section_key_and_both_values() -> None:
    assert Errand().updated("route.share=0.7", "basket.count=2").differences(Errand()) == [
        "basket.count = 2, was none",
        "route.share = 0.7, was 0.5",
    ]


@pytest.mark.parametrize(
    ("setting", "key", "remedy"),
    [
        ("basket.cuont=3", "basket.cuont", "did you mean basket.count?"),
        ("count=3", "unknown key count", "did you mean basket.count?"),
        ("route.count=3", "route.count", "did you mean basket.count?"),
        ("qqqqqq=3", "qqqqqq", "basket, route"),
        ("basket.count", "basket.count", "section.key=value"),
        ("basket.count=many", "basket.count", "whole number"),
        ("basket.count=2.0", "basket.count", "whole number"),
        ("basket.count=true", "basket.count", "whole number"),
        ("basket.count=0", "basket.count", "from 1"),
        ("basket.fruit=plum", "basket.fruit", "one of apple, pear, none"),
        ("basket.weights=2", "basket.weights", "a list of numbers above 0"),
        ("basket.weights=[]", "basket.weights", "a list of numbers"),
        ("basket.weights=[1, inf]", "basket.weights", "a list of numbers"),
        ("route.share=nan", "route.share", "from 0 to 1"),
        ("route.share=1.01", "route.share", "from 0 to 1"),
        ("route.share=true", "route.share", "a number"),
        ("route.fast=1", "route.fast", "true or false"),
        ("route.to=5", "route.to", "a string"),
        ("route.to=2024-01-01", "route.to", "a string"),
    ],
)
def test_bad_settings_are_refused_with_the_key_and_the_remedy(setting: str, key: str, remedy: str) -> None:
    with pytest.raises(UserError) as refusal:
        Errand.load(None, [setting])
    said = refusal.value.message
    assert said.startswith("--set ") and key in said and remedy in said and "\n" not in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[basket]\ncount = = 3", "not valid TOML"),
        (f"a = {'[' * 50_000}{']' * 50_000}", "not valid TOML"),
        (f"[basket]\ncount = {'9' * 6_000}", "not valid TOML"),
        ("[basket]\ncuont = 3", "did you mean basket.count?"),
        ("count = 3", "did you mean basket.count?"),
        ("basket = 3", "write [basket]"),
        ("[baskets]\ncount = 3", "did you mean basket.count?"),
        ("[basket.count]\na = 1", "basket.count must be"),
        ("[basket]\ncount = 99\n[route]\nfast = true", "route.fast"),
    ],
)
def test_bad_files_are_refused_by_name_and_key(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(UserError) as refusal:
        Errand.load(file)
    assert str(file) in refusal.value.message and said in refusal.value.message
    with pytest.raises(UserError, match="missing.toml cannot be read"):
        Errand.load(tmp_path / "missing.toml")


def test_keys_are_judged_together_and_the_refusal_names_all_sources(tmp_path: Path) -> None:
    file = tmp_path / "fast.toml"
    file.write_text("[route]\nfast = true\n")
    with pytest.raises(UserError, match=f"{file}, --set basket.count=99: .*basket.count = 99"):
        Errand.load(file, ["basket.count=99"])


@pytest.mark.parametrize("kind", [Recipe, DetectorRecipe])
def test_what_a_version_without_sections_wrote_is_refused_as_that(kind: type[Config]) -> None:
    with pytest.raises(UserError, match="run.json .*without sections"):
        kind.from_dict({"seed": 0, "batch": 512, "steps": 10}, "run.json")


@pytest.mark.parametrize("value", [0, 2.0, math.inf, "3", True, None])
def test_a_record_made_in_python_is_checked_alike(value: Any) -> None:
    if value is None:
        assert Basket(count=value).count is None
        return
    with pytest.raises(UserError, match="Basket.count"):
        Basket(count=value)


def test_types_are_described_in_words() -> None:
    assert describe(Fruit) == "one of apple, pear, none"
    assert describe(Annotated[int, msgspec.Meta(ge=1)] | None) == "a whole number of at least 1 or none"
    assert describe(Count) == "a whole number from 1 to 1,000,000,000"
    assert describe(Count, with_limit=False) == "a whole number of at least 1"
    assert describe(Annotated[float, msgspec.Meta(gt=0, le=1)]) == "a number above 0 and at most 1"
    assert describe(tuple[Positive, ...], with_limit=False) == "a list of numbers above 0"
    assert describe(tuple[Count, ...] | None, with_limit=False) == "a list of whole numbers of at least 1 or none"


def test_the_reference_has_each_key_with_values_default_and_docstring() -> None:
    text = reference(Errand)
    assert "[basket]" in text and "What is in it." in text
    assert "| `fruit` | one of apple, pear, none | `apple` | Kind of fruit. |" in text
    assert "Kilograms of each, in order." in text


def test_a_recipe_that_comes_with_the_program_is_found_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Recipe.load("sample") == Recipe.load(REPOSITORY / "recipes" / "sample.toml")
    with pytest.raises(UserError, match="paper-r50.*sample"):
        Recipe.load("nowhere")
    # A file of the user's own goes before.
    (tmp_path / "sample").write_text("[optim]\nsteps = 7\n")
    assert Recipe.load("sample").optim.steps == 7


@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_a_recipe_that_is_no_file_is_named_and_not_waited_for(kind: str, tmp_path: Path) -> None:
    path = {"fifo": tmp_path / "fifo", "device": Path("/dev/zero"), "folder": tmp_path}[kind]
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UserError) as caught:
        Recipe.load(path)
    assert str(path) in caught.value.message
