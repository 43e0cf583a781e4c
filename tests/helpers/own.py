"""Backbones of a user's own, for tests of `module:callable`."""

import torch
from torch import Tensor, nn

from tests.train.jobs import Plain


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
        return image, image


def number() -> int:
    return 3


def failing() -> nn.Module:
    raise KeyError("weights")


def uneven() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Conv2d(4, 4, 3, stride=2))


def tensors() -> dict[str, Tensor]:
    return {key: torch.ones_like(value) for key, value in plain().state_dict().items()}
