"""Every family of torchvision's convolutional networks takes a step and exports."""

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from jigsaw_pretrain.train.cli import main
from jigsaw_pretrain.train.engine.pretraining import execute
from jigsaw_pretrain.train.models import backbones
from tests.helpers.jobs import rows, small_job, synthetic

FAMILIES = (
    "resnet18",
    "resnext50_32x4d",
    "regnet_y_400mf",
    "convnext_tiny",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "vgg11_bn",
)


@pytest.mark.slow(seconds=34)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_and_an_export(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name.startswith("vgg"):
        # Most of its time goes to drawing the 120 million weights of a classifier that is dropped.
        monkeypatch.setattr(torch.nn.init, "normal_", lambda tensor, *given, **named: tensor)
    settings = (
        f"model.backbone={name}",
        "data.batch=2",
        "data.lanes=2",
        "optim.steps=1",
        "optim.warmup_steps=1",
        "optim.lr_batch=2",
    )
    job = small_job(tmp_path / "run", *settings)
    execute(job, synthetic(job))
    assert len(rows(tmp_path / "run")) == 1
    out = tmp_path / "x.pth"
    command = ["export", "--run", str(tmp_path / "run"), "--to", "torchvision", "--out", str(out)]
    assert CliRunner().invoke(main, command).exit_code == 0
    own = backbones.names()
    assert name in own and torch.load(out, weights_only=True)
