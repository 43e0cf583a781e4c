"""Ground truth as a detector is trained on it, and annotations that are mistakes."""

from pathlib import Path

import pytest

from jigsaw_pretrain.detect.annotations import read_ground_truth, require_same_classes
from jigsaw_pretrain.errors import UserError
from tests.helpers.detection import write_annotations


def test_annotations_are_labelled_in_order_of_category_ids_and_cut_to_the_image(tmp_path: Path) -> None:
    boxes = [[90, 10, 30, 20], [0, 0, 0, 5], [200, 0, 5, 5], [float("nan"), 0, 5, 5]]
    found = [{"id": i, "image_id": 1, "category_id": 9, "bbox": box} for i, box in enumerate(boxes)]
    read = read_ground_truth(write_annotations(tmp_path / "a.json", found))
    assert read.classes == ["a", "b"] and read.unusable == 3
    assert read.images[0].boxes.tolist() == [[90, 10, 100, 30]] and read.images[0].labels.tolist() == [1]
    assert [one["id"] for one in read.truth["annotations"]] == [1, 2, 3]


def test_annotation_mistakes_name_the_place(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"annotations\[0\]"):
        read_ground_truth(
            write_annotations(tmp_path / "a.json", [{"image_id": 5, "category_id": 9, "bbox": [0, 0, 1, 1]}])
        )
    with pytest.raises(UserError, match=r"\$\.images"):
        read_ground_truth(write_annotations(tmp_path / "b.json", [], images=[{"id": 1}]))
    with pytest.raises(UserError, match="cannot be read"):
        read_ground_truth(tmp_path / "c.json")
    (tmp_path / "d.json").write_text("{")
    with pytest.raises(UserError, match="not a COCO"):
        read_ground_truth(tmp_path / "d.json")
    other = write_annotations(tmp_path / "e.json", [], categories=[{"id": 4, "name": "a"}])
    with pytest.raises(UserError, match="same categories"):
        require_same_classes(read_ground_truth(write_annotations(tmp_path / "f.json", [])), read_ground_truth(other))
