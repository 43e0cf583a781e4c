"""Average precision is pycocotools' own."""

from pathlib import Path

import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from jigsaw_pretrain.detect.annotations import read_ground_truth
from jigsaw_pretrain.detect.coco_eval import STATS, score
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
