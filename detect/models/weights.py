"""Weights for the backbone and the neck: read, matched name by name, reported, and refused where they do not fit.

A source is a state-dict file under torchvision's names or a run's folder. Files are read with ``weights_only=True``:
they cannot run code. Nothing is matched silently: every tensor is counted as matched, missing, unexpected or of another
shape.

- *Backbone.* From a run's backbone.pth, else its newest checkpoint; of a file with a neck too, the backbone's part.
  What is missing or odd is refused unless the recipe says ``partial = true``. Two differences are no mistakes and are
  reported in words: the classifier's tensors, and batch statistics that a group norm has no use for.
- *Neck.* It comes with a pre-training run (``neck = "fpn"``), in its folder or in the file that `train export --to
  torchvision-fpn` writes. It has four levels; RetinaNet's pyramid begins at the second, and its P6 and P7 are its own.
  Four differences are no mistakes and are reported in words: these two, a norm that the detector's pyramid has and the
  neck was trained without, and the biases which that norm replaces. All others are refused. Leave a neck out with
  ``neck = "none"``, to compare.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models.resnet import ResNet
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

BACKBONE_FILE = "backbone.pth"
PYRAMID_FILE = "backbone-fpn.pth"
CHECKPOINTS = "checkpoints"
LEVELS = 4

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""What the names of a batch norm's statistics end with."""

_NECK_NAME = re.compile(r"(inner_blocks|layer_blocks)\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Compared:
    """How a source's tensors met the model's: names, and shapes where they differ."""

    source: str
    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    reshaped: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether every tensor of the model was matched and none was left over that matters."""
        return not (self.missing or self.unexpected or self.reshaped)

    def counted(self, what: str) -> list[str]:
        """How many tensors of ``what`` matched, and the names of those that did not."""
        lines = [
            f"{what} {self.source}: {len(self.matched)} matched, {len(self.missing)} missing, "
            f"{len(self.unexpected)} unexpected, {len(self.reshaped)} of another shape"
        ]
        for word in ("missing", "unexpected", "reshaped"):
            if names := getattr(self, word):
                lines.append(f"  {'of another shape' if word == 'reshaped' else word}: {few(names)}")
        return lines


@dataclass(frozen=True)
class MatchReport(Compared):
    """How a file's tensors met the network's.

    classifier: names behind the feature map. statistics: of batch norms, given to a network that keeps none, or wanted
    by one and not given.
    """

    classifier: tuple[str, ...]
    statistics: tuple[str, ...]

    def lines(self) -> list[str]:
        """What a person is shown."""
        lines = self.counted("weights")
        if self.classifier:
            lines.append(f"  not used: {few(self.classifier)} (the classifier)")
        if self.statistics:
            lines.append(f"  batch statistics that only one side has: {len(self.statistics)} tensors, left out")
        return lines


@dataclass(frozen=True)
class NeckReport(Compared):
    """How a neck's tensors met the pyramid's.

    finer: of levels that the detector does not have. own: of levels that only the detector has. norms: of the norm of
    the detector's pyramid, as far as the neck has none. biases: which it replaces.
    """

    finer: tuple[str, ...]
    own: tuple[str, ...]
    norms: tuple[str, ...]
    biases: tuple[str, ...]

    def lines(self) -> list[str]:
        """What a person is shown."""
        lines = self.counted("neck")
        if self.finer:
            lines.append(f"  not used: {len(self.finer)} tensors of finer levels than this detector has")
        if self.own:
            lines.append(f"  begun at random: {len(self.own)} tensors of levels that only the detector has (P6, P7)")
        if self.norms:
            lines.append(
                f"  of the pyramid's norm {len(self.norms)} tensors are not in the neck and begin as built; "
                f"{len(self.biases)} biases that it replaces are left out"
            )
        return lines


def few(names: tuple[str, ...], most: int = 6) -> str:
    """The first of some names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def read_weights(source: Path) -> dict[str, Tensor]:
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
        return backbone_state(trained_state(found[1]))
    state = read_file(path)
    if any(name.startswith(BODY) for name in state):
        return {name.removeprefix(BODY): one for name, one in state.items() if name.startswith(BODY)}
    return state


def read_neck(source: Path) -> dict[str, Tensor]:
    """The neck of a run's folder or of a weights file, in the names of a FeaturePyramidNetwork; empty without one.

    Raises UserError where the file cannot be read safely.
    """
    if source.is_dir() and (source / PYRAMID_FILE).exists():
        source = source / PYRAMID_FILE
    if not source.is_dir():
        state = read_file(source)
        return {name.removeprefix(PYRAMID): one for name, one in state.items() if name.startswith(PYRAMID)}
    if (source / BACKBONE_FILE).exists():
        return {}
    found = newest_checkpoint(source / CHECKPOINTS)
    return neck_state(trained_state(found[1])) if found is not None else {}


def source_file(source: Path) -> Path:
    """The file a source means: itself, or a run folder's backbone.pth where there is one."""
    return source / BACKBONE_FILE if source.is_dir() and (source / BACKBONE_FILE).exists() else source


def read_file(path: Path) -> dict[str, Tensor]:
    """The state dict in a file; raises UserError where there is none, or where reading it would run code."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"--init {path} does not exist: give `scratch`, a weights file or a run's folder") from error
    except Exception as error:
        raise UserError(f"{path} is not a state dict that can be read safely ({str(error).splitlines()[0]})") from error
    if not isinstance(state, Mapping) or not state or not all(isinstance(one, Tensor) for one in state.values()):
        raise UserError(
            f"{path} is not a state dict of tensors under torchvision's names: write one with "
            "`jigsaw-train export --to torchvision`"
        )
    return dict(state)


def brings_statistics(state: Mapping[str, Tensor]) -> bool:
    """Whether batch statistics have been gathered: present, and not all still at their initial 0 and 1."""
    means = [value for name, value in state.items() if name.endswith("running_mean")]
    variances = [value for name, value in state.items() if name.endswith("running_var")]
    gathered = any(bool((mean != 0).any()) for mean in means) or any(bool((one != 1).any()) for one in variances)
    return bool(means) and bool(variances) and gathered


def load(network: ResNet, state: Mapping[str, Tensor], source: str, partial: bool) -> MatchReport:
    """Copy ``state`` into the network and report; raises UserError for a mismatch unless ``partial``."""
    own = network.state_dict()
    stem = state.get("conv1.weight")
    if stem is not None and stem.dim() == 4 and stem.shape[1] != 3:
        raise UserError(
            f"{source} takes images of {stem.shape[1]} channels, and these detectors read 8-bit RGB: fine-tune a "
            "detector of your own (`jigsaw-train export` writes the weights, and beside them how to normalise)"
        )
    ours_keep = any(name.endswith("running_mean") for name in own)
    theirs_keep = any(name.endswith("running_mean") for name in state)
    one_sided = ours_keep != theirs_keep
    matched, reshaped, missing, unexpected, classifier, statistics = [], [], [], [], [], []
    for name, value in own.items():
        if name in state and state[name].shape == value.shape:
            matched.append(name)
        elif name in state:
            reshaped.append(f"{name} {list(state[name].shape)} for {list(value.shape)}")
        elif name.endswith("num_batches_tracked") or (one_sided and name.endswith(STATISTICS)):
            statistics.append(name)
        else:
            missing.append(name)
    for name in state:
        if name in own:
            continue
        if name.startswith("fc."):
            classifier.append(name)
        elif name.endswith("num_batches_tracked") or (one_sided and name.endswith(STATISTICS)):
            statistics.append(name)
        else:
            unexpected.append(name)
    kinds = (matched, missing, unexpected, reshaped, classifier, statistics)
    report = MatchReport(source, *(tuple(kind) for kind in kinds))
    if not report.complete and (not partial or not matched):
        raise UserError(
            "\n".join(report.lines())
            + "\nThese are weights of another backbone: give --backbone the one they were trained with"
            + (", or --set partial=true to take what matches." if matched else ".")
        )
    network.load_state_dict({name: state[name] for name in matched}, strict=False)
    return report


def pyramid_of(model: nn.Module) -> FeaturePyramidNetwork | None:
    """The detector's pyramid; None where it has none."""
    found = getattr(model.get_submodule("backbone"), "fpn", None)
    assert found is None or isinstance(found, FeaturePyramidNetwork)
    return found


def load_neck(pyramid: FeaturePyramidNetwork, neck: Mapping[str, Tensor], source: str) -> NeckReport:
    """Copy a neck into a detector's pyramid and report; raises UserError, with the report, where it does not fit."""
    ours = {name: one for name, one in pyramid.state_dict().items() if _NECK_NAME.fullmatch(name)}
    own = tuple(name for name in pyramid.state_dict() if name not in ours)
    skipped = LEVELS - len(pyramid.inner_blocks)
    placed: dict[str, Tensor] = {}
    finer: list[str] = []
    for name, value in neck.items():
        match = _NECK_NAME.fullmatch(name)
        if match is None:
            placed[name] = value
        elif int(match[2]) < skipped:
            finer.append(name)
        else:
            placed[f"{match[1]}.{int(match[2]) - skipped}.{match[3]}"] = value
    normed = any(_is_norm(name) for name in placed)
    norms = tuple(
        name for name in ours if name not in placed and _is_norm(name) and (not normed or name.endswith(STATISTICS))
    )
    biases = tuple(name for name in placed if norms and name.endswith(".0.bias") and name not in ours)
    shared = {name for name in ours if name in placed}
    matched = tuple(name for name in ours if name in shared and placed[name].shape == ours[name].shape)
    report = NeckReport(
        source,
        matched,
        missing=tuple(name for name in ours if name not in shared and name not in norms),
        unexpected=tuple(name for name in placed if name not in shared and name not in biases),
        reshaped=tuple(
            f"{name} {list(placed[name].shape)} for {list(ours[name].shape)}"
            for name in ours
            if name in shared and name not in matched
        ),
        finer=tuple(finer),
        own=own,
        norms=norms,
        biases=biases,
    )
    if not report.complete:
        raise UserError("\n".join(report.lines()) + f"\n{_remedy(placed, ours)}, or --set neck=none to leave it out.")
    pyramid.load_state_dict({name: placed[name] for name in matched}, strict=False)
    return report


def _is_norm(name: str) -> bool:
    """Whether an entry is of the layer after a convolution."""
    match = _NECK_NAME.fullmatch(name)
    return match is not None and match[3].startswith("1.")


def _remedy(neck: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> str:
    """What to do where a neck does not fit."""
    first = "inner_blocks.0.0.weight"
    widths = [state[first].shape[0] if first in state else 0 for state in (neck, ours)]
    if widths[0] != widths[1]:
        return f"The neck has {widths[0]} channels, this detector's pyramid {widths[1]}: --set width={widths[0]}"
    if any(_is_norm(name) for name in neck) and not any(_is_norm(name) for name in ours):
        return "The neck was trained with a norm that this detector's pyramid has not: --norm gn"
    return "This is no neck of that backbone: give the --backbone it was trained with"
