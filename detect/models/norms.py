"""The three normalisations of a detector: frozen-bn, sync-bn, gn.

- ``frozen-bn``: statistics and affine of the weights stay as they are (the Jigsaw paper's). Only for weights that bring
  statistics; barely trained ones hurt, and random ones are no normalisation at all.
- ``sync-bn``: batch statistics over all ranks (the scratch paper's choice for large batches). On GPUs torch's own, on
  CPUs the same arithmetic by an all-reduce; one rank alone is plain batch normalisation.
- ``gn``: 32 groups (the scratch paper's choice), independent of the batch, so the one for one or two images a GPU.
  Layers of other channel counts than multiples of 32 take as many groups as 32 and the count have in common.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torchvision.ops.misc import FrozenBatchNorm2d

from jigsaw_pretrain.train.models.layers import GroupNorm

NormLayer = Callable[[int], nn.Module]


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
