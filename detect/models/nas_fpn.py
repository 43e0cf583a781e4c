"""NAS-FPN's published pyramid (Ghiasi et al. 2019): seven stacks of the cell that the search found, on levels P3 to P7.

The head of more capacity than FPN that the frozen-backbone paper's best detectors have. A cell merges two levels, by a
sum or by global pooling (the second, plus the first weighed by a sigmoid of the second's mean); seven of a stack's nine
convolve the result. Each convolution has a norm, under frozen batch norm one that learns. P6 and P7 begin as P5 pooled
once and twice. With 256 channels it has nine times the weights of an FPN. Prefer FPN where the backbone learns too.
A module of its own, because it is a network from a paper of its own.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

STACKS = 7

CELLS = (
    ("gp", "P6", "P4", "P4", "a"),
    ("sum", "a", "P4", "P4", "b"),
    ("sum", "b", "P3", "P3", "P3"),
    ("sum", "P3", "b", "P4", "P4"),
    ("gp", "P4", "P3", "P5", "c"),
    ("sum", "P5", "c", "P5", "P5"),
    ("gp", "P5", "b", "P7", "d"),
    ("sum", "P7", "d", "P7", "P7"),
    ("gp", "P7", "P5", "P6", "P6"),
)
"""The merging cells of figure 6: how, the two that are merged, whose size the result has, what it is called."""

UNCONVOLVED = ("c", "d")
"""Results that are only merged."""

LEVELS = ("P3", "P4", "P5", "P6", "P7")


class NasFpn(nn.Module):
    """The pyramid, from the maps of strides 8, 16 and 32 to five levels of ``channels``, finest first."""

    def __init__(self, stages: Sequence[int], channels: int, norm: Callable[[int], nn.Module]) -> None:
        """stages: channels of the three maps. norm: the layer after each convolution, called with a channel count."""
        super().__init__()
        self.laterals = nn.ModuleList(nn.Sequential(nn.Conv2d(one, channels, 1), norm(channels)) for one in stages)
        self.stacks = nn.ModuleList(
            nn.ModuleList(
                nn.Identity()
                if name in UNCONVOLVED
                else nn.Sequential(nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1, bias=False), norm(channels))
                for *_, name in CELLS
            )
            for _ in range(STACKS)
        )
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_uniform_(part.weight, a=1)

    def forward(self, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        """[n, C_i, h_i, w_i] by name, finest first, to [n, channels, h, w] by name, "0" the finest."""
        found = [lateral(one) for lateral, one in zip(self.laterals, maps.values(), strict=True)]
        for _ in range(2):
            found.append(F.max_pool2d(found[-1], kernel_size=2, stride=2, ceil_mode=True))
        level = dict(zip(LEVELS, found, strict=True))
        for stack in self.stacks:
            assert isinstance(stack, nn.ModuleList)
            for (kind, first, second, place, name), cell in zip(CELLS, stack, strict=True):
                height, width = level[place].shape[2:]
                one, other = (_resized(level[key], height, width) for key in (first, second))
                if kind == "gp":
                    one = one * other.mean((2, 3), keepdim=True).sigmoid()
                level[name] = cell(one + other)
        return OrderedDict((str(nth), level[name]) for nth, name in enumerate(LEVELS))


def _resized(found: Tensor, height: int, width: int) -> Tensor:
    """A level at another's size: repeated where it grows, pooled where it shrinks."""
    if found.shape[2] <= height:
        return F.interpolate(found, size=(height, width), mode="nearest")
    return F.adaptive_max_pool2d(found, (height, width))
