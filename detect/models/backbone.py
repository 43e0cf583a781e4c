"""The detector's backbone: a residual network of torchvision under a chosen norm, and what of it is frozen.

Parameter names are torchvision's own (conv1, bn1, layer1 to layer4), so weights that `train export` writes, and
torchvision's own files, fit without renaming. Every model registered with torchvision that is a ResNet will do:
resnet18 to 152, resnext*, wide_resnet*. Prefer mmdetection or detectron2 (`train export --to ...`) for other families.
"""

import difflib
from collections.abc import Iterator

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import ResNet

from jigsaw_pretrain.detect.models.norms import norm_layer
from jigsaw_pretrain.errors import UserError

STAGES = ("layer1", "layer2", "layer3", "layer4")
STEM = ("conv1", "bn1")


def build(name: str, norm: str, device: torch.device) -> ResNet:
    """The randomly initialised network (He normal, from torch's global generator), without its classifier.

    Raises UserError for a name torchvision does not have, or one that is no ResNet.
    """
    known = torchvision.models.list_models()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        raise UserError(f"backbone {name!r} is not a model of torchvision; the nearest is {near[0]!r}")
    try:
        network = torchvision.models.get_model(name, weights=None, norm_layer=norm_layer(norm, device))
    except TypeError:
        network = None
    if not isinstance(network, ResNet):
        family = ", ".join(one for one in known if "resne" in one and "/" not in one and "quant" not in one)
        raise UserError(
            f"backbone {name!r} is no residual network with four stages, which these detectors stand on: choose "
            f"one of {family}, or export the weights to mmdetection or detectron2"
        )
    network.fc = nn.Identity()
    return network


def stage_channels(network: ResNet) -> list[int]:
    """Channels after each of the four stages."""
    found = []
    for stage in STAGES:
        block = getattr(network, stage)[-1]
        found.append((block.conv3 if hasattr(block, "conv3") else block.conv2).out_channels)
    return found


def freeze(network: ResNet, what: str) -> list[nn.Module]:
    """Stop the gradients of "none", the "stem" or the whole "backbone"; returns the modules to hold in eval mode.

    Held in eval mode, their batch norms neither use nor update statistics of the batch, so every weight and buffer
    stays bit-identical.
    """
    names = {"none": (), "stem": STEM, "backbone": STEM + STAGES}[what]
    held = [getattr(network, name) for name in names]
    for module in held:
        module.requires_grad_(False)
    return held


def network_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of the backbone's parts within a detector, under the backbone's own names."""
    body = model.get_submodule("backbone.body")
    for name in STEM + STAGES:
        if hasattr(body, name):
            yield name, getattr(body, name)
        elif name == "layer4":
            yield name, model.get_submodule("roi_heads.box_head.layer4")


def backbone_state(model: nn.Module) -> dict[str, Tensor]:
    """The backbone's weights and statistics within a detector, under torchvision's names, on the CPU."""
    return {
        f"{name}.{key}": value.detach().cpu().contiguous().clone()
        for name, module in network_of(model)
        for key, value in module.state_dict().items()
    }
