"""A detector's page: which mistakes come first, and how they are drawn."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jigsaw_pretrain.detect.annotations import NO_LABEL, ImageRecord
from jigsaw_pretrain.detect.recipe import DetectorRecipe
from jigsaw_pretrain.detect.report import _drawn, _judged, pictures, settings_rows
from jigsaw_pretrain.formats.pixels import RGB8


def record(number: int, boxes: list[list[float]], labels: list[int], crowd: int = 0) -> ImageRecord:
    """An image of 100 x 80 pixels; the last ``crowd`` boxes are crowds."""
    flags = np.arange(len(boxes)) >= len(boxes) - crowd
    table = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    return ImageRecord(number, f"{number}.png", 100, 80, table, np.array(labels), flags, (None,) * len(boxes))


def detection(image: int, category: int, box: list[float], score: float) -> dict[str, Any]:
    left, top, right, bottom = box
    return {"image_id": image, "category_id": category, "bbox": [left, top, right - left, bottom - top], "score": score}


LABELS = {7: 0, 9: 1}
BOX, OTHER, FAR = [10.0, 10.0, 40.0, 40.0], [50.0, 10.0, 90.0, 60.0], [5.0, 60.0, 20.0, 78.0]


def test_a_detection_is_right_once_of_its_class_and_where_the_object_is() -> None:
    found = [
        detection(1, 7, [11, 11, 41, 41], 0.9),
        detection(1, 7, BOX, 0.8),
        detection(1, 9, BOX, 0.7),
        detection(1, 9, [52, 12, 92, 58], 0.6),
        detection(1, 7, FAR, 0.2),
    ]
    judged = _judged(record(1, [BOX, OTHER, FAR], [0, 1, 0]), found, LABELS)
    assert list(judged.right) == [True, False, False, True] and list(judged.missed) == [2]
    assert judged.badness == (0.8, pytest.approx(1 / 3))
    on_a_crowd = _judged(record(1, [OTHER], [1], crowd=1), [detection(1, 9, OTHER, 0.9)], LABELS)
    assert list(on_a_crowd.right) == [True] and list(on_a_crowd.missed) == []
    small, beside = [55.0, 20.0, 60.0, 30.0], [80.0, 55.0, 99.0, 79.0]
    for label, right in ((1, True), (NO_LABEL, True), (0, False)):
        found = [detection(1, 9, box, 0.9) for box in (small, beside)]
        assert list(_judged(record(1, [OTHER], [label], crowd=1), found, LABELS).right) == [right, False]


def test_of_an_image_without_a_sure_detection_the_best_three_count() -> None:
    found = [detection(1, 7, BOX, score) for score in (0.01, 0.05, 0.02, 0.03)]
    assert [one["score"] for one in _judged(record(1, [BOX], [0]), found, LABELS).found] == [0.05, 0.03, 0.02]


def test_the_worst_mistakes_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    records = (record(1, [BOX], [0]), record(2, [BOX], [0]), record(3, [BOX], [0]), record(4, [], []))
    results = [
        detection(1, 7, BOX, 0.9),
        detection(2, 9, FAR, 0.5),
        detection(2, 7, BOX, 0.5),
        detection(4, 7, FAR, 0.8),
    ]
    truth: Any = SimpleNamespace(images=records, categories=((7, "猫"), (9, "a dog")), classes=["猫", "a dog"])
    blank = SimpleNamespace(read=lambda _: np.full((80, 100, 3), 128, dtype=np.uint8))
    monkeypatch.setattr("jigsaw_pretrain.detect.report.ImageReader", lambda *_: blank)
    config: Any = SimpleNamespace(pixels=RGB8, mean=(0.5,) * 3, std=(0.5,) * 3)
    captions = [one.caption for one in pictures(truth, "", results, config).figures]
    assert captions == [
        "4.png: 0 right, 1 wrong, 0 missed",
        "2.png: 1 right, 1 wrong, 0 missed",
        "3.png: 0 right, 0 wrong, 1 missed",
        "1.png: 1 right, 0 wrong, 0 missed",
    ]


def test_texts_never_cover_each_other_however_many_detections_there_are() -> None:
    many = [detection(1, 7, BOX, 0.9 - nth / 1000) for nth in range(100)]
    judged = _judged(record(1, [BOX, OTHER], [0, 1]), many, LABELS)
    image = _drawn(np.full((80, 100, 3), 128, dtype=np.uint8), judged, LABELS, ["cat", "dog"])
    assert isinstance(image, Image.Image) and max(image.size) == 560
    dark = (np.asarray(image) < 10).all(axis=2).mean()
    assert 0.01 < dark < 0.2, "black plates hide the picture"


def test_settings_are_those_that_differ_from_the_papers() -> None:
    recipe = DetectorRecipe.load(None, ["optim.lr=0.04", "optim.steps=20"])
    rows = settings_rows({"recipe": recipe.to_dict(), "plan": {"drops": [14, 18]}, "init": "scratch"})
    assert ["optim.lr", "0.04", "0.02"] in rows and ["plan.drops", "14, 18", ""] in rows
    assert len(rows) == 4 and not any("{" in cell for row in rows for cell in row)
