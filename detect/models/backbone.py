"""The detector's backbone: a residual network of torchvision under a chosen norm, and which part of it is frozen.

Parameter names are torchvision's own (conv1, bn1, layer1 to layer4), so weights that `train export` writes, and
torchvision's own files, fit without renaming. Every ResNet registered with torchvision will do: resnet18 to 152,
resnext*, wide_resnet*. Prefer mmdetection or detectron2 (`train export --to ...`) for other families. The norms:

- ``frozen-bn``: statistics and affine of the weights stay as they are (the Jigsaw paper's). Only for weights that bring
  statistics; barely trained ones hurt, and random ones are no normalisation at all.
- ``sync-bn``: batch statistics over all ranks (the scratch paper's choice for large batches). On GPUs torch's own, on
  CPUs the same arithmetic by an all-reduce; one rank alone is plain batch normalisation.
- ``gn``: 32 groups (the scratch paper's choice), independent of the batch, so the one for one or two images per GPU.
  Layers of other channel counts than multiples of 32 take as many groups as 32 and the count have in common.
"""

import difflib
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torchvision.models.resnet import ResNet
from torchvision.ops.misc import FrozenBatchNorm2d

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.train.models.layers import GroupNorm

STAGES = ("layer1", "layer2", "layer3", "layer4")
STEM = ("conv1", "bn1")

NormLayer = Callable[[int], nn.Module]


def build_backbone(name: str, norm: str, device: torch.device) -> ResNet:
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
    frozen = [getattr(network, name) for name in names]
    for module in frozen:
        module.requires_grad_(False)
    return frozen


def backbone_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
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
        for name, module in backbone_modules(model)
        for key, value in module.state_dict().items()
    }


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation over all ranks; its state dict is BatchNorm2d's.

    torch's nn.SyncBatchNorm refuses CPU tensors, so there the moments are all-reduced here, differentiably.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[n, C, h, w] -> the same shape; statistics of all ranks' values in train mode."""
        alone = not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)
        if not self.training or (alone and input.numel()):
            return super().forward(input)
        if alone:
            # No region at all: there is nothing to gather, and batch_norm would make the statistics NaN.
            return input * self.weight[:, None, None]
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        values = input.float()
        # The mean first and the squares about it after: one pass over both would cancel where the mean is large.
        sums = all_reduce(torch.cat((values.sum((0, 2, 3)), values.new_tensor([values.numel() / values.shape[1]]))))
        count = sums[-1].clamp(min=1)
        mean = sums[:-1] / count
        variance = all_reduce((values - mean[:, None, None]).square().sum((0, 2, 3))) / count
        with torch.no_grad():
            momentum = 0.1 if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.detach(), momentum)
            self.running_var.lerp_(variance.detach() * (count / (count - 1).clamp(min=1)), momentum)
            self.num_batches_tracked.add_(1)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        shift = self.bias - mean * scale
        return (values * scale[:, None, None] + shift[:, None, None]).to(input.dtype)


def norm_layer(norm: str, device: torch.device) -> NormLayer:
    """The layer for ``norm`` ("frozen-bn", "sync-bn" or "gn"), a callable of the channel count."""
    if norm == "frozen-bn":
        return FrozenBatchNorm2d
    if norm == "gn":
        return GroupNorm
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return nn.SyncBatchNorm if device.type == "cuda" and several else SyncBatchNorm2d


def added_norm(norm: str, device: torch.device) -> NormLayer | None:
    """The layer for what the detector adds (pyramid, convolutional heads), or None.

    None under frozen-bn, which has nothing to freeze there; the other two are everywhere, as the scratch paper has it.
    """
    return None if norm == "frozen-bn" else norm_layer(norm, device)


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises (so that weight decay has a setting of its own for it)."""
    return isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, FrozenBatchNorm2d))
