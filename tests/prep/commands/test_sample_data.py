"""The sample dataset."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image

from jigsaw_pretrain.formats.jigsaw import aspect_group
from jigsaw_pretrain.prep.cli import main


def _draw(out: Path, *arguments: str) -> dict[str, list[dict[str, Any]]]:
    result = CliRunner().invoke(main, ["sample-data", "--out", str(out), "--images", "6", *arguments])
    assert result.exit_code == 0, result.output
    document: dict[str, list[dict[str, Any]]] = json.loads((out / "annotations.json").read_text())
    return document


@pytest.mark.slow(seconds=3)
def test_scenes_are_a_function_of_the_seed(tmp_path: Path) -> None:
    first, again = _draw(tmp_path / "a"), _draw(tmp_path / "b")
    assert first == again
    for file in sorted((tmp_path / "a" / "images").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / "images" / file.name).read_bytes()
    assert _draw(tmp_path / "c", "--seed", "1") != first


def test_boxes_lie_inside_and_cover_all_groups(tmp_path: Path) -> None:
    document = _draw(tmp_path / "a")
    sizes = {}
    for record in document["images"]:
        with Image.open(tmp_path / "a" / "images" / str(record["file_name"])) as image:
            assert image.size == (record["width"], record["height"])
            sizes[record["id"]] = image.size
    assert len(document["categories"]) >= 8
    groups = set()
    for annotation in document["annotations"]:
        x, y, w, h = annotation["bbox"]
        width, height = sizes[annotation["image_id"]]
        assert x >= 0
        assert y >= 0
        assert x + w <= width
        assert y + h <= height
        assert 0 < annotation["area"] <= w * h
        groups.add(aspect_group(w, h))
    assert groups == {"S", "T", "W"}


def test_existing_sample_is_not_overwritten(tmp_path: Path) -> None:
    _draw(tmp_path / "a")
    result = CliRunner().invoke(main, ["sample-data", "--out", str(tmp_path / "a"), "--images", "6"])
    assert result.exit_code == 2
    assert "already there" in result.output
