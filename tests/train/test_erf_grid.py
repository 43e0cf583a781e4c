"""Where fine maps are measured, and what is made of it: interpolated within regions, exact where all is measured."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jigsaw_pretrain.formats.jigsaw import Template
from jigsaw_pretrain.train.erf import label_weights, measuring_grid, region_masses
from tests.helpers.references import weights_by_hand


@st.composite
def cases(draw: st.DrawFn) -> tuple[Template, int, torch.Tensor]:
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


@given(cases())
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
