"""A pre-trained neck in a detector's pyramid: read, matched name by name, reported, and refused where it does not fit.

A neck comes with a pre-training run (`neck = "fpn"`, train.neck), in its folder or in the file that
`train export --to torchvision-fpn` writes. It has four levels; RetinaNet's pyramid begins at the second, and its P6 and
P7 are its own. Four differences are no mistakes and are said in words: these two, a norm that the detector's pyramid
has and the neck was trained without, and the biases which that norm replaces. Everything else is refused. Leave a neck
out with `neck = "none"`, to compare.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from jigsaw_pretrain.detect.models.weights import BACKBONE_FILE, CHECKPOINTS, STATISTICS, Compared, read_file
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.train.engine.checkpoint import PYRAMID, neck_state, newest_checkpoint, trained_state

PYRAMID_FILE = "backbone-fpn.pth"
LEVELS = 4

_NAME = re.compile(r"(inner_blocks|layer_blocks)\.(\d+)\.(.+)")


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


def _is_norm(name: str) -> bool:
    """Whether an entry is of the layer after a convolution."""
    match = _NAME.fullmatch(name)
    return match is not None and match[3].startswith("1.")


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
    found = newest_checkpoint(source / CHECKPOINTS, lambda _: None)
    return neck_state(trained_state(found[1])) if found is not None else {}


def pyramid_of(model: nn.Module) -> FeaturePyramidNetwork | None:
    """The detector's pyramid; None where it has none."""
    found = getattr(model.get_submodule("backbone"), "fpn", None)
    assert found is None or isinstance(found, FeaturePyramidNetwork)
    return found


def load_neck(pyramid: FeaturePyramidNetwork, neck: Mapping[str, Tensor], source: str) -> NeckReport:
    """Copy a neck into a detector's pyramid and report; raises UserError, with the report, where it does not fit."""
    ours = {name: one for name, one in pyramid.state_dict().items() if _NAME.fullmatch(name)}
    own = tuple(name for name in pyramid.state_dict() if name not in ours)
    skipped = LEVELS - len(pyramid.inner_blocks)
    placed: dict[str, Tensor] = {}
    finer: list[str] = []
    for name, value in neck.items():
        match = _NAME.fullmatch(name)
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


def _remedy(neck: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> str:
    """What to do where a neck does not fit."""
    first = "inner_blocks.0.0.weight"
    widths = [state[first].shape[0] if first in state else 0 for state in (neck, ours)]
    if widths[0] != widths[1]:
        return f"The neck has {widths[0]} channels, this detector's pyramid {widths[1]}: --set width={widths[0]}"
    if any(_is_norm(name) for name in neck) and not any(_is_norm(name) for name in ours):
        return "The neck was trained with a norm that this detector's pyramid has not: --norm gn"
    return "This is no neck of that backbone: give the --backbone it was trained with"
