"""Exporting a run, and running what the README of its export says."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.commands import call

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
"""No library's defaults, so that configuration left out shows."""


CLASSES = ("a", "b")


def exported(run: Path, to: str, out: Path) -> str:
    """Export; returns the first block of code in the README."""
    result = call("export", "--run", run, "--to", to, "--out", out)
    assert result.exit_code == 0, result.output
    text = Path(f"{out}.README.md").read_text()
    assert "Channel order **RGB**" in text and str(list(MEAN)) in text and "3 of 6 steps" in text
    return text.split("```")[1].split("\n", 1)[1]


def picture() -> Tensor:
    """An image as OpenCV reads it: uint8 [H, W, 3], BGR."""
    return torch.randint(0, 256, (96, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


def normalised(bgr: Tensor, swapped: bool = False) -> Tensor:
    image = bgr if swapped else bgr.flip(-1)
    return ((image.double() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1)[None].double()


def run_in(folder: Path, code: str, names: dict[str, Any] | None = None) -> dict[str, Any]:
    names = names if names is not None else {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(code, names)
    return names
