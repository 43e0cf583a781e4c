"""FLOPs of convolutions, which a count over their loops gives."""

import pytest
import torch
from torch import nn

from jigsaw_pretrain.detect.models.backbone import DeformableConvolution
from jigsaw_pretrain.detect.models.flops import flop_counter


def counted(module: nn.Module, learns_input: bool = True) -> int:
    images = torch.rand(2, 8, 9, 8, requires_grad=learns_input)
    with flop_counter() as counter:
        module(images).sum().backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_every_gradient_of_a_convolution_costs_what_the_convolution_does(groups: int) -> None:
    plain = nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=groups)
    # 2 images of 16 channels of 5 x 4 pixels, each a sum over 3 x 3 taps of the group's channels.
    forward = 2 * (2 * 16 * 5 * 4) * (8 // groups * 3 * 3)
    assert counted(plain) == 3 * forward
    assert counted(plain, learns_input=False) == 2 * forward
    deformed = DeformableConvolution(plain)
    offsets = 2 * (2 * 18 * 5 * 4) * (8 * 3 * 3)
    assert counted(deformed) == 3 * forward + 3 * offsets


def test_a_transposed_convolution_is_counted_at_the_pixels_it_begins_from() -> None:
    assert counted(nn.ConvTranspose2d(8, 4, 2, stride=2)) == 3 * 2 * (2 * 8 * 9 * 8) * (4 * 2 * 2)
