"""The libraries a backbone is exported to: for each the names it uses and the file it reads.

A conversion either finds a place for every weight or is refused. torchvision's and timm's own models, and for a neck
torchvision's BackboneWithFPN, are loaded and their feature maps are compared with the run's own. What must agree with
the pre-training besides (pixel mean and deviation, channel order, frozen stages) is in the README (readme.py). Costs
seconds, since a whole model of the target is built. Prefer `safetensors` for any other program: the backbone's own
names, and no code in the file; prefer `torchvision` over `torchvision-fpn` for a detector without a pyramid.
"""

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from io import BytesIO

import torch
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.resnet import ResNet

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.train.engine.checkpoint import BODY, PYRAMID
from jigsaw_pretrain.train.export.readme import PYRAMID_TARGET
from jigsaw_pretrain.train.export.resnet_names import resnet_of, to_detectron2
from jigsaw_pretrain.train.models import backbones, feature_maps, libraries
from jigsaw_pretrain.train.models.layers import GroupNorm, Neck, input_convolutions, set_input_channels
from jigsaw_pretrain.train.models.weights import COUNTER, match, with_about

_LAYERS = {"layer1": "0", "layer2": "1", "layer3": "2", "layer4": "3"}

StateDict = Mapping[str, Tensor]

TOLERANCE = 1e-5
"""The largest difference of a feature map, relative to its largest value."""


@dataclass(frozen=True)
class Target:
    """A library: ``convert`` gives a backbone's state its names, ``pack`` makes its file of them.

    suffix: of its files; the library picks its loader by it. pack: takes the entries and the text entries beside them.
    """

    suffix: str
    convert: Callable[[feature_maps.Backbone, StateDict], dict[str, Tensor]]
    pack: Callable[[Mapping[str, Tensor], Mapping[str, str]], bytes]


def check_own(name: str, state: StateDict, norm: str = "bn", in_channels: int = 3) -> feature_maps.Backbone:
    """The backbone of that name and norm holding exactly these weights; UserError where they are not its own."""
    own = backbones.build(name, norm, in_channels=in_channels)
    try:
        own.module.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"the checkpoint is not of {name}: {' '.join(str(error).split())[:300]}") from error
    own.module.eval()
    return own


def stem(own: feature_maps.Backbone) -> dict[str, str]:
    """The convolutions over the input as Python writes them, by name, where they are not those of three channels."""
    if own.in_channels == 3 or own.name.startswith(backbones.TIMM):
        return {}
    return {name: repr(one) for name, one in input_convolutions(own.module, own.in_channels).items()}


def to_torchvision(own: feature_maps.Backbone, state: StateDict) -> dict[str, Tensor]:
    """The state for ``torchvision.models.NAME().load_state_dict(state, strict=False)``: all but the classifier's keys.

    Raises UserError for a model torchvision does not have, for a key that finds no place, and for another map.
    """
    short = own.name.removeprefix(backbones.TIMM)
    if short not in backbones.names():
        raise UserError(f"torchvision has no {short}: export --to safetensors or --to timm")
    return _proven(own, state, short)


def to_timm(own: feature_maps.Backbone, state: StateDict) -> dict[str, Tensor]:
    """The state for ``timm.create_model(NAME)``, checked as to_torchvision does."""
    if ":" in own.name and not own.name.startswith(backbones.TIMM):
        raise UserError(f"timm has no {own.name}: export --to safetensors")
    return _proven(own, state, backbones.TIMM + own.name.removeprefix(backbones.TIMM))


def normalisation_of_timm(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation, of pixels in 0..1, that timm's own configuration of a model states."""
    import timm

    stated = timm.get_pretrained_cfg(name.removeprefix(backbones.TIMM))
    assert stated is not None
    return tuple(stated.mean), tuple(stated.std)


def _proven(own: feature_maps.Backbone, state: StateDict, other: str) -> dict[str, Tensor]:
    """The state, after the whole model ``other`` took it strictly but for its classifier, with the same map."""
    name = own.name
    if other.startswith(backbones.TIMM):
        whole = backbones.whole_timm_model(other, own.norm, own.in_channels)
    else:
        whole = backbones.whole_model(other, own.norm)
        if own.in_channels != 3:
            set_input_channels(other, whole, own.in_channels)
    head = own.head if other == name else backbones.build(other, own.norm, in_channels=own.in_channels).head
    found = match(state, whole, name, ignored=head)
    wrong = [*found.missing, *found.unexpected, *found.reshaped]
    if wrong:
        raise UserError(
            f"the entries of {name} are not those of {other}: {len(wrong)} differ (such as {wrong[0]}); export "
            "--to safetensors, or train the other library's model (see `backbone` in the recipe)"
        )
    whole.load_state_dict(dict(state), strict=False)
    whole.eval()
    if other.startswith(backbones.TIMM):
        forward: Callable[[Tensor], Tensor] = partial(backbones.timm_map(other, whole, own.in_channels), whole)
    else:
        forward = feature_maps.cut(other, whole, own.norm, in_channels=own.in_channels).module.eval()
    compare(name, own.module, other, forward, 4 * own.stride, own.in_channels)
    return dict(state)


def compare(
    name: str, own: nn.Module, other: str, forward: Callable[[Tensor], Tensor], size: int, in_channels: int = 3
) -> None:
    """Refuse a target whose map of one random image of ``size`` pixels is not the backbone's."""
    image = torch.rand(1, in_channels, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = own(image), forward(image)
    if expected.shape != found.shape or not torch.allclose(
        expected, found, rtol=0, atol=TOLERANCE * float(expected.abs().max())
    ):
        raise UserError(
            f"{other} computes a different feature map from these weights than {name}; nothing was written: export "
            "--to safetensors"
        )


def to_pyramid(own: feature_maps.Backbone, state: StateDict) -> dict[str, Tensor]:
    """The state for ``BackboneWithFPN(...).load_state_dict(state)``, strictly; takes and returns `body.*` and `fpn.*`.

    Raises UserError for a backbone that is no ResNet of torchvision, for a key that finds no place, and for other maps.
    """
    whole = backbones.whole_model(own.name, own.norm)
    if not isinstance(whole, ResNet):
        raise UserError(
            f"torchvision builds its feature pyramids on ResNets, not on a {own.name}: the run's backbone-fpn.pth has "
            "the weights under their own names, and --to torchvision gives the backbone alone"
        )
    if own.in_channels != 3:
        set_input_channels(own.name, whole, own.in_channels)
    norm = GroupNorm if own.norm == "gn" else None
    width = next(value.shape[0] for key, value in state.items() if key.startswith(f"{PYRAMID}inner_blocks"))
    multi_level = backbones.build(own.name, own.norm, multi_level=True, in_channels=own.in_channels)
    channels = [stage.channels for stage in multi_level.stages]
    theirs = BackboneWithFPN(whole, _LAYERS, channels, width, norm_layer=norm)
    try:
        theirs.load_state_dict(dict(state))
    except RuntimeError as error:
        raise UserError(f"the neck's entries are not torchvision's: {' '.join(str(error).split())[:300]}") from error
    neck = Neck(channels, width, norm)
    for module, prefix in ((multi_level.module, BODY), (neck, PYRAMID)):
        module.load_state_dict({key.removeprefix(prefix): one for key, one in state.items() if key.startswith(prefix)})
    _compare_pyramids(nn.Sequential(multi_level.module, neck).eval(), theirs.eval(), own)
    return dict(state)


def _compare_pyramids(ours: nn.Module, theirs: nn.Module, own: feature_maps.Backbone) -> None:
    image = torch.rand(1, own.in_channels, 4 * own.stride, 4 * own.stride, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = ours(image), theirs(image)
    for level, one in enumerate(expected):
        if not torch.allclose(one, found[str(level)], rtol=0, atol=TOLERANCE * float(one.abs().max())):
            raise UserError(
                f"torchvision computes a different level {level} from the weights of {own.name} and its neck; nothing "
                "was written"
            )


def to_mmdet(own: feature_maps.Backbone, state: StateDict) -> dict[str, Tensor]:
    """The state for mmdetection's ResNet or ResNeXt (style pytorch): torchvision's own names."""
    _refuse_group_norm(own, "mmdetection")
    resnet = resnet_of(own.name, "mmdetection")
    if resnet.groups == 1 and resnet.width != 64:
        raise UserError(f"mmdetection's ResNet has no width but 64 and so no {own.name}: export --to detectron2")
    _ = _renamed(state, own.name)
    return dict(state)


def to_detectron(own: feature_maps.Backbone, state: StateDict) -> dict[str, Tensor]:
    """The state under detectron2's names; batch counters, which it does not have, are left out."""
    _refuse_group_norm(own, "detectron2")
    return _renamed(state, own.name)


def _refuse_group_norm(own: feature_maps.Backbone, library: str) -> None:
    if own.norm != "bn":
        raise UserError(
            f"{library} has no such network under group norm, or other names for it, and no conversion was checked: "
            "export --to torchvision or --to safetensors"
        )


def _renamed(state: StateDict, name: str) -> dict[str, Tensor]:
    renamed = {to_detectron2(key): value for key, value in state.items() if not key.endswith(COUNTER)}
    wrong = sorted(set(renamed) ^ resnet_of(name, "detectron2").detectron2_keys())
    if wrong:
        raise UserError(f"{name} is no ResNet of the published form: {len(wrong)} entries differ (such as {wrong[0]})")
    return renamed


def to_ultralytics(own: feature_maps.Backbone, state: StateDict) -> dict[str, Tensor]:
    """The state under Ultralytics' names, after a whole YOLO of the configuration took it with the same map."""
    if not own.name.startswith(libraries.ULTRALYTICS):
        raise UserError(f"ultralytics has no {own.name}: export --to safetensors, torchvision or timm")
    _refuse_group_norm(own, "ultralytics")
    whole = libraries.whole_yolo(own.name, own.in_channels)
    unexpected = whole.load_state_dict(dict(state), strict=False).unexpected_keys
    if unexpected:
        raise UserError(
            f"the entries of {own.name} are not a YOLO's: {len(unexpected)} differ (such as {unexpected[0]})"
        )
    layers = whole.eval().model[: len(whole.yaml["backbone"])]
    compare(own.name, own.module, own.name, layers, 4 * own.stride, own.in_channels)
    return dict(state)


def to_transformers(own: feature_maps.Backbone, state: StateDict) -> dict[str, Tensor]:
    """The state under transformers' names, after its AutoBackbone took it strictly with the same map."""
    if not own.name.startswith(libraries.TRANSFORMERS):
        raise UserError(f"transformers has no {own.name}: export --to safetensors, torchvision or timm")
    _refuse_group_norm(own, "transformers")
    whole = libraries.hugging_face(own.name, own.in_channels)
    try:
        whole.load_state_dict(dict(state))
    except RuntimeError as error:
        raise UserError(f"the entries of {own.name} differ: {' '.join(str(error).split())[:300]}") from error
    whole.eval()
    compare(
        own.name, own.module, own.name, lambda image: whole(image).feature_maps[-1], 4 * own.stride, own.in_channels
    )
    return dict(state)


def to_safetensors(own: feature_maps.Backbone, state: StateDict) -> dict[str, Tensor]:
    """The state under the backbone's own names."""
    return dict(state)


def pack_torch(state: Mapping[str, Tensor], about: Mapping[str, str]) -> bytes:
    """A state dict as torch.save writes it; ``about`` is among its metadata, where no reader meets it unasked."""
    buffer = BytesIO()
    torch.save(with_about(state, about), buffer)
    return buffer.getvalue()


def pack_detectron2(state: Mapping[str, Tensor], about: Mapping[str, str]) -> bytes:
    """The pickle of arrays that detectron2's checkpointer reads and matches to its modules by their last names."""
    arrays = {key: value.numpy() for key, value in state.items()}
    return pickle.dumps({"model": arrays, "__author__": "jigsaw-pretrain", "matching_heuristics": True}, protocol=4)


def pack_safetensors(state: Mapping[str, Tensor], about: Mapping[str, str]) -> bytes:
    """A safetensors file with ``about`` as its metadata."""
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise UserError("--to safetensors needs it: pip install 'jigsaw-pretrain[safetensors]'") from error
    return bytes(save(dict(state), metadata=dict(about)))


TARGETS = {
    "torchvision": Target(".pth", to_torchvision, pack_torch),
    PYRAMID_TARGET: Target(".pth", to_pyramid, pack_torch),
    "timm": Target(".pth", to_timm, pack_torch),
    "mmdet": Target(".pth", to_mmdet, pack_torch),
    "detectron2": Target(".pkl", to_detectron, pack_detectron2),
    "ultralytics": Target(".pth", to_ultralytics, pack_torch),
    "transformers": Target(".pth", to_transformers, pack_torch),
    "safetensors": Target(".safetensors", to_safetensors, pack_safetensors),
}
