"""The schedule of the learning rate, and the average of weights."""

import math
import os

import pytest
import torch
from torch import nn

from jigsaw_pretrain.train.engine.optim import EMA, arithmetic, learning_rate


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
