"""Backbones of detection libraries: `ultralytics:FILE.yaml` and `transformers:TYPE`, built from configuration.

Never with weights: nothing is fetched. Their modules keep the library's own names, so that weights go back under them.

- `ultralytics:yolo11n.yaml`: the layers of the configuration's part ``backbone`` of a YOLO, with the maps of strides 2
  to 32 that its head takes. Ultralytics is licensed under AGPL-3.0, which also covers what you distribute with it.
- `transformers:rt_detr`, `transformers:detr`, `transformers:resnet` or any model type of Hugging Face that is, or has,
  a backbone (AutoBackbone), as its configuration's defaults say; or a folder with a config.json.

A module of its own, because it changes with these libraries. Prefer torchvision's or timm's network where both have it.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from jigsaw_pretrain.errors import UserError

ULTRALYTICS, TRANSFORMERS = "ultralytics:", "transformers:"
PREFIXES = (ULTRALYTICS, TRANSFORMERS)


class YoloBackbone(nn.Module):
    """The first layers of a YOLO, under its names (`model.0.conv.weight`), to the map of each layer in a list."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.model = layers

    def forward(self, image: Tensor) -> list[Tensor]:
        """[n, C, H, W] to maps from fine to coarse."""
        maps = []
        for layer in self.model:
            image = layer(image)
            maps.append(image)
        return maps


def reads_a_file(name: str) -> bool:
    """Whether a network of PREFIXES is built from a user's file: Ultralytics runs words in such a file as code."""
    short = name.partition(":")[2]
    return bool(set(short) & {"/", "\\"}) or Path(short).exists()


def library_module(name: str, in_channels: int) -> nn.Module:
    """The randomly initialised backbone of that name; raises UserError where the library or the name is not there."""
    return yolo(name, in_channels) if name.startswith(ULTRALYTICS) else hugging_face(name, in_channels)


def whole_yolo(name: str, in_channels: int = 3) -> Any:
    """The YOLO of a configuration with its head, randomly initialised; raises UserError."""
    short = name.removeprefix(ULTRALYTICS)
    if not short.endswith((".yaml", ".yml")) or "://" in short:
        raise UserError(f"backbone {name}: name a configuration such as {ULTRALYTICS}yolo11n.yaml, never weights")
    with _offline():
        try:
            from ultralytics.nn.tasks import DetectionModel
        except ImportError as error:
            raise UserError(f"backbone {name} needs ultralytics: pip install 'jigsaw-pretrain[ultralytics]'") from error
        try:
            return DetectionModel(short, ch=in_channels, verbose=False)
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise UserError(f"backbone {name}: ultralytics does not build a detector of it ({reason})") from error


def yolo(name: str, in_channels: int) -> nn.Module:
    """The backbone's layers of a YOLO; raises UserError where they are no plain sequence."""
    whole = whole_yolo(name, in_channels)
    layers = whole.model[: len(whole.yaml["backbone"])]
    if any(layer.f != -1 for layer in layers):
        raise UserError(f"backbone {name}: its layers are no plain sequence; choose another one, such as yolo11n.yaml")
    return YoloBackbone(layers)


def hugging_face(name: str, in_channels: int) -> nn.Module:
    """The backbone that a model type of transformers is or has; raises UserError."""
    short = name.removeprefix(TRANSFORMERS)
    try:
        from transformers import AutoBackbone, AutoConfig
    except ImportError as error:
        raise UserError(f"backbone {name} needs transformers: pip install 'jigsaw-pretrain[transformers]'") from error
    try:
        config: Any
        if Path(short).is_dir():
            config = AutoConfig.from_pretrained(short, local_files_only=True, trust_remote_code=False)
        else:
            config = AutoConfig.for_model(short)
        config = getattr(config, "backbone_config", None) or config
        config.num_channels = in_channels
        if getattr(config, "stage_names", None):
            config.out_features = list(config.stage_names[1:])
        elif getattr(config, "out_indices", None):
            # A network of timm's, as DETR has it: from stride 4 on.
            config.out_indices = [1, 2, 3, 4]
        if hasattr(config, "use_pretrained_backbone"):
            config.use_pretrained_backbone = False
        found: nn.Module = AutoBackbone.from_config(config)
        return found
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"backbone {name}: transformers builds no backbone of it ({reason}): name a type such as "
            f"{TRANSFORMERS}rt_detr or {TRANSFORMERS}resnet, or a folder with a config.json"
        ) from error


@contextmanager
def _offline() -> Iterator[None]:
    """Ultralytics looks for a network when it is imported; told so, it does not."""
    before = os.environ.get("YOLO_OFFLINE")
    os.environ["YOLO_OFFLINE"] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ["YOLO_OFFLINE"]
        else:
            os.environ["YOLO_OFFLINE"] = before
