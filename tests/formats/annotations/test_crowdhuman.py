"""CrowdHuman's odgt: full-body boxes, ignored people, masks, and lines that are none."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.annotations.read import Ignored, Reading, listed, read_annotations
from jigsaw_pretrain.formats.images.source import ImageSource
from jigsaw_pretrain.prep.plan.plan import PlanOptions, make_plan

BOXES: list[dict[str, Any]] = [
    {"tag": "person", "fbox": [10, 5, 20, 30], "hbox": [1, 2, 3, 4], "extra": {"box_id": 0, "occ": 1}},
    {"tag": "person", "fbox": [40, 5, 20, 30], "head_attr": {"ignore": 1}, "extra": {"ignore": 0}},
    {"tag": "person", "fbox": [60, 5, 20, 30], "extra": {"ignore": 1}},
    {"tag": "mask", "fbox": [80, 5, 20, 30], "extra": {"ignore": 1}},
]


@pytest.mark.parametrize("name", ["annotation_train.odgt", "annotations.json"])
@pytest.mark.parametrize(("ignored", "objects"), [("skip", 2), ("use", 3)])
def test_people_are_objects_and_masks_never(tmp_path: Path, name: str, ignored: Ignored, objects: int) -> None:
    Image.new("RGB", (100, 50)).save(tmp_path / "273271,1a0d6000b9e1f5b7.jpg")
    line = json.dumps({"ID": "273271,1a0d6000b9e1f5b7", "gtboxes": BOXES})
    (tmp_path / name).write_bytes(f"\ufeff{line}\r\n\r\n".encode())
    options = PlanOptions(negatives_per_positive=9, context=1, ignored=ignored)
    raw = read_annotations(str(tmp_path / name), str(tmp_path))
    found = listed(raw, ImageSource(str(tmp_path)), options.reading)
    plan = make_plan(found, options, 0)
    assert plan.classes == ("person",) and plan.positives == objects and len(plan.skipped) == 4 - objects
    background = plan.crops.boxes[plan.crops.label == plan.background]
    for left, _, width, _ in [box["fbox"] for box in BOXES]:
        assert (
            (background[:, 2] <= left)
            | (background[:, 0] >= left + width)
            | (background[:, 1] >= 35)
            | (background[:, 3] <= 5)
        ).all()


def test_other_lines_are_refused_with_their_number(tmp_path: Path) -> None:
    good = json.dumps({"ID": "a", "gtboxes": BOXES})
    for bad in (
        "{",
        json.dumps({"ID": "b", "gtboxes": [{"tag": "person", "fbox": [1, 2, 3]}]}),
        json.dumps({"ID": "b"}),
    ):
        (tmp_path / "a.odgt").write_text(f"{good}\n{bad}\n")
        with pytest.raises(UserError, match=r"a\.odgt, line 2") as caught:
            listed(read_annotations(str(tmp_path / "a.odgt"), "x"), ImageSource(str(tmp_path)), Reading())
        assert "\n" not in caught.value.message
