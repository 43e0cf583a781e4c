"""The run folder: what lies where, what the run is of, and when it may be begun or continued.

    RUN/run.json         recipe, classes, dataset fingerprint, backbone, versions: written at the first step
    RUN/recipe.toml      the recipe in full, for the next run
    RUN/checkpoints/     step-NNNNNNNN.pt, the newest few
    RUN/metrics.jsonl    one row per step; RUN/digest.txt, one line per step, with --log-digest
    RUN/.lock            empty; locked while a process trains here
    RUN/backbone.pth     at the end of the schedule: the backbone under its library's names
    RUN/backbone-fpn.pth with a neck, backbone and neck under the names of torchvision's BackboneWithFPN

The checks here keep a run one run: same recipe, same classes, same dataset from its first step to its last, whatever
the machine, the number of ranks or of workers.

A run folder at a URL is staged in a folder of this machine and published at every checkpoint, by a thread while
training goes on. A lost machine then loses the steps since the last checkpoint whose upload was done. An upload
(ResNet-50: 190 MB) that takes longer than the steps between two checkpoints holds the next one up, so choose
run.checkpoint_every by it.
Prefer a local folder with a copying job beside it where the store is slow; a mounted network folder needs none of this.

Importing this module imports no torch, which takes seconds: a user's mistake is reported before.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from filelock import FileLock
from msgspec.structs import replace

from jigsaw_pretrain.errors import UserError, redacted
from jigsaw_pretrain.formats.dataset import layout
from jigsaw_pretrain.formats.dataset.dataset import MOST_BYTES, Classes, Dataset
from jigsaw_pretrain.formats.pixels import RGB8, PixelFormat, pixel_format
from jigsaw_pretrain.storage.files import check_own_folders, lock_file, sweep
from jigsaw_pretrain.storage.store import Storage
from jigsaw_pretrain.train.data.sampler import slots_of
from jigsaw_pretrain.train.engine.remote_run import CHECKPOINT_NAME, FILES, RemoteRunFolder
from jigsaw_pretrain.train.recipe import DataOptions, Recipe

FORMAT_VERSION = 1

PACKAGES = ("jigsaw-pretrain", "torch", "torchvision", "numpy")

DESCRIPTION = "run.json"

LOCK = ".lock"
"""The empty file that is locked while a process trains in the folder."""

WRITTEN_FOLDERS = ("checkpoints", "looks", "tensorboard")
"""The folders in a run's that are written to."""

RECIPE = "recipe.toml"

RUN_FILES = (RECIPE, "metrics.jsonl", "digest.txt")
"""What a run is continued with, beside its description and its newest checkpoint."""

WRITTEN_LATER = tuple(name for name in FILES if name != RECIPE)
"""The files that a run has from its first step on: no run has them before that."""


@dataclass(frozen=True)
class Origin:
    """The dataset of a run, as far as it shapes the weights: class names in label order, and the manifests' hash.

    facts: what dataset.json says, to name what differs from another dataset. shares: of each group in the crops drawn.
    pixels: format of the crops.
    """

    classes: tuple[str, ...]
    fingerprint: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    shares: Mapping[str, float] = field(default_factory=dict)
    pixels: PixelFormat = RGB8


def origin_of(dataset: Dataset, stream: DataOptions) -> Origin:
    """The origin of a run on this dataset."""
    said = dataset.description
    facts = {"seed": said.seed, "plan": said.plan[:12], **said.options, **said.versions, **said.totals}
    shares = {group: round(share, 6) for group, share in slots_of(dataset, stream).shares().items()}
    return Origin(tuple(dataset.classes), dataset.fingerprint, facts, shares, dataset.pixels)


class _Description(msgspec.Struct):
    """What the readers of run.json rely on."""

    recipe: dict[str, Any]
    classes: Classes
    dataset: str
    facts: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET
    shares: dict[str, float] | msgspec.UnsetType = msgspec.UNSET
    backbone: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET
    versions: dict[str, str] | msgspec.UnsetType = msgspec.UNSET


class RunFolder:
    """Where a run keeps its files; of one at a URL, ``path`` is where they are staged."""

    def __init__(self, path: Path, remote: RemoteRunFolder | None = None, description: str = DESCRIPTION) -> None:
        """description: the file's name."""
        self.remote, self._described = remote, description
        self._lock: FileLock | None = None
        self._place(path)

    def _place(self, path: Path) -> None:
        self.path = path
        self.description = path / self._described
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.digest = path / "digest.txt"
        self.backbone = path / "backbone.pth"
        self.pyramid = path / "backbone-fpn.pth"

    def __str__(self) -> str:
        """The folder as the user named it."""
        return redacted(self.remote.url) if self.remote else str(self.path)

    @property
    def begun(self) -> bool:
        """Whether a run's first step was taken here."""
        checkpoints = self.checkpoints.iterdir() if self.checkpoints.is_dir() else ()
        return self.description.exists() or any(CHECKPOINT_NAME.fullmatch(path.name) for path in checkpoints)

    def read_apart(self) -> None:
        """Have what lies at a URL in a folder of this process: a run may be training in the one that it stages."""
        if self.remote:
            self.remote.read_apart()
            self._place(self.remote.path)
            self.remote.pull()

    def holds(self, name: str) -> bool:
        """Whether anything of that name lies in the folder, or at its URL."""
        return os.path.lexists(self.path / name) or (self.remote is not None and self.remote.holds(name))

    def stage(self, checkpoint: str) -> None:
        """Have a checkpoint of that name here, where the folder is at a URL."""
        if self.remote:
            self.remote.fetch_checkpoint(checkpoint)

    def lock(self) -> None:
        """Keep other processes out, and remove what killed ones left; of a remote one, ``pull`` has locked it.

        Raises UserError where another process trains in it.
        """
        if self.remote is None and self._lock is None:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                self._lock = lock_file(self.path / LOCK, f"{self} is being trained by another process")
            except OSError as error:
                raise UserError(
                    f"{error.filename or self.path}: {error.strerror or error}. Name another folder with --run"
                ) from error
        for name in ("", *WRITTEN_FOLDERS):
            sweep(self.path / name)

    def close(self) -> None:
        """Let other processes train in it; one in which nothing was begun goes."""
        if self._lock is not None:
            with contextlib.suppress(OSError):
                if [path.name for path in self.path.iterdir()] == [LOCK]:
                    (self.path / LOCK).unlink()
                    self.path.rmdir()
            self._lock.release()
            self._lock = None
        if self.remote:
            self.remote.close()

    def push(self) -> None:
        """Publish what has changed, where the folder is at a URL."""
        if self.remote:
            self.remote.push()


def open_run_folder(run: str | Path, description: str = DESCRIPTION) -> RunFolder:
    """The run folder of a path or URL; nothing is read yet, see RemoteRunFolder.pull."""
    if "://" not in str(run):
        return RunFolder(Path(run), description=description)
    remote = RemoteRunFolder(str(run), (description, *RUN_FILES))
    return RunFolder(remote.path, remote, description)


def versions() -> dict[str, str]:
    """The versions that shape a run's bits."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "unknown"
    return found


def choose_recipe(
    folder: RunFolder,
    recipe: Recipe | str | Path | None,
    settings: tuple[str, ...],
    resume: bool,
    dataset: Dataset | None = None,
) -> Recipe:
    """The recipe to run, with what it implies written out (Recipe.resolved).

    A new run takes the recipe (None for the paper's) and the settings, a resumed one its own recipe.

    Raises UserError for a folder that holds a run (without resume), a dataset or files that are not the run's, and for
    a recipe that is not the run's (with it), naming what differs.
    """
    if not continues(folder, resume):
        chosen_anew = given_recipe(recipe, settings).resolved(dataset)
        _check_recipe_file(folder, chosen_anew)
        return chosen_anew
    own = Recipe.from_dict(read_description(folder)["recipe"], str(folder.description))
    wanted = own.updated(*settings) if recipe is None else given_recipe(recipe, settings)
    chosen = wanted.data
    data = replace(chosen, lanes=chosen.lane_count, mean=chosen.mean or own.data.mean, std=chosen.std or own.data.std)
    check_same_recipe(folder, replace(wanted, data=data).differences(own))
    return own


def continues(folder: RunFolder, resume: bool) -> bool:
    """Whether this is a run that goes on; nothing is written.

    Raises UserError for a folder that holds a run (without resume), for one that holds no run and a dataset or files
    that a run would write over, and for a file.
    """
    if folder.path.exists() and not folder.path.is_dir():
        raise UserError(f"--run {folder} is a file: name a folder")
    check_own_folders(folder.path, WRITTEN_FOLDERS)
    if folder.begun and not resume:
        raise UserError(f"{folder} already holds a run: add --resume to continue it, or name another folder with --run")
    if not folder.begun:
        _check_unused(folder)
    return folder.begun


def _check_unused(folder: RunFolder) -> None:
    """Refuse to begin a run where a dataset lies, or a file that the run would write over."""
    for name in (layout.DATASET, layout.PLAN):
        if folder.holds(name):
            raise UserError(f"--run {folder} holds a dataset ({name}), which no run may lie in: name another folder")
    for name in WRITTEN_LATER:
        if folder.holds(name):
            raise _foreign(folder, name)


def _check_recipe_file(folder: RunFolder, recipe: Recipe) -> None:
    """Refuse to write over a recipe.toml, unless it is the very one: a run may have been killed before run.json."""
    try:
        there = Storage(folder.path).read(RECIPE, MOST_BYTES)
    except FileNotFoundError:
        return
    except OSError as error:
        raise _foreign(folder, RECIPE) from error
    if there != recipe.to_toml().encode():
        raise _foreign(folder, RECIPE)


def _foreign(folder: RunFolder, name: str) -> UserError:
    return UserError(
        f"--run {folder} holds {name} and no run, which would write over it: move the file away, or name another folder"
    )


def check_same_recipe(folder: RunFolder, changed: list[str]) -> None:
    """Refuse to continue a run with another recipe; ``changed`` says what differs."""
    if changed:
        raise UserError(
            f"{folder} was run with another recipe ({'; '.join(changed)}): resume it without these, "
            "or name another folder with --run"
        )


def given_recipe(recipe: Recipe | str | Path | None, settings: tuple[str, ...]) -> Recipe:
    """The recipe that a caller gave: a record, a TOML file, or None for the paper's, with settings laid over it."""
    return recipe.updated(*settings) if isinstance(recipe, Recipe) else Recipe.load(recipe, settings)


def check_origin(folder: RunFolder, origin: Origin) -> None:
    """Refuse to continue a run on a dataset other than its own; nothing to check for a new one."""
    if not folder.begun:
        return
    description = read_description(folder)
    check_classes(folder, description["classes"], origin.classes)
    if description["dataset"] != origin.fingerprint:
        raise UserError(
            f"{folder} was run on another dataset ({_differences(description, origin)}): resume it with the "
            "--data it began with, or name another folder with --run"
        )


def _differences(description: dict[str, Any], origin: Origin) -> str:
    """What the two datasets' dataset.json say differently, or else that the manifests differ."""
    own, theirs = description.get("facts", {}), json.loads(json.dumps(dict(origin.facts)))
    changed = [
        f"{key} was {own.get(key)}, is {theirs.get(key)}"
        for key in sorted({*own, *theirs})
        if own.get(key) != theirs.get(key)
    ]
    return "; ".join(changed[:6]) or (
        f"its manifests were {description['dataset'][:12]}, these are {origin.fingerprint[:12]}: the shards differ"
    )


def was_trained_on(description: Mapping[str, Any], dataset: Dataset) -> bool:
    """Whether a run's dataset is this one, or one of the same annotations and split, prepped in another way."""
    own, theirs = description.get("facts") or {}, dataset.description.options
    annotations = "annotations_sha256"
    same = own.get(annotations) == theirs.get(annotations) and own.get("split") == theirs.get("split")
    return description["dataset"] == dataset.fingerprint or (annotations in theirs and same)


def check_classes(folder: RunFolder, own: list[str] | tuple[str, ...], others: tuple[str, ...]) -> None:
    """Refuse a dataset whose labels mean other classes than the run's."""
    if list(own) == list(others):
        return
    pairs = [(mine, theirs) for mine, theirs in zip(own, others, strict=False) if mine != theirs]
    what = f"label {list(own).index(pairs[0][0])} is {pairs[0][0]!r} there and {pairs[0][1]!r} here" if pairs else ""
    what = what or f"{len(own)} classes there and {len(others)} here"
    raise UserError(f"{folder} was trained on other classes than this dataset has ({what}): name that run's dataset")


def pixels_of(folder: RunFolder, description: Mapping[str, Any]) -> PixelFormat:
    """What the pixels of a run's dataset are, by its run.json."""
    return pixel_format(description.get("pixels"), str(folder.description))


def check_pixels(folder: RunFolder, own: PixelFormat, others: PixelFormat) -> None:
    """Refuse a dataset whose pixels the run's network does not take."""
    if (own.channels, own.dtype) != (others.channels, others.dtype):
        raise UserError(f"{folder} was trained on pixels of {own}, this dataset has {others}: name another dataset")


def describe_run(folder: RunFolder, recipe: Recipe, origin: Origin, backbone: dict[str, Any]) -> None:
    """Write run.json and recipe.toml."""
    description = {
        "format": FORMAT_VERSION,
        "recipe": recipe.to_dict(),
        "classes": list(origin.classes),
        "dataset": origin.fingerprint,
        "facts": dict(origin.facts),
        "shares": dict(origin.shares),
        "backbone": backbone,
        "versions": versions(),
    }
    if origin.pixels != RGB8:
        description["pixels"] = origin.pixels.to_dict()
    storage = Storage(folder.path)
    storage.publish(RECIPE, recipe.to_toml().encode())
    storage.publish(DESCRIPTION, (json.dumps(description, indent=2) + "\n").encode())


def read_description(folder: RunFolder) -> dict[str, Any]:
    """The contents of run.json; UserError where it is missing, damaged or newer than this program."""
    try:
        raw = Storage(folder.path).read(DESCRIPTION, MOST_BYTES)
        description = msgspec.json.decode(raw, type=dict[str, Any])
        version = description.get("format")
        if version != FORMAT_VERSION:
            raise UserError(
                f"{folder.description} is of format {str(version)[:40]}; this program reads {FORMAT_VERSION}"
            )
        msgspec.convert(description, _Description)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{folder} holds no run (no run.json): name the folder that was given as --run") from error
    except PermissionError as error:
        raise UserError(f"{folder.description} cannot be read ({error.strerror}): correct its permissions") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{folder.description} is damaged ({str(error)[:200]}): restore it, or begin another run"
        ) from error
    pixels_of(folder, description)
    return description


def open_trained(folder: RunFolder) -> tuple[dict[str, Any], Recipe, dict[str, Any]]:
    """A run's description, recipe and newest checkpoint, for commands that use its weights.

    Raises UserError where there is no run or no checkpoint yet.
    """
    from jigsaw_pretrain.train.engine.checkpoint import check_fits, list_checkpoints, newest_checkpoint
    from jigsaw_pretrain.train.engine.state import build_model
    from jigsaw_pretrain.train.models.backbones import check_size

    folder.read_apart()
    description = read_description(folder)
    recipe = Recipe.from_dict(description["recipe"], str(folder.description))
    found = [path for _, path in list_checkpoints(folder.checkpoints)]
    if not found:
        raise UserError(f"{folder} has no checkpoint yet: continue it with `pretrain --resume`")
    largest = max(found, key=lambda path: path.stat().st_size if path.is_file() else 0)
    check_size(recipe.model.backbone, largest, str(folder.description))
    _, model = build_model(recipe, len(description["classes"]) + 1, pixels_of(folder, description))
    own = model.state_dict()
    run = {name: description[name] for name in ("recipe", "classes", "dataset")}
    newest = newest_checkpoint(
        folder.checkpoints, lambda path, content: check_fits(path, content, own, recipe.optim.steps, run)
    )
    assert newest is not None
    return description, recipe, newest[1]
