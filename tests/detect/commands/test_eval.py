"""The eval command on results that are known."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from jigsaw_pretrain.detect.annotations import read_ground_truth
from jigsaw_pretrain.detect.cli import main
from jigsaw_pretrain.detect.data import encoded_mask
from tests.helpers.attacks import bounded
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


BOX = {"image_id": 1, "category_id": 4, "bbox": [1, 1, 10, 10]}
SQUARE = [[1, 1, 11, 1, 11, 11, 1, 11]]
COUNTS = [51, 10, *([40, 10] * 9), 50 * 100 - 51 - 460]
RLE = {"size": [50, 100], "counts": COUNTS}


def scored(folder: Path, results: list[dict[str, Any]], kind: str = "segm", **truth: Any) -> Result:
    """`detect eval` of a results file on one object."""
    write_annotations(folder / "a.json", [{"id": 1, **BOX, "segmentation": SQUARE, **truth}])
    (folder / "r.json").write_text(json.dumps(results))
    named = ["--annotations", str(folder / "a.json"), "--results", str(folder / "r.json"), "--kind", kind]
    return CliRunner().invoke(main, ["eval", *named])


@pytest.mark.parametrize("mask", [SQUARE, RLE, encoded_mask(RLE, 50, 100)], ids=["polygons", "counts", "text"])
@pytest.mark.parametrize("with_box", [True, False])
def test_masks_are_scored_as_coco_writes_them(tmp_path: Path, mask: Any, with_box: bool) -> None:
    mask = {**mask, "counts": mask["counts"].decode()} if isinstance(mask, dict) and mask is not RLE else mask
    found = {**BOX, "score": 0.5, "segmentation": mask}
    result = scored(tmp_path, [found if with_box else {key: found[key] for key in found if key != "bbox"}])
    assert result.exit_code == 0 and "AP 100.0  AP50 100.0" in result.output


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (None, "segmentation"),
        ({"segmentation": None}, "detection 1 has no segmentation"),
        ({"segmentation": [[1, 2, 3]]}, "detection 1 .*polygons"),
        ({"segmentation": [[1, 2, 3, 4]]}, "detection 1 .*polygons"),
        ({"segmentation": {**RLE, "size": [100, 50]}}, "detection 1 .*size"),
        ({"segmentation": {**RLE, "counts": COUNTS[:-1]}}, "detection 1 .*cover"),
        ({"segmentation": {**RLE, "counts": "PPYo1"}}, "detection 1 .*cover"),
        ({"segmentation": SQUARE, "bbox": None}, "detection 1 has no bbox"),
    ],
)
def test_results_without_masks_are_refused_in_one_line(tmp_path: Path, wrong: dict[str, Any] | None, told: str) -> None:
    good = {**BOX, "score": 0.5, "segmentation": SQUARE}
    other = {**BOX, "score": 0.5} if wrong is None else good | wrong
    with bounded():
        result = scored(tmp_path, [good, other])
    assert result.exit_code == 2 and re.search(rf"r\.json: {told if wrong else 'detection 1'}", result.output)


@pytest.mark.parametrize("wrong", [None, [[1, 2, 3]], {"size": [50, 100]}])
def test_ground_truth_without_masks_is_refused_in_one_line(tmp_path: Path, wrong: Any) -> None:
    result = scored(tmp_path, [{**BOX, "score": 0.5, "segmentation": SQUARE}], segmentation=wrong)
    assert result.exit_code == 2 and re.search(r"a\.json: .*a\.jpg .*segmentation", result.output)


def test_masks_without_boxes_are_no_boxes(tmp_path: Path) -> None:
    result = scored(tmp_path, [{"image_id": 1, "category_id": 4, "score": 0.5, "segmentation": SQUARE}], kind="bbox")
    assert result.exit_code == 2 and "--kind segm" in result.output


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--run", "run", "--kind", "segm"), "--kind"),
        (("--results", "r.json", "--annotations", "a.json", "--backbone", "resnet50"), "--backbone"),
    ],
)
def test_options_without_effect_are_refused(options: tuple[str, ...], told: str) -> None:
    result = CliRunner().invoke(main, ["eval", *options])
    assert result.exit_code == 2 and f"Error: {told} " in result.output and "leave it out" in result.output
