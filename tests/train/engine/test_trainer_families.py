"""Families of torchvision that no other test trains take a step and are exported."""

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from jigsaw_pretrain.train.cli import main
from jigsaw_pretrain.train.engine.pretraining import execute
from jigsaw_pretrain.train.models import backbones
from tests.helpers.jobs import rows, small_job, synthetic


@pytest.mark.slow(seconds=10)
@pytest.mark.parametrize("name", ["regnet_y_400mf", "mobilenet_v3_small"])
def test_a_step_and_an_export(name: str, tmp_path: Path) -> None:
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
