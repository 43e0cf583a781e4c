"""A detector run's folder: what is written there, and reading it back.

``config.json`` (recipe, plan, categories, data, weights report, versions: written before the first step),
``metrics.jsonl``, ``checkpoints/``, and at the end ``detector.pth`` (the detector's names in torchvision),
``backbone.pth`` (the backbone's own), ``summary.json`` and the evaluation's files.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import torch
import torchvision
from torch import nn

from jigsaw_pretrain.config import Count, CountOrZero, Number, Positive, PositiveOrZero
from jigsaw_pretrain.detect.models import backbone, detectors
from jigsaw_pretrain.detect.models.backbone import norm_layer
from jigsaw_pretrain.detect.recipe import CONFIG, DetectorNorm, DetectorRecipe, ScaledRecipe
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.annotations.read import Reading
from jigsaw_pretrain.formats.dataset.dataset import MOST_BYTES
from jigsaw_pretrain.formats.pixels import RGB8, PixelFormat, pixel_format
from jigsaw_pretrain.storage.store import Storage
from jigsaw_pretrain.train.models.backbones import check_size
from jigsaw_pretrain.train.models.feature_maps import Backbone
from jigsaw_pretrain.train.models.weights import check_state, load_tensors
from jigsaw_pretrain.train.recipe import MEAN, STD

METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
DETECTOR = "detector.pth"
KIND = "detector run"

MOST_FLOPS = 1e18
"""The most that a training step may cost per image."""

Content = TypeVar("Content")


@dataclass(frozen=True)
class DetectorConfig:
    """What a run is, as config.json holds it.

    norm_built: the backbone's norm as it was built (sync-bn where frozen-bn was asked for and the weights brought no
    statistics). categories: (id, name) in label order. data: the four paths as given. weights: the loading report;
    neck: that of the pyramid, None where no neck was loaded. mean, std: of each channel, of pixels in 0..1. pixels:
    what images are read as. boxes: how many are trained on, by class; empty where they were not counted. reading: how
    annotations and images are read; None of a run from before this was noted.
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
    reading: Reading | None = None

    @property
    def added_norm(self) -> str:
        """The norm of what the detector adds: none beside batch norm that is frozen or was asked to be."""
        return self.recipe.model.norm if self.recipe.model.norm == "frozen-bn" else self.norm_built

    def write(self, folder: Path) -> None:
        """Publish config.json."""
        versions = {"torch": torch.__version__, "torchvision": torchvision.__version__}
        own = {**asdict(self), "recipe": self.recipe.to_dict(), "pixels": self.pixels.to_dict()}
        own["reading"] = None if self.reading is None else self.reading.differences()
        values = {"kind": KIND, **own, "versions": versions}
        Storage(folder).publish(CONFIG, json.dumps(values, indent=2).encode() + b"\n")


class _Reading(msgspec.Struct):
    """What of a Reading is not the default's."""

    exif: Literal["ignore", "apply"] = "ignore"
    ignored: Literal["skip", "use"] = "skip"
    split: str | None = None
    voc_origin: Literal[0, 1] | None = None
    nodata: str | None = None


class _Config(msgspec.Struct):
    """The contents of config.json."""

    kind: Literal["detector run"]
    recipe: dict[str, Any]
    plan: ScaledRecipe
    norm_built: DetectorNorm
    categories: Annotated[tuple[tuple[int, str], ...], msgspec.Meta(min_length=1, max_length=100_000)]
    init: str
    data: dict[Literal["annotations", "images", "val_annotations", "val_images", "val_split"], str | None]
    weights: dict[str, Any] | None
    neck: dict[str, Any] | None = None
    mean: tuple[Number, ...] = MEAN
    std: tuple[Positive, ...] = STD
    pixels: Any = None
    boxes: tuple[CountOrZero, ...] = ()
    reading: _Reading | None = None


class Stratum(msgspec.Struct):
    """AP averaged over some classes, and how many they are."""

    classes: CountOrZero
    AP: Number


class RunSummary(msgspec.Struct):
    """What readers of summary.json rely on."""

    steps: Count
    device: str
    world: Count
    device_seconds: PositiveOrZero
    AP: dict[str, Number] | None
    seconds_per_step: PositiveOrZero | None = None
    gpu_memory: int | None = None
    flops_per_image: Annotated[float, msgspec.Meta(ge=0, le=MOST_FLOPS)] | None = None

    def __post_init__(self) -> None:
        """Refuse figures without the first of them."""
        if self.AP is not None and "AP" not in self.AP:
            raise ValueError("it has figures and no AP")


def read_file(path: Path, kind: type[Content]) -> Content:
    """A JSON file of a run, decoded and checked; raises UserError for one that is not of that type."""
    try:
        return msgspec.json.decode(Storage(path.parent).read(path.name, MOST_BYTES), type=kind)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {path.parent} is no finished detector run") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({str(error)[:200]}): start the run anew in another folder") from error


def read_summary(run: Path) -> RunSummary:
    """A finished run's summary; raises UserError."""
    return read_file(run / SUMMARY, RunSummary)


def read_config(folder: Path) -> DetectorConfig:
    """A run's config; raises UserError where the folder is no detector run."""
    path = folder / CONFIG
    if not path.exists():
        raise UserError(f"{path} is missing: {folder} is no detector run (see `jigsaw-detect train --run`)")
    found = read_file(path, _Config)
    pixels = pixel_format(found.pixels, str(path))
    if not len(found.mean) == len(found.std) == pixels.channels:
        raise UserError(f"{path} is damaged (mean and std are not of {pixels.channels} channels): start the run anew")
    if found.boxes and len(found.boxes) != len(found.categories):
        raise UserError(f"{path} is damaged (boxes are not counted by category): start the run anew")
    values = msgspec.structs.asdict(found)
    del values["kind"]
    values |= {"recipe": DetectorRecipe.from_dict(found.recipe, str(path)), "pixels": pixels}
    values["reading"] = None if found.reading is None else Reading(**msgspec.structs.asdict(found.reading))
    return DetectorConfig(**values)


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
    """The detector around ``network`` on the device, and the modules that stay in eval mode (frozen).

    Its weights lie in the order that GPUs' tensor cores take (channels_last).
    """
    recipe, plan = config.recipe, config.plan
    frozen = backbone.freeze(network, recipe.model.freeze, config.norm_built)
    added, classes = norm_layer(config.added_norm, device), len(config.categories)
    model = detectors.build_detector(recipe, network, classes, plan.anchor_scale, added, config.mean, config.std)
    return model.to(device=device, memory_format=torch.channels_last), frozen  # type: ignore[call-overload]


def load_detector(run: Path, config: DetectorConfig, device: torch.device) -> torch.nn.Module:
    """The trained detector of a run's folder; raises UserError where it has not finished or is damaged."""
    path = run / DETECTOR
    if not path.exists():
        raise UserError(f"{path} is missing: the run has not finished; continue it with `detect train --resume`")
    check_size(config.recipe.model.backbone, path, str(run / CONFIG))
    model, _ = detector_from_config(config, backbone_from_config(config, device), device)
    model.load_state_dict(check_state(load_tensors(path), model.state_dict(), str(path)))
    return model
