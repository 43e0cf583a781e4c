"""A pre-trained neck in a detector: what it matches in each model, what is refused, and how it is left out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from jigsaw_pretrain.train.engine.checkpoint import neck_state, pyramid_state, save_checkpoint, save_file
from jigsaw_pretrain.train.engine.state import build_model
from tests.helpers.detection import TINY
from tests.helpers.jobs import small_job

Run = Callable[..., Any]


def pretrained(folder: Path, *settings: str, width: int = 32) -> dict[str, torch.Tensor]:
    """A neck run's folder with a checkpoint and its exports; the model's weights."""
    recipe = small_job(
        folder, f"model.backbone={TINY}", "model.neck=fpn", f"model.neck_channels={width}", *settings
    ).recipe
    _, model = build_model(recipe, 3)
    state = dict(model.state_dict())
    save_checkpoint(folder / "checkpoints", 1, {"model": state}, 1)
    return state


@pytest.fixture()
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The detectors' pyramids as they are at the first step."""
    from jigsaw_pretrain.detect import training

    seen: list[Any] = []

    def peek(config: Any, network: Any, device: torch.device) -> Any:
        found = detector(config, network, device)
        seen.append(found[0].backbone)
        return found

    detector = training.detector_from_config
    monkeypatch.setattr(training, "detector_from_config", peek)
    monkeypatch.setattr(training.Trainer, "run", lambda trainer, until: trainer.options.describe())
    return seen


def test_every_model_with_a_pyramid_starts_from_the_neck(
    tmp_path: Path, detect: Run, loaded: list[Any], plain_runs: None
) -> None:
    state = pretrained(tmp_path / "run", "model.norm=gn")
    neck = neck_state(state)
    for model in ("faster-rcnn-fpn", "mask-rcnn-fpn", "cascade-rcnn-fpn"):
        said = detect(tmp_path / model, init=tmp_path / "run", norm="gn", model=model).output
        assert f"neck {tmp_path / 'run'}: {len(neck)} matched, 0 missing, 0 unexpected, 0 of another shape" in said
        pyramid = loaded.pop().fpn.state_dict()
        assert all(torch.equal(value, pyramid[name]) for name, value in neck.items())
        kept = json.loads((tmp_path / model / "config.json").read_text())["neck"]
        assert len(kept["matched"]) == len(neck) and kept["notes"] == []
    said = detect(tmp_path / "retinanet", init=tmp_path / "run", norm="gn", model="retinanet").output
    quarter = len(neck) // 4
    assert f"{3 * quarter} matched, 0 missing" in said and f"{quarter} tensors of finer levels" in said
    assert "begun at random: 4 tensors of levels that only the detector has (P6, P7)" in said
    pyramid = loaded.pop().fpn.state_dict()
    for level in range(3):
        for part in ("inner_blocks", "layer_blocks"):
            assert torch.equal(pyramid[f"{part}.{level}.0.weight"], neck[f"{part}.{level + 1}.0.weight"])


def test_a_neck_is_left_out_where_told_and_where_there_is_no_pyramid(
    tmp_path: Path, detect: Run, loaded: list[Any], plain_runs: None
) -> None:
    state = pretrained(tmp_path / "run", "model.norm=gn")
    options: dict[str, Any] = {"init": tmp_path / "run", "norm": "gn", "model": "faster-rcnn-fpn"}
    said = detect(tmp_path / "without", pretrained_neck="none", **options).output
    assert "left out (model.pretrained_neck = none)" in said
    assert json.loads((tmp_path / "without" / "config.json").read_text())["neck"] is None
    without, network = loaded[-1].fpn.state_dict(), loaded.pop().body.state_dict()
    detect(tmp_path / "scratch", **{**options, "init": "scratch"})
    # The rest of the detector begins alike with and without a neck.
    assert all(torch.equal(value, without[name]) for name, value in loaded.pop().fpn.state_dict().items())
    assert all(torch.equal(value, state[f"backbone.{name}"]) for name, value in network.items())
    said = detect(tmp_path / "c4", **{**options, "model": "faster-rcnn-c4"}).output
    assert "left out (this faster-rcnn-c4 has no pyramid that takes one)" in said


def test_a_neck_of_another_width_or_norm_is_refused_with_the_remedy(
    tmp_path: Path, detect: Run, loaded: list[Any], plain_runs: None
) -> None:
    pretrained(tmp_path / "wide", "model.norm=gn", width=64)
    said = detect(tmp_path / "a", expect=2, init=tmp_path / "wide", norm="gn", model="faster-rcnn-fpn").output
    assert "the neck has 64 channels, this detector's pyramid 32: --set model.neck_channels=64, or" in said
    assert "--set model.pretrained_neck=none" in said
    assert not (tmp_path / "a" / "config.json").exists()
    pretrained(tmp_path / "gn", "model.norm=gn")
    said = detect(tmp_path / "b", expect=2, init=tmp_path / "gn", norm="frozen-bn", model="faster-rcnn-fpn").output
    assert "trained with a norm that this detector's pyramid has not: --norm gn" in said
    state = pretrained(tmp_path / "bn")
    said = detect(tmp_path / "c", init=tmp_path / "bn", norm="gn", model="faster-rcnn-fpn").output
    assert "8 matched, 0 missing, 0 unexpected" in said
    assert "of the pyramid's norm 16 tensors are not in the neck and begin as built; 8 biases" in said
    pyramid = loaded.pop().fpn.state_dict()
    assert torch.equal(pyramid["layer_blocks.2.0.weight"], state["neck.layer_blocks.2.0.weight"])
    broken = pyramid_state(state)
    del broken["fpn.layer_blocks.1.0.weight"]
    save_file(tmp_path / "broken.pth", broken)
    said = detect(tmp_path / "d", expect=2, init=tmp_path / "broken.pth", norm="gn", model="faster-rcnn-fpn").output
    assert "1 missing (layer_blocks.1.0.weight)" in said


def test_an_exported_file_brings_backbone_and_neck(
    tmp_path: Path, detect: Run, loaded: list[Any], plain_runs: None
) -> None:
    state = pretrained(tmp_path / "run", "model.norm=gn")
    save_file(tmp_path / "fpn.pth", pyramid_state(state))
    said = detect(tmp_path / "a", init=tmp_path / "fpn.pth", norm="gn", model="faster-rcnn-fpn").output
    assert f"neck {tmp_path / 'fpn.pth'}: {len(neck_state(state))} matched" in said
    found = loaded.pop().state_dict()
    assert all(torch.equal(value, found[name]) for name, value in pyramid_state(state).items())
