"""The export of a neck: backbone and pyramid in one file, as torchvision's BackboneWithFPN names them.

Checked at every export: loaded strictly into torchvision's own module, and all four levels compared with the run's.
Seconds. Prefer `--to torchvision` for a detector without a pyramid, and for what loads a plain backbone.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.resnet import ResNet

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.train.engine.checkpoint import BODY, PYRAMID
from jigsaw_pretrain.train.models import backbones
from jigsaw_pretrain.train.models.layers import GroupNorm
from jigsaw_pretrain.train.models.neck import Neck
from jigsaw_pretrain.train.models.stems import widen

PYRAMID_TARGET = "torchvision-fpn"

_LAYERS = {"layer1": "0", "layer2": "1", "layer3": "2", "layer4": "3"}


def to_pyramid(own: backbones.Backbone, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state for ``BackboneWithFPN(...).load_state_dict(state)``, strictly; takes and returns `body.*` and `fpn.*`.

    Raises UserError for a backbone that is no ResNet of torchvision, for a key that finds no place, and for other maps.
    """
    whole = backbones.whole_model(own.name, own.norm)
    if not isinstance(whole, ResNet):
        raise UserError(
            f"torchvision builds its feature pyramids on ResNets, not on a {own.name}: the run's backbone-fpn.pth has "
            "the weights under their own names, and --to torchvision gives the backbone alone"
        )
    if own.colours != 3:
        widen(own.name, whole, own.colours)
    norm = GroupNorm if own.norm == "gn" else None
    width = next(value.shape[0] for key, value in state.items() if key.startswith(f"{PYRAMID}inner_blocks"))
    staged = backbones.build(own.name, own.norm, staged=True, colours=own.colours)
    channels = [stage.channels for stage in staged.stages]
    theirs = BackboneWithFPN(whole, _LAYERS, channels, width, norm_layer=norm)
    try:
        theirs.load_state_dict(dict(state))
    except RuntimeError as error:
        raise UserError(f"the neck's entries are not torchvision's: {' '.join(str(error).split())[:300]}") from error
    neck = Neck(channels, width, norm)
    for module, prefix in ((staged.module, BODY), (neck, PYRAMID)):
        module.load_state_dict({key.removeprefix(prefix): one for key, one in state.items() if key.startswith(prefix)})
    _compare(nn.Sequential(staged.module, neck).eval(), theirs.eval(), own)
    return dict(state)


def _compare(ours: nn.Module, theirs: nn.Module, own: backbones.Backbone) -> None:
    from jigsaw_pretrain.train.export.targets import TOLERANCE

    image = torch.rand(1, own.colours, 4 * own.stride, 4 * own.stride, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = ours(image), theirs(image)
    for level, one in enumerate(expected):
        if not torch.allclose(one, found[str(level)], rtol=0, atol=TOLERANCE * float(one.abs().max())):
            raise UserError(f"torchvision makes another level {level} of the weights of {own.name} and its neck")
