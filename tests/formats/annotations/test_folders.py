"""People's folders: where names, labels and splits lie, and that every file that is not looked at is told."""

import os
import shutil
from pathlib import Path

import fsspec
import pytest
from PIL import Image

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.annotations.read import Reading, listed, read_annotations
from jigsaw_pretrain.formats.annotations.table import Annotations
from jigsaw_pretrain.formats.images.source import ImageSource


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (100, 50)).save(path)
    return path


def put(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def label(path: Path, number: int = 0) -> Path:
    return put(path, f"{number} 0.5 0.5 0.5 0.5\n")


def table(annotations: Path | str, images: Path | str, reading: Reading | None = None) -> Annotations:
    raw = read_annotations(str(annotations), str(images))
    return listed(raw, ImageSource(str(images)), reading or Reading())


def told(found: Annotations) -> dict[str, tuple[str, ...]]:
    return {note.check: tuple(note.things) for note in found.notes}


@pytest.mark.parametrize("named", [".", "data.yaml", "labels", "classes.txt", "labels/classes.txt", "obj.names"])
def test_class_names_are_found_in_data_yaml_classes_txt_and_obj_names(tmp_path: Path, named: str) -> None:
    picture(tmp_path / "images" / "a.jpg")
    label(tmp_path / "labels" / "a.txt", 1)
    if named == "data.yaml":
        put(tmp_path / "data.yaml", "names: [red, blue]\n")
    else:
        put(tmp_path / (named if named.endswith((".txt", ".names")) else "classes.txt"), "red\nblue\n")
    put(tmp_path / "notes.json", '{"categories": [{"id": 0, "name": "red"}], "info": {}}')
    found = table(tmp_path / named, tmp_path / "images")
    assert found.classes == ("red", "blue") and found.label.tolist() == [1]
    assert found.xywh.tolist() == [[25, 12.5, 50, 25]]


def test_of_several_yaml_files_data_yaml_counts_and_else_they_are_named(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "a.jpg")
    label(tmp_path / "labels" / "a.txt")
    put(tmp_path / "args.yaml", "task: detect\n")
    put(tmp_path / "coco.yaml", "names: {0: person, 1: bicycle}\n")
    put(tmp_path / "zebra.yaml", "names: [zebra]\n")
    with pytest.raises(UserError) as caught:
        table(tmp_path, tmp_path / "images")
    assert "coco.yaml" in caught.value.message and "zebra.yaml" in caught.value.message
    put(tmp_path / "data.yaml", "names: [helmet]\n")
    assert table(tmp_path, tmp_path / "images").classes == ("helmet",)
    put(tmp_path / "dataset.yaml", "names: [vest]\n")
    with pytest.raises(UserError, match=r"data\.yaml, dataset\.yaml|dataset\.yaml"):
        table(tmp_path, tmp_path / "images")


@pytest.mark.parametrize("images", ["train/images", "train", ".", "link/train/images"])
@pytest.mark.parametrize("named", ["data.yaml", ".", "link"])
def test_labels_lie_beside_their_images_whatever_the_paths_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str, images: str
) -> None:
    for split in ("train", "valid"):
        picture(tmp_path / "set" / split / "images" / f"{split}.jpg")
        label(tmp_path / "set" / split / "labels" / f"{split}.txt")
    put(tmp_path / "set" / "data.yaml", "train: ../train/images\nval: ../valid/images\nnames: [red]\n")
    put(tmp_path / "set" / "README.roboflow.txt", "hello\n")
    (tmp_path / "set" / "link").symlink_to(tmp_path / "set")
    monkeypatch.chdir(tmp_path / "set")
    found = table(named, images)
    whole = images == "."
    assert len(found.xywh) == (2 if whole else 1) and ("splits" in told(found)) == whole
    if whole:
        assert table(named, images, Reading(split="train")).files == ("train/images/train.jpg",)


def test_labels_lie_beside_images_in_another_folder_than_the_yaml(tmp_path: Path) -> None:
    put(tmp_path / "config" / "data.yaml", "names: [red]\n")
    picture(tmp_path / "disk" / "images" / "train" / "a.JPG")
    label(tmp_path / "disk" / "labels" / "train" / "a.TXT")
    assert len(table(tmp_path / "config" / "data.yaml", tmp_path / "disk" / "images" / "train").xywh) == 1
    shutil.move(tmp_path / "disk" / "labels" / "train" / "a.TXT", tmp_path / "disk" / "images" / "train" / "a.txt")
    assert len(table(tmp_path / "config" / "data.yaml", tmp_path / "disk" / "images" / "train").xywh) == 1


@pytest.mark.parametrize("inside", [True, False])
def test_linked_folders_are_followed_within_the_named_one_and_else_named(tmp_path: Path, inside: bool) -> None:
    data = tmp_path / "set"
    for part in "ab":
        picture(data / "images" / part / f"{part}.jpg")
    label(data / "labels" / "a" / "a.txt")
    kept = data / "kept" if inside else tmp_path / "kept"
    label(kept / "b.txt")
    (data / "labels" / "b").symlink_to(kept)
    (data / "labels" / "again").symlink_to(data / "labels")
    put(data / "data.yaml", "names: [red]\n")
    found = table(data, data / "images")
    assert len(found.xywh) == 1 + inside
    links = told(found)["links not followed"]
    assert links == (("labels/again",) if inside else ("labels/again", "labels/b"))
    assert ("images without labels" in told(found)) != inside


def test_linked_folders_of_images_are_used_within_the_named_folder(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "store" / "a.jpg")
    os.symlink(tmp_path / "images" / "store", tmp_path / "images" / "view")
    label(tmp_path / "labels" / "view" / "a.txt")
    put(tmp_path / "data.yaml", "names: [red]\n")
    assert table(tmp_path, tmp_path / "images").files == ("view/a.jpg",)
    assert ImageSource(str(tmp_path / "images")).read("view/a.jpg")


def test_what_is_no_label_and_no_picture_is_told(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "a.jpg")
    picture(tmp_path / "images" / "__MACOSX" / "a.jpg")
    picture(tmp_path / "images" / "._a.jpg")
    put(tmp_path / "images" / "b.heic", "")
    (tmp_path / "images" / "a.npy").write_bytes(b"")
    label(tmp_path / "labels" / "a.txt")
    put(tmp_path / "labels" / "train.txt", "images/a.jpg\n")
    put(tmp_path / "labels" / "._a.txt", "resource")
    put(tmp_path / "labels" / "notes.md", "hello")
    label(tmp_path / "labels" / "lost.txt")
    put(tmp_path / "data.yaml", "names: [red]\n")
    found = table(tmp_path, tmp_path / "images")
    assert found.files == ("a.jpg",) and len(found.xywh) == 1
    assert [row.image_file for row in found.skipped] == ["lost.jpg"]
    things = " ".join(thing for note in found.notes for thing in note.things)
    for name in ("__MACOSX/a.jpg", "._a.jpg", "b.heic", "a.npy", "train.txt", "labels/._a.txt", "notes.md"):
        assert name in things, name


def test_two_pictures_or_two_labels_of_one_name_are_named(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.png"):
        picture(tmp_path / "images" / name)
    label(tmp_path / "labels" / "a.txt")
    put(tmp_path / "data.yaml", "names: [red]\n")
    with pytest.raises(UserError) as caught:
        table(tmp_path, tmp_path / "images")
    assert "a.jpg" in caught.value.message and "a.png" in caught.value.message
    (tmp_path / "images" / "a.png").unlink()
    label(tmp_path / "labels" / "a.TXT")
    with pytest.raises(UserError) as caught:
        table(tmp_path, tmp_path / "images")
    assert "a.txt" in caught.value.message and "a.TXT" in caught.value.message


@pytest.mark.parametrize("form", ["folder", "list of folders", "txt", "foreign txt", "base", "obj.data"])
def test_a_split_is_used_alone_where_it_is_named(tmp_path: Path, form: str) -> None:
    for split in ("train", "val"):
        for number in range(2):
            picture(tmp_path / "images" / split / f"{split}{number}.jpg")
            label(tmp_path / "labels" / split / f"{split}{number}.txt")
    stated = {"folder": "images/{}", "list of folders": "[images/{}]", "base": "{}"}.get(form, "{}.txt")
    base = "path: images\n" if form == "base" else ""
    for split in ("train", "val"):
        start = {"foreign txt": "/content/data/images/", "txt": "./images/"}.get(form, "data/images/")
        put(tmp_path / f"{split}.txt", "".join(f"{start}{split}/{split}{number}.jpg\n" for number in range(2)))
    if form == "obj.data":
        put(tmp_path / "obj.names", "red\n")
        put(
            tmp_path / "obj.data", "classes = 1\ntrain = data/train.txt\nvalid = data/val.txt\nnames = data/obj.names\n"
        )
    else:
        yaml = "".join(f"{key}: {stated.format(split)}\n" for key, split in (("train", "train"), ("val", "val")))
        put(tmp_path / "data.yaml", f"{base}{yaml}names: [red]\n")
    whole = table(tmp_path, tmp_path / "images")
    assert len(whole.files) == 4 and "splits" in told(whole)
    for split in ("train", "val"):
        found = table(tmp_path, tmp_path / "images", Reading(split=split))
        assert found.files == (f"{split}/{split}0.jpg", f"{split}/{split}1.jpg") and len(found.xywh) == 2
        assert len(told(found)["images of other splits"]) == 2
    with pytest.raises(UserError, match="test"):
        table(tmp_path, tmp_path / "images", Reading(split="test"))


def test_what_a_list_of_a_split_names_and_is_not_there_is_told(tmp_path: Path) -> None:
    for number in range(2):
        picture(tmp_path / "images" / f"{number}.jpg")
        label(tmp_path / "labels" / f"{number}.txt")
    put(tmp_path / "data.yaml", "train: list.txt\nnames: [red]\n")
    put(tmp_path / "list.txt", "images/0.jpg\n\n./images/1.png\nelsewhere.jpg\n")
    found = table(tmp_path, tmp_path / "images", Reading(split="train"))
    assert found.files == ("0.jpg",)
    assert told(found)["images of the split that are not there"] == ("./images/1.png", "elsewhere.jpg")


@pytest.mark.parametrize("base", ["", "path: sets\n"])
def test_lists_of_splits_are_read_in_a_store_too(tmp_path: Path, base: str) -> None:
    for number in range(4):
        picture(tmp_path / "images" / f"{number}.jpg")
        label(tmp_path / "labels" / f"{number}.txt")
    put(tmp_path / "data.yaml", f"{base}train: a.txt\nval: ./b.txt\nnames: [red]\n")
    put(tmp_path / ("sets" if base else ".") / "a.txt", "./images/0.jpg\n./images/1.jpg\n./images/9.jpg\n")
    put(tmp_path / ("sets" if base else ".") / "b.txt", "images/2.jpg\n")
    store, root = fsspec.filesystem("memory"), f"/{tmp_path.name}-{len(base)}"
    store.put(str(tmp_path), root, recursive=True)
    url = f"memory:/{root}"
    assert "splits" in told(table(url, f"{url}/images", Reading()))
    found = table(url, f"{url}/images", Reading(split="train"))
    assert found.files == ("0.jpg", "1.jpg")
    assert told(found)["images of the split that are not there"] == ("./images/9.jpg",)
    store.rm(f"{root}/{'sets/' if base else ''}a.txt")
    with pytest.raises(UserError, match=r"states 'a\.txt' as a split, which is not there"):
        table(url, f"{url}/images", Reading(split="train"))


def test_splits_of_voc_are_those_of_imagesets(tmp_path: Path) -> None:
    text = "<annotation><filename>{}.jpg</filename><size><width>100</width><height>50</height></size></annotation>"
    for name in "abc":
        picture(tmp_path / "JPEGImages" / f"{name}.jpg")
        put(tmp_path / "Annotations" / f"{name}.XML", text.format(name))
    for split, ids in {"train": "a\nb\n", "val": "c\nd\n", "cat_train": "a 1\n", "train_aug": "a\nc\n"}.items():
        put(tmp_path / "ImageSets" / "Main" / f"{split}.txt", ids)
    for named in (tmp_path, tmp_path / "Annotations"):
        whole = table(named, tmp_path / "JPEGImages")
        assert len(whole.files) == 3 and "splits" in told(whole)
        found = table(named, tmp_path / "JPEGImages", Reading(split="train"))
        assert found.files == ("a.jpg", "b.jpg")
        assert told(table(named, tmp_path / "JPEGImages", Reading(split="val")))["images without XML"] == ("d",)
        assert table(named, tmp_path / "JPEGImages", Reading(split="train_aug")).files == ("a.jpg", "c.jpg")
        with pytest.raises(UserError, match=r"states: train, train_aug, val\)"):
            table(named, tmp_path / "JPEGImages", Reading(split="cat_train"))


def test_ids_of_imagesets_may_hold_blanks_and_marks(tmp_path: Path) -> None:
    text = "<annotation><filename></filename><size><width>100</width><height>50</height></size></annotation>"
    for name in ("a b", "c", "d 1"):
        picture(tmp_path / "JPEGImages" / f"{name}.jpg")
        put(tmp_path / "Annotations" / f"{name}.xml", text)
    put(tmp_path / "ImageSets" / "Main" / "train.txt", "a b\nc  1\nd 1 -1\r\n")
    assert len(table(tmp_path, tmp_path / "JPEGImages", Reading(split="train")).files) == 3


def test_labels_beside_images_are_found_below_the_named_folder(tmp_path: Path) -> None:
    put(tmp_path / "data.yaml", "names: [red]\n")
    put(tmp_path / "README.roboflow.txt", "hello\n")
    picture(tmp_path / "images" / "train" / "a.jpg")
    label(tmp_path / "images" / "train" / "a.txt")
    found = table(tmp_path, tmp_path / "images")
    assert len(found.xywh) == 1 and not found.skipped


def test_a_list_of_classes_with_blank_lines_beside_xml_files_is_theirs(tmp_path: Path) -> None:
    put(tmp_path / "Annotations" / "classes.txt", "\nred\n\nblue\n")
    put(tmp_path / "Annotations" / "a.xml", "<annotation><object><name>blue</name></object></annotation>")
    assert table(tmp_path, picture(tmp_path / "JPEGImages" / "a.jpg").parent).classes == ("red", "blue")
