"""The dense classifier: normalisation, backbone, and a 1 x 1 convolution to C + 1 classes at every position.

With a neck (models.layers.Neck) there are several maps, and a convolution for each.

Takes batches as they travel, uint8 rows of RGB pixels (or another sensor's: formats/pixels.py), and normalises them on
the device; a permuted view of such rows is channels_last already, so nothing is copied. The convolution costs nothing
beside a backbone (0.2 % of ResNet-50's arithmetic at 81 classes).
"""

import torch
from torch import Tensor, nn

from jigsaw_pretrain.formats.pixels import RGB8, PixelFormat
from jigsaw_pretrain.train.models.layers import Level, Neck
from jigsaw_pretrain.train.recipe import MEAN, STD


class DenseClassifier(nn.Module):
    """``backbone`` (to [n, channels, h, w], or before a neck to a tuple of such) with a prediction at every position.

    The state dict holds ``backbone.*`` in the backbone's own names and ``head.*``, with a neck ``neck.*`` in
    torchvision's names and ``head.0.*`` on, finest level first; normalisation is no part of it.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        channels: int,
        classes: int,
        mean: tuple[float, ...] = MEAN,
        std: tuple[float, ...] = STD,
        neck: Neck | None = None,
        pixels: PixelFormat = RGB8,
    ) -> None:
        super().__init__()
        self.pixels = pixels
        self.backbone = backbone
        self.neck = neck
        self.head: nn.Module
        if neck is None:
            self.head = _head(channels, classes)
        else:
            self.head = nn.ModuleList(_head(neck.channels, classes) for _ in neck.layer_blocks)
        shape = (1, len(mean), 1, 1)
        self.register_buffer("mean", pixels.full_scale * torch.tensor(mean).view(shape), persistent=False)
        self.register_buffer("std", pixels.full_scale * torch.tensor(std).view(shape), persistent=False)

    def normalise(self, images: Tensor) -> Tensor:
        """``(x / full scale - mean) / std``: [n, H, W, colours] to float32 [n, colours, H, W], channels_last."""
        return (images.permute(0, 3, 1, 2).float() - self.mean) / self.std

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Logits [n, classes, h, w] of uint8 images [n, H, W, colours]: of each level, finest first, or the one map."""
        found = self.backbone(self.normalise(images))
        if self.neck is None:
            return (self.head(found),)
        assert isinstance(self.head, nn.ModuleList)
        return tuple(head(level) for head, level in zip(self.head, self.neck(found), strict=True))

    def levels(self) -> list[nn.Module]:
        """What maps normalised images to each of the maps classified, in the order of the logits."""
        if self.neck is None:
            return [self.backbone]
        return [Level(self.backbone, self.neck, level) for level in range(len(self.neck.layer_blocks))]

    def last_map(self, normalised: Tensor) -> Tensor:
        """The backbone's own last map [n, channels, h, w], whatever stands on it."""
        found = self.backbone(normalised)
        last: Tensor = found if self.neck is None else found[-1]
        return last


def _head(channels: int, classes: int) -> nn.Conv2d:
    """A 1 x 1 convolution from ``channels`` to ``classes``, begun near zero."""
    head = nn.Conv2d(channels, classes, kernel_size=1)
    nn.init.normal_(head.weight, std=0.01)
    assert head.bias is not None
    nn.init.zeros_(head.bias)
    return head
