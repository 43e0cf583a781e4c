"""Equation 2, the fields it is of, and the grid on which fine maps are measured."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from jigsaw_pretrain.formats.jigsaw import Template
from jigsaw_pretrain.train.erf import SHARES, field_map, field_numbers, label_weights, measuring_grid, region_masses
from jigsaw_pretrain.train.models import backbones
from tests.helpers.detection import TINY
from tests.helpers.references import weights_by_hand

MASSES = st.one_of(st.just(0.0), st.floats(1e-12, 1e12), st.floats(1e-300, 1e-290))


@st.composite
def tables(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, float]:
    height, width = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    count = 4 * height * width
    masses = draw(st.lists(MASSES, min_size=count, max_size=count))
    regions = draw(st.lists(st.integers(0, 3), min_size=height * width, max_size=height * width))
    tau = draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))
    masses_tensor = torch.tensor(masses, dtype=torch.float64).view(4, height, width)
    return masses_tensor, torch.tensor(regions).view(height, width), tau


@given(tables())
@settings(deadline=None, max_examples=150)
def test_label_weights_agree_with_equation_2_position_by_position(
    table: tuple[torch.Tensor, torch.Tensor, float],
) -> None:
    masses, region_map, tau = table
    found = label_weights(masses, region_map, tau)
    assert found.shape == masses.shape
    np.testing.assert_allclose(found.numpy(), weights_by_hand(masses.numpy(), region_map.numpy(), tau), atol=1e-12)
    assert torch.isfinite(found).all()
    np.testing.assert_allclose(found.sum(dim=0).numpy(), 1, atol=1e-12)
    if tau == 1:
        assert torch.equal(found, functional.one_hot(region_map, 4).permute(2, 0, 1).double())


@pytest.mark.parametrize("value", [0.0, math.inf, math.nan])
def test_without_a_usable_field_the_own_region_has_all_weight(value: float) -> None:
    region_map = torch.from_numpy(Template().region_map(32))
    found = label_weights(torch.full((4, 7, 7), value), region_map, 0.7)
    assert found.dtype == torch.float32
    assert torch.equal(found, functional.one_hot(region_map, 4).permute(2, 0, 1).float())


def test_a_field_wholly_outside_its_region_leaves_it_tau() -> None:
    masses = torch.tensor([0.0, 1.0, 3.0, 0.0]).view(4, 1, 1)
    found = label_weights(masses, np.array([[0]]), 0.6).flatten()
    torch.testing.assert_close(found, torch.tensor([0.6, 0.1, 0.3, 0.0]))


def test_wrong_shapes_and_thresholds_are_refused() -> None:
    with pytest.raises(ValueError, match="region map"):
        label_weights(torch.zeros(4, 3, 3), torch.zeros(2, 2, dtype=torch.long), 0.7)
    with pytest.raises(ValueError, match="tau"):
        label_weights(torch.zeros(4, 2, 2), torch.zeros(2, 2, dtype=torch.long), 1.5)
    with pytest.raises(ValueError, match="n > 0"):
        region_masses(nn.Identity(), torch.zeros(0, 3, 4, 4), torch.zeros(2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="region map is 2 x 2"):
        region_masses(nn.Conv2d(3, 1, 1), torch.zeros(1, 3, 4, 4), torch.zeros(2, 2, dtype=torch.long))


def test_masses_of_one_convolution_are_its_absolute_weights() -> None:
    # Of a linear layer the field is known: the summed filters, placed at each position, whatever the image.
    convolution = nn.Conv2d(3, 5, kernel_size=4, stride=2, padding=1).double()
    size = 8
    region_map = np.array([[0, 1, 1, 1], [2, 3, 3, 3], [2, 3, 3, 3], [2, 3, 3, 3]])
    kernel = convolution.weight.detach().sum(dim=0).abs().sum(dim=0)
    expected = np.zeros((4, 4, 4))
    for row in range(4):
        for column in range(4):
            for i in range(4):
                for j in range(4):
                    y, x = 2 * row - 1 + i, 2 * column - 1 + j
                    if 0 <= y < size and 0 <= x < size:
                        expected[region_map[y // 2, x // 2], row, column] += kernel[i, j].item()
    images = torch.randn(3, 3, size, size, dtype=torch.float64)
    np.testing.assert_allclose(region_masses(convolution, images, region_map).numpy(), expected, rtol=1e-12)


class Awkward(nn.Module):
    """In-place first layer, batch statistics, a frozen part, dropout: what must be left as it was."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReLU(inplace=True),
            nn.Conv2d(3, 8, 3, 2, 1),
            nn.BatchNorm2d(8),
            nn.Dropout(0.5),
            nn.Conv2d(8, 4, 3, 2, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.layers(x)
        return result


def test_the_backbone_and_the_images_are_left_as_they_were() -> None:
    backbone = Awkward()
    backbone.train()
    backbone.layers[2].eval()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    images = torch.randn(2, 3, 16, 16)
    kept = images.clone()
    region_map = Template(16, 8).region_map(4)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        first = region_masses(backbone, images, region_map)
        second = region_masses(backbone, images.bfloat16().float(), region_map)
    assert first.dtype == second.dtype == torch.float32
    assert not first.requires_grad and not images.requires_grad and torch.equal(images, kept)
    assert [part.training for part in backbone.layers] == [True, True, False, True, True] and backbone.training
    assert all(parameter.grad is None for parameter in backbone.parameters())
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_masses_are_averages_over_images_of_the_dense_field() -> None:
    backbone = Awkward().eval().double()
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    region_map = Template(16, 8).region_map(4)
    expected = np.zeros((4, 4, 4))
    pixels = np.kron(region_map, np.ones((4, 4), dtype=np.int64))
    for image in images:
        jacobian = torch.autograd.functional.jacobian(lambda x: backbone(x[None].clone())[0].sum(dim=0), image)
        field = jacobian.abs().sum(dim=2).numpy()
        for region in range(4):
            expected[region] += field[:, :, pixels == region].sum(axis=2) / len(images)
    np.testing.assert_allclose(region_masses(backbone, images, region_map).numpy(), expected, rtol=1e-9)


@pytest.mark.slow(seconds=9)
@pytest.mark.parametrize("name", ["mnasnet0_5", TINY])
def test_weights_of_fresh_networks_are_finite_and_sum_to_one(name: str) -> None:
    torch.manual_seed(0)
    backbone = backbones.build(name)
    backbone.module.train()
    template = Template(128, 32)
    region_map = torch.from_numpy(template.region_map(backbone.stride))
    weights = label_weights(region_masses(backbone.module, torch.randn(2, 3, 128, 128), region_map), region_map, 0.7)
    assert torch.isfinite(weights).all() and (weights >= 0).all()
    torch.testing.assert_close(weights.sum(dim=0), torch.ones(4, 4))
    own = weights.gather(0, region_map[None])
    assert (own >= 0.7 - 1e-6).all()
    assert backbone.module.training and backbone.module.graph is backbone.module.train_graph


def stack(depth: int) -> nn.Sequential:
    layers = [nn.Conv2d(1, 1, 3, padding=1, bias=False) for _ in range(depth)]
    for layer in layers:
        nn.init.constant_(layer.weight, 1 / 9)
    return nn.Sequential(*layers)


def test_radius_of_linear_stacks_grows_with_the_root_of_the_depth() -> None:
    depths = [8, 16, 32, 64]
    side = 2 * max(depths) + 3
    radii = [field_numbers(field_map(stack(d), torch.randn(1, 1, side, side))).rms_radius for d in depths]
    slope = math.log(radii[-1] / radii[0]) / math.log(depths[-1] / depths[0])
    assert 0.45 <= slope <= 0.55
    for depth, radius in zip(depths, radii, strict=True):
        assert radius == pytest.approx(math.sqrt(2 * depth * 2 / 3), rel=1e-4)  # variance 2/3 a layer and axis


def test_a_field_known_exactly() -> None:
    field = field_map(stack(1), torch.randn(2, 1, 9, 9))
    expected = torch.zeros(9, 9)
    expected[3:6, 3:6] = 1 / 9
    torch.testing.assert_close(field, expected)
    assert field_numbers(field, (4, 4)).sides == (3, 3, 3, 3)
    deeper = field_map(stack(2), torch.randn(1, 1, 9, 9))
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


@st.composite
def grids(draw: st.DrawFn) -> tuple[Template, int, torch.Tensor]:
    cells = draw(st.integers(2, 5))
    template = Template(32 * cells, 32 * draw(st.integers(1, cells - 1)))
    stride = draw(st.sampled_from([4, 8, 16, 32]))
    words = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return template, stride, torch.rand(4, cells, cells, generator=words, dtype=torch.float64)


def fill_by_hand(template: Template, lines: tuple[int, ...], measured: np.ndarray, stride: int) -> np.ndarray:
    """Bilinear interpolation within each region, the nearest line beyond its last ones, a position at a time."""
    side, cut = template.size // stride, template.split // stride

    def along(position: int, values: list[np.ndarray]) -> np.ndarray:
        own = [(line, value) for line, value in zip(lines, values, strict=True) if (line < cut) == (position < cut)]
        places = np.array([line for line, _ in own], dtype=float)
        held = np.array([value for _, value in own])
        return np.array([np.interp(position, places, column) for column in held.reshape(len(own), -1).T])

    filled = np.zeros((4, side, side))
    for region in range(4):
        rows = [along(k, list(measured[region].T)) for k in range(side)]
        for k, column in enumerate(rows):
            filled[region, :, k] = [along(j, list(column))[0] for j in range(side)]
    return filled


@given(grids())
@settings(deadline=None, max_examples=25)
def test_masses_are_interpolated_within_their_region_and_weights_sum_to_one(
    case: tuple[Template, int, torch.Tensor],
) -> None:
    template, stride, measured = case
    chosen = measuring_grid(template, stride, 32)
    assert len(chosen.lines) == template.size // 32
    filled = chosen.fill(measured)
    np.testing.assert_allclose(
        filled.numpy(), fill_by_hand(template, chosen.lines, measured.numpy(), stride), rtol=1e-12
    )
    lines = torch.tensor(chosen.lines)
    assert torch.equal(filled[:, lines][:, :, lines], measured)
    region_map = template.region_map(stride)
    weights = label_weights(filled, region_map, 0.7)
    np.testing.assert_allclose(weights.sum(dim=0).numpy(), 1, atol=1e-12)
    np.testing.assert_allclose(weights.numpy(), weights_by_hand(filled.numpy(), region_map, 0.7), atol=1e-12)


def test_the_coarsest_map_is_measured_everywhere() -> None:
    template = Template()
    measured = torch.rand(4, 7, 7)
    measured[0, 2, 3] = torch.inf
    measured[1, 4, 4] = torch.nan
    chosen = measuring_grid(template, 32, 32)
    assert chosen.lines == tuple(range(7))
    filled = chosen.fill(measured)
    assert torch.equal(filled.nan_to_num(-1), measured.nan_to_num(-1))


def test_a_mass_that_is_not_finite_stays_among_its_neighbours() -> None:
    chosen = measuring_grid(Template(), 8, 32)
    measured = torch.rand(4, 7, 7)
    measured[:, 4, 4] = torch.nan
    filled = chosen.fill(measured)
    near = filled.isnan().any(dim=0).nonzero()
    around = chosen.lines[4]
    assert len(near) and (near - around).abs().max() < 4


def test_measured_positions_are_those_of_the_whole_table() -> None:
    template = Template(32, 16)
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 5, 2, 2), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 5, 2, 2))
    images = torch.randn(1, 3, 32, 32)
    chosen = measuring_grid(template, 4, 16)
    whole = region_masses(network, images, template.region_map(4))
    part = region_masses(network, images, template.region_map(4), grid=chosen)
    lines = torch.tensor(chosen.lines)
    torch.testing.assert_close(part[:, lines][:, :, lines], whole[:, lines][:, :, lines])
    assert part.shape == whole.shape and not torch.equal(part, whole)
