"""Detectron2's and mmdetection's ResNets, forward only, written from their documentation and published key tables.

They take a file's entries, the pasted configuration and an image as the framework reads it (BGR), and use every entry
once: the frameworks' defaults stand here, so whatever the configuration must override is overridden by it or fails.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


class Entries(dict[str, Tensor]):
    """Entries in float64, each taken out where it is used."""

    def __init__(self, state: dict[str, Any]) -> None:
        super().__init__({key: torch.as_tensor(value).double() for key, value in state.items()})

    def conv(self, x: Tensor, name: str, stride: int = 1, padding: int = 0, groups: int = 1) -> Tensor:
        return F.conv2d(x, self.pop(f"{name}.weight"), stride=stride, padding=padding, groups=groups)

    def norm(self, x: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (
            self.pop(f"{name}.{key}")[:, None, None] for key in ("running_mean", "running_var", "weight", "bias")
        )
        self.pop(f"{name}.num_batches_tracked", None)
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias


def channels_first(image: Tensor, mean: list[float], std: list[float]) -> Tensor:
    x = (image.double() - torch.tensor(mean).double()) / torch.tensor(std).double()
    return x.permute(2, 0, 1)[None]


def detectron2(model: dict[str, Any], config: dict[str, Any], bgr: Tensor) -> Tensor:
    """res5 of `build_resnet_backbone` under MODEL and INPUT, FrozenBatchNorm2d being an affine map."""
    model_config, resnets = config["MODEL"], config["MODEL"]["RESNETS"]
    order = config.get("INPUT", {}).get("FORMAT", "BGR")
    image = bgr.flip(-1) if order == "RGB" else bgr
    depth = resnets.get("DEPTH", 50)
    groups, width = resnets.get("NUM_GROUPS", 1), resnets.get("WIDTH_PER_GROUP", 64)
    in_1x1 = resnets.get("STRIDE_IN_1X1", True)
    out_channels = resnets.get("RES2_OUT_CHANNELS", 256)
    entries = Entries(model)

    def layer(x: Tensor, name: str, stride: int = 1, padding: int = 0, groups: int = 1) -> Tensor:
        return entries.norm(entries.conv(x, name, stride, padding, groups), f"{name}.norm")

    x = channels_first(image, model_config["PIXEL_MEAN"], model_config["PIXEL_STD"])
    x = F.max_pool2d(F.relu(layer(x, "stem.conv1", 2, 3)), 3, 2, 1)
    channels = 64
    for stage, blocks in enumerate(BLOCKS[depth]):
        for block in range(blocks):
            name = f"res{stage + 2}.{block}"
            stride = 2 if block == 0 and stage > 0 else 1
            if depth < 50:
                y = F.relu(layer(x, f"{name}.conv1", stride, 1))
                y = layer(y, f"{name}.conv2", 1, 1)
            else:
                assert entries[f"{name}.conv1.weight"].shape[0] == groups * width * 2**stage
                y = F.relu(layer(x, f"{name}.conv1", stride if in_1x1 else 1))
                y = F.relu(layer(y, f"{name}.conv2", 1 if in_1x1 else stride, 1, groups))
                y = layer(y, f"{name}.conv3")
            wanted = out_channels * 2**stage
            x = F.relu(y + (layer(x, f"{name}.shortcut", stride) if channels != wanted else x))
            channels = wanted
    assert not entries, sorted(entries)
    return x


def mmdet(state: dict[str, Tensor], config: dict[str, Any], bgr: Tensor) -> Tensor:
    """The last output of `ResNet` or `ResNeXt` behind `DetDataPreprocessor`."""
    pixels, backbone = config["data_preprocessor"], config["backbone"]
    image = bgr.flip(-1) if pixels.get("bgr_to_rgb", False) else bgr
    depth, groups, base = backbone["depth"], backbone.get("groups", 1), backbone.get("base_width", 4)
    in_first = backbone.get("style", "pytorch") == "caffe"
    entries = Entries(state)

    def layer(x: Tensor, name: str, number: int, *of_conv: int) -> Tensor:
        return entries.norm(entries.conv(x, f"{name}conv{number}", *of_conv), f"{name}bn{number}")

    x = channels_first(image, pixels["mean"], pixels["std"])
    x = F.max_pool2d(F.relu(layer(x, "", 1, 2, 3)), 3, 2, 1)
    for stage, blocks in enumerate(BLOCKS[depth][: backbone["num_stages"]]):
        planes = 64 * 2**stage
        for block in range(blocks):
            name = f"layer{stage + 1}.{block}."
            stride = 2 if block == 0 and stage > 0 else 1
            if depth < 50:
                y = layer(F.relu(layer(x, name, 1, stride, 1)), name, 2, 1, 1)
            else:
                inner = planes if groups == 1 else planes * base // 64 * groups
                assert entries[f"{name}conv1.weight"].shape[0] == inner
                y = F.relu(layer(x, name, 1, stride if in_first else 1))
                y = F.relu(layer(y, name, 2, 1 if in_first else stride, 1, groups))
                y = layer(y, name, 3)
            if block == 0 and (stage > 0 or depth >= 50):
                x = entries.norm(entries.conv(x, f"{name}downsample.0", stride), f"{name}downsample.1")
            x = F.relu(y + x)
    assert not entries, sorted(entries)
    return x


def mmdet_own(state: dict[str, Tensor], config: dict[str, Any], bgr: Tensor) -> Tensor | None:
    """The same by mmdetection's own module; None where the framework is not installed."""
    try:
        from mmdet.models.backbones import ResNet, ResNeXt
    except ImportError:
        return None
    settings = {key: value for key, value in config["backbone"].items() if key not in ("type", "init_cfg")}
    module = {"ResNet": ResNet, "ResNeXt": ResNeXt}[config["backbone"]["type"]](**settings)
    module.load_state_dict(state)  # strict: every key of the file is one of the framework's, and the other way round
    pixels = config["data_preprocessor"]
    image = bgr.flip(-1) if pixels["bgr_to_rgb"] else bgr
    module.double()
    module.eval()  # its own, which returns nothing
    with torch.no_grad():
        found: Tensor = module(channels_first(image, pixels["mean"], pixels["std"]))[-1]
    return found


def detectron2_own(model: dict[str, Any], config: dict[str, Any], bgr: Tensor) -> Tensor | None:
    """The same by detectron2's own module; None where the framework is not installed."""
    try:
        from detectron2.config import CfgNode, get_cfg
        from detectron2.layers import ShapeSpec
        from detectron2.modeling.backbone import build_resnet_backbone
    except ImportError:
        return None
    cfg = get_cfg()
    cfg.merge_from_other_cfg(CfgNode(config))
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    module = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    module.load_state_dict({key: torch.as_tensor(value) for key, value in model.items()})
    image = bgr.flip(-1) if cfg.INPUT.FORMAT == "RGB" else bgr
    with torch.no_grad():
        found: Tensor = module.double().eval()(channels_first(image, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD))["res5"]
    return found
