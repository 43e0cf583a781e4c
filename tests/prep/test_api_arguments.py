"""Arguments of prep's functions in Python: each is checked before anything is read or written; places may be Paths."""

import math
from pathlib import Path
from typing import Any

import pytest

import jigsaw_pretrain as jp
from jigsaw_pretrain.formats.annotations.read import Reading
from jigsaw_pretrain.prep.plan.plan import PlanOptions, options_of
from tests.helpers.prepped import Drawn, tree

UNTYPED: Any = jp

WRONG = [
    ("exif", "Apply", "one of ignore, apply, not Apply"),
    ("ignored", "Use", "one of skip, use, not Use"),
    ("encode", "Lossless", "one of pixels, lossless, not Lossless"),
    ("context_at", "trainer", "one of prep, train, not trainer"),
    ("subsampling", "4:4:4", "one of 444, 422, 420, 440, 411, not 4:4:4"),
    ("jpeg_quality", 500, "a whole number from 1 to 100, not 500"),
    ("jpeg_quality", 95.5, "a whole number from 1 to 100, not 95.5"),
    ("crops_per_part", 0, "a whole number of at least 1, not 0"),
    ("context", math.nan, "a number from 1 to 10, not nan"),
    ("context", "2", "a number from 1 to 10, not 2"),
    ("negatives_per_positive", math.inf, "a number from 0 to 100, not inf"),
    ("nodata", -9999, "a string or none, not -9999"),
    ("split", 1, "a string or none, not 1"),
    ("voc_origin", 2, "a whole number from 0 to 1 or none, not 2"),
    ("voc_origin", True, "a whole number from 0 to 1 or none, not true"),
    ("pixels", 8, "pixels must be a string, not 8"),
    ("seed", 0.5, "seed must be a whole number, not 0.5"),
    ("contxt", 2.0, "there is no option contxt; did you mean context?"),
]

OF_SHARDS = [
    ("max_skipped", math.nan, "max_skipped must be a number from 0 to 1, not nan"),
    ("workers", 0, "workers must be a whole number from 1 to 1,000,000,000 or none, not 0"),
    ("scheduler", 8786, "scheduler must be a string or none, not 8786"),
]


@pytest.fixture
def given(drawn: Drawn) -> tuple[str, str]:
    """Annotations and images."""
    drawn.box(drawn.add("a.jpg", (60, 40)), [5, 5, 20, 20])
    drawn.box(drawn.add("b.jpg", (60, 40)), [5, 5, 20, 20])
    return str(drawn.write()), str(drawn.folder / "images")


@pytest.mark.parametrize(("name", "value", "said"), WRONG)
def test_a_wrong_option_of_a_plan_is_named_with_what_is_allowed(
    given: tuple[str, str], name: str, value: Any, said: str
) -> None:
    with pytest.raises(jp.UserError) as caught:
        UNTYPED.plan(*given, **{name: value})
    assert name in caught.value.message and caught.value.message.endswith(said)


@pytest.mark.parametrize(("name", "value", "said"), [*WRONG, *OF_SHARDS])
def test_nothing_is_written_for_a_wrong_option(
    given: tuple[str, str], tmp_path: Path, name: str, value: Any, said: str
) -> None:
    before = tree(tmp_path)
    with pytest.raises(jp.UserError) as caught:
        UNTYPED.shards(*given, tmp_path / "out", **{"workers": 1, name: value})
    assert name in caught.value.message and caught.value.message.endswith(said)
    assert tree(tmp_path) == before and not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [PlanOptions, Reading])
@pytest.mark.parametrize(("name", "value", "said"), [one for one in WRONG if one[0] in ("exif", "ignored", "nodata")])
def test_the_records_check_themselves(kind: Any, name: str, value: Any, said: str) -> None:
    with pytest.raises(jp.UserError, match=rf"^{kind.__name__}\.{name} must be "):
        kind(**{name: value})


def test_options_are_recorded_as_they_were_given() -> None:
    assert repr(PlanOptions(context=2).to_dict()["context"]) == "2"
    assert repr(PlanOptions(context=2.0).to_dict()["context"]) == "2.0"
    with pytest.raises(jp.UserError, match=r"^plan\.json is damaged \(PlanOptions\.exif must be"):
        options_of({"exif": "Apply"}, "plan.json")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda given, out: UNTYPED.split(*given, out, share=math.nan), "share must be a number from 0 to 1, not nan"),
        (lambda given, out: UNTYPED.split(*given, out, seed="a"), "seed must be a whole number, not a"),
        (
            lambda given, out: UNTYPED.split(*given, out, held_out="a.jpg"),
            "held_out must be a list of names, not a.jpg",
        ),
        (lambda given, out: UNTYPED.split(*given, 5), "out must be a path or a URL, not 5"),
        (lambda given, out: UNTYPED.finish(out, math.nan), "max_skipped must be a number from 0 to 1, not nan"),
        (lambda given, out: UNTYPED.verify(out, workers=0), "workers must be a whole number"),
        (lambda given, out: UNTYPED.repair(out, [], workers=-1), "workers must be a whole number"),
        (lambda given, out: UNTYPED.sample_data(out, images=math.inf), "images must be a whole number"),
        (lambda given, out: UNTYPED.sample_data(out, images=0), "images must be a whole number"),
        (lambda given, out: UNTYPED.plan(None, given[1]), "annotations must be a path or a URL, not None"),
        (lambda given, out: UNTYPED.plan(given[0], 5), "images must be a path or a URL, not 5"),
        (lambda given, out: UNTYPED.shards(*given, b"out"), "out must be a path or a URL, not b'out'"),
        (lambda given, out: UNTYPED.status(None), "url must be a path or a URL, not None"),
        (lambda given, out: UNTYPED.open_dataset(None), "url must be a path or a URL, not None"),
        (
            lambda given, out: UNTYPED.open_dataset(Path("s3://bucket/crops")),
            "pathlib has made s3:/bucket/crops of a URL",
        ),
    ],
)
def test_arguments_of_other_functions_are_checked(given: tuple[str, str], tmp_path: Path, call: Any, said: str) -> None:
    before = tree(tmp_path)
    with pytest.raises(jp.UserError) as caught:
        call(given, tmp_path / "out")
    assert said in caught.value.message and tree(tmp_path) == before


def test_every_place_may_be_a_path(given: tuple[str, str], tmp_path: Path) -> None:
    annotations, images = map(Path, given)
    assert jp.plan(annotations, images).digest == jp.plan(*given).digest
    out, other = tmp_path / "out", tmp_path / "other"
    made = jp.shards(annotations, images, out, workers=1)
    assert made == jp.open_dataset(out) == jp.open_dataset(str(out)) and isinstance(made.url, str)
    jp.shards(*given, str(other), workers=1)
    assert tree(out) == tree(other)
    shard = next((out / "shards").glob("*.tar"))
    shard.write_bytes(b"")
    found = jp.verify(out, workers=1)
    assert found
    jp.repair(out, found, annotations=annotations, images=images, workers=1)
    assert tree(out) == tree(other) and jp.status(out).finished
    assert jp.finish(out).crops == made.description.totals["crops"]
    split = jp.split(annotations, images, tmp_path / "split", share=0.5)
    assert split.train.exists()
    assert jp.sample_data(tmp_path / "sample", images=1) > 0
