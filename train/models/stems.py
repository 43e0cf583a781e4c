"""Stems: a network's first convolution rebuilt for other than three input channels.

Which convolutions see the input is found by running the network once without data (meta tensors). Their new weights are
drawn from torch's global generator, normal with the spread of the weights that the library itself drew: what follows is
a norm nearly everywhere, and He's initialisation by fan-out, as torchvision's residual networks have it, is exactly
that. Prefer a network that takes the number of channels itself: timm's do, and so may one's own (train.outside).
"""

import torch
from torch import Tensor, nn
from torch.func import functional_call

from jigsaw_pretrain.errors import UserError

SIZE = 256
"""Pixels of the image that is tried."""


def input_convolutions(module: nn.Module, colours: int) -> dict[str, nn.Conv2d]:
    """The convolutions over the input image of ``colours`` channels by name; raises what the module raises."""
    seen: dict[str, nn.Conv2d] = {}
    shape = (1, colours, SIZE, SIZE)

    def watch(name: str, convolution: nn.Conv2d) -> torch.utils.hooks.RemovableHandle:
        def look(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if inputs[0].shape == shape:
                seen[name] = convolution

        return convolution.register_forward_pre_hook(look)

    handles = [watch(name, part) for name, part in module.named_modules() if isinstance(part, nn.Conv2d)]
    state = {key: value.detach().to("meta") for key, value in [*module.named_parameters(), *module.named_buffers()]}
    mode = module.training
    module.eval()
    try:
        functional_call(module, state, (torch.empty(shape, device="meta"),))
    finally:
        module.train(mode)
        for handle in handles:
            handle.remove()
    return seen


def widen(name: str, module: nn.Module, colours: int) -> None:
    """Have a module over three channels take ``colours``; raises UserError where none of its convolutions sees them."""
    try:
        found = input_convolutions(module, 3)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"backbone {name} cannot be run on {SIZE} pixels ({reason}): choose another one") from error
    plain = [one for one in found.values() if one.groups == 1]
    if not plain or len(plain) < len(found):
        raise UserError(
            f"backbone {name} has no plain convolution over its input that could take {colours} channels: give one of "
            "your own (module:callable) that takes in_channels"
        )
    for convolution in plain:
        old = convolution.weight
        weight = torch.empty(old.shape[0], colours, *old.shape[2:], dtype=old.dtype)
        convolution.in_channels = colours
        convolution.weight = nn.Parameter(weight.normal_(0, float(old.detach().std())))
