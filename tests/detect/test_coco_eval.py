"""Average precision is pycocotools' own."""

from pathlib import Path
from typing import Any

import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from jigsaw_pretrain.detect.annotations import class_names, read_ground_truth
from jigsaw_pretrain.detect.coco_eval import STATS, Score, by_stratum, merged, score
from jigsaw_pretrain.errors import UserError
from tests.helpers.detection import as_predictions, write_annotations


@pytest.mark.slow(seconds=3)
def test_ap_is_pycocotools_own(real_data: Path) -> None:
    annotations = real_data / "coco_small_val" / "annotations.json"
    read = read_ground_truth(str(annotations), None)
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
    read = read_ground_truth(str(write_annotations(tmp_path / "a.json", [box, {**box, "bbox": [50, 1, 20, 20]}])), None)
    assert score(read.truth, []).stats["AP"] == 0
    assert score(read.truth, as_predictions(read.truth)).stats["AP"] == 1
    with pytest.raises(UserError, match="another dataset"):
        score(read.truth, [{"image_id": 2, "category_id": 4, "bbox": [0, 0, 1, 1], "score": 1.0}])


def test_classes_of_one_name_are_each_scored(tmp_path: Path) -> None:
    boxes = [
        {"id": number, "image_id": 1, "category_id": number, "bbox": [30 * number, 1, 20, 20]} for number in (0, 1, 2)
    ]
    names = ["ball", "ball", "ball (category 1)"]
    named = [{"id": number, "name": name} for number, name in enumerate(names)]
    read = read_ground_truth(str(write_annotations(tmp_path / "a.json", boxes, categories=named)), None)
    found = score(read.truth, as_predictions(read.truth)[1:])
    assert [one["AP"] for one in found.classes.values()] == [0, pytest.approx(1), pytest.approx(1)]
    assert list(found.classes) == read.classes
    assert by_stratum(found, (1, 20, 1))["1-10"] == {"classes": 2, "AP": pytest.approx(0.5)}
    assert class_names([(4, "a"), (9, "b"), (11, "b")]) == ["a", "b (category 9)", "b (category 11)"]


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_regions_of_no_category_count_neither_for_nor_against(tmp_path: Path, kind: str) -> None:
    def annotation(number: int, category: int, box: list[int], **more: int) -> dict[str, Any]:
        x, y, w, h = box
        polygon = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        mask = {} if category < 0 else {"segmentation": polygon}
        return {
            "id": number,
            "image_id": 1,
            "category_id": category,
            "bbox": box,
            "area": w * h,
            "iscrowd": 0,
            **mask,
            **more,
        }

    images = [{"id": 1, "file_name": "a.jpg", "width": 100, "height": 100}]
    objects = [annotation(1, 4, [0, 0, 20, 20])]
    region = annotation(2, -1, [50, 50, 50, 50], iscrowd=1)
    found = [
        {**annotation(0, 4, box), "score": score} for box, score in (([60, 60, 20, 20], 0.9), ([0, 0, 20, 20], 0.8))
    ]
    read = read_ground_truth(str(write_annotations(tmp_path / "a.json", [*objects, region], images=images)), None)
    ours = score(read.truth, found, kind)
    # What pycocotools makes of a crowd region of the class.
    path = write_annotations(
        tmp_path / "b.json", [*objects, annotation(2, 4, region["bbox"], iscrowd=1)], images=images
    )
    truth = COCO(str(path))
    truth.anns[2]["segmentation"] = annotation(2, 4, region["bbox"])["segmentation"]
    by_hand = COCOeval(truth, truth.loadRes([dict(one) for one in found]), kind)
    by_hand.evaluate()
    by_hand.accumulate()
    by_hand.summarize()
    assert [ours.stats[name] for name in STATS] == by_hand.stats.tolist()
    assert ours.stats["AP"] == pytest.approx(1) and ours.classes["a"]["boxes"] == 1
    assert read.unusable == 0 and read.images[0].crowd.tolist() == [False, True]


def test_detections_of_several_sizes_are_merged_by_class_and_image() -> None:
    def one(image: int, category: int, left: float, score: float) -> dict[str, Any]:
        return {"image_id": image, "category_id": category, "bbox": [left, 0.0, 10.0, 10.0], "score": score}

    found = [one(1, 3, 0, 0.5), one(1, 3, 1, 0.9), one(1, 7, 1, 0.4), one(1, 3, 50, 0.3), one(2, 3, 1, 0.2)]
    kept = merged(found, 2)
    assert kept == [found[1], found[2], found[4]]
    assert merged(found, 9) == [found[1], found[2], found[3], found[4]]


def test_classes_are_averaged_by_their_annotations_in_training() -> None:
    found = Score(
        {}, {name: {"AP": ap, "AP50": ap, "boxes": 1.0} for name, ap in (("a", 0.2), ("b", 0.4), ("c", -1))}, {}
    )
    assert by_stratum(found, (1, 10, 5)) == {"1-10": {"classes": 2, "AP": pytest.approx(0.3)}}
    assert by_stratum(found, (11, 1001, 0)) == {
        "11-100": {"classes": 1, "AP": 0.2},
        "more": {"classes": 1, "AP": 0.4},
    }
    assert by_stratum(found, ()) == {}
