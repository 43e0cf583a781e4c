"""The eval command on results that are known."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from jigsaw_pretrain.detect.annotations import read_ground_truth
from jigsaw_pretrain.detect.cli import main
from tests.helpers.detection import as_predictions, write_annotations


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


@pytest.mark.parametrize("wrong", [{"score": "0.9"}, {"bbox": [1, 2, 3]}, {"score": float("nan")}, {"bbox": None}])
def test_results_of_other_types_are_refused_in_one_line(tmp_path: Path, wrong: dict[str, object]) -> None:
    good = {"image_id": 1, "category_id": 4, "bbox": [1, 1, 5, 5], "score": 0.5}
    write_annotations(tmp_path / "a.json", [{"id": 1, "image_id": 1, "category_id": 4, "bbox": [1, 1, 5, 5]}])
    (tmp_path / "r.json").write_text(json.dumps([good, good | wrong]))
    named = ["--annotations", str(tmp_path / "a.json"), "--results", str(tmp_path / "r.json")]
    result = CliRunner().invoke(main, ["eval", *named])
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert f"{tmp_path}/r.json" in result.output and "1" in result.output
