"""Group norm in the place of batch norm."""

import copy

import pytest
import torch
import torchvision
from torch import nn

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.train.models.layers import GroupNorm, with_norm


def test_every_batch_norm_gives_its_place_name_and_scale_to_group_norm() -> None:
    before = torchvision.models.resnet18(zero_init_residual=True)
    after = with_norm("resnet18", copy.deepcopy(before), "gn")
    kept = {key: value for key, value in before.state_dict().items() if "running" not in key and "tracked" not in key}
    assert after.state_dict().keys() == kept.keys()
    assert all(torch.equal(value, kept[key]) for key, value in after.state_dict().items())
    assert not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in after.modules())
    # The output of one image does not depend on the others in its batch.
    images = torch.rand(3, 3, 64, 64)
    after.train()
    with torch.no_grad():
        assert torch.allclose(after(images)[:1], after(images[:1]), atol=1e-5)


@pytest.mark.parametrize(("channels", "groups"), [(64, 32), (48, 16), (16, 16), (7, 1)])
def test_groups(channels: int, groups: int) -> None:
    assert GroupNorm(channels).num_groups == groups


def test_what_has_nothing_to_replace_or_more_than_a_norm_is_refused() -> None:
    class Activated(nn.BatchNorm2d):
        pass

    with pytest.raises(UserError, match="vgg has no batch norm to replace"):
        with_norm("vgg", nn.Sequential(nn.Conv2d(3, 4, 1)), "gn")
    with pytest.raises(UserError, match="x has a Activated"):
        with_norm("x", nn.Sequential(nn.Conv2d(3, 4, 1), Activated(4)), "gn")
