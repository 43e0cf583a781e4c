"""Every export, loaded as its README says, gives the run's own feature map of an image read in the target's way."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from jigsaw_pretrain.train.engine.checkpoint import read_checkpoint, save_checkpoint
from jigsaw_pretrain.train.engine.run_folder import Origin, RunFolder, describe_run
from jigsaw_pretrain.train.engine.state import build_model
from jigsaw_pretrain.train.export.readme import TARGET_NAMES
from jigsaw_pretrain.train.export.targets import TARGETS
from jigsaw_pretrain.train.models.weights import read_weights
from tests.helpers import frameworks
from tests.helpers.commands import call
from tests.helpers.exports import CLASSES, MEAN, STD, exported, normalised, picture, run_in
from tests.helpers.jobs import same, small_job


def make_run(folder: Path, backbone: str, norm: str = "bn") -> nn.Module:
    """A run with a checkpoint of random weights and batch statistics; returns its model."""
    settings = (f"model.backbone={backbone}", f"data.mean={list(MEAN)}", f"data.std={list(STD)}", f"model.norm={norm}")
    recipe = small_job(folder, *settings).recipe
    _, model = build_model(recipe, len(CLASSES) + 1)
    words = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, nn.BatchNorm2d | nn.GroupNorm):
                for value in (part.weight, part.bias, *part.buffers()):
                    if not value.is_floating_point():
                        continue
                    value.copy_(torch.rand(value.shape, generator=words) * 0.6 + 0.4)
    describe_run(RunFolder(folder), recipe, Origin(CLASSES, "0" * 64), {"name": backbone})
    content = {"model": model.state_dict(), "recipe": recipe.to_dict()}
    save_checkpoint(RunFolder(folder).checkpoints, 3, content, 1)
    return model.eval()


def own_map(model: Any, bgr: Tensor) -> Tensor:
    """What the pre-training saw: RGB rows of uint8."""
    with torch.no_grad():
        images = model.normalise(bgr.flip(-1)[None]).double()
        found: Tensor = model.backbone.double()(images)
    return found


def agree(expected: Tensor, found: Tensor) -> bool:
    return torch.allclose(expected, found, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.slow(seconds=6)
@pytest.mark.parametrize("norm", ["bn", "gn"])
def test_torchvision_and_its_detector_take_every_entry(tmp_path: Path, norm: str) -> None:
    model = make_run(tmp_path / "run", "resnet18", norm)
    code = exported(tmp_path / "run", "torchvision", tmp_path / "r18.pth")
    names = run_in(tmp_path, code)
    body = names["model"].double().eval()
    image = normalised(picture())
    with torch.no_grad():
        found = nn.Sequential(*list(body.children())[:-2])(image)
    assert agree(own_map(model, picture()), found)
    detector = run_in(tmp_path, (tmp_path / "r18.pth.README.md").read_text().split("```")[3].split("\n", 1)[1], names)
    with torch.no_grad():
        maps = detector["detector"].backbone.body.double().eval()(image)
    assert agree(own_map(model, picture()), maps["3"])
    assert list(detector["detector"].transform.image_mean) == list(MEAN)


@pytest.mark.slow(seconds=4)
@pytest.mark.parametrize("backbone", ["timm:convnext_atto", "resnet18"])
def test_timm_takes_every_entry(tmp_path: Path, backbone: str) -> None:
    pytest.importorskip("timm")
    model = make_run(tmp_path / "run", backbone)
    names = run_in(tmp_path, exported(tmp_path / "run", "timm", tmp_path / "t.pth"))
    assert names["mean"] == list(MEAN) != list(names["model"].pretrained_cfg["mean"])
    said = (tmp_path / "t.pth.README.md").read_text()
    assert f"pretrained_cfg has others: {list(names['model'].pretrained_cfg['mean'])}" in said
    assert json.dumps(CLASSES) in said
    with torch.no_grad():
        names["model"].double().eval()
        expected = own_map(model, picture())
        assert agree(expected, names["features"](normalised(picture())))
        assert not agree(expected, names["features"](normalised(picture(), swapped=True)))


@pytest.mark.slow(seconds=6)
@pytest.mark.parametrize("backbone", ["resnet18", "resnext50_32x4d"])
def test_detectron2_gets_its_names_and_its_configuration(tmp_path: Path, backbone: str) -> None:
    model = make_run(tmp_path / "run", backbone)
    config = yaml.safe_load(exported(tmp_path / "run", "detectron2", tmp_path / "d.pkl"))
    content = pickle.loads((tmp_path / config["MODEL"]["WEIGHTS"]).read_bytes())
    assert content["matching_heuristics"] is True and "__author__" in content
    expected, found = own_map(model, picture()), frameworks.detectron2(content["model"], config, picture())
    assert agree(expected, found)
    real = frameworks.detectron2_own(content["model"], config, picture())
    assert real is None or agree(expected, real)
    config["INPUT"]["FORMAT"] = "BGR"
    assert not agree(expected, frameworks.detectron2(content["model"], config, picture()))
    if backbone != "resnet18":
        config["INPUT"]["FORMAT"], config["MODEL"]["RESNETS"]["STRIDE_IN_1X1"] = "RGB", True
        assert not agree(expected, frameworks.detectron2(content["model"], config, picture()))


@pytest.mark.slow(seconds=6)
@pytest.mark.parametrize("backbone", ["resnet18", "resnext50_32x4d"])
def test_mmdetection_gets_its_configuration(tmp_path: Path, backbone: str) -> None:
    model = make_run(tmp_path / "run", backbone)
    config = run_in(tmp_path, exported(tmp_path / "run", "mmdet", tmp_path / "m.pth"))["model"]
    state = torch.load(tmp_path / config["backbone"]["init_cfg"]["checkpoint"], weights_only=True)
    expected = own_map(model, picture())
    assert agree(expected, frameworks.mmdet(state, config, picture()))
    real = frameworks.mmdet_own(state, config, picture())
    assert real is None or agree(expected, real)
    config["data_preprocessor"]["bgr_to_rgb"] = False
    assert not agree(expected, frameworks.mmdet(state, config, picture()))


def test_safetensors_hold_the_entries_as_they_are(tmp_path: Path) -> None:
    from safetensors import safe_open

    make_run(tmp_path / "run", "tests.helpers.own:plain")
    code = exported(tmp_path / "run", "safetensors", tmp_path / "own.safetensors")
    weights = run_in(tmp_path, code)["weights"]
    model = read_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000003.pt")["model"]
    assert same(weights, {key[9:]: value for key, value in model.items() if key.startswith("backbone.")})
    assert same(weights, read_weights(str(tmp_path / "own.safetensors")))
    with safe_open(tmp_path / "own.safetensors", "pt") as file:
        assert file.metadata()["backbone"] == "tests.helpers.own:plain" and file.metadata()["order"] == "RGB"


def test_what_a_library_does_not_have_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_run(run, "tests.helpers.own:plain")
    for to, message in (
        ("torchvision", "torchvision has no tests.helpers.own:plain"),
        ("timm", "timm has no tests.helpers.own:plain"),
        ("mmdet", "mmdetection builds ResNets"),
        ("detectron2", "detectron2 builds ResNets"),
    ):
        refused = call("export", "--run", run, "--to", to, "--out", tmp_path / "x.pkl")
        assert refused.exit_code == 2 and message in refused.output
    other = call("export", "--run", run, "--to", "mmdet", "--backbone", "resnet50", "--out", tmp_path / "x.pkl")
    assert other.exit_code == 2 and "own:plain, not of resnet50" in other.output
    name = call("export", "--run", run, "--to", "safetensors", "--out", tmp_path / "x.pth")
    assert name.exit_code == 2 and "end the name with .safetensors" in name.output
    options = ("--run", run, "--to", "safetensors", "--out", tmp_path / "x.safetensors")
    unmeasured = call("export", *options, "--recalibrate-bn", 8)
    assert unmeasured.exit_code == 2 and "add --data OUT" in unmeasured.output
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


@pytest.mark.slow(seconds=3)
def test_group_norm_is_kept_by_the_libraries_that_are_checked_and_refused_by_others(tmp_path: Path) -> None:
    model = make_run(tmp_path / "run", "resnet18", "gn")
    for to, out in (("mmdet", "m.pth"), ("detectron2", "d.pkl")):
        refused = call("export", "--run", tmp_path / "run", "--to", to, "--out", tmp_path / out)
        assert refused.exit_code == 2 and "under group norm" in refused.output and not (tmp_path / out).exists()
    pytest.importorskip("timm")
    names = run_in(tmp_path, exported(tmp_path / "run", "timm", tmp_path / "t.pth"))
    with torch.no_grad():
        assert agree(own_map(model, picture()), names["model"].double().eval().forward_features(normalised(picture())))


@pytest.mark.slow(seconds=3)
def test_a_checkpoint_of_another_backbone_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path / "run", "resnet18")
    _, model = build_model(small_job(tmp_path / "x", "model.backbone=shufflenet_v2_x0_5").recipe, 3)
    save_checkpoint(RunFolder(tmp_path / "run").checkpoints, 4, {"model": model.state_dict()}, 1)
    for to, target in TARGETS.items():
        out = tmp_path / f"x{target.suffix}"
        refused = call("export", "--run", tmp_path / "run", "--to", to, "--out", out)
        assert refused.exit_code == 2 and "step-00000004.pt" in refused.output, to
        assert not out.exists()


def test_every_target_is_offered_in_the_order_of_its_converters() -> None:
    assert tuple(TARGETS) == TARGET_NAMES
