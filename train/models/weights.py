"""Weights files: read without unpickling code, and matched to a backbone key by key or refused.

A file may hold a state dict, one under `model` or `state_dict` (a checkpoint of ours among them), or safetensors;
the classifier's entries are left out. A key that finds no place is the classic way to lose a pre-training, so nothing
is loaded by halves: every weight of the backbone must be there, of its shape, and nothing else. Seconds.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.train.models.feature_maps import Backbone

COUNTER = ".num_batches_tracked"
"""Entries that no output depends on; old files lack them."""


@dataclass(frozen=True)
class Match:
    """What loading a file found: entries taken, the classifier's left out, counters that the file lacks."""

    file: str
    taken: int
    left_out: tuple[str, ...]
    counters: int

    def __str__(self) -> str:
        such = f" (such as {self.left_out[0]})" if self.left_out else ""
        return (
            f"{self.file}: {self.taken} entries matched, 0 missing, 0 unexpected; "
            f"{len(self.left_out)} of the classifier left out{such}"
        ) + (f"; {self.counters} batch counters not in the file" if self.counters else "")


def read_weights(file: str) -> dict[str, Tensor]:
    """The state dict in a file, tensors on the CPU; raises UserError for whatever cannot be read safely."""
    try:
        if file.endswith(".safetensors"):
            content: object = _safetensors(file)
        else:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{file} is missing: name a weights file such as RUN/backbone.pth") from error
    except UserError:
        raise
    except Exception as error:
        reason = str(error).split("\n")[0][:200]
        raise UserError(f"{file} is not a weights file that can be read safely ({reason})") from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not all(isinstance(one, Tensor) for one in content.values()):
        raise UserError(f"{file} holds no state dict: export one with `python -m train export`")
    for prefix in ("module.", "backbone."):
        if any(key.startswith(prefix) for key in content):
            # Of a whole detector or dense classifier, the backbone alone.
            content = {key.removeprefix(prefix): one for key, one in content.items() if key.startswith(prefix)}
    return content


def load_weights(backbone: Backbone, file: str) -> Match:
    """Put a file's weights into the backbone; raises UserError naming what is missing, unexpected or misshapen."""
    state = read_weights(file)
    own = backbone.module.state_dict()
    left_out = tuple(sorted(set(state) & backbone.head))
    kept = {key: value for key, value in state.items() if key not in backbone.head}
    counters = {key for key in own if key.endswith(COUNTER)} - set(kept)
    problems = {
        "missing": sorted(set(own) - set(kept) - counters),
        "unexpected": sorted(set(kept) - set(own)),
        "of another shape": sorted(key for key in set(own) & set(kept) if own[key].shape != kept[key].shape),
    }
    wrong = [f"{len(keys)} {what} (such as {keys[0]})" for what, keys in problems.items() if keys]
    if wrong:
        taken = len(set(own) & set(kept)) - len(problems["of another shape"])
        stems = [key for key in problems["of another shape"] if own[key].shape[1:2] == (backbone.in_channels,)]
        if len(wrong) == 1 and len(stems) == len(problems["of another shape"]) > 0:
            raise UserError(
                f"{file} is of a {backbone.name} over {kept[stems[0]].shape[1]} input channels ({stems[0]}), and the "
                f"crops have {backbone.in_channels}: begin from weights of as many, or without init"
            )
        raise UserError(
            f"{file} is not of a {backbone.name}: {' and '.join(wrong)} entries; {taken} of {len(own)} would match"
        )
    backbone.module.load_state_dict(kept, strict=False)
    return Match(file, len(kept), left_out, len(counters))


def _safetensors(file: str) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise UserError(f"{file} needs safetensors: pip install 'jigsaw-pretrain[safetensors]'") from error
    return load_file(file)
