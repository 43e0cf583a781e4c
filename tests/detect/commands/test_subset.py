"""The subset command: the images that a run on a subset takes, as a file that both stages read."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from jigsaw_pretrain.detect.annotations import read_ground_truth, subset
from jigsaw_pretrain.detect.cli import main
from jigsaw_pretrain.detect.training import train
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.annotations.read import Reading


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
        out = tmp_path / "subset.json"
        result = CliRunner().invoke(main, ["subset", *given, "--voc-origin", origin, "--out", str(out)])
        assert result.exit_code == 0, result.output
        found = json.loads(out.read_text())
        assert [one["file_name"] for one in found["images"]] == ["a.jpg" if split == "train" else "b.jpg"]
        assert [one["bbox"] for one in found["annotations"]] == [box]
        # Labels are the same in every split.
        assert [one["name"] for one in found["categories"]] == ["ant", "bee"]
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
