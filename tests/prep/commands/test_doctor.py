"""The doctor finds each trouble, tells it in tables and JSON, and exits by its gravity; nothing is written."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jigsaw_pretrain.prep.commands.doctor import doctor
from jigsaw_pretrain.storage import retries
from tests.helpers.prepped import Drawn, invoke, ramp, write_sample
from tests.helpers.stores import proxied_store, upload


def examine(drawn: Drawn, *extra: str) -> dict[str, Any]:
    result = invoke(
        doctor, "--annotations", str(drawn.write()), "--images", str(drawn.folder / "images"), "--json", *extra
    )
    found = json.loads(result.output)
    assert result.exit_code == found["exit_code"], result.output
    return dict(found)


def checks(found: dict[str, Any]) -> dict[str, int]:
    return {finding["check"]: finding["count"] for finding in found["findings"]}


@pytest.fixture
def sound(drawn: Drawn) -> Drawn:
    """Nothing to complain about: three groups, large objects, both categories."""
    boxes = (((10, 10, 150, 150), 3), ((170, 10, 60, 180), 7), ((10, 200, 220, 70), 3), ((260, 30, 200, 190), 7))
    for number in range(12):
        image = drawn.add(f"{number}.jpg", (500, 400))
        for box, category in boxes:
            drawn.box(image, box, category)
    drawn.add("free.jpg", (500, 400))
    return drawn


def test_a_sound_dataset_is_clean(sound: Drawn) -> None:
    found = examine(sound, "--deep")
    assert found["status"] == "clean" and found["exit_code"] == 0, found["findings"]
    assert found["totals"]["positives"] == 48 and set(found["totals"]["by_group"]) == {"S", "T", "W"}
    assert {path.name for path in sound.folder.iterdir()} == {"annotations.json", "images"}


@pytest.mark.slow(seconds=4)
def test_the_sample_dataset_is_clean(tmp_path: Path) -> None:
    write_sample(tmp_path, 24)
    result = invoke(doctor, "--annotations", str(tmp_path / "annotations.json"), "--images", str(tmp_path / "images"))
    assert result.exit_code == 0 and "doctor: clean" in result.output, result.output


def test_copies_are_named_and_the_verdict_and_its_reasons_stand_first_and_last(sound: Drawn) -> None:
    images = sound.folder / "images"
    for name in ("4.jpg", "free.jpg"):
        (images / name).write_bytes((images / "2.jpg").read_bytes())
    (finding,) = [one for one in examine(sound)["findings"] if one["check"] == "byte-identical images"]
    assert (finding["level"], finding["count"]) == ("warning", 2)
    assert {tuple(text.split(" (of ")) for text in finding["examples"]} == {("4.jpg", "2.jpg)"), ("free.jpg", "2.jpg)")}
    for one in sound.annotations:
        one["bbox"] = [10, 10, 20, 20]
    printed = invoke(doctor, "--annotations", str(sound.write()), "--images", str(images)).stdout.splitlines()
    assert printed[0] == printed[-1] and printed[0].startswith("doctor: warnings: ")
    assert "byte-identical images (2)" in printed[0] and not [line for line in printed if line.startswith("warning:")]
    (sound.folder / "images").rename(sound.folder / "elsewhere")
    printed = invoke(doctor, "--annotations", str(sound.write()), "--images", str(images)).stdout.splitlines()
    assert (
        printed[0] == printed[-1] and printed[0].startswith("doctor: cannot be prepped: ") and "--images" in printed[0]
    )


def test_everything_it_looks_for(sound: Drawn) -> None:
    for box in ([5, 5, 0, 9], [9000, 5, 10, 10], [1e308, 5, 1e308, 1]):
        sound.box(1, box)
    sound.box(1, [0, 0, 90, 90], iscrowd=1)
    sound.box(1, [0, 0, 90, 90], category=99)
    sound.box(4242, [0, 0, 90, 90])
    sound.annotations[1]["id"] = sound.annotations[0]["id"]
    sound.categories.append({"id": 9, "name": "never"})
    sound.categories.append({"id": 10, "name": "never"})
    sound.add("missing.jpg", (200, 150), [(10, 10, 50, 40)], draw=False)
    sound.add("turned.jpg", (200, 150), [(10, 10, 50, 40)])
    sound.images[-1].update(width=150, height=200)
    sound.add("text.jpg", (200, 150), [(10, 10, 50, 40)])
    (sound.folder / "images" / "text.jpg").write_text("hello")
    sound.add("../out.jpg", (200, 150), [(10, 10, 50, 40)], draw=False)
    sound.images.append({**sound.images[0], "id": 777})
    sound.images.append(dict(sound.images[1]))
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(ramp(500, 400)).save(sound.folder / "images" / "2.jpg", exif=exif)
    half = sound.folder / "images" / "3.jpg"
    half.write_bytes(half.read_bytes()[:3000])
    found = examine(sound)
    assert found["exit_code"] == 1
    expected = {
        "duplicate image ids": 1,
        "duplicate file names": 2,
        "duplicate annotation ids": 1,
        "duplicate category names": 1,
        "unknown category ids": 1,
        "crowd share": 1,
        "image is not in the annotation file": 1,
        "box has no area": 1,
        "box lies outside the image": 1,
        "box is not four finite numbers": 1,
        "file name leaves the image folder": 1,
        "image of the box cannot be used": 1,
        "categories without boxes": 2,
        "image file is missing": 1,
        "missing images": 1,
        "boxes that leave their image by more than rounding": 1,
        "size disagrees with the annotations": 1,
        "not an image that can be read": 1,
        "EXIF-rotated files": 1,
        "share of unusable images": 4,
    }
    assert checks(found) == expected
    assert checks(examine(sound, "--deep")) == {**expected, "image is damaged": 1, "share of unusable images": 5}


def test_thin_groups(drawn: Drawn) -> None:
    for number in range(3):
        drawn.add(f"{number}.jpg", (500, 400), [(10, 10, 200, 200)])
    found = examine(drawn)
    texts = [finding["text"] for finding in found["findings"] if finding["check"] == "uneven shapes"]
    assert any("no crops are tall" in text for text in texts) and found["exit_code"] == 1


@pytest.mark.parametrize("kind", ["no file", "no json", "no box", "no image", "no folder", "ids"])
def test_what_cannot_be_prepped(sound: Drawn, kind: str) -> None:
    annotations, images = sound.write(), sound.folder / "images"
    if kind == "no file":
        annotations = sound.folder / "nowhere.json"
    elif kind == "no json":
        annotations.write_text("{")
    elif kind == "no box":
        sound.annotations.clear()
        annotations = sound.write()
    elif kind == "no image":
        for path in images.iterdir():
            path.unlink()
    elif kind == "no folder":
        images = sound.folder / "nowhere"
    else:
        sound.images[1]["id"] = 1
        annotations = sound.write()
    result = invoke(doctor, "--annotations", str(annotations), "--images", str(images))
    assert result.exit_code == 2 and "Traceback" not in result.output, result.output
    assert "cannot be prepped" in result.output


def test_markup_and_control_characters_are_printed_as_they_are(sound: Drawn) -> None:
    sound.categories.append({"id": 11, "name": "[bold]x[/bold]\x1b[31m\u202e<script>"})
    result = invoke(doctor, "--annotations", str(sound.write()), "--images", str(sound.folder / "images"))
    assert result.exit_code == 1 and "\x1b[31m" not in result.output and "[bold]x" in result.output.replace("\n", "")
    assert np.isfinite(result.exit_code)


def test_a_store_that_lists_nothing_costs_one_check_and_that_is_told(
    sound: Drawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "PATIENCE_SECONDS", 0.1)
    annotations = str(sound.write())
    with proxied_store() as (store, proxy):
        url = upload(store, sound.folder / "images", "images")
        proxy.faults = lambda number, method, path: "500" if "list-type" in path else None
        result = invoke(doctor, "--annotations", annotations, "--images", url, "--json")
    found = json.loads(result.output)
    assert found["status"] == "clean" and checks(found)["images that cannot be listed"] == 1, found["findings"]
    assert found["totals"]["positives"] == 48
