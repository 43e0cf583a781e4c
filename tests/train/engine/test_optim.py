"""The schedule of the learning rate, and the average of weights."""

import math
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from jigsaw_pretrain.train.engine.optim import (
    EMA,
    arithmetic,
    learning_rate,
    make_optimizer,
    parameter_groups,
    set_rate,
)
from jigsaw_pretrain.train.engine.state import build_model
from jigsaw_pretrain.train.recipe import OptimOptions
from tests.helpers.jobs import small_job


def test_the_papers_schedule() -> None:
    def rate(step: int) -> float:
        return learning_rate(step, steps=64_000, warmup_steps=1_250, start=0.2, peak=0.8)

    assert rate(0) == 0.2
    assert rate(625) == pytest.approx(0.5)
    assert rate(1_250) == pytest.approx(0.8)
    middle = 1_250 + (64_000 - 1_250) // 2
    assert rate(middle) == pytest.approx(0.4)
    assert 0 < rate(63_999) < 1e-8
    assert rate(64_000) == pytest.approx(0, abs=1e-12)
    rates = [rate(step) for step in range(0, 64_000, 250)]
    assert rates[:6] == sorted(rates[:6]) and rates[5:] == sorted(rates[5:], reverse=True)


def test_without_a_warm_up_the_peak_comes_first() -> None:
    assert learning_rate(0, steps=10, warmup_steps=0, start=0.2, peak=0.8) == 0.8
    assert learning_rate(5, steps=10, warmup_steps=0, start=0.2, peak=0.8) == pytest.approx(
        0.8 * (1 + math.cos(math.pi / 2)) / 2
    )


def test_the_average_is_the_exponential_one() -> None:
    model = nn.BatchNorm1d(1)
    average = EMA(model, 0.5)
    expected = 1.0
    for nth, weight in enumerate((3.0, -1.0, 2.0, 7.0, 5.0, 0.5, 4.0, 6.0, 1.0, 2.0)):
        with torch.no_grad():
            model.weight.fill_(weight)
            assert model.num_batches_tracked is not None
            model.num_batches_tracked += 1
        average.update(nth)
        decay = min(0.5, (1 + nth) / (10 + nth))
        expected = decay * expected + (1 - decay) * weight
    assert average.state["weight"].item() == pytest.approx(expected)
    assert average.state["num_batches_tracked"].item() == 10


def test_arithmetic_is_set_and_then_as_it_was() -> None:
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, dict(os.environ)
    with arithmetic(torch.device("cpu"), tf32=False, deterministic=True):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    assert not torch.are_deterministic_algorithms_enabled()
    assert before == (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, dict(os.environ))


def test_nothing_is_set_apart_by_default() -> None:
    _, model = build_model(small_job(Path("run")).recipe, 3)
    groups = parameter_groups(model, OptimOptions(), lambda name: name)
    assert len(groups) == 1 and "lr_scale" not in groups[0]
    assert [id(one) for one in groups[0]["params"]] == [id(one) for one in model.parameters()]
    assert type(make_optimizer(groups, OptimOptions(), lr=0.1)) is torch.optim.SGD


def test_norms_biases_and_blocks_have_their_own() -> None:
    model = nn.ModuleDict(
        {
            "backbone": nn.ModuleDict(
                {
                    "stem": nn.Conv2d(3, 4, 1),
                    "blocks": nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(3)]),
                    "norm": nn.LayerNorm(4),
                }
            ),
            "head": nn.Linear(4, 2),
        }
    )
    model["backbone"].register_parameter("token", nn.Parameter(torch.zeros(4)))
    settings = OptimOptions(name="adamw", weight_decay=0.5, norm_decay=0.25, bias_decay=0.0, layer_decay=0.5)

    def own(name: str) -> str | None:
        return name.removeprefix("backbone.") if name.startswith("backbone.") else None

    optimizer = make_optimizer(parameter_groups(model, settings, own), settings, lr=1.0)
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["betas"] == (0.9, 0.999)
    set_rate(optimizer, 2.0)
    names = {id(one): name for name, one in model.named_parameters()}
    found = {
        names[id(one)]: (group["weight_decay"], group["lr"])
        for group in optimizer.param_groups
        for one in group["params"]
    }
    assert found["head.weight"] == (0.5, 2.0) and found["head.bias"] == (0.0, 2.0)
    # Of six blocks (a block of a Sequential's number each) the last one's rate is halved once, the stem's most.
    assert found["backbone.blocks.2.1.weight"] == (0.25, 1.0) and found["backbone.norm.bias"] == (0.25, 1.0)
    assert found["backbone.blocks.0.0.weight"] == (0.5, 2.0 / 2**6)
    slower = parameter_groups(model, settings, own, 0.1)
    scales = {names[id(one)]: group.get("lr_scale", 1.0) for group in slower for one in group["params"]}
    assert scales["head.weight"] == 1.0 and scales["backbone.norm.bias"] == pytest.approx(0.05)
    assert found["backbone.stem.weight"] == (0.5, 2.0 / 2**7) and found["backbone.token"] == (0.0, 2.0 / 2**7)
    assert found.keys() == set(names.values())
