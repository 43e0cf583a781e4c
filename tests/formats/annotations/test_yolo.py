"""YOLO labels: polygons, bad lines, splits, and YAML files that name no classes."""

import pytest
from PIL import Image

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.annotations.folders import names_of_yaml
from jigsaw_pretrain.formats.annotations.read import Reading, listed, read_annotations
from jigsaw_pretrain.formats.annotations.table import Annotations
from jigsaw_pretrain.formats.images.source import ImageSource
from tests.helpers.prepped import Drawn


def test_polygons_and_bad_lines_of_yolo(drawn: Drawn) -> None:
    drawn.add("a.jpg", (100, 100))
    lines = ["0 0.1 0.2 0.5 0.2 0.3 0.9", "0 0.5 0.5 0.1", "7 0.5 0.5 0.2 0.2", "1.0 0.5 0.5 nan 0.2", ""]
    (drawn.folder / "labels").mkdir()
    (drawn.folder / "labels" / "a.txt").write_text("\n".join(lines))
    (drawn.folder / "labels" / "lost.txt").write_text("0 0.5 0.5 0.1 0.1")
    (drawn.folder / "data.yaml").write_text("names:\n  0: a\n  1: b\n")
    images = str(drawn.folder / "images")
    found = listed(read_annotations(str(drawn.folder), images), ImageSource(images), Reading())
    assert found.classes == ("a", "b") and found.xywh[0].tolist() == [10, 20, 40, 70]
    assert found.label.tolist() == [0, 0, -1, 1]
    assert [(row.image_file, row.reason) for row in found.skipped] == [("lost.jpg", "image file is missing")]


def test_splits_of_yolo_find_their_own_labels(drawn: Drawn) -> None:
    for layout in ("images/{}", "{}/images"):
        for split in ("train", "val"):
            images = drawn.folder / layout.format(split)
            labels = drawn.folder / layout.format(split).replace("images", "labels")
            images.mkdir(parents=True)
            labels.mkdir(parents=True)
            Image.new("RGB", (100, 50)).save(images / f"{split}.jpg")
            (labels / f"{split}.txt").write_text("0 0.5 0.5 0.5 0.5")
            (drawn.folder / "data.yaml").write_text("names: [a]")
            read = read_annotations(str(drawn.folder), str(images))
            assert list(read.files) == [f"{split}.txt"]


def test_yaml_of_other_kinds_has_no_names() -> None:
    assert names_of_yaml(b"a: 1", "x", "x") is None and names_of_yaml(b"- 1", "x", "x") is None


def lines(drawn: Drawn, text: str | list[str], yaml: str = "names: [a, b]") -> Annotations:
    for number, one in enumerate([text] if isinstance(text, str) else text):
        name = f"{number}.jpg"
        drawn.add(name, (100, 100))
        (drawn.folder / "labels").mkdir(exist_ok=True)
        (drawn.folder / "labels" / f"{number}.txt").write_text(one)
    (drawn.folder / "data.yaml").write_text(yaml)
    images = str(drawn.folder / "images")
    return listed(read_annotations(str(drawn.folder), images), ImageSource(images), Reading())


BOX = "0 0.5 0.5 0.4 0.2"
POINTS = ((0.4, 0.45), (0.6, 0.45), (0.5, 0.55), (0.45, 0.5))


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("stated", [True, False])
@pytest.mark.parametrize(("count", "numbers"), [(4, 3), (4, 2), (3, 3), (8, 2), (17, 3), (5, 2)])
def test_pose_lines_are_their_boxes(drawn: Drawn, count: int, numbers: int, stated: bool, plain: bool) -> None:
    texts = []
    for shift in (-0.2, 0.0, 0.29):
        box = f"0 {0.5 + shift} 0.5 0.4 0.2"
        points = [(x + shift, y) for x, y in (POINTS * 5)[:count]]
        tail = " 2" if numbers == 3 else ""
        texts.append(box + "".join(f" {x} {y}{tail}" for x, y in points))
    boxes = [[10, 40, 40, 20], [30, 40, 40, 20], [59, 40, 40, 20]]
    if plain:
        texts.append("0 0.5 0.5 0.2 0.2")
        boxes.append([40, 40, 20, 20])
    found = lines(drawn, texts, "names: [a, b]" + (f"\nkpt_shape: [{count}, {numbers}]" if stated else ""))
    assert found.xywh.tolist() == boxes


@pytest.mark.parametrize("task", ["", "\ntask: obb"])
def test_oriented_boxes_and_polygons_are_their_bounds(drawn: Drawn, task: str) -> None:
    corners = [
        "0 0.1 0.2 0.3 0.1 0.4 0.3 0.2 0.4",
        "1 0.7 0.6 0.9 0.6 0.9 0.9 0.7 0.9",
        "0 0.6 0.1 0.8 0.2 0.7 0.3 0.5 0.2",
    ]
    found = lines(drawn, ["\n".join(corners)], "names: [a, b]" + task)
    assert found.xywh.tolist() == [[10, 10, 30, 30], [70, 60, 20, 30], [50, 10, 30, 20]]


def test_what_may_be_keypoints_or_a_polygon_is_asked_for(drawn: Drawn) -> None:
    text = "0 0.5 0.5 0.45 0.4 0.4 0.55 0.6 0.45"
    with pytest.raises(UserError, match="kpt_shape"):
        lines(drawn, text)
    assert lines(drawn, text, "names: [a]\nkpt_shape: [2, 2]").xywh.tolist() == [[27.5, 30, 45, 40]]
    assert lines(drawn, text, "names: [a]\ntask: segment").xywh.tolist() == [[40, 40, 20, 15]]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("0,0.5,0.5,0.4,0.2", "comma"),
        ("0 0,5 0,5 0,4 0,2", "comma"),
        ("b 0.5 0.5 0.4 0.2", "which is 1"),
        ("thing 0.5 0.5 0.4 0.2", "no label"),
        ("0 0.5 0.5 0.4 0.2 0.93", "six numbers"),
        ("0 50 50 40 20", "no share"),
        ("0 10 10 40 10 40 40 10 40", "no share"),
        ("0 0.5 0.5 0.4 0.2 0.1 0.1 0.1", "8 numbers"),
        ("10 20 40 20 40 60 10 60 plane 0", "no label"),
    ],
)
def test_lines_of_other_forms_are_refused_with_file_and_line(drawn: Drawn, bad: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        lines(drawn, [BOX, f"{BOX}\n\n{bad}\n"])
    assert "labels/1.txt, line 3" in caught.value.message and "\n" not in caught.value.message


def test_classes_counted_from_one_are_refused(drawn: Drawn) -> None:
    with pytest.raises(UserError, match="from 0"):
        lines(drawn, ["1 0.5 0.5 0.4 0.2", "2 0.5 0.5 0.4 0.2"])


def test_pose_lines_of_another_count_than_stated_are_refused(drawn: Drawn) -> None:
    with pytest.raises(UserError, match="makes 17"):
        lines(drawn, BOX + " 0.5 0.5" * 3, "names: [a]\nkpt_shape: [4, 3]")
