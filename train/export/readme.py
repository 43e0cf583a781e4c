"""The lines to paste into the library that takes the weights, and the README they stand in.

Text only. What the pre-training fixed is written out (pixel mean and deviation, channel order, where the stride lies),
and so is what section 4.1 of the paper did in the detector: batch norm frozen, the library's usual first stages frozen.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jigsaw_pretrain.formats.pixels import RGB8, PixelFormat
from jigsaw_pretrain.train.export.resnet_names import resnet_of

FENCE = "```"


@dataclass(frozen=True)
class ExportInfo:
    """What the lines depend on: file name, backbone, and the recipe's mean, std (of pixels in 0..1) and norm.

    pixels: of the run's dataset. stem: its convolutions over other than three channels (train.targets.stem).
    """

    file: str
    backbone: str
    channels: int
    stride: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    head: tuple[str, ...]
    norm: str = "bn"
    neck_channels: int = 256
    pixels: PixelFormat = RGB8
    stem: Mapping[str, str] = field(default_factory=dict)


def readme(facts: ExportInfo, to: str, lines: str, origin: str) -> str:
    """The README beside an export."""
    if not facts.pixels.is_rgb8:
        unit = f"divided by {facts.pixels.full_scale:g}" if facts.pixels.full_scale > 1 else "in their own unit"
        return (
            f"# {facts.file}: {facts.backbone} for {to}\n\n{origin}\n\n"
            f"Feature map: {facts.channels} channels at stride {facts.stride}. Input: **{facts.pixels}**, channels as\n"
            f"the dataset has them. Values {unit} were normalised with mean\n{_numbers(facts.mean)} and standard\n"
            f"deviation {_numbers(facts.std)}.\n"
            "Another order or another normalisation loses most of the pre-training without any error.\n\n"
            f"{lines}"
        )
    return (
        f"# {facts.file}: {facts.backbone} for {to}\n\n{origin}\n\n"
        f"Feature map: {facts.channels} channels at stride {facts.stride}. Channel order **RGB**. Pixels in 0..1 were\n"
        f"normalised with mean {_numbers(facts.mean)} and standard deviation {_numbers(facts.std)}\n"
        f"(in 0..255: {_numbers(facts.mean, 255)} and {_numbers(facts.std, 255)}).\n"
        "Another order or another normalisation loses most of the pre-training without any error.\n\n"
        f"{lines}"
    )


def torchvision(facts: ExportInfo) -> str:
    """Lines of Python for torchvision's classification models and detectors."""
    name = facts.backbone.removeprefix("timm:")
    text = _python(
        f"import {'' if facts.norm == 'bn' else 'math, '}torch, torchvision",
        *_norm_lines(facts),
        "",
        f'weights = torch.load("{facts.file}", weights_only=True)',
        f"model = {_normed(facts, f'torchvision.models.{name}()')}",
        *(f"{_attribute('model', place)} = torch.nn.{convolution}" for place, convolution in facts.stem.items()),
        "found = model.load_state_dict(weights, strict=False)",
        f"assert found.unexpected_keys == [] and set(found.missing_keys) == {_keys(facts.head)}",
    )
    if name.startswith(("resnet", "resnext", "wide_resnet")):
        frozen = facts.norm == "bn"
        what = "first stages and all batch norm frozen, as in the paper" if frozen else "nothing frozen"
        layer = "FrozenBatchNorm2d" if frozen else "torch.nn.BatchNorm2d"
        backbone = (
            f'resnet_fpn_backbone(backbone_name="{name}", weights=None, norm_layer={layer}, '
            f"trainable_layers={3 if frozen else 5})"
        )
        text += f"\nA detector ({what}):\n\n" + _python(
            "from torchvision.models.detection import FasterRCNN",
            "from torchvision.models.detection.backbone_utils import resnet_fpn_backbone",
            *(["from torchvision.ops import FrozenBatchNorm2d"] if frozen else []),
            "",
            f"backbone = {_normed(facts, backbone)}",
            *(
                f"{_attribute('backbone.body', place)} = torch.nn.{convolution}"
                for place, convolution in facts.stem.items()
            ),
            "backbone.body.load_state_dict(weights)  # strict: every entry finds its place",
            f"detector = FasterRCNN(backbone, num_classes=91, image_mean={_numbers(facts.mean)},",
            f"                      image_std={_numbers(facts.std)})",
        )
    return text


def pyramid(facts: ExportInfo) -> str:
    """Lines of Python for a detector of torchvision's with a feature pyramid."""
    frozen = facts.norm == "bn"
    name, width = facts.backbone, facts.neck_channels
    stage = facts.channels // 8
    network = f"torchvision.models.{name}({'norm_layer=FrozenBatchNorm2d' if frozen else ''})"
    what = "First stages and all batch norm frozen, as in the paper" if frozen else "Nothing frozen"
    widths = [stage * 2**level for level in range(4)]
    norm = "" if frozen else ", norm_layer=lambda n: torch.nn.GroupNorm(math.gcd(32, n), n)"
    held = ['for stage in ("conv1", "layer1"):', "    backbone.body[stage].requires_grad_(False)"]
    text = f"{what}:\n\n" + _python(
        f"import {'' if frozen else 'math, '}torch, torchvision",
        "from torchvision.models.detection import FasterRCNN",
        "from torchvision.models.detection.backbone_utils import BackboneWithFPN",
        *(["from torchvision.ops import FrozenBatchNorm2d"] if frozen else []),
        *_norm_lines(facts),
        "",
        f'weights = torch.load("{facts.file}", weights_only=True)',
        f"network = {_normed(facts, network)}",
        *(f"{_attribute('network', place)} = torch.nn.{convolution}" for place, convolution in facts.stem.items()),
        'layers = {"layer1": "0", "layer2": "1", "layer3": "2", "layer4": "3"}',
        f"backbone = BackboneWithFPN(network, layers, {widths}, {width}{norm})",
        "backbone.load_state_dict(weights)  # strict: every entry finds its place",
        *(held if frozen else []),
        f"detector = FasterRCNN(backbone, num_classes=91, image_mean={_numbers(facts.mean)},",
        f"                      image_std={_numbers(facts.std)})",
    )
    if frozen and (name, width) == ("resnet50", 256):
        text += (
            "\nThe `backbone` of torchvision's `fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)` takes\n"
            "the file as strictly; give it `image_mean` and `image_std` too.\n"
        )
    return text + "\nThe pyramid's pooled level has no weights. RetinaNet's pyramid begins at the second stage.\n"


def timm(facts: ExportInfo) -> str:
    """Lines of Python for timm."""
    name = facts.backbone.removeprefix("timm:")
    rgb, count = facts.pixels.is_rgb8, facts.pixels.channels
    channels = "" if count == 3 else f", in_chans={count}"
    return _python(
        f"import {'' if facts.norm == 'bn' else 'math, '}timm, torch",
        *_norm_lines(facts),
        "",
        f'weights = torch.load("{facts.file}", weights_only=True)',
        f"""model = {_normed(facts, f'timm.create_model("{name}", pretrained=False{channels})')}""",
        "found = model.load_state_dict(weights, strict=False)",
        f"assert found.unexpected_keys == [] and set(found.missing_keys) == {_keys(facts.head)}",
        f"mean, std = {_numbers(facts.mean)}, {_numbers(facts.std)}  # not those of model.pretrained_cfg",
        "features = model.forward_features  # "
        + ("RGB images in 0..1" if rgb else f"images / {facts.pixels.full_scale:g}")
        + ", after (x - mean) / std",
    )


def mmdet(facts: ExportInfo) -> str:
    """Lines of an mmdetection 3 configuration."""
    resnet = resnet_of(facts.backbone, "mmdetection")
    kind = "type='ResNet'"
    if resnet.groups > 1:
        kind = f"type='ResNeXt', groups={resnet.groups}, base_width={resnet.width}"
    pixels, scale = facts.pixels, facts.pixels.full_scale
    channels = "" if pixels.channels == 3 else f" in_channels={pixels.channels},"
    means = f"mean={_numbers(facts.mean, scale)}, std={_numbers(facts.std, scale)}"
    text = _python(
        "model = dict(",
        "    data_preprocessor=dict(",
        f"        type='DetDataPreprocessor', {means},",
        f"        bgr_to_rgb={pixels.is_rgb8}, pad_size_divisor=32),",
        "    backbone=dict(",
        f"        {kind},{channels} depth={resnet.depth}, num_stages=4, out_indices=(0, 1, 2, 3), style='pytorch',",
        "        frozen_stages=1, norm_cfg=dict(type='BN', requires_grad=False), norm_eval=True,",
        f"        init_cfg=dict(type='Pretrained', checkpoint='{facts.file}')))",
    )
    if not pixels.is_rgb8:
        return text + (
            "\nYour own loading transform must give these values in this order of channels (bgr_to_rgb is off). The\n"
            "preprocessor takes one mean or three: of any other number normalise in the transform and leave mean and\n"
            "std out. The log lists keys that found no place: expect none.\n"
        )
    return text + (
        "\nmmdetection reads images as BGR, so `bgr_to_rgb` must be True; style `pytorch` has the stride in the 3 x 3\n"
        "convolution, as here. Its log lists keys that found no place: expect none.\n"
    )


def detectron2(facts: ExportInfo) -> str:
    """Lines of a detectron2 YAML configuration."""
    resnet = resnet_of(facts.backbone, "detectron2")
    lines = [
        "MODEL:",
        f'  WEIGHTS: "{facts.file}"',
        f"  PIXEL_MEAN: {_numbers(facts.mean, facts.pixels.full_scale)}",
        f"  PIXEL_STD: {_numbers(facts.std, facts.pixels.full_scale)}",
        "  BACKBONE:",
        "    FREEZE_AT: 2",
        "  RESNETS:",
        f"    DEPTH: {resnet.depth}",
        "    STRIDE_IN_1X1: False",
        '    NORM: "FrozenBN"',
    ]
    if resnet.convolutions == 2:
        lines.append("    RES2_OUT_CHANNELS: 64")
    if (resnet.groups, resnet.width) != (1, 64):
        lines += [f"    NUM_GROUPS: {resnet.groups}", f"    WIDTH_PER_GROUP: {resnet.width}"]
    if not facts.pixels.is_rgb8:
        return (
            f"{FENCE}yaml\n" + "\n".join(lines) + f"\n{FENCE}\n\n"
            "STRIDE_IN_1X1 must be False. The number of input channels follows from PIXEL_MEAN; your own dataset\n"
            "mapper must give these values in this order of channels. FREEZE_AT 2 freezes the stem and res2.\n"
        )
    lines += ["INPUT:", '  FORMAT: "RGB"']
    return (
        f"{FENCE}yaml\n" + "\n".join(lines) + f"\n{FENCE}\n\n"
        "STRIDE_IN_1X1 must be False (the stride lies in the 3 x 3 convolution) and FORMAT RGB: both differ from\n"
        "detectron2's defaults. FREEZE_AT 2 freezes the stem and res2.\n"
    )


def safetensors(facts: ExportInfo) -> str:
    """Lines of Python for any program."""
    return _python(
        "from safetensors.torch import load_file",
        "",
        f'weights = load_file("{facts.file}")  # under the names of {facts.backbone}',
    )


def _normed(facts: ExportInfo, model: str) -> str:
    return model if facts.norm == "bn" else f"group_norm({model})"


def _norm_lines(facts: ExportInfo) -> list[str]:
    """A function that puts GN(32) in the place of batch norm, as the backbone was trained; nothing for batch norm."""
    if facts.norm == "bn":
        return []
    return [
        "",
        "",
        "def group_norm(module):",
        "    for name, child in module.named_children():",
        "        if isinstance(child, torch.nn.BatchNorm2d):",
        "            groups = math.gcd(32, child.num_features)",
        "            setattr(module, name, torch.nn.GroupNorm(groups, child.num_features))",
        "        else:",
        "            group_norm(child)",
        "    return module",
        "",
    ]


def _python(*lines: str) -> str:
    return f"{FENCE}python\n" + "\n".join(lines) + f"\n{FENCE}\n"


def _numbers(values: Sequence[float], scale: float = 1) -> list[float]:
    return [round(scale * value, 6) if abs(value) > 0.01 else float(f"{scale * value:.6g}") for value in values]


def _attribute(root: str, place: str) -> str:
    """``model.features[0][0]`` of ``features.0.0``."""
    return root + "".join(f"[{step}]" if step.isdigit() else f".{step}" for step in place.split("."))


def _keys(names: Sequence[str]) -> str:
    """A set of keys; a long one by what its members begin with would say too little, so all are named."""
    return "set()" if not names else "{" + ", ".join(f'"{name}"' for name in names) + "}"
