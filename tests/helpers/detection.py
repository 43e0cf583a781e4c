"""A tiny residual network registered with torchvision, and tiny datasets to train detectors on."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import nn
from torchvision.models._api import register_model
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from jigsaw_pretrain.detect.recipe import DetectorRecipe

TINY = "tinyresnet"
SETTINGS = {
    "steps": 2,
    "batch": 2,
    "short_side": 64,
    "anchor_scale": 0.25,
    "neck_channels": 32,
    "fc": 32,
    "rois": 16,
    "proposals": 30,
    "log_every": 1,
    "lr": 0.01,
}


class Narrow(ResNet):
    """A ResNet with an eighth of the usual channels in its stages."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        whole: nn.Linear = self.fc
        self.fc: nn.Linear = nn.Linear(whole.in_features // 8, whole.out_features)

    def _make_layer(self, block: Any, planes: int, *args: Any, **kwargs: Any) -> nn.Sequential:
        return super()._make_layer(block, planes // 8, *args, **kwargs)


def tinyresnet(weights: None = None, **kwargs: Any) -> ResNet:
    return Narrow(BasicBlock, [1, 1, 1, 1], **kwargs)


def tinybottleneck(weights: None = None, **kwargs: Any) -> ResNet:
    return Narrow(Bottleneck, [1, 1, 1, 1], **kwargs)


for builder in (tinyresnet, tinybottleneck):
    # Pre-training takes classification models only, which torchvision tells by the module that they are defined in.
    builder.__module__ = "torchvision.models.resnet"
    register_model(builder.__name__)(builder)


def draw(folder: Path, count: int, seed: int, masks: bool = False) -> tuple[Path, Path]:
    """A dataset of bright rectangles of two classes: its annotations and its images."""
    rng = np.random.default_rng(seed)
    images = folder / "images"
    images.mkdir(parents=True)
    document: dict[str, list[Any]] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 3, "name": "red"}, {"id": 7, "name": "blue"}],
    }
    for index in range(count):
        width, height = (80, 64) if index % 2 else (64, 80)
        pixels = rng.integers(0, 90, (height, width, 3), dtype=np.uint8)
        for _ in range(2):
            w, h = (int(one) for one in rng.integers(18, 40, 2))
            x, y = int(rng.integers(0, width - w)), int(rng.integers(0, height - h))
            category = int(rng.choice([3, 7]))
            pixels[y : y + h, x : x + w, 0 if category == 3 else 2] = 230
            record = {
                "id": len(document["annotations"]) + 1,
                "image_id": index + 10,
                "category_id": category,
                "bbox": [x, y, w, h],
                "area": w * h,
                "iscrowd": 0,
            }
            if masks:
                record["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            document["annotations"].append(record)
        name = f"{index}.png"
        Image.fromarray(pixels).save(images / name)
        document["images"].append({"id": index + 10, "file_name": name, "width": width, "height": height})
    path = folder / "annotations.json"
    path.write_text(json.dumps(document))
    return path, images


def set_options(**values: Any) -> list[str]:
    """The --set options that give a detector recipe's keys these values, the section of each key being looked up."""
    # Of a key that two sections have, the first: `name` is the model's.
    sections = reversed(DetectorRecipe().to_dict().items())
    paths = {key: f"{section}.{key}" for section, keys in sections for key in keys}
    return [part for key, value in values.items() for part in ("--set", f"{paths.get(key, key)}={toml(value)}")]


def toml(value: Any) -> str:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else str(value)


def as_predictions(truth: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"image_id": one["image_id"], "category_id": one["category_id"], "bbox": one["bbox"], "score": 1.0}
        for one in truth["annotations"]
        if not one["iscrowd"]
    ]


def write_annotations(path: Path, annotations: list[dict[str, Any]], **more: Any) -> Path:
    document = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 100, "height": 50}],
        "categories": [{"id": 9, "name": "b"}, {"id": 4, "name": "a"}],
        "annotations": annotations,
        **more,
    }
    path.write_text(json.dumps(document))
    return path
