"""The README beside an export: what the pre-training fixed, and the lines that load the weights in their library.

The text lies in templates/, one file per target. It states what a detector must agree with (pixel mean and deviation,
channel order, where the stride lies) and what section 4.1 of the paper did there: batch norm frozen, the library's
usual first stages frozen.

A module of its own: it changes with other libraries' documentation, the command does not.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import jinja2

from jigsaw_pretrain.formats.pixels import RGB8, PixelFormat
from jigsaw_pretrain.train.export.resnet_names import resnet_of

PYRAMID_TARGET = "torchvision-fpn"

TARGET_NAMES = (
    "torchvision",
    PYRAMID_TARGET,
    "timm",
    "mmdet",
    "detectron2",
    "ultralytics",
    "transformers",
    "safetensors",
)
"""What a backbone is exported to, each with a template; known without torch, which targets.py imports."""

MARK = "Pre-trained on jigsaws by jigsaw-pretrain: "
"""What the sentence on where the weights come from begins with: a README without it is no export's."""


@dataclass(frozen=True)
class ExportInfo:
    """What the README depends on: file name, backbone, and the recipe's mean, std (of pixels in 0..1) and norm.

    head: keys of the classifier, which an export leaves out. pixels: of the run's dataset. stem: the convolutions over
    other than three channels, by name (targets.stem). classes: of the run's dataset, in label order.
    timm_normalisation: mean and std by timm's own configuration of the model, for its target.
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
    classes: tuple[str, ...] = ()
    timm_normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    @property
    def is_as_in_timm(self) -> bool:
        """Whether timm's configuration states the run's mean and std, to four digits."""
        own, theirs = (self.mean, self.std), self.timm_normalisation or ()
        return [[round(one, 4) for one in values] for values in own] == [[round(one, 4) for one in v] for v in theirs]


def readme(info: ExportInfo, to: str, origin: str) -> str:
    """The README of an export to the target ``to``; ``origin``, after MARK, says where the weights come from."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jigsaw_pretrain.train.export", "templates"),
        autoescape=False,
        trim_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "json": partial(json.dumps, ensure_ascii=False),
        "numbers": _numbers,
        "attribute": _attribute,
        "key_set": _key_set,
    }
    return environment.get_template(f"{to}.md.j2").render(
        info=info,
        to=to,
        origin=origin,
        scale=info.pixels.full_scale,
        group_norm=info.norm != "bn",
        resnet_of=resnet_of,
    )


def _numbers(values: Sequence[float], scale: float = 1) -> list[float]:
    return [round(scale * value, 6) if abs(value) > 0.01 else float(f"{scale * value:.6g}") for value in values]


def _attribute(root: str, place: str) -> str:
    """``model.features[0][0]`` of ``features.0.0``."""
    return root + "".join(f"[{step}]" if step.isdigit() else f".{step}" for step in place.split("."))


def _key_set(names: Sequence[str]) -> str:
    """Format keys as a Python set, every key named: a shared prefix would not tell them from others."""
    return "set()" if not names else "{" + ", ".join(f'"{name}"' for name in names) + "}"
