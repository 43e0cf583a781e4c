import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from jigsaw_pretrain.detect.annotations import read_ground_truth, require_same_classes
from jigsaw_pretrain.detect.cli import main
from jigsaw_pretrain.detect.evaluate import STATS, score
from jigsaw_pretrain.errors import UserError


def as_predictions(truth: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"image_id": one["image_id"], "category_id": one["category_id"], "bbox": one["bbox"], "score": 1.0}
        for one in truth["annotations"]
        if not one["iscrowd"]
    ]


def write(path: Path, annotations: list[dict[str, Any]], **more: Any) -> Path:
    document = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 100, "height": 50}],
        "categories": [{"id": 9, "name": "b"}, {"id": 4, "name": "a"}],
        "annotations": annotations,
        **more,
    }
    path.write_text(json.dumps(document))
    return path


@pytest.mark.parametrize("name", ["coco_small_val", "bccd", "voc2007_224/val"])
def test_ground_truth_given_as_predictions_has_an_ap_of_one(real_data: Path, tmp_path: Path, name: str) -> None:
    annotations = real_data / name / "annotations.json"
    found = as_predictions(read_ground_truth(annotations).truth)
    (tmp_path / "results.json").write_text(json.dumps(found))
    arguments = ["eval", "--annotations", str(annotations), "--results", str(tmp_path / "results.json")]
    result = CliRunner().invoke(main, [*arguments, "--out", str(tmp_path)], catch_exceptions=False)
    assert result.exit_code == 0 and "AP 100.0  AP50 100.0" in result.output
    saved = json.loads((tmp_path / "ap.json").read_text())["bbox"]
    assert saved["stats"]["AP"] == 1.0
    assert all(one["AP"] == pytest.approx(1) for one in saved["classes"].values() if one["boxes"])


def test_ap_is_pycocotools_own(real_data: Path) -> None:
    annotations = real_data / "coco_small_val" / "annotations.json"
    read = read_ground_truth(annotations)
    noisy = [
        {**one, "bbox": [x + 0.2 * w, y, w, 0.9 * h], "score": (37 * index % 101) / 101}
        for index, one in enumerate(as_predictions(read.truth))
        for x, y, w, h in [one["bbox"]]
    ]
    truth = COCO(str(annotations))
    by_hand = COCOeval(truth, truth.loadRes([dict(one) for one in noisy]), "bbox")
    by_hand.evaluate()
    by_hand.accumulate()
    by_hand.summarize()
    found = score(read.truth, noisy)
    assert [found.stats[name] for name in STATS] == by_hand.stats.tolist()
    assert 0.1 < found.stats["AP"] < 0.9
    there = [one["AP"] for one in found.classes.values() if one["AP"] >= 0]
    assert sum(there) / len(there) == pytest.approx(found.stats["AP"])
    assert sum(found.curves["0.50"]) / 101 == pytest.approx(found.stats["AP50"])


def test_no_detection_is_an_ap_of_zero_and_foreign_ones_are_refused(tmp_path: Path) -> None:
    box = {"id": 0, "image_id": 1, "category_id": 4, "bbox": [1, 1, 20, 20]}
    read = read_ground_truth(write(tmp_path / "a.json", [box, {**box, "bbox": [50, 1, 20, 20]}]))
    assert score(read.truth, []).stats["AP"] == 0
    assert score(read.truth, as_predictions(read.truth)).stats["AP"] == 1
    with pytest.raises(UserError, match="another dataset"):
        score(read.truth, [{"image_id": 2, "category_id": 4, "bbox": [0, 0, 1, 1], "score": 1.0}])


def test_annotations_are_labelled_in_order_of_category_ids_and_cut_to_the_image(tmp_path: Path) -> None:
    boxes = [[90, 10, 30, 20], [0, 0, 0, 5], [200, 0, 5, 5], [float("nan"), 0, 5, 5]]
    found = [{"id": i, "image_id": 1, "category_id": 9, "bbox": box} for i, box in enumerate(boxes)]
    read = read_ground_truth(write(tmp_path / "a.json", found))
    assert read.classes == ["a", "b"] and read.unusable == 3
    assert read.images[0].boxes.tolist() == [[90, 10, 100, 30]] and read.images[0].labels.tolist() == [1]
    assert [one["id"] for one in read.truth["annotations"]] == [1, 2, 3]


def test_annotation_mistakes_name_the_place(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"annotations\[0\]"):
        read_ground_truth(write(tmp_path / "a.json", [{"image_id": 5, "category_id": 9, "bbox": [0, 0, 1, 1]}]))
    with pytest.raises(UserError, match=r"\$\.images"):
        read_ground_truth(write(tmp_path / "b.json", [], images=[{"id": 1}]))
    with pytest.raises(UserError, match="cannot be read"):
        read_ground_truth(tmp_path / "c.json")
    (tmp_path / "d.json").write_text("{")
    with pytest.raises(UserError, match="not a COCO"):
        read_ground_truth(tmp_path / "d.json")
    other = write(tmp_path / "e.json", [], categories=[{"id": 4, "name": "a"}])
    with pytest.raises(UserError, match="same categories"):
        require_same_classes(read_ground_truth(write(tmp_path / "f.json", [])), read_ground_truth(other))
