"""The eval command on results that are known."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from jigsaw_pretrain.detect.annotations import read_ground_truth
from jigsaw_pretrain.detect.cli import main
from tests.helpers.detection import as_predictions


@pytest.mark.slow(seconds=8)
@pytest.mark.parametrize("name", ["coco_small_val", "bccd", "voc2007_224/val"])
def test_ground_truth_given_as_predictions_has_an_ap_of_one(real_data: Path, tmp_path: Path, name: str) -> None:
    annotations = real_data / name / "annotations.json"
    found = as_predictions(read_ground_truth(str(annotations), None).truth)
    (tmp_path / "results.json").write_text(json.dumps(found))
    arguments = ["eval", "--annotations", str(annotations), "--results", str(tmp_path / "results.json")]
    result = CliRunner().invoke(main, [*arguments, "--out", str(tmp_path)], catch_exceptions=False)
    assert result.exit_code == 0 and "AP 100.0  AP50 100.0" in result.output
    saved = json.loads((tmp_path / "ap.json").read_text())["bbox"]
    assert saved["stats"]["AP"] == 1.0
    assert all(one["AP"] == pytest.approx(1) for one in saved["classes"].values() if one["boxes"])
