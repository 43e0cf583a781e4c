"""Weights files: read without unpickling code, and matched to a module name by name or refused.

A file may hold a state dict, one under `model` or `state_dict` (a checkpoint of ours among them), or safetensors;
the classifier's entries are left out. A key that finds no place is the classic way to lose a pre-training, so nothing
is loaded by halves: every weight of the backbone must be there, of its shape, and nothing else. Seconds.
"""

import pickle
import pickletools
import stat
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor, nn

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.train.models.feature_maps import Backbone

COUNTER = ".num_batches_tracked"
"""Entries that no output depends on; old files lack them."""


MOST_PICKLE = 8 << 20
"""The most bytes of what names the tensors in a file: a thousand tensors take 0.1 MB."""

MOST_IN_TUPLE = 10_000
"""The most that a tuple may hold, and what the tuples in it hold: to hash one, all that is gone through."""

MOST_TIED = 4
"""How many times the bytes of a file its tensors may claim, as some are views of one another."""


@dataclass(frozen=True)
class Match:
    """The match of a file's entries with a module's, by name.

    reshaped: the names of entries of another shape, with both shapes. notes: what is no mistake and a person should
    know.
    """

    source: str
    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    reshaped: Mapping[str, str]
    notes: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every entry of the module was matched and none was left over."""
        return not (self.missing or self.unexpected or self.reshaped)

    def __str__(self) -> str:
        """One line: how many of each kind, and which did not match."""
        reshaped = tuple(f"{name} {shapes}" for name, shapes in self.reshaped.items())
        kinds = (("missing", self.missing), ("unexpected", self.unexpected), ("of another shape", reshaped))
        counted = [f"{len(names)} {kind}" + (f" ({few(names)})" if names else "") for kind, names in kinds]
        return f"{self.source}: {', '.join([f'{len(self.matched)} matched', *counted])}"

    @property
    def text(self) -> str:
        """The line, and the notes below it."""
        return "\n  ".join([str(self), *self.notes])


def few(names: Sequence[str], most: int = 6) -> str:
    """The first of some names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def match(
    state: Mapping[str, Tensor],
    module: nn.Module | Sequence[nn.Module],
    source: str,
    notes: Sequence[str] = (),
    ignored: Collection[str] = (),
) -> Match:
    """Match a state with a module, or with its parts, by ``load_state_dict``'s own lists; the module is not changed.

    So what a layer forgives is forgiven here (counters of batch norm that old files lack). ignored: names that are
    neither missing nor unexpected.
    """
    parts = [module] if isinstance(module, nn.Module) else list(module)
    own = {name: value for part in parts for name, value in part.state_dict().items()}
    shared = [name for name in own if name in state]
    reshaped = {
        name: f"{list(state[name].shape)} for {list(own[name].shape)}"
        for name in shared
        if state[name].shape != own[name].shape
    }
    # Its own values in place of the state's: the lists are the same, and nothing changes.
    same = {name: own.get(name, one) for name, one in state.items()}
    lists = [part.load_state_dict(same, strict=False) for part in parts]
    missing = [name for one in lists for name in one.missing_keys]
    unexpected = set[str].intersection(*(set(one.unexpected_keys) for one in lists))
    return Match(
        source,
        tuple(name for name in shared if name not in reshaped),
        tuple(name for name in missing if name not in ignored),
        tuple(name for name in state if name in unexpected and name not in ignored),
        reshaped,
        tuple(notes),
    )


def load_tensors(file: str | Path) -> object:
    """What torch.save wrote to a file, without running code from it; raises UserError, FileNotFoundError.

    A file's own checksums (CRC-32) are verified: torch does not look at them. Costs 1 s per GB.
    """
    path = Path(file)
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{file} is not a file but a folder, a FIFO or a device: name a file")
    if not status.st_size:
        raise UserError(f"{file} is empty: it is no weights file")
    try:
        with path.open("rb") as content:
            if content.read(4) == b"PK\x03\x04":
                _check_archive(path)
            else:
                # As torch wrote until 1.6: what the file is of, the content, and the names of its storages.
                content.seek(0)
                for _ in range(5):
                    _check_pickle(content, str(file))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror or error})") from error
    except Exception as error:
        # torch's own words advise to load without weights_only, which runs whatever the file says.
        holds_objects = isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error).upper()
        why = (
            "it holds objects other than tensors and plain values"
            if holds_objects
            else "it is damaged or of another kind"
        )
        raise UserError(f"{file} cannot be read safely: {why}") from error


def _check_archive(path: Path) -> None:
    """Raise UserError for an archive with members that are compressed, damaged, or refused by ``_check_pickle``."""
    with zipfile.ZipFile(path) as archive:
        if any(one.compress_type != zipfile.ZIP_STORED for one in archive.infolist()):
            raise UserError(f"{path} is compressed, which torch.save does not do: it is not read")
        if (damaged := archive.testzip()) is not None:
            raise UserError(f"{path} is damaged: {damaged} is not what its checksum says")
        for member in archive.infolist():
            if member.filename.endswith("data.pkl"):
                with archive.open(member) as content:
                    _check_pickle(content, str(path))


def _check_pickle(content: IO[bytes], file: str) -> None:
    """Raise UserError for a pickle that would take hours to read, though none of it is run.

    A tuple that holds a tuple twice, which holds a tuple twice, and so on, costs a few bytes for each doubling; where
    it is a key of a dict, all of it is hashed. So the pickle's operations are followed, as pickletools describes them,
    with what each value on their stack holds.
    """
    stack: list[int] = []
    marks: list[int] = []
    memo: dict[int, int] = {}
    for operation, argument, place in pickletools.genops(content):
        if (place or 0) > MOST_PICKLE:
            raise UserError(
                f"{file} cannot be read safely: the part that names its tensors has more than {MOST_PICKLE:,} bytes"
            )
        name, before, after = operation.name, operation.stack_before, operation.stack_after
        if name == "MARK":
            marks.append(len(stack))
            continue
        if "PUT" in name or name == "MEMOIZE":
            memo[len(memo) if argument is None else int(argument)] = stack[-1]
            continue
        since_mark = pickletools.markobject in before
        first = marks.pop() - before.index(pickletools.markobject) if since_mark else len(stack) - len(before)
        taken = stack[first:]
        del stack[first:]
        if "TUPLE" in name:
            stack.append(1 + sum(taken))
        elif "GET" in name:
            stack.append(memo[int(argument or 0)])
        else:
            stack += [1] * len(after) if name != "DUP" else taken * 2
        if stack and stack[-1] > MOST_IN_TUPLE:
            raise UserError(f"{file} cannot be read safely: one of its tuples holds more than {MOST_IN_TUPLE:,} values")


ABOUT = "jigsaw-pretrain"
"""The name under which a file of weights says what they were trained with, among a state dict's metadata."""


def with_about(state: Mapping[str, Tensor], about: Mapping[str, str]) -> "OrderedDict[str, Tensor]":
    """The state with what it was trained with, in the metadata that torch.save keeps of a state dict.

    Every reader takes it as bare entries: load_state_dict asks the metadata for names of modules only.
    """
    found = OrderedDict(state)
    found._metadata = {ABOUT: dict(about)}  # type: ignore[attr-defined]
    return found


def read_about(file: str) -> dict[str, str]:
    """What a weights file says of its training (backbone, norm, mean, std, ...); empty where it says nothing.

    Raises UserError for a file that cannot be read safely.
    """
    if file.endswith(".safetensors"):
        try:
            from safetensors import safe_open

            with safe_open(file, "pt") as opened:
                stated: object = opened.metadata()
        except Exception:
            return {}  # what is wrong with it is reported where its weights are read
    else:
        try:
            metadata = getattr(load_tensors(file), "_metadata", None)
        except FileNotFoundError:
            return {}
        stated = metadata.get(ABOUT) if isinstance(metadata, dict) else None
    if not isinstance(stated, dict) or not all(isinstance(one, str) for pair in stated.items() for one in pair):
        return {}
    return dict(stated)


def check_tensors(state: object, where: str, finite: bool = True) -> dict[str, Tensor]:
    """The state dict; raises UserError for a file that holds none, or tensors that are no weights.

    finite: whether infinite values and NaN are none.
    """
    if not isinstance(state, dict) or not state:
        raise UserError(f"{where} holds no state dict: export one with `jigsaw-train export`")
    seen: set[int] = set()
    held = claimed = 0
    for name, value in state.items():
        if not isinstance(name, str):
            raise UserError(f"{where} holds no state dict: one of its names is a {type(name).__name__}")
        if not isinstance(value, Tensor):
            raise UserError(f"{where} holds no state dict: {name[:80]!r} is a {type(value).__name__} there")
        if value.is_meta or value.layout != torch.strided or value.is_quantized or value.is_complex():
            raise UserError(f"{where} cannot be used: {name[:80]} is no plain tensor of numbers")
        storage = value.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            held += storage.nbytes()
        claimed += value.numel() * value.element_size()
        # Weights are tied by twos; thousands of names of one tensor cost hours.
        if claimed > MOST_TIED * held or value.numel() * value.element_size() > storage.nbytes():
            raise UserError(f"{where} cannot be used: {name[:80]} claims more numbers than the file holds")
        # Numbers are computed with as float32, which the largest of float64 are not.
        if finite and value.is_floating_point() and not bool(torch.isfinite(value.float()).all()):
            raise UserError(f"{where} cannot be used: {name[:80]} has values that are not finite")
    return state


def check_state(state: object, own: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The state dict, of the names, shapes and kinds of ``own``; raises UserError for any other."""
    found = check_tensors(state, where)
    for name in sorted({*own, *found}):
        mine, theirs = own.get(name), found.get(name)
        if (
            mine is None
            or theirs is None
            or mine.shape != theirs.shape
            or mine.is_floating_point() != theirs.is_floating_point()
        ):
            raise UserError(f"{where} is not of this run's model: {name[:80]} is missing, odd or of another shape")
    return found


def read_weights(file: str) -> dict[str, Tensor]:
    """The state dict in a file, tensors on the CPU; raises UserError for whatever cannot be read safely."""
    try:
        content = _safetensors(file) if file.endswith(".safetensors") else load_tensors(file)
    except FileNotFoundError as error:
        raise UserError(f"{file} is missing: name a weights file such as RUN/backbone.pth") from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    state = check_tensors(content, file)
    for prefix in ("module.", "backbone."):
        if any(key.startswith(prefix) for key in state):
            # Of a whole detector or dense classifier, the backbone alone.
            state = {key.removeprefix(prefix): one for key, one in state.items() if key.startswith(prefix)}
    return state


def load_weights(backbone: Backbone, file: str) -> Match:
    """Put a file's weights into the backbone; raises UserError naming what is missing, unexpected or misshapen."""
    return load_state(backbone, read_weights(file), file)


def load_state(backbone: Backbone, state: Mapping[str, Tensor], file: str) -> Match:
    """Put a state into the backbone, as load_weights does; ``file`` is for messages."""
    own = backbone.module.state_dict()
    head = tuple(sorted(set(state) & backbone.head))
    kept = {name: value for name, value in state.items() if name not in backbone.head}
    counters = sum(name.endswith(COUNTER) and name not in kept for name in own)
    notes = [f"not used: {few(head)} (the classifier)"] if head else []
    notes += [f"{counters} batch counters are not in the file"] if counters else []
    found = match(kept, backbone.module, file, notes)
    if found.complete:
        backbone.module.load_state_dict(kept, strict=False)
        return found
    stem = next((name for name in found.reshaped if own[name].shape[1:2] == (backbone.in_channels,)), None)
    if stem is not None and not found.missing and not found.unexpected and len(found.reshaped) == 1:
        raise UserError(
            f"{file} is of a {backbone.name} over {kept[stem].shape[1]} input channels ({stem}), and the crops have "
            f"{backbone.in_channels}: name weights of as many channels, or leave model.init out"
        )
    raise UserError(f"{found}: these are not weights of a {backbone.name}")


def _safetensors(file: str) -> object:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise UserError(f"{file} needs safetensors: pip install 'jigsaw-pretrain[safetensors]'") from error
    if not Path(file).is_file() and Path(file).exists():
        raise UserError(f"{file} is not a file but a folder, a FIFO or a device: name a file")
    try:
        return load_file(file)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise UserError(f"{file} cannot be read safely: it is damaged or no safetensors file") from error
