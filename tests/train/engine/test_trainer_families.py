"""Families of torchvision that no other test trains take a step and are exported."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from jigsaw_pretrain.train.cli import main
from jigsaw_pretrain.train.engine.pretraining import execute
from jigsaw_pretrain.train.models import backbones
from jigsaw_pretrain.train.recipe import Recipe
from tests.helpers.jobs import rows, small_job, synthetic
from tests.helpers.settings import REPOSITORY, SOAK


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


@pytest.mark.slow(seconds=25)
@pytest.mark.parametrize(
    ("recipe", "to"),
    [("vit-small", "timm"), *([("convnext-tiny", "torchvision"), ("swin-tiny", "torchvision")] if SOAK else [])],
)
def test_a_recipe_of_adamw_trains_resumes_and_exports(recipe: str, to: str, tmp_path: Path) -> None:
    small = ("data.template_size=64", "data.template_split=32", "data.batch=2", "optim.micro_batch=none")
    short = ("optim.steps=2", "optim.warmup_steps=1", "loss.strategy=block-wise", "run.precision=fp32")
    chosen = Recipe.load(REPOSITORY / "recipes" / f"{recipe}.toml", (*small, *short)).resolved()
    job = replace(small_job(tmp_path / "run"), recipe=chosen)
    execute(job, synthetic(job), stop_after=1)
    state = execute(job, synthetic(job))
    assert type(state.optimizer) is torch.optim.AdamW and len(state.optimizer.param_groups) == 2
    assert [row["step"] for row in rows(tmp_path / "run")] == [0, 1]
    command = ["export", "--run", str(tmp_path / "run"), "--to", to, "--out", str(tmp_path / "x.pth")]
    assert CliRunner().invoke(main, command, catch_exceptions=False).exit_code == 0
    assert torch.load(tmp_path / "x.pth", weights_only=True)
