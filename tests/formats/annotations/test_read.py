"""VOC and YOLO versions of a COCO file give its crops; kinds are told by content; hostile files are refused plainly."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.annotations.read import Reading, listed, read_annotations
from jigsaw_pretrain.formats.annotations.table import Annotations
from jigsaw_pretrain.formats.annotations.voc import read_voc
from jigsaw_pretrain.formats.images.source import ImageSource
from tests.helpers.prepped import Drawn, rows, run_shards
from tests.helpers.writers import write_voc, write_yolo


@pytest.fixture
def whole(drawn: Drawn) -> Drawn:
    """Whole-pixel boxes in nested folders, one image without a box."""
    drawn.categories = [{"id": 1, "name": "ant"}, {"id": 2, "name": "bee"}]
    for number, name in enumerate(("a/one.jpg", "a/two.png", "b/three.jpg", "four.jpg", "b/none.jpg")):
        image = drawn.add(name, (311, 203 + number))
        for box in ((0, 0, 50, 40), (17, 33, 101, 29), (200, 100, 111, 103), (150, 10, 20, 60))[
            : 4 if number < 4 else 0
        ]:
            drawn.box(image, box, category=1 + (box[0] + number) % 2)
    return drawn


def crops(out: Path) -> list[tuple[Any, ...]]:
    found = rows(out, "crops")
    columns = [name for name in found[0] if name != "annotation_id"]
    return [tuple(row[name] for name in columns) for row in found]


@pytest.mark.slow(seconds=4)
@pytest.mark.parametrize("kind", ["voc", "voc from 1", "yolo", "yolo without empty files", "yolo by its yaml"])
@pytest.mark.parametrize("context", ["1", "2"])
def test_other_formats_give_the_same_crops(whole: Drawn, kind: str, context: str) -> None:
    out, images = whole.folder / "coco-out", whole.folder / "images"
    run = ("--workers", "1", "--context", context, "--negatives-per-positive", "0.5")
    assert run_shards(whole.write(), images, out, *run).exit_code == 0
    if kind.startswith("voc"):
        annotations = whole.folder / "xml"
        write_voc(whole, annotations, origin=int(kind == "voc from 1"))
    else:
        annotations = whole.folder
        write_yolo(whole, annotations, empty="without" not in kind)
        annotations = annotations / "data.yaml" if "yaml" in kind else annotations
    result = run_shards(annotations, images, whole.folder / "out", *run)
    assert result.exit_code == 0, result.output
    assert crops(whole.folder / "out") == crops(out)
    shards = {path.name: path.read_bytes() for path in (out / "shards").iterdir()}
    assert shards == {path.name: path.read_bytes() for path in (whole.folder / "out" / "shards").iterdir()}


def test_sizes_come_from_the_images_where_the_file_has_none(drawn: Drawn) -> None:
    drawn.add("a.jpg", (200, 150), [(10, 10, 50, 40)])
    drawn.add("b.png", (99, 77), [(5, 5, 9, 9)])
    with_sizes, images = drawn.folder / "with", drawn.folder / "images"
    assert run_shards(drawn.write(), images, with_sizes, "--workers", "1").exit_code == 0
    for image in drawn.images:
        del image["width"], image["height"]
    drawn.add("gone.jpg", (9, 9), draw=False)
    drawn.images[-1].update(width=None)
    result = run_shards(drawn.write(), images, drawn.folder / "out", "--workers", "1", "--max-skipped", "50%")
    assert result.exit_code == 0, result.output
    assert crops(drawn.folder / "out") == crops(with_sizes)
    assert [(row["image_file"], row["reason"]) for row in rows(drawn.folder / "out", "skipped")] == [
        ("gone.jpg", "image file is missing")
    ]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "empty folder"),
        ({"a.png": "x"}, "no annotations that are known"),
        ({"a.json": "{}"}, "Name the JSON file"),
        ({"a.txt": "0 1 1 1 1"}, "no data.yaml"),
        ({"data.yaml": "names: [a]"}, "no YOLO label files"),
        ({"data.yaml": "names: [[a]]", "a.txt": "0"}, "no name"),
        ({"data.yaml": "names: {x: y}", "a.txt": "0"}, "numbered from 0"),
        ({"data.yaml": "names: [a", "a.txt": "0"}, "not YAML"),
        ({"data.yaml": "names: &n [*n]", "a.txt": "0"}, "not YAML"),
        ({"data.yaml": "!!python/object/apply:os.system ['true']", "a.txt": "0"}, "not YAML"),
        ({"a.xml": "<annotation>"}, "not whole XML"),
        ({"a.xml": "<kml/>"}, "no Pascal VOC file"),
        ({"a.xml": '<!DOCTYPE a [<!ENTITY x "y">]><annotation/>'}, "entities"),
        ({"a.xml": "<annotation/>", "classes.txt": "a\na"}, "twice"),
    ],
)
def test_folders_that_are_something_else(tmp_path: Path, files: dict[str, str], said: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=said) as caught:
        raw = read_annotations(str(tmp_path), str(tmp_path / "images"))
        read_voc(raw.files, raw.source)
    assert "\n" not in caught.value.message


def test_one_xml_file_is_not_a_dataset(tmp_path: Path) -> None:
    (tmp_path / "a.xml").write_text("<annotation/>")
    with pytest.raises(UserError, match="folder of Pascal VOC"):
        read_annotations(str(tmp_path / "a.xml"), "x")


def test_lvis_and_objects365_fields_do_no_harm(drawn: Drawn) -> None:
    drawn.add("train2017/a.jpg", (200, 150), [(10, 10, 50, 40)])
    drawn.images[0] |= {
        "coco_url": "http://host/train2017/a.jpg",
        "neg_category_ids": [3],
        "not_exhaustive_category_ids": [],
    }
    del drawn.images[0]["file_name"]
    drawn.annotations[0] |= {"isfake": 0, "isreflected": 1, "iscrowd": 0, "segmentation": [[1, 2, 3, 4, 5, 6]]}
    drawn.categories[0] |= {"synset": "b.n.01", "frequency": "r", "image_count": 1}
    path = drawn.write()
    path.write_text(json.dumps(json.loads(path.read_text()) | {"licenses": [], "info": {}}))
    assert run_shards(path, drawn.folder / "images", drawn.folder / "out", "--workers", "1").exit_code == 0
    assert {row["image_id"] for row in rows(drawn.folder / "out", "crops")} == {"train2017/a"}
    assert os.path.isdir(drawn.folder / "out")


def test_a_missing_file_is_named() -> None:
    with pytest.raises(UserError, match=r"nowhere\.json: no such file"):
        read_annotations("nowhere.json", "images")


def test_boxes_in_percent_are_refused(drawn: Drawn) -> None:
    rng = np.random.default_rng(0)
    for nth in range(12):
        number = drawn.add(f"{nth}.jpg", (640, 480), draw=False)
        for left, top in rng.uniform(0, 80, (5, 2)):
            drawn.box(number, [left, top, 19.5, 19.5])

    def table() -> Annotations:
        images = str(drawn.folder / "images")
        return listed(read_annotations(str(drawn.write()), images), ImageSource(images), Reading())

    with pytest.raises(UserError, match=r"all 60 boxes .* percentages, .*size / 100"):
        table()
    drawn.box(number, [120, 90, 40, 40])
    assert len(table().files) == 12
