"""Backbones of a user's own, for tests of `module:callable`."""

import torch
from torch import Tensor, nn

from tests.helpers.jobs import Plain


def plain() -> nn.Module:
    return Plain().features


def idle() -> nn.Module:
    module = Plain().features
    module.extra = nn.Linear(2, 2)
    module.forward = lambda image: nn.Sequential(*list(module.children())[:-1])(image)  # type: ignore[method-assign]
    return module


def flat() -> nn.Module:
    return Plain()


class Pair(nn.Module):
    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        return image.flatten(2), image.flatten(2)


class Maps(nn.Module):
    """Maps of strides 2 to 32 in a dict, as detectors' own backbones give them."""

    def __init__(self, in_channels: int = 3) -> None:
        super().__init__()
        widths = (in_channels, 8, 8, 16, 16, 32)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU())
            for before, after in zip(widths, widths[1:], strict=False)
        )

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        found = {}
        for nth, stage in enumerate(self.stages):
            image = found[f"c{nth + 1}"] = stage(image)
        return found


def number() -> int:
    return 3


def failing() -> nn.Module:
    raise KeyError("weights")


def uneven() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Conv2d(4, 4, 3, stride=2))


def tensors() -> dict[str, Tensor]:
    return {key: torch.ones_like(value) for key, value in plain().state_dict().items()}


def takes_any(in_channels: int = 3) -> nn.Module:
    return nn.Sequential(nn.Conv2d(in_channels, 4, 4, 4), nn.Conv2d(4, 8, 2, 2))


def sees_nothing() -> nn.Module:
    class Sliced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Conv2d(1, 8, 8, 8)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.inner(x[:, :1])
            return result

    return Sliced()
