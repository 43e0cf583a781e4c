"""The command end to end: what it writes, on drawn and on real data, and that it writes the same each time."""

import io
import json
import tarfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from jigsaw_pretrain.formats.dataset import layout
from jigsaw_pretrain.formats.dataset.dataset import CropIndex, open_dataset
from jigsaw_pretrain.formats.jigsaw import SHAPES, aspect_group
from tests.helpers.prepped import Drawn, Run, rows, run_shards, tree


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = ((a.astype(float) - b.astype(float)) ** 2).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


def check_dataset(annotations: Path, images: Path, out: Path) -> dict[str, float]:
    """Everything that must hold of a dataset, checked without prep's own code; returns each crop's PSNR by key."""
    lists = json.loads(annotations.read_text())
    image_of = {image["id"]: image for image in lists["images"]}
    classes = sorted(lists["categories"], key=lambda category: category["id"])
    label_of = {category["id"]: label for label, category in enumerate(classes)}
    boxes_of: dict[str, list[Any]] = defaultdict(list)
    for annotation in lists["annotations"]:
        boxes_of[image_of[annotation["image_id"]]["file_name"]].append(annotation)
    description = json.loads((out / "manifests" / "dataset.json").read_text())
    assert description["classes"] == [category["name"] for category in classes]
    background = description["background"]
    crops = rows(out, "crops")
    assert len({crop["key"] for crop in crops}) == len(crops) == description["totals"]["crops"]

    positives = {(crop["image_file"], crop["ordinal"]): crop for crop in crops if crop["label"] < background}
    wanted = {
        (file, ordinal): annotation
        for file, listed in boxes_of.items()
        for ordinal, annotation in enumerate(listed)
        if not annotation.get("iscrowd") and annotation["bbox"][2] > 0 and annotation["bbox"][3] > 0
    }
    assert positives.keys() == wanted.keys()
    assert len(crops) - len(positives) == int(0.1 * len(positives) + 0.5)
    for place, crop in positives.items():
        x, y, w, h = wanted[place]["bbox"]
        assert crop["annotation_id"] == wanted[place]["id"] and crop["label"] == label_of[wanted[place]["category_id"]]
        assert [crop[name] for name in ("box_x", "box_y", "box_width", "box_height")] == [x, y, w, h]
        assert max(0, np.floor(x - w / 2)) <= crop["left"] <= max(0, x)
        assert crop["right"] >= np.floor(x + w) and crop["bottom"] >= np.floor(y + h)
    for crop in crops:
        assert crop["group"] == aspect_group(crop["right"] - crop["left"], crop["bottom"] - crop["top"])
        assert crop["key"].startswith(layout.image_hash(crop["image_id"]))
        if crop["label"] == background:
            assert crop["annotation_id"] is None and crop["box_x"] is None
            others = [annotation["bbox"] for annotation in boxes_of[crop["image_file"]]]
            regions = [(x, y, x + w, y + h) for x, y, w, h in others]
            regions += [
                (other["left"], other["top"], other["right"], other["bottom"])
                for other in (positives.get((crop["image_file"], n)) for n in range(len(others)))
                if other is not None
            ]
            for left, top, right, bottom in regions:
                over = min(right, crop["right"]) - max(left, crop["left"])
                assert over <= 0 or min(bottom, crop["bottom"]) <= max(top, crop["top"])

    by_key = {crop["key"]: crop for crop in crops}
    tars = sorted(str(path) for path in (out / "shards").glob("*.tar"))
    dataset = webdataset.WebDataset(tars, shardshuffle=False)
    read = {sample["__key__"]: sample for sample in dataset}
    assert read.keys() == by_key.keys()
    found: dict[str, float] = {}
    sources: dict[str, np.ndarray] = {}
    for key, sample in read.items():
        crop = by_key[key]
        assert int(sample["cls"]) == crop["label"]
        if crop["image_file"] not in sources:
            sources[crop["image_file"]] = np.asarray(Image.open(images / crop["image_file"]).convert("RGB"))
        source = sources[crop["image_file"]][crop["top"] : crop["bottom"], crop["left"] : crop["right"]]
        found[key] = psnr(np.asarray(Image.open(io.BytesIO(sample["jpg"]))), source)
    return found


def check_index(out: Path) -> None:
    """Row groups stand for shards and rows for members, and offsets point at JPEGs."""
    dataset = open_dataset(str(out))
    index = CropIndex(dataset)
    assert [shard.name for shard in dataset.shards] == sorted(shard.name for shard in dataset.shards)
    for shard in dataset.shards:
        data = (out / "shards" / shard.name).read_bytes()
        assert len(data) == shard.bytes
        found = index.rows(shard)
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            members = tar.getmembers()
            assert {(m.mtime, m.uname, m.uid, m.mode) for m in members} == {(0, "jigsaw", 0, 0o444)}
            jpegs = [tar.extractfile(m).read() for m in members if m.name.endswith(".jpg")]  # type: ignore[union-attr]
        keys = [m.name.removesuffix(".jpg") for m in members if m.name.endswith(".jpg")]
        assert keys == found["key"].tolist() and keys != sorted(keys) or len(keys) < 5
        places = zip(found["offset"], found["size"], strict=True)
        assert [data[offset : offset + size] for offset, size in places] == jpegs


@pytest.mark.slow(seconds=15)
def test_coco(real_data: Path, tmp_path: Path) -> None:
    source = real_data / "coco_small_train"
    for workers in ("1", "2"):
        made = run_shards(
            source / "annotations.json",
            source / "images",
            tmp_path / workers,
            *("--workers", workers, "--crops-per-part", "700"),
        )
        assert made.exit_code == 0, made.output
    assert tree(tmp_path / "1") == tree(tmp_path / "2")
    found = check_dataset(source / "annotations.json", source / "images", tmp_path / "1")
    assert np.mean(list(found.values())) > 38 and min(found.values()) >= 28
    check_index(tmp_path / "1")
    assert [row["reason"] for row in rows(tmp_path / "1", "skipped")] == ["crowd region"] * 22


@pytest.mark.slow(seconds=15)
def test_bccd_has_hardly_any_tall_crops_and_says_so(real_data: Path, tmp_path: Path) -> None:
    source = real_data / "bccd"
    made = run_shards(source / "annotations.json", source / "images", tmp_path, "--workers", "1")
    assert made.exit_code == 0, made.output
    assert "few crops are tall" in " ".join(made.output.split())
    found = check_dataset(source / "annotations.json", source / "images", tmp_path)
    assert min(found.values()) > 28
    check_index(tmp_path)


@pytest.mark.parametrize(("group", "size"), [("S", (40, 40)), ("T", (20, 80)), ("W", (80, 20))])
def test_one_group_alone(drawn: Drawn, prepped: Run, group: str, size: tuple[int, int]) -> None:
    for number in range(4):
        drawn.add(f"{number}.jpg", (300, 300), [(10, 10, *size), (150, 150, *size)])
    result = prepped("--context", "1")
    dataset = open_dataset(str(drawn.folder / "out"))
    assert {shard.group for shard in dataset.shards} == {group}
    for other in {"S", "T", "W"} - {group}:
        assert f"no crops are {SHAPES[other]}: {SHAPES[group]} ones" in result.output
    check_dataset(drawn.folder / "annotations.json", drawn.folder / "images", drawn.folder / "out")


def test_kinds_of_images(drawn: Drawn, prepped: Run) -> None:
    modes = {"a.png": "RGBA", "b.png": "P", "c.jpg": "L", "d.jpg": "CMYK", "e.png": "RGB", "same.jpg": "RGB"}
    for name, mode in modes.items():
        number = drawn.add(name, (120, 90), [(5, 5, 30, 30), (60.5, 40.25, 30.5, 11)])
        path = drawn.folder / "images" / name
        Image.open(path).convert(mode).save(path, quality=95)
    drawn.add("same.png", (120, 90), [(5, 5, 30, 30)])
    wide = np.linspace(0, 65535, 90 * 120).astype(np.uint16).reshape(90, 120)
    number = drawn.add("deep.png", (120, 90), [(0, 0, 120, 90)])
    Image.fromarray(wide).save(drawn.folder / "images" / "deep.png")
    prepped("--negatives-per-positive", "0")
    crops = rows(drawn.folder / "out", "crops")
    assert len(crops) == len(drawn.annotations) and number
    assert {"same.jpg", "same.png", "a"} <= {crop["image_id"] for crop in crops}
    assert not rows(drawn.folder / "out", "skipped")


def test_broken_things_cost_themselves_only(drawn: Drawn, prepped: Run) -> None:
    drawn.add("good.jpg", (200, 150), [(10, 10, 50, 40), (-5, 90, 30, 30)])
    bad = drawn.images[0]["id"]
    for box in ([5, 5, 0, 9], [5, 5, -3, 9], [300, 5, 10, 10], [1e308, 5, 1e308, 1], [1, 2, 3], None):
        drawn.box(bad, box)
    drawn.box(bad, [0, 0, 90, 90], iscrowd=1)
    drawn.box(bad, [0, 0, 90, 90], category=99)
    drawn.box(4242, [0, 0, 90, 90])
    drawn.add("missing.jpg", (200, 150), [(10, 10, 50, 40)], draw=False)
    drawn.add("../escape.jpg", (200, 150), [(10, 10, 50, 40)], draw=False)
    drawn.add("turned.jpg", (200, 150), [(10, 10, 50, 40)])
    drawn.images[-1].update(width=150, height=200)
    drawn.add("text.jpg", (200, 150), [(10, 10, 50, 40)])
    (drawn.folder / "images" / "text.jpg").write_text("hello")
    drawn.add("empty.jpg", (200, 150))
    result = prepped("--max-skipped", "100%")
    out = drawn.folder / "out"
    positives = [crop for crop in rows(out, "crops") if crop["annotation_id"] is not None]
    assert [(crop["image_id"], crop["ordinal"]) for crop in sorted(positives, key=lambda c: c["ordinal"])] == [
        ("good", 0),
        ("good", 1),
    ]
    found = [(row["stage"], row["reason"].split(":")[0], row["ordinal"]) for row in rows(out, "skipped")]
    expected = [
        ("plan", "box has no area", 2),
        ("plan", "box has no area", 3),
        ("plan", "box lies outside the image", 4),
        ("plan", "box is not four finite numbers", 5),
        ("plan", "box is not four finite numbers", 6),
        ("plan", "box is not four finite numbers", 7),
        ("plan", "crowd region", 8),
        ("plan", "category is not in the annotation file", 9),
        ("plan", "image is not in the annotation file", None),
        ("plan", "file name leaves the image folder", None),
        ("plan", "image of the box cannot be used", 0),
        ("cut", "image file is missing", None),
        ("cut", "size disagrees with the annotations", None),
        ("cut", "not an image that can be read", None),
    ]
    assert sorted(found, key=str) == sorted(expected, key=str)
    assert "image file is missing" in result.output


def test_dry_run_writes_nothing(drawn: Drawn, prepped: Run) -> None:
    drawn.add("a.jpg", (200, 150), [(10, 10, 50, 40)])
    before = set(drawn.folder.rglob("*"))
    result = prepped("--dry-run")
    assert set(drawn.folder.rglob("*")) - before <= {drawn.folder / "annotations.json"}
    assert "nothing was written" in result.output and "large square" in result.output


def test_a_second_run_resumes_and_a_third_has_nothing_to_do(drawn: Drawn, prepped: Run) -> None:
    for number in range(6):
        drawn.add(f"{number}.jpg", (300, 200), [(10 * number, 10, 50, 40), (100, 50, 90, 30)])
    prepped("--crops-per-part", "4", out="whole")
    whole = tree(drawn.folder / "whole")
    assert sum(name.endswith(".tar") for name in whole) >= 3
    prepped("--crops-per-part", "4", out="torn")
    for name in ("dataset.json", "crops.parquet", "parts/000001.json"):
        (drawn.folder / "torn" / "manifests" / name).unlink()
    for shard in (drawn.folder / "torn" / "shards").glob("*-000001.tar"):
        shard.write_bytes(b"torn")
    kept = (drawn.folder / "torn" / "manifests" / "parts" / "000000.json").stat().st_mtime_ns
    prepped("--crops-per-part", "4", out="torn")
    assert tree(drawn.folder / "torn") == whole
    assert (drawn.folder / "torn" / "manifests" / "parts" / "000000.json").stat().st_mtime_ns == kept
    assert "nothing to do" in prepped("--crops-per-part", "4", out="torn").output


def test_other_options_are_refused_by_name(drawn: Drawn, prepped: Run) -> None:
    drawn.add("a.jpg", (300, 200), [(10, 10, 50, 40)])
    prepped()
    source = (drawn.folder / "annotations.json", drawn.folder / "images", drawn.folder / "out")
    for extra, said in ((("--seed", "1"), "seed was 0, now 1"), (("--jpeg-quality", "90"), "jpeg_quality was 95")):
        result = run_shards(*source, *extra)
        assert result.exit_code == 2 and said in result.output
    drawn.box(1, [5, 5, 9, 9])
    drawn.write()
    result = run_shards(*source)
    assert result.exit_code == 2 and "annotations_sha256" in result.output


def test_published_files_hold_no_path_of_the_machine(drawn: Drawn, prepped: Run) -> None:
    drawn.add("a.jpg", (300, 200), [(10, 10, 50, 40)])
    prepped()
    for name, data in tree(drawn.folder / "out").items():
        assert str(drawn.folder).encode() not in data, name
        assert not name.split("/")[-1].startswith(".")


def test_a_wrong_folder_is_named(drawn: Drawn) -> None:
    drawn.add("a.jpg", (300, 200), [(10, 10, 50, 40)])
    result = run_shards(drawn.write(), drawn.folder / "nowhere", drawn.folder / "out")
    assert result.exit_code == 2 and "nowhere is not a folder" in result.output
    assert not (drawn.folder / "out").exists()


def test_names_with_markup_are_printed_as_they_are(drawn: Drawn, prepped: Run) -> None:
    drawn.categories[0]["name"] = "[red]x[/red]\x1b[31m :car:"
    drawn.add("a.jpg", (300, 200), [(10, 10, 50, 40)])
    result = prepped()
    assert "[red]x[/red]?[31m :car:" in result.output
