"""Weights for the backbone and the neck: what a source means, and what may differ from the detector's own.

A source is a weights file under the backbone's own names or a run's folder. Nothing is matched silently: every tensor
is counted as matched, missing, unexpected or of another shape (train/models/weights.py), and what differs is refused.

- *Backbone.* From a run's backbone.pth, else its newest checkpoint; of a file with a neck too, the backbone's part.
  What is missing or odd is refused unless the recipe says ``model.partial = true``. Two differences are no mistakes
  and are reported in words: the classifier's tensors, and batch statistics that a group norm has no use for.
- *Neck.* It comes with a pre-training run (its ``model.neck = "fpn"``), in its folder or in the file that
  `train export --to torchvision-fpn` writes. It has four levels; RetinaNet's pyramid begins at the second, and its P6
  and P7 are its own. Four differences are no mistakes and are reported in words: these two, a norm that the detector's
  pyramid has and the neck was trained without, and the biases which that norm replaces. All others are refused. Leave a
  neck out with ``model.pretrained_neck = "none"``, to compare.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.train.engine.checkpoint import (
    BODY,
    PYRAMID,
    backbone_state,
    neck_state,
    newest_checkpoint,
    trained_state,
)
from jigsaw_pretrain.train.models.feature_maps import Backbone
from jigsaw_pretrain.train.models.weights import Match, check_tensors, few, match, read_weights

BACKBONE_FILE = "backbone.pth"
PYRAMID_FILE = "backbone-fpn.pth"
CHECKPOINTS = "checkpoints"
LEVELS = 4

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""What the names of a batch norm's statistics end with."""

OFFSET = ".offset."
"""In the names of what predicts a deformable convolution's offsets (detect/models/backbone.py)."""

_NECK_NAME = re.compile(r"(inner_blocks|layer_blocks)\.(\d+)\.(.+)")


def read_backbone(source: Path) -> dict[str, Tensor]:
    """The backbone's state dict from a file or a run's folder.

    Raises UserError where there is none, where it is no state dict, or where reading it would run code.
    """
    path = source_file(source)
    if path.is_dir():
        found = newest_checkpoint(path / CHECKPOINTS)
        if found is None:
            raise UserError(
                f"{source} has neither {BACKBONE_FILE} nor a checkpoint: name a finished run, or a weights file"
            )
        return check_tensors(backbone_state(trained_state(found[1])), str(found[0]))
    state = read_weights(str(path))
    return _part(state, BODY) or state


def read_neck(source: Path) -> dict[str, Tensor]:
    """The neck of a run's folder or of a weights file, in the names of a FeaturePyramidNetwork; empty without one.

    Raises UserError where the file cannot be read safely.
    """
    if source.is_dir() and (source / PYRAMID_FILE).exists():
        source = source / PYRAMID_FILE
    if not source.is_dir():
        return _part(read_weights(str(source)), PYRAMID)
    if (source / BACKBONE_FILE).exists():
        return {}
    found = newest_checkpoint(source / CHECKPOINTS)
    return neck_state(trained_state(found[1])) if found is not None else {}


def source_file(source: Path) -> Path:
    """The file a source means: itself, or a run folder's backbone.pth where there is one."""
    return source / BACKBONE_FILE if source.is_dir() and (source / BACKBONE_FILE).exists() else source


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): one for name, one in state.items() if name.startswith(prefix)}


def brings_statistics(state: Mapping[str, Tensor]) -> bool:
    """Whether batch statistics have been gathered: present, and not all still at their initial 0 and 1."""
    means = [value for name, value in state.items() if name.endswith("running_mean")]
    variances = [value for name, value in state.items() if name.endswith("running_var")]
    gathered = any(bool((mean != 0).any()) for mean in means) or any(bool((one != 1).any()) for one in variances)
    return bool(means) and bool(variances) and gathered


def load(network: Backbone, state: Mapping[str, Tensor], source: str, partial: bool) -> Match:
    """Copy ``state`` into the network and report; raises UserError for a mismatch unless ``partial``."""
    classifier = tuple(name for name in state if name in network.head)
    own = {name: value for part in network.parts for name, value in part.state_dict().items()}
    is_one_sided = any(name.endswith("running_mean") for name in own) != any(
        name.endswith("running_mean") for name in state
    )
    statistics = {name for name in {*own, *state} if is_one_sided and name.endswith(STATISTICS)}
    notes = [f"not used: {few(classifier)} (the classifier)"] if classifier else []
    if statistics:
        notes.append(f"batch statistics that only one side has: {len(statistics)} tensors, left out")
    offsets = {name for name in own if OFFSET in name}
    if offsets and not offsets & state.keys():
        notes.append(f"begun at 0: {len(offsets)} tensors of deformable convolutions' offsets")
        statistics |= offsets
    found = match(state, network.parts, source, notes, ignored={*classifier, *statistics})
    stem = next((name for name in found.reshaped if own[name].shape[1:2] == (network.in_channels,)), None)
    if stem is not None and len(found.reshaped) == 1 and not found.missing and not found.unexpected:
        raise UserError(
            f"{source} takes images of {state[stem].shape[1]} channels ({stem}), and these images have "
            f"{network.in_channels}: name weights of as many, or the pixels they are for (--set data.pixels=...)"
        )
    if not found.complete and (not partial or not found.matched):
        raise UserError(
            f"{found}: these are weights of another backbone than {network.name}; give --backbone the one they were "
            "trained with" + (", or --set model.partial=true to take what matches" if found.matched else "")
        )
    for part in network.parts:
        part.load_state_dict({name: state[name] for name in found.matched}, strict=False)
    return found


def pyramid_of(model: nn.Module) -> FeaturePyramidNetwork | None:
    """The detector's feature pyramid as torchvision builds it; None where it has none."""
    found = getattr(model.get_submodule("backbone"), "fpn", None)
    return found if isinstance(found, FeaturePyramidNetwork) else None


def load_neck(pyramid: FeaturePyramidNetwork, neck: Mapping[str, Tensor], source: str) -> Match:
    """Copy a neck into a detector's pyramid and report; raises UserError where it does not fit."""
    ours = {name: one for name, one in pyramid.state_dict().items() if _NECK_NAME.fullmatch(name)}
    only_here = [name for name in pyramid.state_dict() if name not in ours]
    skipped = LEVELS - len(pyramid.inner_blocks)
    placed: dict[str, Tensor] = {}
    finer = 0
    for name, value in neck.items():
        found = _NECK_NAME.fullmatch(name)
        if found is None:
            placed[name] = value
        elif int(found[2]) < skipped:
            finer += 1
        else:
            placed[f"{found[1]}.{int(found[2]) - skipped}.{found[3]}"] = value
    is_normed = any(_is_norm(name) for name in placed)
    norms = [
        name for name in ours if name not in placed and _is_norm(name) and (not is_normed or name.endswith(STATISTICS))
    ]
    biases = [name for name in placed if norms and name.endswith(".0.bias") and name not in ours]
    notes = []
    if finer:
        notes.append(f"not used: {finer} tensors of finer levels than this detector has")
    if only_here:
        notes.append(f"begun at random: {len(only_here)} tensors of levels that only the detector has (P6, P7)")
    if norms:
        notes.append(
            f"of the pyramid's norm {len(norms)} tensors are not in the neck and begin as built; "
            f"{len(biases)} biases that it replaces are left out"
        )
    report = match(placed, pyramid, source, notes, ignored={*only_here, *norms, *biases})
    if not report.complete:
        raise UserError(f"{report}: {_remedy(placed, ours)}, or --set model.pretrained_neck=none to leave it out")
    pyramid.load_state_dict({name: placed[name] for name in report.matched}, strict=False)
    return report


def _is_norm(name: str) -> bool:
    """Whether an entry is of the layer after a convolution."""
    found = _NECK_NAME.fullmatch(name)
    return found is not None and found[3].startswith("1.")


def _remedy(neck: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> str:
    """What to do where a neck does not fit."""
    first = "inner_blocks.0.0.weight"
    widths = [state[first].shape[0] if first in state else 0 for state in (neck, ours)]
    if widths[0] != widths[1]:
        return (
            f"the neck has {widths[0]} channels, this detector's pyramid {widths[1]}: "
            f"--set model.neck_channels={widths[0]}"
        )
    if any(_is_norm(name) for name in neck) and not any(_is_norm(name) for name in ours):
        return "the neck was trained with a norm that this detector's pyramid has not: --norm gn"
    return "this is no neck of that backbone: give the --backbone it was trained with"
