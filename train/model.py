"""The dense classifier: normalisation, backbone, and a 1 x 1 convolution to C + 1 classes at every position.

Takes batches as they travel, uint8 rows of RGB pixels (or another sensor's: formats.pixels), and normalises them on the
device; a permuted view of such rows is channels_last already, so nothing is copied. The convolution costs nothing
beside a backbone (0.2 % of ResNet-50's arithmetic at 81 classes).
"""

import torch
from torch import Tensor, nn

from formats.pixels import RGB8, PixelFormat

MEAN = (0.485, 0.456, 0.406)
"""Of pixels in 0..1, red, green, blue (section 4.1)."""

STD = (0.229, 0.224, 0.225)


def torch_dtype(pixels: PixelFormat) -> torch.dtype:
    """The type in which images of that format travel."""
    found = getattr(torch, pixels.dtype)
    assert isinstance(found, torch.dtype)
    return found


class DenseClassifier(nn.Module):
    """``backbone`` (to [n, channels, h, w]) with a class prediction at every position.

    The state dict holds ``backbone.*`` in the backbone's own names and ``head.*``; normalisation is no part of it.
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
        pixels: PixelFormat = RGB8,
    ) -> None:
        super().__init__()
        self.pixels = pixels
        self.backbone = backbone
        self.head = nn.Conv2d(channels, classes, kernel_size=1)
        nn.init.normal_(self.head.weight, std=0.01)
        assert self.head.bias is not None
        nn.init.zeros_(self.head.bias)
        shape = (1, len(mean), 1, 1)
        self.register_buffer("mean", pixels.full_scale * torch.tensor(mean).view(shape), persistent=False)
        self.register_buffer("std", pixels.full_scale * torch.tensor(std).view(shape), persistent=False)

    def normalise(self, images: Tensor) -> Tensor:
        """``(x / full scale - mean) / std``: [n, H, W, colours] to float32 [n, colours, H, W], channels_last."""
        return (images.permute(0, 3, 1, 2).float() - self.mean) / self.std

    def forward(self, images: Tensor) -> Tensor:
        """Logits [n, classes, h, w] of uint8 images [n, H, W, colours]."""
        logits: Tensor = self.head(self.backbone(self.normalise(images)))
        return logits
