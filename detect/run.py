"""A detector run's folder: what is written there, and reading it back.

``config.json`` (recipe, plan, categories, data, weights report, versions: written before the first step),
``metrics.jsonl``, ``checkpoints/``, and at the end ``detector.pth`` (the detector's names in torchvision),
``backbone.pth`` (the backbone's own), ``summary.json`` and the evaluation's files.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from jigsaw_pretrain.detect.models import backbone, detectors
from jigsaw_pretrain.detect.models.backbone import norm_layer
from jigsaw_pretrain.detect.recipe import DetectorRecipe, ScaledRecipe
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.pixels import RGB8, PixelFormat, pixel_format
from jigsaw_pretrain.storage import Storage
from jigsaw_pretrain.train.models.feature_maps import Backbone
from jigsaw_pretrain.train.recipe import MEAN, STD

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
    neck: that of the pyramid, None where no neck was loaded. mean, std: of each channel, of pixels in 0..1. pixels:
    what images are read as. boxes: how many are trained on, by class; empty where they were not counted.
    """

    recipe: DetectorRecipe
    plan: ScaledRecipe
    norm_built: str
    categories: tuple[tuple[int, str], ...]
    init: str
    data: dict[str, str | None]
    weights: dict[str, Any] | None
    neck: dict[str, Any] | None = None
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    pixels: PixelFormat = RGB8
    boxes: tuple[int, ...] = ()

    @property
    def added_norm(self) -> str:
        """The norm of what the detector adds: none beside batch norm that is frozen or was asked to be."""
        return self.recipe.model.norm if self.recipe.model.norm == "frozen-bn" else self.norm_built

    def write(self, folder: Path) -> None:
        """Publish config.json."""
        versions = {"torch": torch.__version__, "torchvision": torchvision.__version__}
        own = {**asdict(self), "recipe": self.recipe.to_dict(), "pixels": self.pixels.to_dict()}
        values = {"kind": KIND, **own, "versions": versions}
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
    plan: Any = {key: tuple(one) if isinstance(one, list) else one for key, one in values["plan"].items()}
    return DetectorConfig(
        recipe=DetectorRecipe.from_dict(values["recipe"], str(path)),
        plan=ScaledRecipe(**plan),
        norm_built=values["norm_built"],
        categories=tuple((one, name) for one, name in values["categories"]),
        init=values["init"],
        data=values["data"],
        weights=values["weights"],
        neck=values.get("neck"),
        mean=tuple(values.get("mean", MEAN)),
        std=tuple(values.get("std", STD)),
        pixels=pixel_format(values.get("pixels"), str(path)),
        boxes=tuple(values.get("boxes", ())),
    )


def backbone_from_config(config: DetectorConfig, device: torch.device) -> Backbone:
    """The backbone of a config, randomly initialised from torch's global generator."""
    model = config.recipe.model
    c4 = model.name == "faster-rcnn-c4"
    return backbone.build_backbone(
        model.backbone, config.norm_built, device, c4=c4, in_channels=config.pixels.channels, deform=model.deform
    )


def detector_from_config(
    config: DetectorConfig, network: Backbone, device: torch.device
) -> tuple[nn.Module, list[nn.Module]]:
    """The detector around ``network`` on the device, and the modules that stay in eval mode (frozen)."""
    recipe, plan = config.recipe, config.plan
    frozen = backbone.freeze(network, recipe.model.freeze, config.norm_built)
    added, classes = norm_layer(config.added_norm, device), len(config.categories)
    model = detectors.build_detector(recipe, network, classes, plan.anchor_scale, added, config.mean, config.std)
    return model.to(device), frozen


def load_detector(run: Path, config: DetectorConfig, device: torch.device) -> torch.nn.Module:
    """The trained detector of a run's folder; raises UserError where it has not finished."""
    path = run / DETECTOR
    if not path.exists():
        raise UserError(f"{path} is missing: the run has not finished; continue it with `detect train --resume`")
    model, _ = detector_from_config(config, backbone_from_config(config, device), device)
    model.load_state_dict(torch.load(path, map_location=device, weights_only=True))
    return model
