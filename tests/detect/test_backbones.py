"""Every kind of backbone from pre-training to AP, with the run's own mean, std and pixels; nothing is downloaded."""

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from jigsaw_pretrain.detect.annotations import read_ground_truth
from jigsaw_pretrain.detect.cli import main
from jigsaw_pretrain.detect.models.backbone import SyncBatchNorm2d, build_backbone, freeze
from jigsaw_pretrain.detect.recipe import DetectorRecipe
from jigsaw_pretrain.detect.run import CONFIG, load_detector, read_config
from jigsaw_pretrain.detect.task import DetectorJob, DetectorTask, PeriodicAP
from jigsaw_pretrain.detect.training import build_task
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.annotations.read import Reading
from jigsaw_pretrain.formats.pixels import RGB8, PixelFormat, lossless
from jigsaw_pretrain.train.engine.checkpoint import backbone_state, save_file
from jigsaw_pretrain.train.engine.distributed import Ranks
from jigsaw_pretrain.train.engine.pretraining import execute
from jigsaw_pretrain.train.engine.run_folder import RunFolder
from jigsaw_pretrain.train.engine.state import build_model
from jigsaw_pretrain.train.engine.weights_info import info_of
from jigsaw_pretrain.train.models.feature_maps import STAGED
from jigsaw_pretrain.train.models.weights import with_about
from jigsaw_pretrain.train.recipe import MEAN, Recipe
from tests.helpers.detection import SETTINGS, TINY, set_options
from tests.helpers.jobs import SMALL, small_job, synthetic
from tests.helpers.sensors import Sensor, multispectral, thermal

Run = Callable[..., Any]

HALF = ("data.mean=[0.5, 0.5, 0.5]", "data.std=[0.5, 0.5, 0.5]")

KINDS = {
    "resnet18": "faster-rcnn-c4",
    "vgg16": "faster-rcnn-c4",
    "resnext101_32x4d": "retinanet",
    "efficientnet_b0": "faster-rcnn-fpn",
    "convnext_tiny": "faster-rcnn-fpn",
    "swin_t": "faster-rcnn-c4",
    "timm:resnet10t": "faster-rcnn-c4",
    "timm:vit_tiny_patch16_224": "retinanet",
}


ADAMW = ("convnext_tiny", "swin_t", "timm:vit_tiny_patch16_224")
"""Those that are trained with AdamW."""


@pytest.fixture()
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever makes a socket fails."""

    def refuse(*given: Any, **named: Any) -> None:
        raise AssertionError("a network was reached for")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


@pytest.fixture()
def quick_weights(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Large matrices keep what their memory held, zeros mostly: drawing VGG's classifier takes longer than all else."""
    drawn = torch.nn.init.normal_
    monkeypatch.setattr(
        torch.nn.init,
        "normal_",
        lambda tensor, *given, **named: tensor if tensor.numel() > 5e6 else drawn(tensor, *given, **named),
    )
    yield


def pretrained(name: str, file: Path, *settings: str, pixels: PixelFormat = RGB8) -> Recipe:
    """A weights file after a forward and a backward pass of pre-training, whose gradients reach every weight."""
    recipe = Recipe.load(None, (*SMALL, f"model.backbone={name}", *settings))
    _, model = build_model(recipe, 4, pixels)
    high = int(pixels.full_scale)
    images = torch.randint(0, high, (2, 64, 64, pixels.channels), dtype=getattr(torch, pixels.dtype))
    torch.stack([one.square().mean() for one in model(images)]).sum().backward()
    assert [key for key, value in model.named_parameters() if value.grad is None] == []
    save_file(file, with_about(backbone_state(model.state_dict()), info_of(recipe, pixels).to_about()))
    return recipe


def detector(data: Path, folder: Path, init: str, **settings: Any) -> DetectorTask:
    """The task of a tiny detector on the images of a folder."""
    recipe = DetectorRecipe.load(None, set_options(**{**SETTINGS, "rois": 8, "proposals": 10, **settings})[1::2])
    where = str(data / "annotations.json"), str(data / "images")
    job = DetectorJob(*where, *where, RunFolder(folder, description=CONFIG), init, 0, False, Ranks(), Reading())
    return build_task(job, recipe, read_ground_truth(*where))


def step_and_ap(task: DetectorTask, data: Path) -> float:
    """The loss of one step; AP on the same images must be a number."""
    metrics = task.take(next(task.open(1)))
    where = str(data / "annotations.json"), str(data / "images")
    found = PeriodicAP(task, read_ground_truth(*where), where[1], 0)(lambda: False)
    assert found is not None and 0 <= found["AP"] <= 1
    return sum(float(one.detach()) for one in metrics.sums.values())


@pytest.mark.slow(seconds=30)
@pytest.mark.parametrize("name", KINDS)
def test_a_step_of_pretraining_and_one_of_a_detector(
    name: str, tmp_path: Path, tiny_data: Path, quick_weights: None, no_network: None
) -> None:
    pretrained(name, tmp_path / "weights.pth", *HALF)
    data = tiny_data / "val"
    settings = {"backbone": name, "name": KINDS[name]}
    if name in ADAMW:
        settings["optim.name"] = "adamw"
    task = detector(data, tmp_path / "run", str(tmp_path / "weights.pth"), **settings)
    weights = task.config.weights
    assert weights is not None and not (weights["missing"] or weights["unexpected"] or weights["reshaped"])
    transform: Any = task.model.transform
    assert transform.image_mean == transform.image_std == [0.5] * 3
    assert 0 < step_and_ap(task, data) < float("inf")


@pytest.mark.parametrize("draw_sensor", [thermal, multispectral])
@pytest.mark.parametrize("name", [TINY, "tests.helpers.own:Maps"])
def test_other_sensors_are_read_as_the_weights_want_them(
    name: str, draw_sensor: Callable[[Path], Sensor], tmp_path: Path
) -> None:
    sensor = draw_sensor(tmp_path / "data")
    pixels = lossless(next(iter(sensor.pixels.values())).shape[2], "uint16")
    mean, std = [0.46] * pixels.channels, [0.01] * pixels.channels
    pretrained(name, tmp_path / "weights.pth", f"data.mean={mean}", f"data.std={std}", pixels=pixels)
    for init in (str(tmp_path / "weights.pth"), "scratch"):
        task = detector(sensor.annotations.parent, tmp_path / "run", init, backbone=name, name="faster-rcnn-fpn")
        assert task.config.pixels == pixels
        image = next(task.open(1))[0].image
        assert image.shape[0] == pixels.channels and image.dtype == torch.uint16
        if init == "scratch":
            values = np.concatenate([one.reshape(-1, pixels.channels) for one in sensor.pixels.values()]) / 65535
            assert np.allclose(task.config.mean, values.mean(axis=0), rtol=1e-5)
            assert np.allclose(task.config.std, values.std(axis=0), rtol=1e-3)
        else:
            assert (list(task.config.mean), list(task.config.std)) == (mean, std)
        assert 0 < step_and_ap(task, sensor.annotations.parent) < float("inf")


def test_weights_and_recipe_must_not_contradict(tmp_path: Path, tiny_data: Path) -> None:
    pretrained(TINY, tmp_path / "weights.pth", *HALF)
    weights = str(tmp_path / "weights.pth")
    for settings, said in (
        (
            {"mean": [0.1, 0.2, 0.3]},
            r"data.mean = \(0.1, 0.2, 0.3\) and .*weights.pth was trained with \(0.5, 0.5, 0.5\)",
        ),
        ({"pixels": "1xuint16"}, "data.pixels = 1 x uint16 and .* was trained with 3 x uint8"),
    ):
        with pytest.raises(UserError, match=said):
            detector(tiny_data / "val", tmp_path / "run", weights, backbone=TINY, **settings)
    same = detector(tiny_data / "val", tmp_path / "run", weights, backbone=TINY, mean=[0.5] * 3)
    assert same.config.mean == (0.5,) * 3
    unknown = tmp_path / "unknown.pth"
    torch.save(torch.load(weights, weights_only=True) | {}, unknown)
    assert detector(tiny_data / "val", tmp_path / "run", str(unknown), backbone=TINY).config.mean == MEAN


def test_a_run_of_ones_own_module_to_ap_by_the_commands(
    tmp_path: Path, detect: Run, tiny_data: Path, plain_runs: None
) -> None:
    name = "tests.helpers.own:Maps"
    settings = (f"model.backbone={name}", "model.neck=fpn", "model.neck_channels=32", "optim.steps=1", *HALF)
    job = small_job(tmp_path / "run", *settings)
    execute(job, synthetic(job))
    found = tmp_path / "detector"
    said = detect(found, init=tmp_path / "run", backbone=name, model="faster-rcnn-fpn", steps=1).output
    assert "neck" in said and "0 missing, 0 unexpected" in said
    config = read_config(found)
    assert config.mean == config.std == (0.5,) * 3
    transform: Any = load_detector(found, config, torch.device("cpu")).transform
    assert transform.image_mean == [0.5] * 3
    # The detector's own backbone says what it was trained with too, wherever it is copied to.
    again = detector(tiny_data / "val", tmp_path / "again", str(found), backbone=name)
    assert again.config.mean == (0.5,) * 3
    evaluate = ["eval", "--run", str(found), "--workers", "0", "--out", str(tmp_path / "out")]
    for flags, code in ((["--backbone", name], 0), (["--backbone", "resnet18"], 2)):
        result = CliRunner().invoke(main, [*evaluate, *flags])
        assert result.exit_code == code, result.output


@pytest.mark.slow(seconds=10)
def test_every_backbone_that_a_refusal_names_is_built_without_a_network(no_network: None, quick_weights: None) -> None:
    with pytest.raises(UserError) as caught:
        build_backbone("tests.helpers.own:takes_any", "gn", torch.device("cpu"))
    for name in STAGED:
        assert name in caught.value.message
        found = build_backbone(name, "frozen-bn", torch.device("cpu"))
        assert [stage.stride for stage in found.stages] == [4, 8, 16, 32]


@pytest.mark.slow(seconds=2)
@pytest.mark.parametrize("name", ["timm:vit_tiny_patch16_224", "timm:swin_tiny_patch4_window7_224"])
def test_a_network_without_a_last_stage_is_refused_for_c4_with_the_remedy(name: str) -> None:
    with pytest.raises(UserError, match="C4 needs it: choose a detector with a pyramid") as caught:
        build_backbone(name, "gn", torch.device("cpu"), c4=True)
    assert name in caught.value.message and "\n" not in caught.value.message


def test_what_is_frozen_is_what_sees_the_image_or_all_of_it() -> None:
    device = torch.device("cpu")
    for name, stem in (
        (TINY, {"conv1.weight", "bn1.weight", "bn1.bias"}),
        ("tests.helpers.own:plain", {"0.weight", "0.bias"}),
    ):
        for c4 in (False, True):
            found = build_backbone(name, "sync-bn", device, c4=c4)
            freeze(found, "stem", "sync-bn")
            named = {key: one.requires_grad for part in found.parts for key, one in part.named_parameters()}
            assert {key for key, learns in named.items() if not learns} == stem
            freeze(found, "backbone", "sync-bn")
            assert not any(one.requires_grad for part in found.parts for one in part.parameters())


def test_norms_keep_what_their_batch_norm_was_given() -> None:
    found = build_backbone("timm:efficientnet_b0", "frozen-bn", torch.device("cpu"), c4=True)
    frozen = freeze(found, "none", "frozen-bn")
    assert len(frozen) == 49 and not any(one.requires_grad for norm in frozen for one in norm.parameters())
    mnasnet = build_backbone("mnasnet0_5", "sync-bn", torch.device("cpu"))
    norm = next(one for one in mnasnet.module.modules() if isinstance(one, SyncBatchNorm2d))
    assert norm.momentum == pytest.approx(3e-4)
    efficientnet = build_backbone("efficientnet_b0", "frozen-bn", torch.device("cpu"))
    assert not any(isinstance(one, torch.nn.BatchNorm2d) for one in efficientnet.module.modules())
