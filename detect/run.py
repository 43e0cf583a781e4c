"""A detector run's folder: what is written there, and reading it back.

``config.json`` (recipe, plan, categories, data, weights report, versions: written before the first step),
``metrics.jsonl``, ``checkpoints/``, and at the end ``detector.pth`` (the detector's names in torchvision),
``backbone.pth`` (the ResNet's), ``summary.json`` and the evaluation's files.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn
from torchvision.models.resnet import ResNet

from jigsaw_pretrain.detect.models import backbone, detectors
from jigsaw_pretrain.detect.models.backbone import added_norm
from jigsaw_pretrain.detect.recipe import DetectorRecipe, ScaledRecipe
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.storage import Storage

CONFIG = "config.json"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
DETECTOR = "detector.pth"
KIND = "detector run"


@dataclass(frozen=True)
class DetectorConfig:
    """What a run is, as config.json holds it.

    norm_built: the backbone's norm as it was built (sync-bn where frozen-bn was asked for and the weights brought no
    statistics). categories: (id, name) in label order. data: the four paths as given. weights: the loading report;
    neck: that of the pyramid, None where no neck was loaded.
    """

    recipe: DetectorRecipe
    plan: ScaledRecipe
    norm_built: str
    categories: tuple[tuple[int, str], ...]
    init: str
    data: dict[str, str | None]
    weights: dict[str, Any] | None
    neck: dict[str, Any] | None = None

    def write(self, folder: Path) -> None:
        """Publish config.json."""
        versions = {"torch": torch.__version__, "torchvision": torchvision.__version__}
        values = {"kind": KIND, **asdict(self), "recipe": self.recipe.to_dict(), "versions": versions}
        Storage(folder).publish(CONFIG, json.dumps(values, indent=2).encode() + b"\n")


def read_config(folder: Path) -> DetectorConfig:
    """A run's config; raises UserError where the folder is no detector run."""
    path = folder / CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: {folder} is no detector run (see `jigsaw-detect train --run`)") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): start the run anew in another folder") from error
    if values.get("kind") != KIND:
        raise UserError(f"{folder} is no detector run: its {CONFIG} is of another kind")
    return DetectorConfig(
        recipe=DetectorRecipe.from_dict(values["recipe"], str(path)),
        plan=ScaledRecipe(**{**values["plan"], "drops": tuple(values["plan"]["drops"])}),
        norm_built=values["norm_built"],
        categories=tuple((one, name) for one, name in values["categories"]),
        init=values["init"],
        data=values["data"],
        weights=values["weights"],
        neck=values.get("neck"),
    )


def backbone_from_config(config: DetectorConfig, device: torch.device) -> ResNet:
    """The backbone of a config, randomly initialised from torch's global generator."""
    return backbone.build_backbone(config.recipe.model.backbone, config.norm_built, device)


def detector_from_config(
    config: DetectorConfig, network: ResNet, device: torch.device
) -> tuple[nn.Module, list[nn.Module]]:
    """The detector around ``network`` on the device, and the modules that stay in eval mode (frozen)."""
    frozen = backbone.freeze(network, config.recipe.model.freeze)
    added = added_norm(config.norm_built if config.recipe.model.norm != "frozen-bn" else "frozen-bn", device)
    model = detectors.build_detector(config.recipe, network, len(config.categories), config.plan.anchor_scale, added)
    return model.to(device), frozen


def load_detector(run: Path, config: DetectorConfig, device: torch.device) -> torch.nn.Module:
    """The trained detector of a run's folder; raises UserError where it has not finished."""
    path = run / DETECTOR
    if not path.exists():
        raise UserError(f"{path} is missing: the run has not finished; continue it with `detect train --resume`")
    model, _ = detector_from_config(config, backbone_from_config(config, device), device)
    model.load_state_dict(torch.load(path, map_location=device, weights_only=True))
    return model
