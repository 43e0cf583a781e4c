"""Checkpoints: one file each, whole or absent, read without unpickling code.

A checkpoint holds all that the rest of a run depends on: step, weights, buffers, optimizer state, the ERF table, and
the recipe, classes and dataset it belongs to. The data state is the step; random states are keyed by the step. Writing
is a temporary file, a sync, a rename, so a kill at any moment leaves the previous one the newest. Costs twice the
weights' bytes (momentum; ResNet-50: 190 MB). Prefer `export` for weights alone.

A run takes a snapshot in host memory and goes on, while a thread writes it. That costs the copy (about 0.2 ms per MB on
a CPU; a GPU's does not make the host wait) and a checkpoint's bytes once more in host memory.
"""

import errno
import logging
import os
import re
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.storage.files import atomic_write
from jigsaw_pretrain.train.models.weights import check_state, check_tensors, load_tensors

FORMAT_VERSION = 1

BODY, PYRAMID = "body.", "fpn."
"""What names begin with in torchvision's BackboneWithFPN."""

_NAME = re.compile(r"step-(\d{8,})\.pt")

log = logging.getLogger(__name__)


def checkpoint_path(folder: Path, step: int) -> Path:
    """The file of the checkpoint after ``step`` steps."""
    return folder / f"step-{step:08d}.pt"


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of every published checkpoint, oldest first; none where there is no folder."""
    if not folder.is_dir():
        return []
    found = ((match, path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name)))
    return sorted((int(match[1]), path) for match, path in found)


def save_file(path: Path, value: Any) -> None:
    """``torch.save`` that makes ``value`` appear under ``path`` whole or not at all, and durably."""
    try:
        with atomic_write(path) as file:
            torch.save(value, file)
    except RuntimeError as error:
        # What torch's writer raises where the disk is full, or on its way out of what the file raised.
        if not any(part in str(error) for part in ("PytorchStreamWriter", "inline_container")):
            raise
        code = (isinstance(error.__context__, OSError) and error.__context__.errno) or errno.ENOSPC
        raise OSError(code, os.strerror(code), str(path)) from error


def save_checkpoint(folder: Path, step: int, content: dict[str, Any], keep: int) -> Path:
    """Publish the checkpoint after ``step`` steps, then remove all but the newest ``keep``; returns its path."""
    path = checkpoint_path(folder, step)
    save_file(path, {"format": FORMAT_VERSION, "step": step, **content})
    for _, old in list_checkpoints(folder)[:-keep]:
        old.unlink(missing_ok=True)
    return path


def snapshot(value: Any, into: Any = None) -> Any:
    """A copy of nested dicts, lists and tuples whose tensors are in host memory and share it with nothing.

    Copies from a GPU may be under way: before reading them wait for an event that was recorded after this call. What
    the GPU is asked to do later does not change them.

    into: a former snapshot that nobody reads any more, whose memory is used again: two to five times as fast.
    """
    if isinstance(value, Tensor):
        value = value.detach()
        if isinstance(into, Tensor) and (into.shape, into.dtype, into.stride()) == (
            value.shape,
            value.dtype,
            value.stride(),
        ):
            return into.copy_(value, non_blocking=True)
        # To page-locked memory, so that the host does not wait for the device.
        return value.to("cpu", non_blocking=True) if value.is_cuda else value.clone()
    if isinstance(value, dict):
        before = into if isinstance(into, dict) else {}
        return {key: snapshot(one, before.get(key)) for key, one in value.items()}
    if isinstance(value, list | tuple):
        former = into if isinstance(into, list | tuple) and len(into) == len(value) else [None] * len(value)
        return type(value)(snapshot(one, old) for one, old in zip(value, former, strict=True))
    return value


class BackgroundWriter:
    """Runs actions in a thread, one at a time: the next one waits until the one before has ended.

    After an action that failed no other one is run until ``wait`` has raised what it raised.
    """

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._running: Future[None] | None = None

    @property
    def failed(self) -> bool:
        """Whether an action has failed and nobody was told."""
        running = self._running
        return running is not None and running.done() and running.exception() is not None

    def submit(self, action: Callable[[], None]) -> None:
        """Run ``action`` as soon as the one before has ended; returns when it has begun."""
        if self._running is not None and self._running.exception() is not None:
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "writer")
        self._running = self._pool.submit(action)

    def settle(self) -> None:
        """Wait until the last action has ended, whatever it raised."""
        if self._running is not None:
            self._running.exception()

    def wait(self) -> None:
        """Wait until the last action has ended; raises what it raised."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def close(self) -> None:
        """Wait as ``wait`` does and end the thread; an error is logged, since another one is on its way."""
        try:
            self.wait()
        except Exception as error:
            log.error("%s", error)
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The contents of one checkpoint, tensors on the CPU; UserError for what is damaged or none of this version's.

    Checked are its checksums, and its step against its name; ``check_fits`` checks the weights.
    """
    try:
        content = load_tensors(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: all hosts must see the run folder, so put it on shared storage") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is no checkpoint: it holds a {type(content).__name__}")
    version = content.get("format")
    if not isinstance(version, int) or version != FORMAT_VERSION:
        raise UserError(f"{path} is of checkpoint format {_told(version)}; this program reads {FORMAT_VERSION}")
    named, step = _NAME.fullmatch(path.name), content.get("step")
    if not isinstance(step, int) or step < 0 or (named is not None and step != int(named[1])):
        raise UserError(f"{path} is damaged: it is not of the step that its name says")
    return content


def _told(version: Any) -> str:
    # A list that holds itself twice, forty times over, is a few bytes in a file and has no end as text.
    return str(version)[:40] if isinstance(version, int | float | str) else f"no number but a {type(version).__name__}"


def newest_checkpoint(
    folder: Path, usable: Callable[[Path, dict[str, Any]], None] | None = None
) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that can be used, with its contents; None where there is none at all.

    A damaged one (a failing disk) is passed over, and that is logged; UserError where all are. usable: raises UserError
    for one that does not fit the run.
    """
    last: UserError | None = None
    for _, path in reversed(list_checkpoints(folder)):
        try:
            content = read_checkpoint(path)
            if usable is not None:
                usable(path, content)
            return path, content
        except UserError as error:
            log.warning("%s", error.message)
            last = error
    if last is not None:
        raise last
    return None


def check_fits(
    path: Path,
    content: dict[str, Any],
    own: Mapping[str, Tensor],
    steps: int,
    run: Mapping[str, Any],
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Raise UserError for a checkpoint that is not of a run of so many steps whose model has the state ``own``.

    run: what the run is of (its recipe, its classes), which its checkpoints hold. optimizer: the run's, where it goes
    on with it.
    """
    for name, value in run.items():
        if name in content and not _agrees(content[name], value):
            raise UserError(
                f"{path} is of another run, whose {name} is not this one's: remove it, or name its own folder"
            )
    if content["step"] > steps:
        raise UserError(f"{path} is of step {content['step']:,}, and the run has {steps:,}: it is not this run's")
    for state in (content.get("model"), *([content["average"]] if content.get("average") is not None else [])):
        check_state(state, own, str(path))
    if optimizer is not None:
        _check_optimizer(content.get("optimizer"), optimizer, str(path))
    check_values(path, content, _Versions)


def _agrees(found: Any, own: Any) -> bool:
    """Whether plain values are equal; of tables the keys that both have, as programs of other versions know others."""
    if isinstance(found, dict) and isinstance(own, Mapping):
        return all(_agrees(found[key], own[key]) for key in found.keys() & own.keys())
    if isinstance(found, list | tuple) and isinstance(own, list | tuple):
        return len(found) == len(own) and all(map(_agrees, found, own))
    return not isinstance(found, Tensor) and bool(found == own)


class _Versions(msgspec.Struct):
    """What is compared with this program's versions."""

    versions: dict[str, str] = {}


def _check_optimizer(found: Any, optimizer: torch.optim.Optimizer, where: str) -> None:
    """Raise UserError for the state of an optimizer over other parameters, or with other settings."""
    wrong = UserError(f"{where} is not of this run's optimizer: its parameters or settings are others")
    if not isinstance(found, dict) or not isinstance(found.get("state"), dict):
        raise wrong
    own, groups = optimizer.state_dict()["param_groups"], found.get("param_groups")
    if not isinstance(groups, list) or len(groups) != len(own):
        raise wrong
    for mine, theirs in zip(own, groups, strict=True):
        if not isinstance(theirs, dict) or "lr" not in theirs:
            raise wrong
        if any(key in theirs and not _same(theirs[key], one) for key, one in mine.items() if key not in _OF_MACHINE):
            raise wrong
    parameters = [one for group in optimizer.param_groups for one in group["params"]]
    for place, entry in found["state"].items():
        if not isinstance(place, int) or not 0 <= place < len(parameters) or not isinstance(entry, dict):
            raise wrong
        tensors = {name: one for name, one in entry.items() if one is not None}
        if tensors:
            check_tensors(tensors, where)
        if any(one.shape not in (parameters[place].shape, torch.Size()) for one in tensors.values()):
            raise wrong


def check_values(path: Path, content: Mapping[str, Any], kind: type[msgspec.Struct]) -> None:
    """Raise UserError where a checkpoint's plain values are not of the types of a record with fields of their names."""
    try:
        msgspec.convert({name: content[name] for name in kind.__struct_fields__ if name in content}, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error})") from error
    except AttributeError as error:
        # msgspec takes whatever has indices for a dict, and asks a tensor for its keys.
        raise UserError(f"{path} is damaged: a tensor stands where a dict belongs") from error


_OF_MACHINE = ("lr", "initial_lr", "fused", "foreach", "capturable", "differentiable")
"""Settings of an optimizer that every step, or every machine, sets anew."""


def _same(left: Any, right: Any) -> bool:
    if type(left) is not type(right) or isinstance(left, Tensor):
        return False
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(_same(*pair) for pair in zip(left, right, strict=True))
    return bool(left == right)


def trained_state(content: dict[str, Any]) -> dict[str, Tensor]:
    """The model's weights that a checkpoint is used by: their average over steps where the run keeps one."""
    state: dict[str, Tensor] = content.get("average") or content["model"]
    return state


def backbone_state(model_state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The backbone's part of a checkpoint's ``model``, in the backbone's own names, contiguous on the CPU."""
    return _part(model_state, "backbone.")


def neck_state(model_state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The neck's part, in torchvision's names of a FeaturePyramidNetwork; empty where the run has none."""
    return _part(model_state, "neck.")


def pyramid_state(model_state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Backbone and neck in the names of torchvision's BackboneWithFPN, BODY and PYRAMID; empty without a neck."""
    body, neck = backbone_state(model_state), neck_state(model_state)
    if not neck:
        return {}
    return {BODY + name: value for name, value in body.items()} | {
        PYRAMID + name: value for name, value in neck.items()
    }


def _part(model_state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value.detach().cpu().contiguous().clone()
        for name, value in model_state.items()
        if name.startswith(prefix)
    }
