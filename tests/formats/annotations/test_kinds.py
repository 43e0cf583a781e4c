"""Folders and files as people have them: each is read as it is meant, or refused with the file and the remedy."""

import json
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.annotations.read import Ignored, Reading, listed, read_annotations
from jigsaw_pretrain.formats.annotations.skipped import BoxReason
from jigsaw_pretrain.formats.annotations.table import Annotations
from jigsaw_pretrain.formats.images.source import ImageSource
from jigsaw_pretrain.prep.plan.plan import PlanOptions, make_plan

LINE = "0 0.5 0.5 0.5 0.5\n"
BOX = [[25, 12.5, 50, 25]]


def write(folder: Path, files: Mapping[str, str | bytes | None]) -> None:
    """Files by their paths: text, bytes, or None for a picture of 100x50."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            Image.new("RGB", (100, 50)).save(path, format="PNG")
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())


def read(annotations: Path, images: Path, reading: Reading | None = None) -> Annotations:
    return listed(read_annotations(str(annotations), str(images)), ImageSource(str(images)), reading or Reading())


@pytest.mark.parametrize(
    "files",
    [
        {"images/a.jpg": None, "labels/a.txt": b"\xef\xbb\xbf0 0.5 0.5 0.5 0.5\r\n\r\n"},
        {"images/a.jpg": None, "labels/a.txt": "  0\t0.5  0.5 0.5 0.5   \n\n   \n"},
        {"images/a.JPEG": None, "labels/a.TXT": LINE},
        {"images/x/y/a.Jpg": None, "labels/x/y/a.txt": LINE},
        {"images/a.b.jpg": None, "labels/a.b.txt": LINE},
        {"images/a b.jpg": None, "labels/a b.txt": LINE},
        {"images/a%20b.jpg": None, "labels/a%20b.txt": LINE},
        {"images/a.jpg": None, "images/b.png": None, "labels/a.txt": LINE, "labels/b.txt": ""},
        {"images/a.jpg": None, "images/b.png": None, "labels/a.txt": LINE},
        {"images/a.jpg": None, "labels/a.txt": LINE, "data.yaml": b"\xef\xbb\xbfnames:\r\n  0: red\r\n  1: blue\r\n"},
        {"images/a.jpg": None, "labels/a.txt": LINE, "data.yaml": "names: {'0': red, '1': blue}\n"},
        {"images/a.jpg": None, "labels/a.txt": LINE, "data.yaml": "", "classes.txt": "red\nblue\n\n\n"},
        {"images/a.jpg": None, "labels/a.txt": LINE, "data.yaml": "", "classes.txt": b"\xef\xbb\xbfred\r\nblue\r\n"},
    ],
)
def test_yolo_as_editors_and_systems_write_it(tmp_path: Path, files: Mapping[str, str | bytes | None]) -> None:
    write(tmp_path, {"data.yaml": "nc: 2\nnames: [red, blue]\n", **files})
    found = read(tmp_path, tmp_path / "images")
    assert found.classes == ("red", "blue") and found.xywh.tolist() == BOX and found.label.tolist() == [0]
    assert not found.skipped and len(found.files) == sum(content is None for content in files.values())


def test_pictures_of_one_stem_in_several_folders_have_their_own_labels(tmp_path: Path) -> None:
    names = ("a/1", "b/1", "b/c/1")
    write(tmp_path, {f"images/{name}.jpg": None for name in names} | {"data.yaml": "names: [p, q, r]"})
    write(tmp_path, {f"labels/{name}.txt": f"{nth}{LINE[1:]}" for nth, name in enumerate(names)})
    found = read(tmp_path, tmp_path / "images")
    assert [found.files[nth] for nth in found.image] == [f"{name}.jpg" for name in names]
    assert found.label.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("picture", "label"),
    [
        ("IMG_1.JPG", "img_1.txt"),
        ("a b.jpg", "a%20b.txt"),
        ("a.jpg", "a.jpg.txt"),
        (unicodedata.normalize("NFC", "\u00fc.jpg"), unicodedata.normalize("NFD", "\u00fc.txt")),
    ],
)
def test_a_label_of_nearly_an_images_name_is_named_and_the_image_is_no_background(
    tmp_path: Path, picture: str, label: str
) -> None:
    write(tmp_path, {f"images/{picture}": None, f"labels/{label}": LINE, "data.yaml": "names: [red]"})
    write(tmp_path, {"images/other.jpg": None, "labels/other.txt": LINE})
    with pytest.raises(UserError) as caught:
        read(tmp_path, tmp_path / "images")
    assert label in caught.value.message and picture in caught.value.message and "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("images", "labels"),
    [("images", "label"), ("image", "label"), ("images/val", "labels/Val"), ("images/val", "labels/valid")],
)
def test_folders_of_labels_and_images_that_do_not_fit_are_named(tmp_path: Path, images: str, labels: str) -> None:
    write(tmp_path, {f"{images}/a.jpg": None, f"{labels}/a.txt": LINE, "data.yaml": "names: [red]"})
    with pytest.raises(UserError) as caught:
        read(tmp_path, tmp_path / images)
    assert f"{labels}/a.txt" in caught.value.message and "a.jpg" in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("yaml", "classes"),
    [
        ("base: &b {names: [x]}\n<<: *b\n", ("x",)),
        ("names: [yes, no, 010, 1e3, 12:30, null]", ("yes", "no", "010", "1e3", "12:30", "null")),
        ("names: {0: on, 2: ' off '}", ("on", "class 1", "off")),
        ("names:\n- a # first\n- 'b: c'\n", ("a", "b: c")),
    ],
)
def test_class_names_of_yaml_are_those_that_are_written(tmp_path: Path, yaml: str, classes: tuple[str, ...]) -> None:
    write(tmp_path, {"images/a.jpg": None, "labels/a.txt": LINE, "data.yaml": yaml})
    assert read(tmp_path, tmp_path / "images").classes == classes


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"data.yaml": "nc: 3\nnames: [a, b]"}, "nc"),
        ({"data.yaml": "names: {0: a, 0: b}"}, "twice"),
        ({"data.yaml": "names: [a]\nnames: [b]"}, "twice"),
        ({"data.yaml": "names: [a]\ntrain: x\nval: y\ntrain: y"}, "'train' stands there twice"),
        ({"data.yaml": "names: [a]\nval: x\nvalid: y"}, "'val' stands there twice"),
        ({"data.yaml": "names: [a, b]\nnc: '3'"}, "`nc` says 3"),
        ({"data.yaml": "names: [a]\ntrain: [images, 5]"}, "`train` must be a path"),
        ({"data.yaml": "names: [a, ]\nnc: 2"}, "nc"),
        ({"data.yaml": "names: ['', b]"}, "no name"),
        ({"classes.txt": "a\n\nb\n"}, "empty line"),
        ({"classes.txt": "a\nb\n".encode("utf-16")}, "UTF-8"),
        ({"data.yaml": "names: [a, b]", "labels/a.txt": LINE.encode("utf-16")}, "line 1"),
        ({"data.yaml": "names: [a, b]", "images/a.jpeg": None}, "a.jpeg"),
        ({"data.yaml": "names: [a, b]", "images/a.PNG": None}, "a.PNG"),
        ({"data.yaml": "names: [a, b]", "labels/a.txt": "0\\0.5\\0.5\\0.5\\0.5\n"}, "line 1"),
        ({"data.yaml": "names: [a, b]", "labels/a.txt": "0 0.5 0.5 0.5 0_5\n"}, "line 1"),
    ],
)
def test_yolo_that_could_mean_two_things_is_refused(
    tmp_path: Path, files: Mapping[str, str | bytes | None], said: str
) -> None:
    write(tmp_path, {"images/a.jpg": None, "labels/a.txt": LINE, **files})
    with pytest.raises(UserError) as caught:
        read(tmp_path, tmp_path / "images")
    assert said in caught.value.message and "\n" not in caught.value.message


@pytest.mark.parametrize("number", ["2", "-1", "0.5", "7"])
def test_classes_beyond_the_names_are_lost_boxes_and_no_background(tmp_path: Path, number: str) -> None:
    write(tmp_path, {"images/a.jpg": None, "labels/a.txt": LINE + f"{number} 0.1 0.1 0.1 0.1\n"})
    write(tmp_path, {"data.yaml": "names: [a, b]"})
    found = read(tmp_path, tmp_path / "images")
    assert found.reason.tolist() == [BoxReason.USABLE, BoxReason.UNKNOWN_CATEGORY]


def test_splits_may_be_written_on_windows(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write(tmp_path, {f"{split}/images/{split}.jpg": None, f"{split}/labels/{split}.txt": LINE})
    write(tmp_path, {"list.txt": b"C:\\data\\train\\images\\train.jpg\r\n"})
    for stated in ("..\\train\\images", ".\\train\\images\\", "list.txt"):
        write(tmp_path, {"data.yaml": f"train: {stated}\nval: val\\images\nnames: [red]\n"})
        assert read(tmp_path, tmp_path, Reading(split="train")).files == ("train/images/train.jpg",)


@pytest.mark.parametrize("letter", ["\u0085", "\u2028", "\x0b"])
def test_a_class_list_ends_its_lines_as_editors_do(tmp_path: Path, letter: str) -> None:
    names = (f"a{letter}b", "c")
    write(tmp_path, {"images/a.jpg": None, "labels/a.txt": f"1{LINE[1:]}", "classes.txt": "\n".join(names)})
    found = read(tmp_path, tmp_path / "images")
    assert found.classes == names and found.label.tolist() == [1]


def voc(file: str, more: str = "", root: str = "<annotation>", difficult: str = "0") -> str:
    return (
        f"{root}<filename>{file}</filename>{more}<size><width>100</width><height>50</height></size><object>"
        f"<name> red\n</name><difficult>{difficult}</difficult><bndbox><xmin>26</xmin><ymin>13</ymin><xmax>75</xmax>"
        "<ymax>37</ymax></bndbox></object></annotation>"
    )


@pytest.mark.parametrize(
    "files",
    [
        {"P/a.jpg": None, "A/a.xml": voc("a.jpg")},
        {"P/a.JPG": None, "A/a.XML": voc("a.jpg")},
        {"P/a.jpg": None, "A/a.xml": voc("a.jpg", root='<annotation xmlns="http://x.org/voc">')},
        {"P/a.jpg": None, "A/a.xml": b"\xef\xbb\xbf" + voc("a.jpg").replace(">", ">\r\n").encode()},
        {"P/a.jpg": None, "A/a.xml": ('<?xml version="1.0" encoding="utf-16"?>' + voc("a.jpg")).encode("utf-16")},
        {"P/s/a.jpg": None, "A/s/a.xml": voc("C:\\photos\\a.jpg")},
        {"P/s/a.jpg": None, "A/a.xml": voc("s\\a.jpg")},
        {"P/a b.jpg": None, "A/a b.xml": voc("a%20b.jpg")},
        {"P/a.png": None, "A/a.xml": voc("a.jpg"), "A/classes.txt": b"\xef\xbb\xbfred\r\n\r\n"},
        {"P/a.jpg": None, "P/a.png": None, "A/a.xml": voc("a.jpg")},
    ],
)
def test_voc_as_editors_and_systems_write_it(tmp_path: Path, files: Mapping[str, str | bytes | None]) -> None:
    write(tmp_path, files)
    found = read(tmp_path / "A", tmp_path / "P")
    (picture,) = (name[2:] for name, content in list(files.items())[:1] if content is None)
    assert found.files == (picture,) and found.classes == ("red",) and not found.skipped
    assert found.xywh.tolist() == [[25, 12, 50, 25]] and found.reason.tolist() == [BoxReason.USABLE]


@pytest.mark.parametrize("names", [("a.jpg", "./a.jpg"), ("s/a.jpg", "s\\a.jpg")])
def test_two_voc_files_of_one_picture_are_named_however_they_spell_it(tmp_path: Path, names: tuple[str, str]) -> None:
    picture = names[0]
    write(tmp_path, {f"P/{picture}": None, "A/x.xml": voc(names[0]), "A/y.xml": voc(names[1])})
    with pytest.raises(UserError) as caught:
        read(tmp_path / "A", tmp_path / "P")
    assert "x.xml" in caught.value.message and "y.xml" in caught.value.message


def coco(**change: Any) -> dict[str, Any]:
    """A file of one image and box; changes are of the lists' entries."""
    found: dict[str, Any] = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 100, "height": 50}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 7, "bbox": [25, 12.5, 50, 25]}],
        "categories": [{"id": 90, "name": "blue"}, {"id": 7, "name": "red"}],
    }
    for name, entry in change.items():
        found[name][0] |= entry
    return found


def text_ids(lists: dict[str, Any]) -> dict[str, Any]:
    lists["images"][0]["id"] = lists["annotations"][0]["image_id"] = "frame 1"
    return lists


@pytest.mark.parametrize(
    "lists",
    [
        coco(),
        coco(annotations={"iscrowd": False, "id": "7f"}),
        coco(annotations={"iscrowd": None, "ignore": None, "extra": {"occ": 1}, "mot_conf": 1.0}),
        coco(images={"file_name": ".\\a.jpg"}),
        coco(images={"width": None, "height": None}),
        coco(annotations={"bbox": None, "segmentation": [[25, 12.5, 75, 12.5, 75, 37.5, 25, 37.5]]}),
        coco(annotations={"bbox": [0, 0, 0, 0], "segmentation": [[25, 12.5, 75, 12.5, 75, 37.5], [25, 37.5, 30, 37]]}),
        text_ids(coco()),
    ],
)
@pytest.mark.parametrize("encode", [str.encode, lambda text: b"\xef\xbb\xbf" + text.replace(" ", "\r\n").encode()])
def test_coco_as_exporters_write_it(tmp_path: Path, lists: dict[str, Any], encode: Callable[[str], bytes]) -> None:
    write(tmp_path, {"images/a.jpg": None, "a.json": encode(json.dumps(lists))})
    if "frame" in str(lists):
        write(tmp_path, {"a.json": json.dumps(lists)})
    found = read(tmp_path / "a.json", tmp_path / "images")
    assert found.files == ("a.jpg",) and found.xywh.tolist() == BOX and found.classes == ("red", "blue")
    assert found.label.tolist() == [0] and found.reason.tolist() == [BoxReason.USABLE]
    assert not found.crowd.any() and not found.ignored.any()


@pytest.mark.parametrize(
    ("lists", "said"),
    [
        (coco(annotations={"category_id": "7"}), "annotations[0].category_id"),
        (coco(categories={"id": "90"}), "categories[0].id"),
        (coco(annotations={"bbox": ["25", "12.5", "50", "25"]}), "annotations[0].bbox"),
        (coco(annotations={"bbox": {"x": 25, "y": 12}}), "annotations[0].bbox"),
        (coco(images={"width": "100"}), "images[0].width"),
        (coco(annotations={"iscrowd": "0"}), "annotations[0].iscrowd"),
    ],
)
def test_coco_with_text_for_numbers_is_refused_with_its_place(tmp_path: Path, lists: dict[str, Any], said: str) -> None:
    write(tmp_path, {"a.json": json.dumps(lists)})
    with pytest.raises(UserError) as caught:
        read(tmp_path / "a.json", tmp_path)
    assert said in caught.value.message and "\n" not in caught.value.message


@pytest.mark.parametrize(
    "mark", [{"ignore": 1}, {"extra": {"ignore": 1}}, {"mot_conf": 0.0}, {"category_id": -1}, {"iscrowd": 1}]
)
@pytest.mark.parametrize("ignored", ["skip", "use"])
def test_what_exports_mark_as_ignored_is_no_object_and_no_background(
    tmp_path: Path, mark: dict[str, Any], ignored: Ignored
) -> None:
    lists = coco(annotations={"bbox": [0, 0, 20, 20]})
    lists["annotations"].append({"id": 2, "image_id": 1, "category_id": 7, "bbox": [20, 0, 80, 50], **mark})
    write(tmp_path, {"images/a.jpg": None, "a.json": json.dumps(lists)})
    options = PlanOptions(negatives_per_positive=20, context=1, ignored=ignored)
    plan = make_plan(read(tmp_path / "a.json", tmp_path / "images", options.reading), options, 0)
    used = ignored == "use" and not {"iscrowd", "category_id"} & mark.keys()
    assert (plan.crops.label < plan.background).sum() == 1 + used and len(plan.skipped) == 1 - used
    background = plan.crops.boxes[plan.crops.label == plan.background]
    assert (background[:, 2] <= 20).all()


@pytest.mark.parametrize("box", [[0, 0, 0, 0], [30, 20, 0, 0], [30, 20, -5, 9], [], [1, 2, 3]])
def test_an_object_whose_place_is_unknown_keeps_background_off_its_image(tmp_path: Path, box: list[float]) -> None:
    lists = coco(annotations={"bbox": [0, 0, 20, 20]})
    lists["annotations"].append({"id": 2, "image_id": 1, "category_id": 7, "bbox": box})
    write(tmp_path, {"images/a.jpg": None, "a.json": json.dumps(lists)})
    plan = make_plan(read(tmp_path / "a.json", tmp_path / "images"), PlanOptions(negatives_per_positive=9), 0)
    assert len(plan.crops) == 1 and len(plan.skipped) == 1


def test_a_dataset_of_no_usable_box_says_the_probable_cause(tmp_path: Path) -> None:
    write(tmp_path, {"images/a.jpg": None, "a.json": json.dumps(coco(annotations={"image_id": "1"}))})
    with pytest.raises(UserError, match="image_id of another type"):
        make_plan(read(tmp_path / "a.json", tmp_path / "images"), PlanOptions(), 0)


@pytest.mark.parametrize("folder", ["annotations", "Annotations", "xml"])
def test_voc_below_a_folder_of_its_own(tmp_path: Path, folder: str) -> None:
    write(tmp_path, {"images/a.jpg": None, f"{folder}/a.xml": voc("a.jpg")})
    assert read(tmp_path, tmp_path / "images").files == ("a.jpg",)


def test_folders_in_capitals_have_their_labels_beside_them(tmp_path: Path) -> None:
    write(tmp_path, {"data.yaml": "names: [red]", "Images/train/a.jpg": None, "Labels/train/a.txt": LINE})
    for images in ("Images", "Images/train"):
        assert read(tmp_path, tmp_path / images).xywh.tolist() == BOX


def test_a_file_of_names_that_a_yaml_names_is_asked_for(tmp_path: Path) -> None:
    write(tmp_path, {"data.yaml": "names: coco.list", "images/a.jpg": None, "labels/a.txt": LINE})
    with pytest.raises(UserError, match=r"coco\.list"):
        read(tmp_path / "data.yaml", tmp_path / "images")


def test_a_folder_of_labels_that_is_a_link_is_named(tmp_path: Path) -> None:
    write(tmp_path, {"set/data.yaml": "names: [red]", "set/images/a.jpg": None, "disk/a.txt": LINE})
    (tmp_path / "set" / "labels").symlink_to(tmp_path / "disk")
    with pytest.raises(UserError, match="not followed: labels"):
        read(tmp_path / "set", tmp_path / "set" / "images")


def test_cvats_export_is_read_as_it_is_unpacked(tmp_path: Path) -> None:
    write(tmp_path, {"obj.names": "red\n", "obj.data": "classes = 1\ntrain = data/train.txt\nnames = data/obj.names\n"})
    write(tmp_path, {"train.txt": "data/obj_train_data/a.jpg\n"})
    write(tmp_path, {"obj_train_data/a.jpg": None, "obj_train_data/a.txt": LINE, "obj_train_data/b.jpg": None})
    for images, files in (
        ("obj_train_data", ("a.jpg", "b.jpg")),
        (".", ("obj_train_data/a.jpg", "obj_train_data/b.jpg")),
    ):
        assert read(tmp_path, tmp_path / images).files == files
    found = read(tmp_path, tmp_path, Reading(split="train"))
    assert found.files == ("obj_train_data/a.jpg",) and "labels without an image" not in {n.check for n in found.notes}
