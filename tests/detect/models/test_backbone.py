"""Norms of a detector's backbone."""

import torch

from jigsaw_pretrain.detect.models.backbone import SyncBatchNorm2d, norm_layer
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
