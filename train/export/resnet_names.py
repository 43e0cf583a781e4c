"""ResNets as the detection libraries know them: which one a backbone's name means, and its entries by name.

Detectron2 and mmdetection build ResNets (and ResNeXts) from a depth and a width instead of loading a whole model, so
an export must say which, and every entry must have its place there. Arithmetic only.
"""

import re
from dataclasses import dataclass

from jigsaw_pretrain.errors import UserError

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}

_NAME = re.compile(
    r"(?:timm:)?(?P<kind>resnet|resnext|wide_resnet)(?P<depth>\d+)(?:_(?P<groups>\d+)x(?P<width>\d+)d|_2)?"
)


@dataclass(frozen=True)
class ResNet:
    """A ResNet or ResNeXt of the published form.

    depth: one of BLOCKS. groups, width: of the 3 x 3 convolutions of the first stage (1 and 64 in a plain one).
    """

    depth: int
    groups: int = 1
    width: int = 64

    @property
    def convolutions(self) -> int:
        """Number of convolutions per block."""
        return 2 if self.depth < 50 else 3

    def detectron2_keys(self) -> set[str]:
        """The entries of detectron2's ResNet without a classifier: stem, res2 to res5, convN.norm, shortcut."""
        norms = ("weight", "bias", "running_mean", "running_var")
        layers = ["stem.conv1"]
        for stage, blocks in enumerate(BLOCKS[self.depth], start=2):
            for block in range(blocks):
                layers += [f"res{stage}.{block}.conv{place + 1}" for place in range(self.convolutions)]
            # A shortcut has weights where the number of channels changes: not in the first stage of basic blocks.
            if stage > 2 or self.convolutions == 3:
                layers.append(f"res{stage}.0.shortcut")
        return {f"{layer}.weight" for layer in layers} | {f"{layer}.norm.{norm}" for layer in layers for norm in norms}


def resnet_of(name: str, library: str) -> ResNet:
    """The ResNet that a backbone's name means; UserError, naming the ``library``, where it is none."""
    match = _NAME.fullmatch(name)
    if match is None or int(match["depth"]) not in BLOCKS:
        raise UserError(
            f"{library} builds ResNets and ResNeXts of depth 18 to 152 and has no {name}: export --to safetensors, "
            "torchvision or timm and use that library's module there"
        )
    depth = int(match["depth"])
    if match["kind"] == "wide_resnet":
        return ResNet(depth, width=128)
    if match["groups"]:
        return ResNet(depth, int(match["groups"]), int(match["width"]))
    return ResNet(depth)


def to_detectron2(key: str) -> str:
    """Detectron2's name of an entry of torchvision's ResNet: its own converter's table."""
    head, *rest = key.split(".")
    if not head.startswith("layer"):
        return f"stem.{_layer(head, rest)}"
    block, *inner = rest
    place = f"res{int(head.removeprefix('layer')) + 1}.{block}"
    if inner[0] == "downsample":
        return ".".join([place, "shortcut", *(["norm"] if inner[1] == "1" else []), *inner[2:]])
    return f"{place}.{_layer(inner[0], inner[1:])}"


def _layer(name: str, rest: list[str]) -> str:
    """``conv2.weight`` of itself, ``conv2.norm.bias`` of ``bn2.bias``."""
    return ".".join([f"conv{name.removeprefix('bn')}.norm" if name.startswith("bn") else name, *rest])
