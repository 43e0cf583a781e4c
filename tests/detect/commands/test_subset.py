"""The subset command: the images that a run on a subset takes, as a file that both stages read."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import jigsaw_pretrain as jp
from jigsaw_pretrain.detect.annotations import read_ground_truth, subset
from jigsaw_pretrain.detect.cli import main
from jigsaw_pretrain.detect.training import train
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.annotations.read import Reading
from tests.helpers.prepped import Drawn


def test_its_file_holds_what_a_run_on_a_subset_takes(tiny_data: Path, tmp_path: Path) -> None:
    where = str(tiny_data / "train" / "annotations.json"), str(tiny_data / "train" / "images")
    out = tmp_path / "subset.json"
    given = ["--annotations", where[0], "--images", where[1], "--images-limit", "3", "--subset-seed", "5"]
    result = CliRunner().invoke(main, ["subset", *given, "--out", str(out)], catch_exceptions=False)
    assert result.exit_code == 0 and "3 images, 6 annotations" in result.output
    expected, found = subset(read_ground_truth(*where), 3, 5), read_ground_truth(str(out), where[1])
    assert found.categories == expected.categories
    for one, other in zip(expected.images, found.images, strict=True):
        assert one.file_name == other.file_name and (one.boxes == other.boxes).all()
        assert (one.labels == other.labels).all() and one.segmentations == other.segmentations


@pytest.mark.parametrize("kind", ["region", "unknown"])
def test_no_background_is_cut_where_the_whole_dataset_has_none(drawn: Drawn, tmp_path: Path, kind: str) -> None:
    image = drawn.add("a.jpg", (200, 200), [[0, 0, 40, 40]])
    drawn.box(image, None if kind == "unknown" else [0, 60, 200, 140], category=-1 if kind == "region" else 3, mine=7)
    drawn.images[0]["camera"] = "left"
    drawn.images.append({**drawn.images[0], "id": "again"})
    drawn.box("again", [50, 0, 20, 20])  # type: ignore[arg-type]
    drawn.box(77, [0, 0, 5, 5])
    file, out = drawn.write(), tmp_path / "subset.json"
    images = str(drawn.folder / "images")
    given = ["subset", "--annotations", str(file), "--images", images, "--images-limit", "1", "--out", str(out)]
    result = CliRunner().invoke(main, given)
    assert result.exit_code == 0 and "left out: 0 images and 1 annotation" in result.output
    whole, found = json.loads(file.read_text()), json.loads(out.read_text())
    assert found == {**whole, "annotations": whole["annotations"][:-1]}
    plans = [jp.plan(str(one), images, negatives_per_positive=20, context=1.0).crops for one in (file, out)]
    assert plans[0].boxes.tolist() == plans[1].boxes.tolist()
    assert CliRunner().invoke(main, given).exit_code == 0 and json.loads(out.read_text()) == found
    out.write_text("mine")
    other = CliRunner().invoke(main, given)
    assert other.exit_code == 2 and "already there" in other.output and out.read_text() == "mine"
    # As mktemp makes it.
    out.write_text("")
    assert CliRunner().invoke(main, given).exit_code == 0 and json.loads(out.read_text()) == found


def test_splits_and_the_origin_of_voc_are_as_in_prep(tmp_path: Path) -> None:
    lists = tmp_path / "ImageSets" / "Main"
    for folder in (tmp_path / "Annotations", lists):
        folder.mkdir(parents=True)
    for name, kind in (("a", "ant"), ("b", "bee")):
        (tmp_path / "Annotations" / f"{name}.xml").write_text(
            f"<annotation><filename>{name}.jpg</filename><size><width>60</width><height>50</height></size><object><name>"
            f"{kind}</name><bndbox><xmin>11</xmin><ymin>6</ymin><xmax>40</xmax><ymax>30</ymax></bndbox></object></annotation>"
        )
    (lists / "train.txt").write_text("a\n")
    (lists / "val.txt").write_text("b\n")
    for split, origin, box in (("train", "1", [10, 5, 30, 25]), ("val", "0", [11, 6, 29, 24])):
        given = ["--annotations", str(tmp_path), "--images", str(tmp_path), "--images-limit", "1", "--split", split]
        out = tmp_path / f"{split}.json"
        result = CliRunner().invoke(main, ["subset", *given, "--voc-origin", origin, "--out", str(out)])
        assert result.exit_code == 0, result.output
        found = json.loads(out.read_text())
        assert [one["file_name"] for one in found["images"]] == ["a.jpg" if split == "train" else "b.jpg"]
        assert [one["bbox"] for one in found["annotations"]] == [box]
        # Labels are the same in every split.
        assert [one["name"] for one in found["categories"]] == ["ant", "bee"]
        whole = read_ground_truth(str(tmp_path), str(tmp_path))
        assert read_ground_truth(str(out), None).categories == whole.categories
    with pytest.raises(UserError, match="--val-split"):
        train(
            str(tmp_path),
            str(tmp_path),
            tmp_path / "run",
            val_annotations=str(tmp_path),
            val_images=str(tmp_path),
            reading=Reading(split="train"),
        )
    assert not (tmp_path / "run").exists()
