"""Backbones of detection libraries: built from configuration, pre-trained, exported, loaded by the lines to paste."""

import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.train.engine.pretraining import execute
from jigsaw_pretrain.train.models import backbones
from tests.helpers.commands import call
from tests.helpers.exports import run_in
from tests.helpers.jobs import small_job, synthetic


def without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever connects fails."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a network was reached for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)


STEP = ("data.batch=2", "data.lanes=2", "optim.steps=1", "optim.warmup_steps=0", "loss.strategy=block-wise")


def exported(run: Path, to: str, out: Path) -> str:
    """Export; returns the lines to paste."""
    result = call("export", "--run", run, "--to", to, "--out", out)
    assert result.exit_code == 0, result.output
    text = Path(f"{out}.README.md").read_text()
    assert "sees other numbers" not in text
    return text.split("```")[1].split("\n", 1)[1]


def own_maps(folder: Path, name: str, image: torch.Tensor) -> Any:
    found = backbones.build(name, multi_level=True)
    found.module.load_state_dict(torch.load(folder / "backbone.pth", weights_only=True))
    with torch.no_grad():
        return found.module.eval()(image)


@pytest.mark.slow(seconds=6)
def test_a_yolo_takes_its_backbone_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("YOLO_OFFLINE", "true")
    pytest.importorskip("ultralytics")
    without_a_network(monkeypatch)
    name = "ultralytics:yolo11n.yaml"
    job = small_job(tmp_path / "run", f"model.backbone={name}", *STEP, "data.mean=[0, 0, 0]", "data.std=[1, 1, 1]")
    execute(job, synthetic(job))
    code = exported(tmp_path / "run", "ultralytics", tmp_path / "yolo.pth")
    model = run_in(tmp_path, code)["model"].model.eval()
    image = torch.rand(1, 3, 64, 64)
    maps, x = [], image
    with torch.no_grad():
        for layer in model.model[:11]:
            x = layer(x)
            maps.append(x)
    expected = own_maps(tmp_path / "run", name, image)
    for found, own in zip((maps[2], maps[4], maps[6], maps[10]), expected, strict=True):
        torch.testing.assert_close(found, own)
    with pytest.raises(UserError, match="never weights"):
        backbones.build("ultralytics:yolo11n.pt")


@pytest.mark.slow(seconds=16)
@pytest.mark.parametrize("kind", ["rt_detr", "detr"])
def test_a_detr_takes_its_backbone_back(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    without_a_network(monkeypatch)
    name = f"transformers:{kind}"
    job = small_job(tmp_path / "run", f"model.backbone={name}", *STEP)
    execute(job, synthetic(job))
    code = exported(tmp_path / "run", "transformers", tmp_path / "detr.pth")
    model = run_in(tmp_path, code)["model"].eval()
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        found = model.model.backbone.model(image)
        found = getattr(found, "feature_maps", found)
    for one, own in zip(found, own_maps(tmp_path / "run", name, image)[-len(found) :], strict=True):
        # Its detector freezes batch norm, which rounds otherwise.
        torch.testing.assert_close(one, own, rtol=0, atol=1e-5 * float(own.abs().max()))


def test_other_backbones_of_transformers_are_built_from_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    without_a_network(monkeypatch)
    for kind in ("resnet", "deformable_detr"):
        found = backbones.build(f"transformers:{kind}", multi_level=True)
        assert [stage.stride for stage in found.stages] == [4, 8, 16, 32]
    with pytest.raises(UserError, match="builds no backbone of it"):
        backbones.build("transformers:no_such_type")


def test_what_is_not_installed_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for library, name in (("ultralytics", "yolo11n.yaml"), ("transformers", "rt_detr")):
        monkeypatch.setitem(sys.modules, library, None)
        monkeypatch.setitem(sys.modules, "ultralytics.nn.tasks", None)
        with pytest.raises(UserError, match=rf"pip install 'jigsaw-pretrain\[{library}\]'"):
            backbones.build(f"{library}:{name}")
