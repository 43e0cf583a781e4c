"""Builds backbones by name: torchvision's, timm's (`timm:NAME`), or one's own (`module:callable`).

Those of detection libraries, `ultralytics:FILE.yaml` and `transformers:TYPE`, are built in models/libraries.py.

torchvision's classification models are cut after their last feature map; where to cut is found, not listed (see
models/feature_maps.py). All that lies behind is dropped (DDP meets no unused parameter), names in the state dict stay
torchvision's, and train and eval keep their own graphs, so dropout and stochastic depth behave.

A timm model is taken before its pooling (`forward_features`) under its own names; what lies behind, a head or a last
1 x 1 convolution on pooled features, is dropped. One that is made for a single input size is told to follow the image's
(`dynamic_img_size`), and one that gives tokens, such as a ViT, gives them as a map (`forward_intermediates`, where the
maps of a pyramid come from too). One's own callable is called without arguments and returns a module that maps [n, 3,
H, W] to a feature map, or to a list or dict of maps, of which the coarsest is the last and those of strides 4 to 32 are
a pyramid's; where it returns one map alone, the others are found by tracing it. For images of N channels timm is told
so, and one's own callable is called with ``in_channels=N`` where it takes that; else its first convolution is rebuilt
(models/layers.py). Both are tried on two input sizes and one backward pass without data (meta tensors; a second or
two), so a map that cannot be cut into regions, or a weight that never reaches the map, is refused before a run begins.

A run or a recipe may be a stranger's, so `module:callable` runs only where the command line itself names it. Nothing is
ever downloaded. Prefer torchvision's name where both libraries have the network: its weights load into more
detectors. Prefer a module of your own where the tracing refuses: anything that maps [n, C, H, W] to a map will do.
"""

import copy
import difflib
import importlib
import inspect
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet

from jigsaw_pretrain.errors import COMMAND_LINE, UserError
from jigsaw_pretrain.train.models.feature_maps import (
    NO_STAGES,
    SIZES,
    STAGES,
    Backbone,
    Stage,
    cut,
    is_columnar,
    is_map,
    no_last_stage,
    simple_pyramid,
)
from jigsaw_pretrain.train.models.layers import meta_state, run_on_meta, set_input_channels, with_norm
from jigsaw_pretrain.train.models.libraries import PREFIXES, library_module, reads_a_file

TIMM = "timm:"

_ALLOWED: set[str] = set()

_CLASSIFIERS = ("fc", "classifier", "head", "heads", "AuxLogits", "aux1", "aux2")
"""What torchvision's models call what lies behind their last map."""


OWN: dict[str, Callable[[], nn.Module]] = {
    "resnext101_32x4d": lambda: ResNet(Bottleneck, [3, 4, 23, 3], groups=32, width_per_group=4)
}
"""Networks that torchvision builds and has no name for: X101-32x4d of the papers' tables."""


def names() -> list[str]:
    """Every classification model this torchvision knows, and OWN, in alphabetical order."""
    return sorted({*torchvision.models.list_models(module=torchvision.models), *OWN})


def build(
    name: str, norm: str = "bn", multi_level: bool = False, in_channels: int = 3, *, split: bool = False
) -> Backbone:
    """The backbone of that name under ``norm`` (bn or gn), randomly initialised as its library does it.

    Drawn from torch's global generator.

    Args:
        name: one of torchvision's, `timm:NAME`, or `module:callable` for one's own.
        norm: its norm.
        multi_level: whether its module gives the maps of all STAGES.
        in_channels: channels of its images; models/layers.py says what other than 3 does.
        split: whether its module ends at stride 16, with the last stage as ``rest``.

    Raises:
        UserError: for an unknown name (with the nearest ones), for a model without a feature map that can be cut into
            regions, and for one without the stages asked for.
    """
    if ":" not in name:
        whole = whole_model(name, norm)
        if in_channels != 3:
            set_input_channels(name, whole, in_channels)
        return cut(name, whole, norm, multi_level, in_channels, split=split)
    if name.startswith(TIMM):
        return timm_backbone(name, norm, multi_level, in_channels, split)
    if name.startswith(PREFIXES):
        if reads_a_file(name):
            _check_allowed(name)
        return _of_module(name, library_module(name, in_channels), norm, multi_level, in_channels, split)
    return own_backbone(name, norm, multi_level, in_channels, split)


def whole_model(name: str, norm: str = "bn") -> nn.Module:
    """The model of torchvision with its classifier, randomly initialised; raises UserError for an unknown name."""
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "see torchvision.models.list_models()."
        hint += " timm's are timm:NAME, your own module:callable."
        raise UserError(f"backbone {name!r} is not a classification model of torchvision: {hint}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model: nn.Module = OWN[name]() if name in OWN else torchvision.models.get_model(name, weights=None)
    return with_norm(name, model, norm)


def least_bytes(name: str) -> int:
    """The bytes of the weights of a library's model below its classifier, without making them.

    0 of those that cannot be built without memory, and of the user's own.
    """
    makers: dict[str, Callable[[], nn.Module]] = {
        "": lambda: whole_model(name),
        TIMM: lambda: whole_timm_model(name),
        **dict.fromkeys(PREFIXES, lambda: library_module(name, 3)),
    }
    library = next((prefix for prefix in makers if prefix and name.startswith(prefix)), "")
    if (":" in name and not library) or (library in PREFIXES and reads_a_file(name)):
        return 0
    try:
        with torch.device("meta"):
            model = makers[library]()
    except (UserError, NotImplementedError, RuntimeError):
        # RegNets read values while they are made; what is wrong with a name is reported where its network is built.
        known = torchvision.models.get_model_weights(name) if name in names() and name not in OWN else ()
        return min((4 * one.meta["num_params"] for one in known), default=0)
    weights = (one for key, one in model.named_parameters() if key.split(".")[0] not in _CLASSIFIERS)
    return sum(one.numel() * one.element_size() for one in weights)


def check_size(name: str, weights: Path, where: str) -> None:
    """Refuse a network that is larger than its weights can be: a stranger's run may name one of any size.

    Args:
        name: the network's.
        weights: a file that holds its weights; the largest of them.
        where: the file that names the network.

    Raises:
        UserError: before the network is built.
    """
    least, most = least_bytes(name), weights.stat().st_size if weights.is_file() else 0
    if least > 2 * most:
        raise UserError(
            f"{where} names the backbone {name}, whose weights take {least / 1e6:,.0f} MB, and {weights.name} has "
            f"{most / 1e6:,.1f}: it is damaged, or of another run"
        )


def timm_backbone(
    name: str, norm: str = "bn", multi_level: bool = False, in_channels: int = 3, split: bool = False
) -> Backbone:
    """timm's model of that name up to the map before its pooling, without weights that do not reach the map."""
    whole = whole_timm_model(name, norm, in_channels)
    before = set(whole.state_dict())
    if split:
        _give(whole, type(whole).forward_features)  # type: ignore[attr-defined]
        found = _split(name, whole, norm, in_channels)
        return replace(found, head=frozenset(before - {key for part in found.parts for key in part.state_dict()}))
    last = timm_map(name, whole, in_channels)
    _give(whole, _timm_maps if multi_level else last)
    measured = _measured(name, whole, norm, multi_level, in_channels, last)
    for child, module in list(whole.named_children()):
        own = {f"{child}.{key}" for key, _ in module.named_parameters()}
        if own and own <= measured.idle:
            setattr(whole, child, nn.Identity())
    _refuse_idle(name, measured.idle & {key for key, _ in whole.named_parameters()})
    return replace(measured.backbone, head=frozenset(before - set(whole.state_dict())))


def timm_map(name: str, whole: nn.Module, in_channels: int) -> Callable[[Any, Tensor], Tensor]:
    """What gives the map before pooling of a whole model of timm, called with the model and images.

    That is its forward_features, or where this gives tokens or [n, h, w, channels] its last intermediate map.
    """
    own = type(whole)
    tried = copy.copy(whole)
    _give(tried, own.forward_features)  # type: ignore[attr-defined]
    found = _tried(name, tried, in_channels)[0]
    if _is_channels_first(whole, found) or not hasattr(own, "forward_intermediates"):
        forward: Callable[[Any, Tensor], Tensor] = own.forward_features  # type: ignore[attr-defined]
        return forward
    return _last_intermediate


def _last_intermediate(whole: Any, image: Tensor) -> Tensor:
    found: Tensor = whole.forward_intermediates(image, indices=1, norm=True, intermediates_only=True)[-1]
    return found


def _timm_maps(whole: Any, image: Tensor) -> tuple[Tensor, ...]:
    """The maps of timm's stages; the last is that of forward_features where this is a map of the last stage's size."""
    last, found = whole.forward_intermediates(image, norm=True)
    if _is_channels_first(whole, last) and last.shape[2:] == found[-1].shape[2:]:
        return (*found[:-1], last)
    return tuple(found)


def _is_channels_first(whole: Any, found: Tensor) -> bool:
    return found.dim() == 4 and found.shape[1] == whole.num_features


def _split(name: str, module: nn.Module, norm: str, in_channels: int) -> Backbone:
    """The backbone in two, by tracing it; raises UserError that names the remedy where that fails."""
    try:
        return cut(name, module, norm, in_channels=in_channels, split=True, pooled=False)
    except UserError as error:
        raise UserError(no_last_stage(name)) from error


def whole_timm_model(name: str, norm: str = "bn", in_channels: int = 3) -> nn.Module:
    """timm's model with its classifier, randomly initialised; raises UserError without timm or for an unknown name."""
    try:
        import timm
    except ImportError as error:
        raise UserError(f"backbone {name} needs timm: pip install 'jigsaw-pretrain[timm]'") from error
    short = name.removeprefix(TIMM)
    if not timm.is_model(short):
        near = difflib.get_close_matches(short, timm.list_models(), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(TIMM + one for one in near)}?" if near else "see timm.list_models()."
        raise UserError(f"backbone {name}: timm has no model {short!r}: {hint}")
    asked: dict[str, Any] = {"in_chans": in_channels} if in_channels != 3 else {}
    model: nn.Module = timm.create_model(short, pretrained=False, **asked)
    if "dynamic_img_size" in inspect.signature(type(model).__init__).parameters:
        model = timm.create_model(short, pretrained=False, dynamic_img_size=True, **asked)
    return with_norm(name, model, norm)


def allow_backbone(name: str) -> None:
    """Let `module:callable` run in this process, or a file make a network, where no command line names it.

    For programs that call the library.
    """
    _ALLOWED.add(name)


def _check_allowed(name: str) -> None:
    """Refuse code that only a file names: a recipe or a run may be a stranger's."""
    named = any(word == name or word.endswith(f"={name}") for word in COMMAND_LINE.get())
    if not named and name not in _ALLOWED:
        does = (
            "is built by a file" if name.startswith(PREFIXES) else f"runs code of the module {name.partition(':')[0]}"
        )
        raise UserError(
            f"backbone {name} {does}, and nothing but a file asks for it: where it is yours, name it on the command "
            f"line (--backbone {name} or --set model.backbone={name}; in a program jigsaw_pretrain.allow_backbone)"
        )


def own_backbone(
    name: str, norm: str = "bn", multi_level: bool = False, in_channels: int = 3, split: bool = False
) -> Backbone:
    """The module that `module:callable` returns; raises UserError that says what is wrong with it."""
    _check_allowed(name)
    return _of_module(name, _called(name, in_channels), norm, multi_level, in_channels, split)


def _of_module(name: str, module: nn.Module, norm: str, multi_level: bool, in_channels: int, split: bool) -> Backbone:
    """The backbone of a module that returns a map, or a list or dict of maps."""
    module = with_norm(name, module, norm)
    if split:
        return _split(name, module, norm, in_channels)
    kind = type(module)
    is_several = not isinstance(_tried(name, module, in_channels)[0], Tensor)
    if multi_level and not is_several:
        return cut(name, module, norm, multi_level, in_channels, pooled=False)
    if is_several:
        _give(module, lambda own, image: _by_stride(kind.forward(own, image), multi_level))
    found = _measured(name, module, norm, multi_level, in_channels)
    _refuse_idle(name, found.idle)
    return found.backbone


def _by_stride(found: Any, all_of_them: bool) -> Any:
    """The coarsest of a list, dict or transformers' output of maps, or all of them from fine to coarse."""
    found = getattr(found, "feature_maps", found)
    maps = list(found.values()) if isinstance(found, dict) else list(found)
    maps.sort(key=lambda one: -one.shape[-1])
    return tuple(maps) if all_of_them else maps[-1]


def _called(name: str, in_channels: int) -> nn.Module:
    where, _, what = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        # A console script would not look there. Last, so that no file there stands in for an installed module.
        sys.path.append(here)
    try:
        maker: Callable[..., object] = getattr(importlib.import_module(where), what)
        told = in_channels != 3 and "in_channels" in inspect.signature(maker).parameters
        made = maker(in_channels=in_channels) if told else maker()
    except Exception as error:
        raise UserError(
            f"backbone {name}: {where}.{what}() fails ({type(error).__name__}: {error}): name a callable without "
            "arguments that returns a torch.nn.Module"
        ) from error
    if not isinstance(made, nn.Module):
        raise UserError(f"backbone {name} returns a {type(made).__name__}, not a torch.nn.Module")
    if in_channels != 3 and not told:
        set_input_channels(name, made, in_channels)
    return made


@dataclass(frozen=True)
class _Measured:
    """A backbone, without what lies behind its maps, and the names of the parameters that do not reach them."""

    backbone: Backbone
    idle: set[str]


def _tried(name: str, module: nn.Module, in_channels: int) -> tuple[Any, Any, dict[str, Tensor]]:
    """What the module gives for images of the two SIZES, and the parameters that these were computed from."""
    state = meta_state(module)
    parameters = {key: state[key].requires_grad_() for key, _ in module.named_parameters()}
    try:
        small, large = (run_on_meta(module, state, in_channels, size) for size in SIZES)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"backbone {name} cannot be run on {SIZES[0]} and {SIZES[1]} pixels ({reason}): "
            "choose one whose map follows the input's size, such as a convolutional network"
        ) from error
    return small, large, parameters


def _measured(
    name: str,
    module: nn.Module,
    norm: str,
    multi_level: bool,
    in_channels: int,
    last_map: Callable[[Any, Tensor], Tensor] | None = None,
) -> _Measured:
    """The backbone of a module that gives its map, or with ``multi_level`` its maps, from fine to coarse.

    last_map: what gives the last of several maps alone.
    """
    small, large, parameters = _tried(name, module, in_channels)
    pairs = [(small, large)] if not multi_level else list(zip(small, large, strict=True))
    for one, other in pairs:
        if not isinstance(one, Tensor) or not isinstance(other, Tensor):
            raise UserError(f"backbone {name} returns a {type(one).__name__}: return a feature map, or several of them")
        if not is_map(one.shape, other.shape):
            raise UserError(
                f"backbone {name} maps {SIZES[0]} pixels to {list(one.shape)} and {SIZES[1]} to {list(other.shape)}: "
                "that is no map [n, channels, h, w] on a regular grid. Choose another one, such as resnet50."
            )
    maps = [Stage(one.shape[1], SIZES[0] // one.shape[2]) for one, _ in pairs]
    last = maps[-1]
    stages: tuple[Stage, ...] = ()
    used = [one for one, _ in pairs]
    if multi_level:
        forward = type(module).forward
        if is_columnar([one.stride for one in maps]):
            only = last_map or (lambda own, image: forward(own, image)[-1])
            _give(module, lambda own, image: simple_pyramid(only(own, image)))
            stages, used = tuple(Stage(last.channels, stride) for stride in STAGES), used[-1:]
        else:
            place = {one.stride: nth for nth, one in enumerate(maps)}
            if not set(STAGES) <= place.keys():
                strides = ", ".join(str(stride) for stride in sorted(place))
                raise UserError(f"backbone {name} has maps of strides {strides} and {NO_STAGES}")
            chosen = [place[stride] for stride in STAGES]
            _give(module, lambda own, image: tuple(forward(own, image)[nth] for nth in chosen))
            stages, used = tuple(maps[nth] for nth in chosen), [used[nth] for nth in chosen]
            last = stages[-1]
    if used[0].requires_grad or used[-1].requires_grad:
        torch.autograd.backward([one.sum() for one in used if one.requires_grad])
    idle = {key for key, value in parameters.items() if value.grad is None}
    backbone = Backbone(name, module.train(), last.channels, last.stride, frozenset(), norm, stages, in_channels)
    return _Measured(backbone, idle)


def _give(module: nn.Module, forward: Callable[[Any, Tensor], Any]) -> None:
    """Have a module, and a copy of it, return ``forward(module, image)``; its names stay."""
    kind = type(module)
    module.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def _refuse_idle(name: str, idle: set[str]) -> None:
    if idle:
        raise UserError(
            f"backbone {name}: {len(idle)} parameters never reach its map (such as {min(idle)}), so they would not be "
            "trained: leave them out of the module"
        )
