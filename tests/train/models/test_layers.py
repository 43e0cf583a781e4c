"""Group norm in the place of batch norm, and stems of any number of channels."""

import copy

import pytest
import torch
import torchvision
from torch import nn

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.train.models import backbones
from jigsaw_pretrain.train.models.layers import GroupNorm, input_convolutions, with_norm


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


@pytest.mark.slow(seconds=9)
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "timm:resnet18", "tests.helpers.own:plain"])
@pytest.mark.parametrize("channels", [1, 6])
def test_stems_of_any_number_of_channels(name: str, channels: int) -> None:
    torch.manual_seed(0)
    rgb = backbones.build(name)
    torch.manual_seed(0)
    found = backbones.build(name, in_channels=channels)
    assert (found.channels, found.stride, found.head, found.in_channels) == (
        rgb.channels,
        rgb.stride,
        rgb.head,
        channels,
    )
    size = 2 * found.stride
    assert found.module.eval()(torch.rand(1, channels, size, size)).shape == (1, found.channels, 2, 2)
    (stem,) = input_convolutions(found.module, channels).values()
    (old,) = input_convolutions(rgb.module, 3).values()
    assert stem.weight.shape == (old.weight.shape[0], channels, *old.weight.shape[2:])
    if not name.startswith("timm"):
        assert float(stem.weight.detach().std()) == pytest.approx(float(old.weight.detach().std()), rel=0.4)


def test_ones_own_backbone_is_told_or_rebuilt() -> None:
    found = backbones.build("tests.helpers.own:takes_any", in_channels=5)
    assert found.module(torch.rand(1, 5, 16, 16)).shape == (1, 8, 2, 2)
    with pytest.raises(UserError, match="no plain convolution over its input that could take 5 channels"):
        backbones.build("tests.helpers.own:sees_nothing", in_channels=5)
