"""The train command: every model, norm and freeze, resuming, refusals, and what a run leaves."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from jigsaw_pretrain.config import choices
from jigsaw_pretrain.detect.annotations import read_ground_truth, subset
from jigsaw_pretrain.detect.cli import main
from jigsaw_pretrain.detect.recipe import DetectorName, DetectorNorm, Freeze
from jigsaw_pretrain.detect.training import _image_place
from jigsaw_pretrain.train.engine.checkpoint import save_checkpoint
from tests.helpers.browser import check_page
from tests.helpers.prepped import tree
from tests.helpers.settings import SOAK

Run = Callable[..., Any]


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow(seconds=9)
@pytest.mark.parametrize(
    ("model", "norm", "freeze"),
    [
        # Every pair of two of them; `make soak` runs all.
        (model, norm, freeze)
        for i, model in enumerate(choices(DetectorName))
        for j, norm in enumerate(choices(DetectorNorm))
        for k, freeze in enumerate(choices(Freeze))
        if SOAK or (i + j + k) % len(choices(Freeze)) == 0
    ],
)
def test_every_model_norm_and_freeze_trains_resumes_and_evaluates(
    tmp_path: Path, detect: Run, tiny_weights: Path, plain_runs: None, model: str, norm: str, freeze: str
) -> None:
    options = {"model": model, "norm": norm, "freeze": freeze, "init": tiny_weights}
    said = detect(tmp_path / "run", "--stop-after", "1", **options).output
    assert "matched" in said and not (tmp_path / "run" / "detector.pth").exists()
    detect(tmp_path / "run", "--resume", **options)
    found = rows(tmp_path / "run")
    assert [row["step"] for row in found if "loss" in row] == [0, 1]
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in found if "loss" in row)
    assert 0 <= found[-1]["AP"] <= 1
    before = torch.load(tiny_weights, weights_only=True)
    after = torch.load(tmp_path / "run" / "backbone.pth", weights_only=True)
    shared = before.keys() & after.keys()
    changed = {name for name in shared if not torch.equal(before[name], after[name])}
    if norm != "gn":
        assert before.keys() - {name for name in before if name.endswith("num_batches_tracked")} <= after.keys()
    stem = {name for name in shared if name.startswith(("conv1.", "bn1."))}
    if freeze == "backbone":
        assert not changed
    elif freeze == "stem":
        assert not changed & stem and changed
    else:
        assert "conv1.weight" in changed and "layer3.0.conv1.weight" in changed and "layer4.0.conv1.weight" in changed
    if norm == "frozen-bn":
        assert not any("bn" in name or "downsample.1" in name for name in changed)


@pytest.mark.slow(seconds=2)
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(
    tmp_path: Path, detect: Run, tiny_weights: Path, plain_runs: None
) -> None:
    options = {"model": "cascade-rcnn-fpn", "norm": "sync-bn", "init": tiny_weights, "steps": 4, "head": "4conv1fc"}
    options |= {"optim.name": "adamw", "optim.layer_decay": 0.9, "optim.bias_decay": 0.0, "lr": 1e-4}
    detect(tmp_path / "whole", **options)
    detect(tmp_path / "parts", "--stop-after", "2", **options)
    detect(tmp_path / "parts", "--resume", "--workers", "1", **options)
    whole = torch.load(tmp_path / "whole" / "detector.pth", weights_only=True)
    parts = torch.load(tmp_path / "parts" / "detector.pth", weights_only=True)
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    losses = [[row["loss"] for row in rows(tmp_path / name) if "loss" in row] for name in ("whole", "parts")]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_large_scale_jitter_and_bf16_train(tmp_path: Path, detect: Run, plain_runs: None) -> None:
    detect(
        tmp_path / "run", norm="gn", model="faster-rcnn-fpn", jitter_low=0.1, jitter_high=2.0, precision="bf16", seed=3
    )
    assert len(rows(tmp_path / "run")) == 3


@pytest.mark.parametrize("name", ["detector.pth", "manifests/dataset.json"])
def test_a_folder_with_files_that_are_not_the_runs_is_left_as_it_is(tmp_path: Path, detect: Run, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"mine")
    said = detect(tmp_path, "--resume", expect=2).output
    assert f"Error: --run {tmp_path} holds " in said and name in said and "name another folder" in said
    assert tree(tmp_path) == {name: b"mine"}


def test_bottleneck_networks_fit_every_model(tmp_path: Path, detect: Run, plain_runs: None) -> None:
    for model in ("faster-rcnn-c4", "retinanet"):
        detect(tmp_path / model, model=model, norm="gn", backbone="tinybottleneck")


def test_frozen_bn_without_statistics_becomes_batch_norm_that_learns_and_says_so(
    tmp_path: Path, detect: Run, plain_runs: None
) -> None:
    said = detect(tmp_path / "run", norm="frozen-bn", model="faster-rcnn-fpn").output
    assert "warning: frozen-bn needs weights that bring batch statistics" in said
    assert json.loads((tmp_path / "run" / "config.json").read_text())["norm_built"] == "sync-bn"
    assert "backbone.body.bn1.num_batches_tracked" in torch.load(tmp_path / "run" / "detector.pth", weights_only=True)


@pytest.mark.slow(seconds=4)
def test_a_run_leaves_a_page_and_results_that_pycocotools_scores_alike(
    tmp_path: Path, detect: Run, tiny_data: Path
) -> None:
    folder = tmp_path / "run"
    detect(folder, norm="gn", model="mask-rcnn-fpn", steps=30, lr=0.1, log_every=5, val_every=15, score_threshold=0.01)
    page = (folder / "report.html").read_text()
    assert (page.count('<svg role="img"'), page.count("data:image/webp;base64,")) == (3, 2)
    assert "http" not in page.split("<style>")[1].split("</style>")[0]
    assert len([row for row in rows(folder) if "AP" in row]) == 2
    truth = COCO(str(tiny_data / "val" / "annotations.json"))
    results = json.loads((folder / "results.json").read_text())
    assert results
    found = json.loads((folder / "ap.json").read_text())
    for kind in ("bbox", "segm"):
        plain = [{k: v for k, v in one.items() if kind == "segm" or k != "segmentation"} for one in results]
        by_hand = COCOeval(truth, truth.loadRes(plain), kind)
        by_hand.evaluate()
        by_hand.accumulate()
        by_hand.summarize()
        assert list(found[kind]["stats"].values()) == by_hand.stats.tolist()
    again = CliRunner().invoke(main, ["eval", "--run", str(folder), "--workers", "0", "--out", str(tmp_path / "again")])
    assert again.exit_code == 0, again.output
    assert (tmp_path / "again" / "results.json").read_bytes() == (folder / "results.json").read_bytes()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 30 and summary["seconds"] > 0 and summary["AP"]["AP"] == found["bbox"]["stats"]["AP"]
    state = torch.load(folder / "detector.pth", weights_only=True)
    assert {"backbone.fpn.inner_blocks.0.0.weight", "rpn.head.conv.0.0.weight"} <= state.keys()
    # Last: without a browser the rest of the test is skipped.
    check_page(folder / "report.html", "By class")


def test_refusals_name_the_thing_and_the_remedy(
    tmp_path: Path, detect: Run, tiny_weights: Path, plain_runs: None
) -> None:
    assert "did you mean" in (said := detect(tmp_path / "a", expect=2, stepz=3).output) and "steps" in said
    assert "resnet50" in detect(tmp_path / "b", expect=2, backbone="resnet5").output
    assert "C4 needs it" in detect(tmp_path / "c", expect=2, backbone="timm:vit_tiny_patch16_224").output
    said = detect(tmp_path / "d", expect=2, init=tiny_weights, backbone="tinybottleneck").output
    assert "missing" in said and "weights of another backbone" in said
    assert "is missing" in detect(tmp_path / "e", expect=2, init=tmp_path / "none.pth").output
    (tmp_path / "odd.pth").write_bytes(b"odd")
    assert "odd.pth" in detect(tmp_path / "f", expect=2, init=tmp_path / "odd.pth").output
    detect(tmp_path / "g", norm="gn", model="faster-rcnn-fpn", steps=1)
    assert "already holds a run" in detect(tmp_path / "g", expect=2, norm="gn", model="faster-rcnn-fpn").output
    assert "another recipe" in detect(tmp_path / "g", "--resume", expect=2, norm="gn", model="retinanet").output
    assert "head" in detect(tmp_path / "h", expect=2, model="retinanet", head="4conv1fc").output


def test_weights_that_fit_in_part_are_taken_only_when_told(tmp_path: Path, detect: Run, tiny_weights: Path) -> None:
    state = torch.load(tiny_weights, weights_only=True)
    del state["layer2.0.conv1.weight"]
    torch.save({**state, "layer9.weight": torch.zeros(1)}, tmp_path / "partial.pth")
    said = detect(tmp_path / "run", expect=2, init=tmp_path / "partial.pth").output
    assert "layer2.0.conv1.weight" in said and "layer9.weight" in said
    said = detect(tmp_path / "run", init=tmp_path / "partial.pth", partial=True, model="retinanet").output
    assert "1 missing (layer2.0.conv1.weight), 1 unexpected (layer9.weight)" in said


def test_loss_that_is_not_finite_ends_the_run_with_a_remedy(tmp_path: Path, detect: Run, plain_runs: None) -> None:
    said = detect(tmp_path / "run", expect=2, norm="gn", lr=1e9, warmup_steps=0, steps=5).output
    assert "lower the learning rate" in said


def test_a_run_is_taken_by_its_backbone_or_else_its_newest_checkpoint(
    tmp_path: Path, detect: Run, tiny_weights: Path, plain_runs: None
) -> None:
    state = torch.load(tiny_weights, weights_only=True)
    run = tmp_path / "pretrained"
    assert "is missing" in detect(tmp_path / "a", expect=2, init=run).output
    run.mkdir()
    assert "neither backbone.pth nor a checkpoint" in detect(tmp_path / "a", expect=2, init=run).output
    content = {"model": {**{f"backbone.{name}": value for name, value in state.items()}, "head.bias": torch.zeros(3)}}
    save_checkpoint(run / "checkpoints", 7, content, keep=1)
    options = {"model": "faster-rcnn-fpn", "freeze": "backbone", "norm": "frozen-bn", "steps": 1}
    detect(tmp_path / "by-checkpoint", init=run, **options)
    torch.save([torch.zeros(1)], run / "backbone.pth")
    assert "holds no state dict" in detect(tmp_path / "b", expect=2, init=run).output
    torch.save({**state, "fc.weight": torch.zeros(3, 3)}, run / "backbone.pth")
    assert "not used: fc.weight (the classifier)" in detect(tmp_path / "by-file", init=run, **options).output
    for name in ("by-checkpoint", "by-file"):
        found = torch.load(tmp_path / name / "backbone.pth", weights_only=True)
        assert all(torch.equal(value, state[key]) for key, value in found.items())
    # A detector's own backbone is a start as well.
    detect(tmp_path / "again", init=tmp_path / "by-file", **options)


def test_a_group_norm_takes_batch_norm_weights_and_says_what_it_leaves_out(
    tmp_path: Path, detect: Run, tiny_weights: Path, plain_runs: None
) -> None:
    said = detect(tmp_path / "run", init=tiny_weights, norm="gn", model="retinanet").output
    assert "0 missing, 0 unexpected" in said and "batch statistics that only one side has" in said
    assert "warning:" in said and "trained with batch norm" in said and "this detector has group norm" in said


def test_one_norm_on_both_sides_is_no_warning(
    tmp_path: Path, detect: Run, tiny_weights: Path, plain_runs: None
) -> None:
    said = detect(tmp_path / "first", "--stop-after", "1", init=tiny_weights, norm="sync-bn", model="retinanet").output
    assert "under another norm" not in said
    state = torch.load(tiny_weights, weights_only=True)
    grouped = {name: value for name, value in state.items() if "running_" not in name and "tracked" not in name}
    torch.save(grouped, tmp_path / "gn.pth")
    said = detect(
        tmp_path / "other", "--stop-after", "1", init=tmp_path / "gn.pth", norm="gn", model="retinanet"
    ).output
    assert "under another norm" not in said


def test_validation_images_that_are_trained_on_are_told(
    tmp_path: Path, detect: Run, tiny_data: Path, plain_runs: None
) -> None:
    same = tiny_data / "train"
    # Spelled in another way it is the same folder.
    given = ("--val-annotations", str(same / "annotations.json"), "--val-images", f"{tiny_data}/val/.././train/images/")
    assert "validation images are trained on" in detect(tmp_path / "same", "--stop-after", "1", *given).output
    assert "validation images are trained on" not in detect(tmp_path / "other", "--stop-after", "1").output


def test_a_folder_of_images_is_known_however_it_is_spelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "link").symlink_to("images")
    monkeypatch.chdir(tmp_path)
    same = ["images", "images/", "./images", "link", f"{tmp_path}/images", f"file://{tmp_path}/images/", "x/../images"]
    assert {_image_place(one) for one in same} == {str(tmp_path.resolve() / "images")}
    stores = {_image_place(one) for one in ("memory://a/images", "memory://a/images/", "memory://a/./b/../images")}
    assert len(stores) == 1 and stores.isdisjoint({_image_place("memory://a/other"), _image_place("/a/images")})


def without_objects(document: dict[str, Any], kind: str) -> None:
    if kind == "none":
        document["annotations"] = []
    for one in document["annotations"]:
        one[kind] = 1


@pytest.mark.parametrize("kind", ["none", "iscrowd", "ignore"])
def test_a_dataset_without_objects_is_refused_in_one_line(
    tmp_path: Path, detect: Run, tiny_data: Path, kind: str
) -> None:
    document = json.loads((tiny_data / "train" / "annotations.json").read_text())
    without_objects(document, kind)
    (tmp_path / "a.json").write_text(json.dumps(document))
    said = detect(tmp_path / "run", "--annotations", str(tmp_path / "a.json"), expect=2).output
    (line,) = (line for line in said.splitlines() if line.startswith("Error: "))
    assert f"{tmp_path}/a.json has no object to learn in 6 images ({0 if kind == 'none' else 12} boxes" in line
    assert not (tmp_path / "run" / "config.json").exists()


def test_there_must_be_something_to_judge_by(tmp_path: Path, detect: Run, tiny_data: Path) -> None:
    document = json.loads((tiny_data / "val" / "annotations.json").read_text())
    without_objects(document, "iscrowd")
    empty = tmp_path / "empty.json"
    empty.write_text(json.dumps(document))
    validation = ("--val-annotations", str(empty), "--val-images", str(tiny_data / "val" / "images"))
    said = detect(tmp_path / "run", *validation, expect=2).output
    assert f"Error: {empty} has no object to judge by" in said and not (tmp_path / "run" / "config.json").exists()
    (tmp_path / "results.json").write_text("[]")
    judged = ("eval", "--results", str(tmp_path / "results.json"), "--annotations", str(empty))
    result = CliRunner().invoke(main, judged)
    assert result.exit_code == 2 and "no object to judge by" in result.output


def test_images_drawn_without_objects_are_refused_and_regions_are_counted(
    tmp_path: Path, detect: Run, tiny_data: Path, plain_runs: None
) -> None:
    document = json.loads((tiny_data / "train" / "annotations.json").read_text())
    whole = [one for one in document["annotations"] if one["image_id"] == document["images"][0]["id"]]
    without_objects({"annotations": [one for one in document["annotations"] if one not in whole]}, "iscrowd")
    (tmp_path / "a.json").write_text(json.dumps(document))
    given = ("--annotations", str(tmp_path / "a.json"))
    said = detect(tmp_path / "run", *given, "--stop-after", "1", model="retinanet", norm="gn").output
    assert "10 of 12 boxes are crowd regions" in said
    read = read_ground_truth(str(tmp_path / "a.json"), None)
    seed = next(seed for seed in range(20) if not subset(read, 1, seed).objects)
    refused = detect(tmp_path / "none", *given, images_limit=1, subset_seed=seed, expect=2).output
    assert "none of the 1 image drawn has an object" in refused and "data.subset_seed" in refused


def test_no_training_second_is_lost_to_an_evaluation(tmp_path: Path, detect: Run, plain_runs: None) -> None:
    detect(tmp_path / "run", norm="gn", model="retinanet", steps=5, log_every=3, val_every=2)
    found = rows(tmp_path / "run")
    assert [row["step"] for row in found if "loss" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in found if "AP" in row] == [1, 3, 4]
    seconds = [row["seconds"] for row in found if "loss" in row]
    assert seconds == sorted(seconds) and seconds[0] > 0


def test_the_strategies_of_figure_8_and_a_subset_train_and_are_tested(
    tmp_path: Path, detect: Run, tiny_weights: Path, plain_runs: None
) -> None:
    options = {"model": "mask-rcnn-fpn", "norm": "frozen-bn", "init": tiny_weights, "deform": True, "steps": 2}
    scales = {"train_short_sides": [640, 800], "test_short_sides": [640, 800], "images_limit": 4, "freeze": "stem"}
    detect(tmp_path / "run", **options, **scales)
    found = rows(tmp_path / "run")
    assert 0 <= found[-1]["AP"] <= 1 and 0 <= found[-1]["mask_AP"] <= 1
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["plan"]["test_short_sides"] == [51, 64] and sum(config["boxes"]) == 8
    ap = json.loads((tmp_path / "run" / "ap.json").read_text())
    assert set(ap["by_training_annotations"]) == {"1-10"}
    state = torch.load(tmp_path / "run" / "backbone.pth", weights_only=True)
    offsets = [value for key, value in state.items() if "layer2.0.conv1.offset" in key]
    assert len(offsets) == 2 and all(value.any() for value in offsets)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["flops_per_image"] > 1e6
    detect(tmp_path / "again", **{**options, "init": tmp_path / "run"}, **scales)


@pytest.mark.parametrize("model", ["cascade-rcnn-fpn", "retinanet"])
def test_a_frozen_backbone_under_nas_fpn_trains_with_pasted_objects(
    tmp_path: Path, detect: Run, tiny_weights: Path, plain_runs: None, model: str
) -> None:
    options = {"model": model, "norm": "frozen-bn", "init": tiny_weights, "freeze": "backbone", "neck": "nas-fpn"}
    detect(tmp_path / "run", **options, jitter_low=0.5, jitter_high=1.5, copy_paste=0.9, neck_channels=8)
    found = rows(tmp_path / "run")
    assert (
        all(torch.isfinite(torch.tensor(row["loss"])) for row in found if "loss" in row) and 0 <= found[-1]["AP"] <= 1
    )
    state = torch.load(tmp_path / "run" / "detector.pth", weights_only=True)
    assert len([name for name in state if "fpn.stacks." in name and state[name].dim() == 4]) == 7 * 7
    assert "needs large-scale jitter" in detect(tmp_path / "b", expect=2, **options, copy_paste=0.5).output


def test_a_split_of_no_validation_set_is_refused(tmp_path: Path, tiny_data: Path) -> None:
    given = ["--annotations", str(tiny_data / "train" / "annotations.json"), "--images", str(tiny_data / "train")]
    result = CliRunner().invoke(main, ["train", *given, "--run", str(tmp_path / "run"), "--val-split", "val"])
    assert result.exit_code == 2 and "--val-annotations" in result.output and not (tmp_path / "run").exists()
