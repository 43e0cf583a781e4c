"""Norms of a detector's backbone."""

import pytest
import torch

from jigsaw_pretrain.detect.models.backbone import DeformableConvolution, SyncBatchNorm2d, build_backbone, norm_layer
from jigsaw_pretrain.detect.models.weights import load
from jigsaw_pretrain.train.models.layers import GroupNorm


def test_group_norm_fits_any_channel_count_and_batch_norm_survives_an_empty_batch() -> None:
    assert norm_layer("gn", torch.device("cpu")) is (layer := GroupNorm)
    assert layer(256).num_groups == 32 and layer(48).num_groups == 16 and layer(7).num_groups == 1
    norm = SyncBatchNorm2d(4)
    assert norm.running_mean is not None and norm.running_var is not None
    norm(torch.zeros(0, 4, 3, 3)).sum().backward()
    assert torch.isfinite(norm.running_mean).all() and norm.weight.grad is not None
    plain = torch.nn.BatchNorm2d(4)
    assert plain.running_var is not None
    values = torch.randn(5, 4, 3, 3)
    assert torch.equal(norm(values), plain(values)) and torch.equal(norm.running_var, plain.running_var)


@pytest.mark.parametrize("c4", [False, True])
def test_deformable_convolutions_begin_as_the_plain_ones(c4: bool) -> None:
    torch.manual_seed(0)
    plain, deformed = (
        build_backbone("tinybottleneck", "gn", torch.device("cpu"), c4=c4, deform=one) for one in (False, True)
    )
    state = {key: value for part in plain.parts for key, value in part.state_dict().items()}
    report = load(deformed, state, "file.pth", False)
    assert report.complete and "begun at 0: 6 tensors" in report.text
    names = {
        name for part in deformed.parts for name, one in part.named_modules() if isinstance(one, DeformableConvolution)
    }
    assert names == {f"layer{stage}.0.conv2" for stage in (2, 3, 4)}
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        maps = [one.module(images) for one in (plain, deformed)]
        if c4:
            maps = [
                (one, backbone.rest(one))
                for one, backbone in zip(maps, (plain, deformed), strict=True)
                if backbone.rest
            ]
    for expected, found in zip(*maps, strict=True):
        torch.testing.assert_close(expected, found)
    whole = {key: value for part in deformed.parts for key, value in part.state_dict().items()}
    assert load(
        build_backbone("tinybottleneck", "gn", torch.device("cpu"), c4=c4, deform=True), whole, "f", False
    ).complete
