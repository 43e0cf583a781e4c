"""Builds backbones by name: torchvision's, timm's (`timm:NAME`), or one's own (`module:callable`).

torchvision's classification models are cut after their last feature map; where to cut is found, not listed (see
models/feature_maps.py). All that lies behind is dropped (DDP meets no unused parameter), names in the state dict stay
torchvision's, and train and eval keep their own graphs, so dropout and stochastic depth behave.

A timm model is taken before its pooling (`forward_features`) under its own names; what lies behind, a head or a last
1 x 1 convolution on pooled features, is dropped. One's own callable is called without arguments and returns a module
that maps [n, 3, H, W] to a feature map. For images of N channels timm is told so, and one's own callable is called with
``in_channels=N`` where it takes that; else its first convolution is rebuilt (models/layers.py). Both are tried on two
input sizes and one backward pass without data (meta tensors; a second or two), so a map that cannot be cut into
regions, or a weight that never reaches the map, is refused before a run begins.

A run or a recipe may be a stranger's, so `module:callable` runs only where the command line itself names it. Nothing is
ever downloaded. Prefer torchvision's name where both libraries have the network: its weights load into more
detectors. Prefer a module of your own where the tracing refuses: anything that maps [n, C, H, W] to a map will do.
"""

import difflib
import importlib
import inspect
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torchvision
from torch import Tensor, nn

from jigsaw_pretrain.errors import COMMAND_LINE, UserError
from jigsaw_pretrain.train.models.feature_maps import _NO_STAGES, SIZES, Backbone, cut, is_map
from jigsaw_pretrain.train.models.layers import meta_state, run_on_meta, set_input_channels, with_norm

TIMM = "timm:"

_ALLOWED: set[str] = set()


def names() -> list[str]:
    """Every classification model this torchvision knows, in alphabetical order."""
    return sorted(torchvision.models.list_models(module=torchvision.models))


def build(name: str, norm: str = "bn", multi_level: bool = False, in_channels: int = 3) -> Backbone:
    """The backbone of that name under ``norm`` (models.layers.NORMS), randomly initialised as its library does it.

    Drawn from torch's global generator.

    name: one of torchvision's, `timm:NAME`, or `module:callable` for one's own. multi_level: whether its module gives
    the maps of all STAGES. in_channels: channels of its images; models/layers.py says what other than 3 does.
    Raises UserError for an unknown name (with the nearest ones), for a model without a feature map that can be cut into
    regions and, multi_level, for one without these stages.
    """
    if ":" in name:
        if multi_level:
            raise UserError(f"backbone {name} {_NO_STAGES}")
        return build_external(name, norm, in_channels)
    whole = whole_model(name, norm)
    if in_channels != 3:
        set_input_channels(name, whole, in_channels)
    return cut(name, whole, norm, multi_level, in_channels)


def whole_model(name: str, norm: str = "bn") -> nn.Module:
    """The model of torchvision with its classifier, randomly initialised; raises UserError for an unknown name."""
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "see torchvision.models.list_models()."
        hint += " timm's are timm:NAME, your own module:callable."
        raise UserError(f"backbone {name!r} is not a classification model of torchvision: {hint}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model: nn.Module = torchvision.models.get_model(name, weights=None)
    return with_norm(name, model, norm)


def build_external(name: str, norm: str = "bn", in_channels: int = 3) -> Backbone:
    """The backbone of a name with a colon, randomly initialised from torch's global generator; raises UserError."""
    return timm_backbone(name, norm, in_channels) if name.startswith(TIMM) else own_backbone(name, norm, in_channels)


def timm_backbone(name: str, norm: str = "bn", in_channels: int = 3) -> Backbone:
    """timm's model of that name up to the map before its pooling, without weights that do not reach the map."""
    whole = whole_timm_model(name, norm, in_channels)
    before = set(whole.state_dict())
    # Called as the module itself, so that names in the state dict stay timm's.
    whole.forward = whole.forward_features  # type: ignore[assignment]
    channels, stride, idle = _measured(name, whole, in_channels)
    for child, module in list(whole.named_children()):
        own = {f"{child}.{key}" for key, _ in module.named_parameters()}
        if own and own <= idle:
            setattr(whole, child, nn.Identity())
    _refuse_idle(name, idle & {key for key, _ in whole.named_parameters()})
    left_out = frozenset(before - set(whole.state_dict()))
    return Backbone(name, whole, channels, stride, left_out, norm, in_channels=in_channels)


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
    return with_norm(name, model, norm)


def allow_backbone(name: str) -> None:
    """Let `module:callable` run in this process, where no command line names it: for programs that call the library."""
    _ALLOWED.add(name)


def _check_allowed(name: str) -> None:
    """Refuse code that only a file names: a recipe or a run may be a stranger's."""
    named = any(word == name or word.endswith(f"={name}") for word in COMMAND_LINE.get())
    if not named and name not in _ALLOWED:
        raise UserError(
            f"backbone {name} runs code of the module {name.partition(':')[0]}, and nothing but a file asks for it: "
            f"where it is yours, name it on the command line (--backbone {name} or --set model.backbone={name}; in a "
            "program jigsaw_pretrain.allow_backbone)"
        )


def own_backbone(name: str, norm: str = "bn", in_channels: int = 3) -> Backbone:
    """The module that `module:callable` returns; raises UserError that says what is wrong with it."""
    _check_allowed(name)
    module = with_norm(name, _called(name, in_channels), norm)
    channels, stride, idle = _measured(name, module, in_channels)
    _refuse_idle(name, idle)
    return Backbone(name, module.train(), channels, stride, frozenset(), norm, in_channels=in_channels)


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


def _measured(name: str, module: nn.Module, in_channels: int) -> tuple[int, int, set[str]]:
    """Channels and stride of the module's map, and the names of the parameters that do not reach it."""
    state = meta_state(module)
    parameters = {key: state[key].requires_grad_() for key, _ in module.named_parameters()}
    try:
        small, large = (run_on_meta(module, state, in_channels, size) for size in SIZES)
    except Exception as error:
        raise UserError(
            f"backbone {name} cannot be run on {SIZES[0]} and {SIZES[1]} pixels ({str(error).splitlines()[0][:200]}): "
            "choose one whose map follows the input's size, such as a convolutional network"
        ) from error
    if not isinstance(small, Tensor) or not isinstance(large, Tensor):
        raise UserError(f"backbone {name} returns a {type(small).__name__}: return the last feature map alone")
    if not is_map(small.shape, large.shape):
        raise UserError(
            f"backbone {name} maps {SIZES[0]} pixels to {list(small.shape)} and {SIZES[1]} to {list(large.shape)}: "
            "that is no map [n, channels, h, w] on a regular grid. Choose another one, such as resnet50."
        )
    if small.requires_grad:
        small.sum().backward()
    idle = {key for key, value in parameters.items() if value.grad is None}
    return small.shape[1], SIZES[0] // small.shape[2], idle


def _refuse_idle(name: str, idle: set[str]) -> None:
    if idle:
        raise UserError(
            f"backbone {name}: {len(idle)} parameters never reach its map (such as {min(idle)}), so they would not be "
            "trained: leave them out of the module"
        )
