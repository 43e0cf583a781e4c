"""Splitting annotations: whole groups, nothing lost, and the same images as the dataset grows."""

import errno
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jigsaw_pretrain as jp
from jigsaw_pretrain.prep.cli import main
from jigsaw_pretrain.prep.split import _drawn
from jigsaw_pretrain.storage.store import Storage
from tests.helpers.commands import run_command
from tests.helpers.prepped import Drawn, tree
from tests.helpers.writers import write_voc, write_yolo


def read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def folder_of_images(drawn: Drawn, count: int = 12) -> Path:
    """Two boxes in each of some images, three images in each folder."""
    drawn.categories[:] = [{"id": 1, "name": "ant"}, {"id": 2, "name": "bee"}]
    for nth in range(count):
        number = drawn.add(f"clip{nth // 3}/{nth}.jpg", (60, 40))
        drawn.images[-1]["camera"] = nth % 4
        drawn.box(number, [5, 5, 20, 20], category=1)
        drawn.box(number, [30, 10, 20, 20], category=2)
    return drawn.write()


def test_a_coco_file_is_parted_and_keeps_every_field(drawn: Drawn, tmp_path: Path) -> None:
    file = folder_of_images(drawn)
    whole = read(file) | {"info": {"year": 2026}}
    whole["annotations"].append({"id": 999, "image_id": 777, "category_id": 1, "bbox": [0, 0, 5, 5]})
    file.write_text(json.dumps(whole))
    made = jp.split(str(file), str(drawn.folder / "images"), tmp_path / "out", share=0.25, seed=3)
    train, val = read(made.train), read(made.val)
    assert (len(train["images"]), len(val["images"])) == made.images == (9, 3)
    for key in ("images", "annotations"):
        assert sorted(train[key] + val[key], key=lambda one: one["id"]) == whole[key]
    assert train["info"] == val["info"] == whole["info"] and train["categories"] == whole["categories"]
    ids = {one["id"] for one in val["images"]}
    assert all((one["image_id"] in ids) for one in val["annotations"])
    assert 777 in {one["image_id"] for one in train["annotations"]}


@pytest.mark.parametrize(("group", "key"), [("folder", "file_name"), ("camera", "camera")])
def test_a_group_is_on_one_side(drawn: Drawn, tmp_path: Path, group: str, key: str) -> None:
    file = folder_of_images(drawn)
    made = jp.split(str(file), str(drawn.folder / "images"), tmp_path / "out", share=0.2, group=group)
    sides = [{str(one[key]).split("/")[0] for one in read(side)["images"]} for side in (made.train, made.val)]
    assert sides[0] and sides[1] and not sides[0] & sides[1]


@pytest.mark.parametrize("kind", ["voc", "yolo"])
def test_other_kinds_become_coco_with_the_same_boxes(drawn: Drawn, tmp_path: Path, kind: str) -> None:
    file = folder_of_images(drawn)
    images = drawn.folder / "images"
    if kind == "voc":
        write_voc(drawn, drawn.folder / "xml", origin=1)
    else:
        write_yolo(drawn, drawn.folder, empty=True)
    of_coco = jp.split(str(file), str(images), tmp_path / "coco", share=0.3)
    labels = drawn.folder / ("xml" if kind == "voc" else "data.yaml")
    made = jp.split(str(labels), str(images), tmp_path / kind, share=0.3)
    for expected, side in ((of_coco.train, made.train), (of_coco.val, made.val)):
        assert boxes(read(side)) == boxes(read(expected))
    assert made.left_out == 0


@pytest.mark.parametrize("kind", ["voc", "yolo"])
def test_an_object_of_unknown_place_or_class_keeps_background_off_as_before(
    drawn: Drawn, tmp_path: Path, kind: str
) -> None:
    drawn.categories[:] = [{"id": 1, "name": "ant"}, {"id": 2, "name": "bee"}]
    for nth in range(6):
        number = drawn.add(f"{nth}.jpg", (120, 80))
        drawn.box(number, [5, 5, 20, 20], category=1)
        drawn.box(number, [30, 10, 20, 20], category=2)
    images = drawn.folder / "images"
    if kind == "voc":
        write_voc(drawn, drawn.folder / "xml", origin=1)
        labels = drawn.folder / "xml"
        one = next(labels.rglob("*.xml"))
        text = one.read_text()
        one.write_text(text[: text.index("<bndbox>")] + text[text.index("</bndbox>") + len("</bndbox>") :])
    else:
        write_yolo(drawn, drawn.folder, empty=True)
        labels = drawn.folder / "data.yaml"
        one = next(path for path in drawn.folder.rglob("*.txt") if path.read_text().startswith("0"))
        one.write_text("7" + one.read_text()[1:])
    made = jp.split(str(labels), str(images), tmp_path / "out", share=0.5)
    both = [read(side) for side in (made.train, made.val)]
    assert made.left_out == made.images_left_out == 0 and sum(len(side["annotations"]) for side in both) == 12
    plans = [
        jp.plan(str(file), str(images), negatives_per_positive=20, context=1.0)
        for file in (labels, made.train, made.val)
    ]
    reasons = [[row.reason for row in plan.skipped] for plan in plans]
    assert len(reasons[0]) == 1 and reasons[0] == reasons[1] + reasons[2]
    place = (0, 0, 120, 80) if kind == "voc" else (5, 5, 25, 25)
    for plan in plans:
        (odd,) = {row.image_file for row in plans[0].skipped}
        background = plan.crops.label == len(plan.classes)
        in_odd = [plan.images.files[image] == odd for image in plan.crops.image]
        assert background.any()
        for left, top, right, bottom in plan.crops.boxes[background & in_odd].tolist():
            assert left >= place[2] or top >= place[3] or right <= place[0] or bottom <= place[1]


def boxes(document: dict[str, Any]) -> Counter[tuple[Any, ...]]:
    """Every box with its image's and its class's name."""
    files = {one["id"]: one["file_name"] for one in document["images"]}
    names = {one["id"]: one["name"] for one in document["categories"]}
    return Counter(
        (files[one["image_id"]], names[one["category_id"]], *(round(value, 3) for value in one["bbox"]))
        for one in document["annotations"]
    )


@given(st.integers(2, 60), st.integers(0, 9), st.floats(0.01, 0.9), st.integers(1, 5))
@settings(max_examples=60)
def test_the_draw_reaches_the_share_by_whole_groups_and_stays_as_the_dataset_grows(
    count: int, seed: int, share: float, size: int
) -> None:
    groups = {f"{nth}.jpg": f"group {nth // size}" for nth in range(count)}
    chosen = _drawn(groups, share, seed)
    assert share * count <= len(chosen) < share * count + size
    assert {groups[name] for name in chosen}.isdisjoint(groups[name] for name in groups.keys() - chosen)
    grown = groups | {f"{nth}.jpg": f"group {nth}" for nth in range(1000, 1000 + count)}
    again = _drawn(grown, share, seed)
    # The order of the draws is each group's own, so of two old ones the same is first.
    assert (again & groups.keys()) <= chosen or chosen <= (again & groups.keys())


def test_the_command_takes_a_list_and_says_what_to_do_next(drawn: Drawn, tmp_path: Path) -> None:
    file = folder_of_images(drawn)
    names = tmp_path / "val.txt"
    names.write_text("clip0/0.jpg\r\n\r\nclip1/4.jpg\n")
    common = ("split", "--annotations", file, "--images", drawn.folder / "images", "--out", tmp_path / "out")
    result = run_command(main, *common, "--val-list", names)
    assert result.exit_code == 0, result.output
    assert [one["file_name"] for one in read(tmp_path / "out" / "val.json")["images"]] == ["clip0/0.jpg", "clip1/4.jpg"]
    assert f"--annotations {tmp_path / 'out' / 'train.json'}" in result.output and "--exif" not in result.output
    turned = run_command(main, *common[:-1], tmp_path / "turned", "--exif", "apply")
    assert "--exif apply" in turned.output.splitlines()[-1]
    again = run_command(main, *common)
    assert again.exit_code == 2 and "already there" in again.output


def test_lvis_entries_are_named_by_their_urls(drawn: Drawn, tmp_path: Path) -> None:
    file = folder_of_images(drawn)
    document = read(file)
    for entry in document["images"]:
        entry["coco_url"] = f"http://images.example.org/{entry.pop('file_name')}"
    lvis = tmp_path / "lvis.json"
    lvis.write_text(json.dumps(document))
    names = tmp_path / "val.txt"
    names.write_text("clip1/4.jpg\n")
    command = ("split", "--annotations", lvis, "--images", drawn.folder / "images", "--out", tmp_path / "out")
    result = run_command(main, *command, "--val-list", names)
    assert result.exit_code == 0, result.output
    kept = read(tmp_path / "out" / "val.json")["images"]
    assert [entry["coco_url"] for entry in kept] == ["http://images.example.org/clip1/4.jpg"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--group", "patient"), "camera"),
        (("--share", "0"), "val.json would hold no image"),
        (("--share", "100%"), "train.json would hold no image"),
        (("--val-list", "nowhere.txt"), "nowhere.txt cannot be read"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    drawn: Drawn, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    file = folder_of_images(drawn)
    out = tmp_path / "out"
    result = run_command(
        main, "split", "--annotations", file, "--images", drawn.folder / "images", "--out", out, *options
    )
    assert result.exit_code == 2 and message in result.output and not out.exists()


def test_an_unknown_name_in_the_list_is_named(drawn: Drawn, tmp_path: Path) -> None:
    file = folder_of_images(drawn)
    with pytest.raises(jp.UserError, match="clip9/1.jpg"):
        jp.split(str(file), str(drawn.folder / "images"), tmp_path / "out", held_out=["clip9/1.jpg"])


@pytest.mark.parametrize("gone", ["train.json", "val.json"])
def test_a_split_that_was_cut_short_between_its_files_goes_on(drawn: Drawn, tmp_path: Path, gone: str) -> None:
    given = (str(folder_of_images(drawn)), str(drawn.folder / "images"), tmp_path)
    jp.split(*given)
    made = tree(tmp_path)
    (tmp_path / gone).unlink()
    jp.split(*given)
    assert tree(tmp_path) == made
    (tmp_path / gone).unlink()
    with pytest.raises(jp.UserError, match="json is already there: name another folder"):
        jp.split(*given, seed=1)
    assert tree(tmp_path) == {name: data for name, data in made.items() if name != gone}


def test_a_split_that_cannot_be_written_whole_leaves_nothing_that_stops_it(
    drawn: Drawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = (str(folder_of_images(drawn)), str(drawn.folder / "images"), tmp_path)
    written: list[str] = []

    def publish(self: Storage, name: str, data: bytes) -> None:
        if written:
            raise OSError(errno.ENOSPC, "No space left on device", name)
        written.append(name)
        original(self, name, data)

    original = Storage.publish
    with monkeypatch.context() as patched:
        patched.setattr(Storage, "publish", publish)
        with pytest.raises(OSError, match="No space"):
            jp.split(*given)
    made = jp.split(*given)
    assert len(written) == 1 and len(read(made.train)["images"]) + len(read(made.val)["images"]) == 12
