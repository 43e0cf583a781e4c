"""The neck: torchvision's feature pyramid on a backbone's four stages, pre-trained with it (the paper's future work).

Levels P2 to P5 (strides 4 to 32), each with a classification head and an ERF table of its own; the loss is the mean of
the levels' losses. A detector's further levels are no part of it: torchvision's pooled one has no weights, RetinaNet's
P6 and P7 are the detector's. Beside a ResNet-18 at 128 pixels a step costs 1.1 times as much with 64 channels and 1.7
times with 256, a refresh of the four tables 4 and 7 times as much as of one (docs/lab-notebook.md). Prefer
`neck = "none"`, the paper's, for a detector without a pyramid (C4).
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

NECKS = ("none", "fpn")


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
    """One level's map of normalised images, for what takes a backbone of a single map (train.erf, train.field)."""

    def __init__(self, backbone: nn.Module, neck: Neck, level: int) -> None:
        super().__init__()
        self.backbone, self.neck, self._level = backbone, neck, level

    def forward(self, images: Tensor) -> Tensor:
        """[n, colours, H, W] to [n, channels, h, w]."""
        found: tuple[Tensor, ...] = self.neck(self.backbone(images))
        return found[self._level]
