"""A tiny dataset and weights, and a way to run the command line in process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from click.testing import CliRunner, Result
from torch import nn

from jigsaw_pretrain.detect.cli import main
from jigsaw_pretrain.train.models import backbones
from tests.helpers import own
from tests.helpers.comparisons import InProcess
from tests.helpers.detection import SETTINGS, TINY, draw, set_options
from tests.helpers.tiny import make_dataset, picture

for one in vars(own):
    backbones.allow_backbone(f"{own.__name__}:{one}")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train/ and val/ datasets."""
    folder = tmp_path_factory.mktemp("detect")
    draw(folder / "train", 6, 0, masks=True)
    draw(folder / "val", 2, 1, masks=True)
    return folder


@pytest.fixture(scope="session")
def tiny_weights(tiny_data: Path) -> Path:
    """A state dict of the tiny network with gathered statistics, as a pre-training run leaves it."""
    torch.manual_seed(0)
    network = torchvision.models.get_model(TINY)
    network.train()
    with torch.no_grad():
        # The classifier of the narrow network does not fit its features; the statistics are what is wanted.
        body = nn.Sequential(*list(network.children())[:-2])
        for _ in range(20):
            body(torch.randn(8, 3, 64, 64))
    path = tiny_data / "tiny.pth"
    torch.save({name: value for name, value in network.state_dict().items() if not name.startswith("fc.")}, path)
    return path


@pytest.fixture()
def plain_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs without their page, whose drawing takes most of a tiny run's time."""
    monkeypatch.setattr("jigsaw_pretrain.detect.report.write_page", lambda *_: None)


@pytest.fixture(scope="session")
def detect(tiny_data: Path) -> Callable[..., Result]:
    """Runs `detect train` on the tiny dataset; keyword arguments are options, or --set where the recipe has them."""

    def run(folder: Path, *flags: str, expect: int = 0, **settings: Any) -> Result:
        sets = {**SETTINGS, **settings}
        options = {
            "annotations": tiny_data / "train" / "annotations.json",
            "images": tiny_data / "train" / "images",
            "val-annotations": tiny_data / "val" / "annotations.json",
            "val-images": tiny_data / "val" / "images",
            "run": folder,
            "workers": 0,
            "backbone": TINY,
            "device": "cpu",
        }
        for key in ("init", "model", "backbone", "norm", "freeze", "schedule", "seed", "recipe"):
            if key in sets:
                options[key] = sets.pop(key)
        arguments = ["train", *(part for key, value in options.items() for part in (f"--{key}", str(value)))]
        arguments += set_options(**sets)
        result = CliRunner().invoke(main, [*arguments, *flags], catch_exceptions=False)
        assert result.exit_code == expect, result.output
        return result

    return run


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepped dataset to pre-train on."""
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    sizes = {"S": (40, 40), "T": (20, 60), "W": (60, 20)}
    pictures = {group: [picture(*size, rng) for _ in range(8)] for group, size in sizes.items()}
    make_dataset(folder, {group: [8] for group in sizes}, pictures=pictures)
    return folder


@pytest.fixture()
def in_process(monkeypatch: pytest.MonkeyPatch) -> type[InProcess]:
    """Comparisons train in this process."""
    monkeypatch.setattr("jigsaw_pretrain.detect.comparison.comparison.TaskRunner", InProcess)
    monkeypatch.setattr(InProcess, "ran", [])
    monkeypatch.setattr(InProcess, "most", None)
    return InProcess
