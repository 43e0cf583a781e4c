"""The subset command: the images that a run on a subset takes, as a file that both stages read."""

from pathlib import Path

from click.testing import CliRunner

from jigsaw_pretrain.detect.annotations import read_ground_truth, subset
from jigsaw_pretrain.detect.cli import main


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
