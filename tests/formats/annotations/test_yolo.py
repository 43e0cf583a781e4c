"""YOLO labels: polygons, bad lines, splits, and YAML files that name no classes."""

from PIL import Image

from jigsaw_pretrain.formats.annotations.read import Reading, listed, read_annotations
from jigsaw_pretrain.formats.annotations.yolo import class_names
from jigsaw_pretrain.formats.images.source import ImageSource
from tests.helpers.prepped import Drawn


def test_polygons_and_bad_lines_of_yolo(drawn: Drawn) -> None:
    drawn.add("a.jpg", (100, 100))
    lines = ["0 0.1 0.2 0.5 0.2 0.3 0.9", "0 0.5 0.5 0.1", "x y z", "7 0.5 0.5 0.2 0.2", "1.0 0.5 0.5 nan 0.2", ""]
    (drawn.folder / "labels").mkdir()
    (drawn.folder / "labels" / "a.txt").write_text("\n".join(lines))
    (drawn.folder / "labels" / "lost.txt").write_text("0 0.5 0.5 0.1 0.1")
    (drawn.folder / "data.yaml").write_text("names:\n  0: a\n  1: b\n")
    images = str(drawn.folder / "images")
    found = listed(read_annotations(str(drawn.folder), images), ImageSource(images), Reading())
    assert found.classes == ("a", "b") and found.xywh[0].tolist() == [10, 20, 40, 70]
    assert found.label.tolist() == [0, 0, -1, -1, 1]
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
    assert class_names(b"a: 1", "x") is None and class_names(b"- 1", "x") is None
