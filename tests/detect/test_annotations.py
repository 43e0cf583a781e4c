"""Ground truth as a detector is trained on it, of every kind that prep reads, and annotations that are mistakes."""

import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result

from jigsaw_pretrain.detect.annotations import (
    GroundTruth,
    check_images,
    read_ground_truth,
    require_same_classes,
    subset,
)
from jigsaw_pretrain.detect.data import ImageReader
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.annotations.read import Reading
from tests.helpers.attacks import bounded
from tests.helpers.detection import write_annotations
from tests.helpers.prepped import Drawn
from tests.helpers.writers import write_voc, write_yolo


def read(path: Path, images: Path | None = None, reading: Reading | None = None) -> GroundTruth:
    return read_ground_truth(str(path), None if images is None else str(images), reading)


def test_annotations_are_labelled_in_order_of_category_ids_and_cut_to_the_image(tmp_path: Path) -> None:
    boxes = [[90, 10, 30, 20], [0, 0, 0, 5], [200, 0, 5, 5], [float("nan"), 0, 5, 5]]
    found = [{"id": i, "image_id": 1, "category_id": 9, "bbox": box} for i, box in enumerate(boxes)]
    made = read(write_annotations(tmp_path / "a.json", found))
    assert made.classes == ["a", "b"] and made.unusable == 3
    assert made.images[0].boxes.tolist() == [[90, 10, 100, 30]] and made.images[0].labels.tolist() == [1]
    assert [one["id"] for one in made.truth["annotations"]] == [1, 2, 3]


def test_annotation_mistakes_name_the_place(tmp_path: Path) -> None:
    strange = [
        {"image_id": 5, "category_id": 9, "bbox": [0, 0, 1, 1]},
        {"image_id": 1, "category_id": 5, "bbox": [0, 0, 1, 1]},
    ]
    counted = read(write_annotations(tmp_path / "a.json", strange))
    assert counted.unusable == 2 and counted.truth["annotations"] == []
    with pytest.raises(UserError, match="no image"):
        read(write_annotations(tmp_path / "b.json", [], images=[]))
    with pytest.raises(UserError, match=r"c\.json"):
        read(tmp_path / "c.json")
    (tmp_path / "d.json").write_text("{")
    with pytest.raises(UserError, match=r"d\.json"):
        read(tmp_path / "d.json")
    other = write_annotations(tmp_path / "e.json", [], categories=[{"id": 4, "name": "a"}])
    with pytest.raises(UserError, match="same categories"):
        require_same_classes(read(write_annotations(tmp_path / "f.json", [])), read(other))


@pytest.fixture
def scene(drawn: Drawn) -> Drawn:
    drawn.categories = [{"id": 1, "name": "ant"}, {"id": 2, "name": "bee"}]
    for number in range(4):
        image = drawn.add(f"{number}.png", (96, 72))
        for label, box in enumerate(((0, 0, 30, 20), (40, 30, 36, 32))):
            drawn.box(image, list(box), category=1 + label)
    return drawn


def test_a_sample_of_the_images_is_looked_at_before_anything_is_trained(scene: Drawn) -> None:
    images = scene.folder / "images"
    truth = read(scene.write(), images)
    check_images(truth, str(images))
    (images / "2.png").rename(images / "2.PNG")
    with pytest.raises(UserError, match=r"1 of 4 .*2\.png is not there, but 2\.PNG is .*--val-images"):
        check_images(truth, str(images), "--val-images")
    (images / "2.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"images/2\.png cannot be used"):
        check_images(truth, str(images))
    (images / "2.png").unlink()
    images.joinpath("2.png").symlink_to(images / "0.png")
    other = replace(truth, images=(*truth.images[:1], replace(truth.images[1], width=95), *truth.images[2:]))
    with pytest.raises(UserError, match=r"1\.png cannot be used .*96x72.*95x72"):
        check_images(other, str(images))
    with pytest.raises(UserError, match="no image that has boxes is there"):
        check_images(truth, str(scene.folder))


def trained(detect: Callable[..., Result], drawn: Drawn, annotations: Path, images: Path, **more: object) -> Result:
    """A step of a toy detector on this data."""
    where = ("--annotations", str(annotations), "--images", str(images))
    validated = ("--val-annotations", str(annotations), "--val-images", str(images))
    return detect(drawn.folder / "run", *where, *validated, steps=1, **more)


@pytest.mark.slow(seconds=8)
@pytest.mark.usefixtures("plain_runs")
@pytest.mark.parametrize("kind", ["voc", "yolo", "twice", "zip"])
def test_a_detector_trains_on_what_prep_takes(scene: Drawn, detect: Callable[..., Result], kind: str) -> None:
    annotations, images = scene.write(), scene.folder / "images"
    expected = read(annotations, images)
    if kind == "voc":
        annotations = scene.folder / "xml"
        write_voc(scene, annotations, origin=1)
    elif kind == "yolo":
        write_yolo(scene, scene.folder, empty=True)
        annotations = scene.folder / "data.yaml"
    elif kind == "zip":
        with zipfile.ZipFile(scene.folder / "images.zip", "w") as archive:
            for path in sorted(images.iterdir()):
                archive.write(path, f"train/{path.name}")
        images = scene.folder / "images.zip"
    else:
        # The second entry of a file has the second half of its boxes.
        scene.images += [{**image, "id": image["id"] + 100} for image in scene.images]
        for annotation in scene.annotations[1::2]:
            annotation["image_id"] += 100
        annotations = scene.write()
    made = read(annotations, images)
    assert made.classes == expected.classes and [one.file_name for one in made.images] == [f"{i}.png" for i in range(4)]
    for one, other in zip(made.images, expected.images, strict=True):
        assert one.boxes.tolist() == other.boxes.tolist() and one.labels.tolist() == other.labels.tolist()
    for one, other in zip(made.truth["annotations"], expected.truth["annotations"], strict=True):
        assert (one["bbox"], one["area"], one["iscrowd"]) == (other["bbox"], other["area"], other["iscrowd"])
    pixels = ImageReader(str(images), made).read(made.images[2])
    assert (pixels == ImageReader(str(scene.folder / "images"), expected).read(expected.images[2])).all()
    assert made.other_ids == ({101: 1, 102: 2, 103: 3, 104: 4} if kind == "twice" else {})
    result = trained(detect, scene, annotations, images)
    assert result.exit_code == 0 and "AP" in result.output


def test_crowd_and_ignored_regions_are_alike_in_prep_and_detect(scene: Drawn) -> None:
    scene.annotations[0]["iscrowd"] = 1
    scene.annotations[3]["ignore"] = 1
    made = read(scene.write())
    assert [one.crowd.tolist() for one in made.images] == [[True, False], [False, True], [False] * 2, [False] * 2]
    assert [one["iscrowd"] for one in made.truth["annotations"]] == [1, 0, 0, 1, 0, 0, 0, 0]
    used = read(scene.write(), reading=Reading(ignored="use"))
    assert [one["iscrowd"] for one in used.truth["annotations"]] == [1, 0, 0, 0, 0, 0, 0, 0]


def test_segmentations_are_kept_for_masks(scene: Drawn) -> None:
    scene.annotations[0]["segmentation"] = [[0, 0, 30, 0, 30, 20, 0, 20]]
    scene.annotations[1]["segmentation"] = {"size": [72, 96], "counts": [5, 5, 6902]}
    scene.annotations[2]["segmentation"] = []
    scene.annotations[0]["area"] = 5.5
    made = read(scene.write())
    assert made.images[0].segmentations == tuple(one["segmentation"] for one in scene.annotations[:2])
    assert made.images[1].segmentations == (None, None)
    assert [one["area"] for one in made.truth["annotations"][:2]] == [5.5, 36 * 32]
    labels = scene.folder / "labels"
    labels.mkdir()
    for number in range(4):
        (labels / f"{number}.txt").write_text("0 0.25 0.25 0.75 0.25 0.5 0.75\n0 0.1 0.1 0.2 0.1 0.2 0.3 0.1 0.2\n")
    (scene.folder / "data.yaml").write_text("names: [ant, bee]\n")
    polygons = read(scene.folder, scene.folder / "images").images[0]
    assert np.allclose(polygons.segmentations[0][0], [24, 18, 72, 18, 48, 54])
    assert np.allclose(polygons.boxes[0], [24, 18, 72, 54])


def test_yolo_without_images_is_refused(scene: Drawn) -> None:
    write_yolo(scene, scene.folder, empty=True)
    with pytest.raises(UserError, match="--images"):
        read(scene.folder)


def test_areas_of_zero_or_in_shares_are_computed(scene: Drawn) -> None:
    scene.annotations[0] |= {"area": 0, "segmentation": [[0, 0, 30, 0, 30, 20]]}
    scene.annotations[1]["area"] = 0.17
    scene.annotations[2]["area"] = 55
    assert [one["area"] for one in read(scene.write()).truth["annotations"][:3]] == [300, 36 * 32, 55]


def test_subsets_are_nested_and_do_not_depend_on_the_order_of_images(tiny_data: Path) -> None:
    truth = read_ground_truth(str(tiny_data / "train" / "annotations.json"), str(tiny_data / "train" / "images"))
    files = [{one.file_name for one in subset(truth, count, 3).images} for count in (1, 2, 4, 6)]
    assert [len(one) for one in files] == [1, 2, 4, 6] and files[0] < files[1] < files[2] < files[3]
    turned = replace(truth, images=truth.images[::-1])
    assert {one.file_name for one in subset(turned, 2, 3).images} == files[1]
    assert subset(truth, None, 0) is truth
    assert len({frozenset(one.file_name for one in subset(truth, 3, seed).images) for seed in range(20)}) > 5


KINDS: dict[str, Callable[[Path], None]] = {
    "fifo": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": Path.mkdir,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("option", ["annotations", "images", "val-annotations", "val-images"])
def test_what_is_no_file_and_no_folder_is_named_in_a_line(
    detect: Callable[..., Result], tmp_path: Path, kind: str, option: str
) -> None:
    path = tmp_path / "named"
    KINDS[kind](path)
    with bounded():
        result = detect(tmp_path / "run", f"--{option}", str(path), expect=2)
    (line,) = (line for line in result.output.splitlines() if line.startswith("Error: "))
    assert str(path) in line and not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", ["train", "val"])
def test_an_image_that_is_no_file_is_named_in_a_line(
    detect: Callable[..., Result], tiny_data: Path, tmp_path: Path, kind: str, split: str
) -> None:
    images = Path(shutil.copytree(tiny_data / split / "images", tmp_path / "images"))
    path = sorted(images.iterdir())[0]
    path.unlink()
    KINDS[kind](path)
    with bounded():
        result = detect(tmp_path / "run", "--images" if split == "train" else "--val-images", str(images), expect=2)
    (line,) = (line for line in result.output.splitlines() if line.startswith("Error: "))
    assert str(path) in line
