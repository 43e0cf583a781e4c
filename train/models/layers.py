"""Changes a backbone's norm, builds the neck on its stages, and rebuilds its first convolution for other images.

Norm (`norm` in a recipe): batch norm as the backbone's library builds it, or GN(32) in its place. Group norm needs no
statistics, so it is the choice where a detector is to be fine-tuned with small batches and without frozen batch norm
("Rethinking ImageNet Pre-training", section 3.1): weights trained under one norm are worth little under another. It
costs some 10 to 20 % of a step. Prefer `bn` where the detector freezes it, as this paper's does.

Neck: torchvision's feature pyramid on four stages, pre-trained with the backbone (the paper's future work). Levels P2
to P5 (strides 4 to 32), each with a classification head and an ERF table of its own; the loss is the mean of the
levels' losses. A detector's further levels are no part of it: torchvision's pooled one has no weights, RetinaNet's
P6 and P7 are the detector's. Beside a ResNet-18 at 128 pixels a step costs 1.1 times as much with 64 channels and 1.7
times with 256, a refresh of the four tables 4 and 7 times as much as of one (docs/lab-notebook.md). Prefer
`model.neck = "none"`, the paper's, for a detector without a pyramid (C4).

First convolution, for other than three input channels: which convolutions see the input is found by running the network
once without data (meta tensors). Their new weights are drawn from torch's global generator, normal with the spread of
the weights that the library itself drew: what follows is a norm nearly everywhere, and He's initialisation by fan-out,
as torchvision's residual networks have it, is exactly that. Prefer a network that takes the number of channels itself:
timm's do, and so may one's own (models/backbones.py).
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import FeaturePyramidNetwork

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.train.erf import eval_mode

NORM_GROUPS = 32

STEM_SIZE = 256
"""Pixels of the image that is tried."""


class GroupNorm(nn.GroupNorm):
    """GN(32) by channel count; 16 channels make 16 groups, 48 make 16."""

    def __init__(self, channels: int) -> None:
        super().__init__(math.gcd(NORM_GROUPS, channels), channels)


def with_norm(name: str, module: nn.Module, norm: str) -> nn.Module:
    """The module under ``norm``: with "gn" every BatchNorm2d in it gives its place, name and initial scale to GN(32).

    Raises UserError for a module (``name`` is for the message) whose batch norms do more than normalise, or that has
    none.
    """
    if norm == "bn":
        return module
    if not replace_batch_norms(name, module, lambda layer: GroupNorm(layer.num_features)):
        raise UserError(f"model.norm = gn: {name} has no batch norm to replace: leave model.norm out of the recipe")
    return module


def replace_batch_norms(name: str, module: nn.Module, make: Callable[[nn.BatchNorm2d], nn.Module]) -> int:
    """Give the place of every BatchNorm2d in a module to what ``make`` returns, which takes its weights; their count.

    Raises UserError for a module (``name`` is for the message) whose batch norms do more than normalise.
    """
    found = 0
    for parent in list(module.modules()):
        for child, layer in list(parent.named_children()):
            if not isinstance(layer, nn.modules.batchnorm._BatchNorm):
                continue
            if not is_plain(layer):
                raise UserError(
                    f"model.norm: {name} has a {type(layer).__name__}, whose place no other norm can take: train "
                    "it with its own batch norm, or name another backbone, such as resnet50"
                )
            assert isinstance(layer, nn.BatchNorm2d)
            other = make(layer)
            # Some libraries begin the last norm of a block at zero.
            state = layer.state_dict()
            other.load_state_dict({key: value for key, value in state.items() if key in other.state_dict()})
            setattr(parent, child, other)
            found += 1
    return found


def is_plain(layer: nn.Module) -> bool:
    """Whether a batch norm does nothing but normalise, scale and shift, so that another norm can take its place."""
    return type(layer) is nn.BatchNorm2d and layer.affine


class Neck(FeaturePyramidNetwork):
    """The pyramid from a tuple of maps to a tuple of maps, finest first; its state dict is torchvision's."""

    def __init__(self, stages: Sequence[int], channels: int, norm: Callable[..., nn.Module] | None = None) -> None:
        """stages: their channels; channels: of every level; norm: the layer after each convolution, none where None."""
        super().__init__(list(stages), channels, norm_layer=norm)
        self.channels = channels

    def forward(self, stages: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Stages [n, C_i, h_i, w_i] to levels [n, channels, h_i, w_i]."""
        named = OrderedDict((str(level), stage) for level, stage in enumerate(stages))
        return tuple(super().forward(named).values())


class Level(nn.Module):
    """One level's map of normalised images, for what takes a backbone of a single map (train/erf.py)."""

    def __init__(self, backbone: nn.Module, neck: Neck, level: int) -> None:
        super().__init__()
        self.backbone, self.neck, self._level = backbone, neck, level

    def forward(self, images: Tensor) -> Tensor:
        """[n, in_channels, H, W] to [n, channels, h, w]."""
        found: tuple[Tensor, ...] = self.neck(self.backbone(images))
        return found[self._level]


def meta_state(module: nn.Module) -> dict[str, Tensor]:
    """The module's parameters and buffers by name, without data (meta tensors)."""
    return {key: value.detach().to("meta") for key, value in [*module.named_parameters(), *module.named_buffers()]}


def run_on_meta(module: nn.Module, state: dict[str, Tensor], in_channels: int, size: int) -> Any:
    """What the module returns in eval mode for one image of that size, with ``state`` (meta_state) for its own."""
    with eval_mode(module):
        return functional_call(module, state, (torch.empty(1, in_channels, size, size, device="meta"),))


def input_convolutions(module: nn.Module, in_channels: int) -> dict[str, nn.Conv2d]:
    """The convolutions over the input image of ``in_channels`` channels by name; raises what the module raises."""
    seen: dict[str, nn.Conv2d] = {}
    shape = (1, in_channels, STEM_SIZE, STEM_SIZE)

    def watch(name: str, convolution: nn.Conv2d) -> torch.utils.hooks.RemovableHandle:
        def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if inputs[0].shape == shape:
                seen[name] = convolution

        return convolution.register_forward_pre_hook(note)

    handles = [watch(name, part) for name, part in module.named_modules() if isinstance(part, nn.Conv2d)]
    try:
        run_on_meta(module, meta_state(module), in_channels, STEM_SIZE)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def set_input_channels(name: str, module: nn.Module, in_channels: int) -> None:
    """Replace the first convolution so that a module over three channels takes ``in_channels``.

    Raises UserError where none of its convolutions sees the image.
    """
    try:
        found = input_convolutions(module, 3)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"backbone {name} cannot be run on {STEM_SIZE} pixels ({reason}): choose another one"
        ) from error
    plain = [one for one in found.values() if one.groups == 1]
    if not plain or len(plain) < len(found):
        raise UserError(
            f"backbone {name} has no plain convolution over its input that could take {in_channels} channels: give one "
            "of your own (module:callable) that takes in_channels"
        )
    for convolution in plain:
        old = convolution.weight
        weight = torch.empty(old.shape[0], in_channels, *old.shape[2:], dtype=old.dtype)
        convolution.in_channels = in_channels
        convolution.weight = nn.Parameter(weight.normal_(0, float(old.detach().std())))


def measure_batch_norms(module: nn.Module, batches: Iterable[Tensor]) -> int:
    """Give every batch norm of a module the plain mean of its statistics over batches; returns how many these are.

    All else is in eval mode meanwhile, and the module's mode is left as it was.
    """
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm) and part.track_running_stats]
    kept = [norm.momentum for norm in norms]
    with eval_mode(module), torch.no_grad():
        for norm in norms:
            norm.reset_running_stats()
            norm.train()
            norm.momentum = None  # the cumulative mean, not the moving one
        for images in batches:
            module(images)
    for norm, momentum in zip(norms, kept, strict=True):
        norm.momentum = momentum
    return len(norms)
