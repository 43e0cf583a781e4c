"""Equation 1 and the other losses, against loops over positions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jigsaw_pretrain.formats.jigsaw import Template
from jigsaw_pretrain.train.erf import label_weights
from jigsaw_pretrain.train.losses import block_wise_loss, erf_adaptive_loss, global_loss, region_logits
from tests.helpers.references import block_wise_by_hand, erf_adaptive_by_hand, global_by_hand


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    side = draw(st.integers(2, 5))
    split = draw(st.integers(1, side - 1))
    images, classes = draw(st.integers(1, 3)), draw(st.integers(2, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    region_map = torch.from_numpy(Template(side, split).region_map(1))
    scale = draw(st.sampled_from([0.1, 3.0, 100.0]))
    logits = scale * torch.randn(images, classes, side, side, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, classes, (images, 4), generator=generator)
    masses = torch.rand(4, side, side, dtype=torch.float64, generator=generator)
    return logits, labels, label_weights(masses, region_map, draw(st.sampled_from([0.5, 0.7, 1.0]))), region_map


@given(cases(), st.sampled_from([0.0, 0.1, 0.5]))
@settings(deadline=None, max_examples=60)
def test_losses_agree_with_loops_over_positions(
    case: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], smoothing: float
) -> None:
    logits, labels, weights, region_map = case
    plain = (logits.numpy(), labels.numpy())
    regions = region_map.numpy()
    found = erf_adaptive_loss(logits, labels, weights, region_map, smoothing)
    assert found.shape == ()
    assert found.item() == pytest.approx(erf_adaptive_by_hand(*plain, weights.numpy(), regions, smoothing), rel=1e-9)
    assert block_wise_loss(logits, labels, region_map, smoothing).item() == pytest.approx(
        block_wise_by_hand(*plain, regions, smoothing), rel=1e-9
    )
    assert global_loss(logits, labels, region_map, smoothing).item() == pytest.approx(
        global_by_hand(*plain, regions, smoothing), rel=1e-9
    )
    # float32 in, as in training.
    single = erf_adaptive_loss(logits.float(), labels, weights.float(), region_map, smoothing)
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(found.item(), rel=1e-4, abs=1e-5)


def example() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    region_map = torch.from_numpy(Template().region_map(32))
    return torch.randn(4, 9, 7, 7, generator=generator), torch.randint(0, 9, (4, 4), generator=generator), region_map


def test_tau_1_is_cross_entropy_with_the_own_regions_label() -> None:
    logits, labels, region_map = example()
    weights = label_weights(torch.rand(4, 7, 7), region_map, 1.0)
    dense = labels[:, region_map]
    each = torch.nn.functional.cross_entropy(logits, dense, reduction="none")
    expected = torch.stack([each[:, region_map == region].mean() for region in range(4)]).mean()
    torch.testing.assert_close(erf_adaptive_loss(logits, labels, weights, region_map), expected)


def test_the_region_map_may_be_numpy_and_losses_stay_float32_under_autocast() -> None:
    logits, labels, region_map = example()
    weights = label_weights(torch.rand(4, 7, 7), region_map, 0.7)
    expected = erf_adaptive_loss(logits.bfloat16().float(), labels, weights, region_map)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = logits.bfloat16().requires_grad_()
        found = [
            erf_adaptive_loss(half, labels, weights, region_map.numpy()),
            block_wise_loss(half, labels, region_map.numpy()),
            global_loss(half, labels, region_map.numpy()),
        ]
    assert all(loss.dtype == torch.float32 for loss in found)
    assert torch.equal(found[0], expected)
    torch.stack(found).sum().backward()
    assert half.grad is not None and torch.isfinite(half.grad).all()


def test_gradients_agree_with_finite_differences() -> None:
    logits, labels, region_map = example()
    logits = logits[:1, :3, :, :].double().requires_grad_()
    labels = labels[:1] % 3
    weights = label_weights(torch.rand(4, 7, 7).double(), region_map, 0.7)
    assert torch.autograd.gradcheck(lambda x: erf_adaptive_loss(x, labels, weights, region_map), logits)
    assert torch.autograd.gradcheck(lambda x: block_wise_loss(x, labels, region_map), logits)
    assert torch.autograd.gradcheck(lambda x: global_loss(x, labels, region_map), logits)


def test_region_logits_are_means_by_region() -> None:
    logits, _, region_map = example()
    found = region_logits(logits, region_map)
    assert found.shape == (4, 4, 9)
    for region in range(4):
        expected = logits[:, :, region_map == region].mean(dim=2)
        torch.testing.assert_close(found[:, region], expected)


def test_shapes_that_disagree_are_refused() -> None:
    logits, labels, region_map = example()
    with pytest.raises(ValueError, match="region map"):
        block_wise_loss(logits[:, :, :5], labels, region_map)
    with pytest.raises(ValueError, match="weights"):
        erf_adaptive_loss(logits, labels, torch.ones(4, 5, 5), region_map)
    assert np.isfinite(global_loss(logits, labels, region_map).item())
