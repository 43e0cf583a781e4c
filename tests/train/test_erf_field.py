import math

import pytest
import torch
from torch import nn

from jigsaw_pretrain.train.erf import SHARES, field_map, field_numbers


def _stack(depth: int) -> nn.Sequential:
    layers = [nn.Conv2d(1, 1, 3, padding=1, bias=False) for _ in range(depth)]
    for layer in layers:
        nn.init.constant_(layer.weight, 1 / 9)
    return nn.Sequential(*layers)


def test_radius_of_linear_stacks_grows_with_the_root_of_the_depth() -> None:
    depths = [8, 16, 32, 64]
    side = 2 * max(depths) + 3
    radii = [field_numbers(field_map(_stack(d), torch.randn(1, 1, side, side))).rms_radius for d in depths]
    slope = math.log(radii[-1] / radii[0]) / math.log(depths[-1] / depths[0])
    assert 0.45 <= slope <= 0.55
    for depth, radius in zip(depths, radii, strict=True):
        assert radius == pytest.approx(math.sqrt(2 * depth * 2 / 3), rel=1e-4)  # variance 2/3 a layer and axis


def test_a_field_known_exactly() -> None:
    field = field_map(_stack(1), torch.randn(2, 1, 9, 9))
    expected = torch.zeros(9, 9)
    expected[3:6, 3:6] = 1 / 9
    torch.testing.assert_close(field, expected)
    assert field_numbers(field, (4, 4)).sides == (3, 3, 3, 3)
    deeper = field_map(_stack(2), torch.randn(1, 1, 9, 9))
    one = torch.tensor([1.0, 2, 3, 2, 1]) / 9
    torch.testing.assert_close(deeper[2:7, 2:7], one[:, None] * one[None, :])
    held = {1: (3 / 9) ** 2, 3: (7 / 9) ** 2, 5: 1.0}
    expected_sides = tuple(min(side for side, share in held.items() if share >= wanted) for wanted in SHARES)
    assert field_numbers(deeper, (4, 4)).sides == expected_sides


def test_a_strided_field_is_asked_about_its_own_centre() -> None:
    pool = nn.AvgPool2d(4)
    field = field_map(pool, torch.randn(1, 1, 16, 16), [(1, 2)])
    assert torch.count_nonzero(field) == 16
    assert field[4:8, 8:12].sum() == pytest.approx(1.0)
    assert field_numbers(field, (5.5, 9.5)).sides == (2, 4, 4, 4)


def test_the_model_is_left_as_it_was_and_an_empty_field_is_zero() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Dropout(0.5))
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    field_map(model, torch.randn(2, 3, 8, 8))
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    nn.init.zeros_(next(model.parameters()))
    empty = field_map(model, torch.randn(2, 3, 8, 8))
    assert field_numbers(empty).sides == (0, 0, 0, 0)
