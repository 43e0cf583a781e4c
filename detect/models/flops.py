"""FLOPs of a training step by torch's counter, corrected where it is wrong or does not know a layer.

Counted are two per multiplication and addition of convolutions, matrices and attention, forward and backward. Not
counted are what samples (the taps of deformable convolutions, region pooling, interpolation), norms, activations,
losses and the optimizer.

torch counts the gradient of a grouped convolution's weights as though there were one group: 32 times too much for
ResNeXt-32x4d, 96 to 768 times for ConvNeXt-T. Of torchvision's deformable convolution it knows nothing.
A module of its own, because it can be deleted once torch counts them.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

Shape = Sequence[int]


def flop_counter() -> FlopCounterMode:
    """A context whose ``get_total_flops()`` are those of what ran in it."""
    return FlopCounterMode(
        display=False,
        custom_mapping={
            torch.ops.aten.convolution_backward: _of_gradients,
            torch.ops.torchvision.deform_conv2d: _of_deformable,
            torch.ops.torchvision._deform_conv2d_backward: _of_deformable_gradients,
        },
    )


def _of_gradients(made: Shape, image: Shape, weight: Shape, *more: Any, **_: Any) -> int:
    """FLOPs of a convolution's gradients: each is a product of the size of the convolution's own.

    Of ``more``, aten's arguments in its order, the fifth says whether it is transposed, and the last which gradients
    are wanted.
    """
    transposed, wanted = more[4], more[-1]
    return sum(wanted[:2]) * int(conv_flop_count(list(image), list(weight), list(made), transposed))


def _of_deformable(image: Shape, weight: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
    """FLOPs of the product of the displaced taps with the weights, which is the plain convolution's."""
    return 2 * prod(out_shape) * prod(weight[1:])


def _of_deformable_gradients(made: Shape, image: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    """FLOPs of the gradients of the taps and of the weights, both of which are computed."""
    return 2 * _of_deformable(image, weight, out_shape=made)
