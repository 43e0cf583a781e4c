"""The detector's backbone: any that pre-training takes, under a chosen norm, and which part of it is frozen.

It is built by the function that pre-training builds it by (train/models/backbones.py), under its library's own names,
so a run's weights and exported ones fit without renaming. A detector with a pyramid takes the maps of strides 4 to 32,
C4 the network cut at stride 16, before its last stage. The norms, of batch norm's place:

- ``frozen-bn``: statistics and affine of the weights stay as they are (the Jigsaw paper's). Only for weights that bring
  statistics; barely trained ones hurt, and random ones are no normalisation at all.
- ``sync-bn``: batch statistics over all ranks (the scratch paper's choice for large batches). On GPUs torch's own, on
  CPUs the same arithmetic by an all-reduce; one rank alone is plain batch normalisation.
- ``gn``: 32 groups (the scratch paper's choice), independent of the batch, so the one for one or two images per GPU.
  Layers of other channel counts than multiples of 32 take as many groups as 32 and the count have in common.

A backbone without batch norm (VGG, ConvNeXt, Swin, a ViT) keeps what it has; the norm is then that of the layers which
the detector adds. timm's batch norms that hold an activation too can be frozen or learn; no other takes their place.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torchvision.ops import DeformConv2d
from torchvision.ops.misc import FrozenBatchNorm2d

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.train.engine.optim import NORMS
from jigsaw_pretrain.train.models import backbones
from jigsaw_pretrain.train.models.feature_maps import REGIONS_STRIDE, Backbone
from jigsaw_pretrain.train.models.layers import (
    GroupNorm,
    input_convolutions,
    is_plain,
    meta_state,
    replace_batch_norms,
    run_on_meta,
)

BATCH_NORM = nn.modules.batchnorm._BatchNorm


def build_backbone(
    name: str,
    norm: str,
    device: torch.device,
    *,
    c4: bool = False,
    in_channels: int = 3,
    deform: bool = False,
) -> Backbone:
    """The randomly initialised network, drawn from torch's global generator, without its classifier.

    Args:
        name: a backbone's, as pre-training takes it.
        norm: "frozen-bn", "sync-bn" or "gn".
        device: where it is to be trained.
        c4: whether it is cut at stride 16, before its last stage; else it gives the maps of a pyramid.
        in_channels: channels of its images.
        deform: whether 3 x 3 convolutions of the stages from stride 8 on are deformable.

    Raises:
        UserError: for an unknown name, for a network that cannot be cut so, and for a batch norm that cannot be
            replaced.
    """
    found = backbones.build(name, "bn", not c4, in_channels, split=c4)
    if deform:
        make_deformable(found)
    for part in found.parts:
        _set_norm(name, part, norm, device)
    return found


class DeformableConvolution(DeformConv2d):
    """A deformable convolution that predicts its own offsets; its state is a Conv2d's, and that of ``offset``.

    The offsets begin at 0, where it is the plain convolution (Dai et al. 2017).
    """

    def __init__(self, plain: nn.Conv2d) -> None:
        """plain: whose weights it takes."""
        size: Any = {key: getattr(plain, key) for key in ("kernel_size", "stride", "padding", "dilation")}
        super().__init__(
            plain.in_channels, plain.out_channels, **size, groups=plain.groups, bias=plain.bias is not None
        )
        self.load_state_dict(plain.state_dict())
        shifts = 2 * plain.kernel_size[0] * plain.kernel_size[1]
        self.offset = nn.Conv2d(plain.in_channels, shifts, **size)
        for parameter in self.offset.parameters():
            nn.init.zeros_(parameter)

    def forward(self, image: Tensor) -> Tensor:
        """[n, C, h, w] to what the plain convolution gives, its taps displaced."""
        found: Tensor = super().forward(image, self.offset(image))
        return found


def make_deformable(backbone: Backbone) -> None:
    """Put deformable convolutions in the place of the 3 x 3 ones of the stages of strides 8 to 32.

    Which these are is seen by running the network without data. Depthwise ones stay. Raises UserError where there are
    none.
    """
    size, count = 256, 0
    for part in backbone.parts:
        given = part is backbone.rest
        channels = backbone.stages[0].channels if given else backbone.in_channels
        side = size // REGIONS_STRIDE if given else size
        coarse = _outputs(part, channels, side, size // 8)
        for name in coarse:
            plain = part.get_submodule(name)
            assert isinstance(plain, nn.Conv2d)
            if plain.kernel_size != (3, 3) or plain.groups == plain.in_channels or plain.padding_mode != "zeros":
                continue
            owner, _, child = name.rpartition(".")
            setattr(part.get_submodule(owner), child, DeformableConvolution(plain))
            count += 1
    if not count:
        raise UserError(f"model.deform: {backbone.name} has no 3 x 3 convolution in its stages of strides 8 to 32")


def _outputs(module: nn.Module, channels: int, side: int, most: int) -> list[str]:
    """The convolutions whose maps are of at most ``most`` pixels for an input of ``side``, in the order they run."""
    found: list[str] = []

    def watch(name: str, convolution: nn.Conv2d) -> Any:
        def note(_: nn.Module, given: Any, made: Tensor) -> None:
            if made.shape[-1] <= most and name not in found:
                found.append(name)

        return convolution.register_forward_hook(note)

    handles = [watch(name, one) for name, one in module.named_modules() if isinstance(one, nn.Conv2d)]
    try:
        run_on_meta(module, meta_state(module), channels, side)
    finally:
        for handle in handles:
            handle.remove()
    return found


def has_batch_norm(backbone: Backbone) -> bool:
    """Whether anything in it has, or had before it was frozen, batch statistics."""
    kinds = (BATCH_NORM, FrozenBatchNorm2d)
    return any(isinstance(layer, kinds) for part in backbone.parts for layer in part.modules())


def _set_norm(name: str, module: nn.Module, norm: str, device: torch.device) -> None:
    odd = any(isinstance(layer, BATCH_NORM) and not is_plain(layer) for layer in module.modules())
    if norm == "frozen-bn" and odd:
        return  # held in eval mode instead: see frozen_norms
    if norm == "sync-bn" and odd:
        if _several_ranks() and device.type != "cuda":
            raise UserError(
                f"model.norm = sync-bn: {name} has batch norms of its own, whose statistics CPUs cannot share: train "
                "on one process, or with model.norm=frozen-bn"
            )
        if _several_ranks():
            from timm.layers import convert_sync_batchnorm

            for child, part in list(module.named_children()):
                setattr(module, child, convert_sync_batchnorm(part))
        return

    def make(layer: nn.BatchNorm2d) -> nn.Module:
        if norm == "gn":
            return GroupNorm(layer.num_features)
        if norm == "frozen-bn":
            return FrozenBatchNorm2d(layer.num_features, layer.eps)
        kind = _sync_batch_norm(device)
        return kind(layer.num_features, eps=layer.eps, momentum=layer.momentum)

    replace_batch_norms(name, module, make)


def _several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _sync_batch_norm(device: torch.device) -> type[nn.Module]:
    return nn.SyncBatchNorm if device.type == "cuda" and _several_ranks() else SyncBatchNorm2d


def freeze(backbone: Backbone, what: str, norm: str) -> list[nn.Module]:
    """Stop the gradients of "none", the "stem" or the whole "backbone"; returns the modules to hold in eval mode.

    Held in eval mode, their batch norms neither use nor update statistics of the batch, so every weight and buffer
    stays bit-identical. The stem is what sees the image, and the norm beside it.
    """
    frozen: list[nn.Module] = {"none": [], "stem": _stem(backbone), "backbone": [*backbone.parts]}[what]
    if norm == "frozen-bn":
        frozen += [layer for part in backbone.parts for layer in part.modules() if isinstance(layer, BATCH_NORM)]
    for module in frozen:
        module.requires_grad_(False)
    return frozen


def _stem(backbone: Backbone) -> list[nn.Module]:
    """The convolutions over the image, and of each the norm that stands next to it."""
    found = []
    for name in input_convolutions(backbone.module, backbone.in_channels):
        parent = backbone.module.get_submodule(name.rpartition(".")[0])
        children = list(parent.children())
        place = children.index(backbone.module.get_submodule(name))
        found.append(children[place])
        found += [one for one in children[place + 1 : place + 2] if isinstance(one, NORMS)]
    return found


def backbone_modules(model: nn.Module) -> Iterator[nn.Module]:
    """The modules within a detector that hold the backbone's weights, under the backbone's own names."""
    yield model.get_submodule("backbone.body")
    head = getattr(getattr(model, "roi_heads", None), "box_head", None)
    if isinstance(head, torch.fx.GraphModule):
        yield head


def backbone_state(model: nn.Module) -> dict[str, Tensor]:
    """The backbone's weights and statistics within a detector, under its library's names, on the CPU."""
    return {
        key: value.detach().cpu().contiguous().clone()
        for module in backbone_modules(model)
        for key, value in module.state_dict().items()
    }


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation over all ranks; its state dict is BatchNorm2d's.

    torch's nn.SyncBatchNorm refuses CPU tensors, so there the moments are all-reduced here, differentiably.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[n, C, h, w] -> the same shape; statistics of all ranks' values in train mode."""
        alone = not _several_ranks()
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


def norm_layer(norm: str, device: torch.device) -> type[nn.Module] | None:
    """The layer of ``norm``, called with a channel count, for what the detector adds (pyramid, convolutional heads).

    None under frozen-bn, which has nothing to freeze there; the other two are everywhere, as the scratch paper has it.
    """
    if norm == "frozen-bn":
        return None
    return GroupNorm if norm == "gn" else _sync_batch_norm(device)
