"""The run folder: what lies where, what the run is of, and when it may be begun or continued.

    RUN/run.json         recipe, classes, dataset fingerprint, backbone, versions: written at the first step
    RUN/recipe.toml      the recipe in full, for the next run
    RUN/checkpoints/     step-NNNNNNNN.pt, the newest few
    RUN/metrics.jsonl    a row a step; RUN/digest.txt, a line a step, with --log-digest
    RUN/backbone.pth     at the end of the schedule: the backbone under its library's names
    RUN/backbone-fpn.pth with a neck, backbone and neck under the names of torchvision's BackboneWithFPN

The checks here keep a run one run: same recipe, same classes, same dataset from its first step to its last, whatever
the machine, the number of ranks or of workers.
"""

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.dataset.dataset import Dataset
from jigsaw_pretrain.formats.pixels import RGB8, PixelFormat, pixel_format
from jigsaw_pretrain.storage import Storage
from jigsaw_pretrain.train.data.sampler import slots_of
from jigsaw_pretrain.train.engine.checkpoint import list_checkpoints, newest_checkpoint
from jigsaw_pretrain.train.engine.mirror import Mirror
from jigsaw_pretrain.train.recipe import Recipe, load_recipe, recipe_from
from jigsaw_pretrain.train.streams import StreamOptions

FORMAT_VERSION = 1

PACKAGES = ("jigsaw-pretrain", "torch", "torchvision", "numpy")


@dataclass(frozen=True)
class Origin:
    """The dataset of a run, as far as it shapes the weights: class names in label order, and the manifests' hash.

    facts: what dataset.json says, to name what differs from another dataset. shares: the share of each group in the
    crops drawn. pixels: of the crops.
    """

    classes: tuple[str, ...]
    fingerprint: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    shares: Mapping[str, float] = field(default_factory=dict)
    pixels: PixelFormat = RGB8


def origin_of(dataset: Dataset, stream: StreamOptions) -> Origin:
    """The origin of a run on this dataset."""
    said = dataset.description
    facts = {"seed": said.seed, "plan": said.plan[:12], **said.options, **said.versions, **said.totals}
    shares = {group: round(share, 6) for group, share in slots_of(dataset, stream).shares().items()}
    return Origin(tuple(dataset.classes), dataset.fingerprint, facts, shares, dataset.pixels)


@dataclass(frozen=True)
class RunFolder:
    """Where a run keeps its files; with a mirror, ``path`` is where those of its URL are staged."""

    path: Path
    mirror: Mirror | None = None

    def __str__(self) -> str:
        """The folder as the user named it."""
        return self.mirror.url if self.mirror else str(self.path)

    def stage(self, checkpoint: str) -> None:
        """Have a checkpoint of that name here, where the folder is at a URL."""
        if self.mirror:
            self.mirror.fetch_checkpoint(checkpoint)

    def push(self) -> None:
        """Publish what has changed, where the folder is at a URL."""
        if self.mirror:
            self.mirror.push()

    @property
    def description(self) -> Path:
        """run.json."""
        return self.path / "run.json"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """metrics.jsonl."""
        return self.path / "metrics.jsonl"

    @property
    def digest(self) -> Path:
        """digest.txt."""
        return self.path / "digest.txt"

    @property
    def backbone(self) -> Path:
        """backbone.pth."""
        return self.path / "backbone.pth"

    @property
    def pyramid(self) -> Path:
        """backbone-fpn.pth."""
        return self.path / "backbone-fpn.pth"

    @property
    def begun(self) -> bool:
        """Whether a run's first step was taken here."""
        return self.description.exists() or bool(list_checkpoints(self.checkpoints))


def open_run(run: str | Path) -> RunFolder:
    """The run folder of a path or URL, not yet looked into; see Mirror.pull."""
    if "://" not in str(run):
        return RunFolder(Path(run))
    mirror = Mirror(str(run))
    return RunFolder(mirror.path, mirror)


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
    folder: RunFolder, file: Path | None, settings: tuple[str, ...], resume: bool, dataset: Dataset | None = None
) -> Recipe:
    """The recipe to run, with what it implies written out (Recipe.resolved).

    File and settings' for a new run, the run's own for a resumed one.

    Raises UserError for a folder that holds a run (without resume), and for a recipe that is not the run's (with it),
    naming what differs.
    """
    if folder.path.exists() and not folder.path.is_dir():
        raise UserError(f"--run {folder} is a file: name a folder")
    if not (resume and folder.begun):
        if folder.begun:
            raise UserError(
                f"{folder} already holds a run: add --resume to continue it, or name another folder with --run"
            )
        return load_recipe(file, settings).resolved(dataset)
    own = recipe_from(read_description(folder)["recipe"], str(folder.description))
    wanted = load_recipe(file, settings, base=own)
    wanted = replace(wanted, lanes=wanted.stream.lane_count, mean=wanted.mean or own.mean, std=wanted.std or own.std)
    if changed := wanted.differences(own):
        raise UserError(
            f"{folder} was run with another recipe ({'; '.join(changed)}): resume it without these, "
            "or name another folder with --run"
        )
    return own


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
    storage.publish("recipe.toml", recipe.to_toml().encode())
    storage.publish("run.json", (json.dumps(description, indent=2) + "\n").encode())


def read_description(folder: RunFolder) -> dict[str, Any]:
    """The contents of run.json; UserError where it is missing, damaged or newer than this program."""
    try:
        description = json.loads(folder.description.read_text(encoding="utf-8"))
        version = description["format"]
    except FileNotFoundError as error:
        raise UserError(f"{folder} holds no run (no run.json): name the folder that was given as --run") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder.description} is damaged ({error}): restore it, or begin another run") from error
    if version != FORMAT_VERSION:
        raise UserError(f"{folder.description} is of format {version}; this program reads {FORMAT_VERSION}")
    assert isinstance(description, dict)
    return description


def open_trained(folder: RunFolder) -> tuple[dict[str, Any], Recipe, dict[str, Any]]:
    """A run's description, recipe and newest checkpoint, for commands that use its weights.

    Raises UserError where there is no run or no checkpoint yet.
    """
    if folder.mirror:
        folder.mirror.pull()
    description = read_description(folder)
    newest = newest_checkpoint(folder.checkpoints, print)
    if newest is None:
        raise UserError(f"{folder} has no checkpoint yet: continue it with `pretrain --resume`")
    return description, recipe_from(description["recipe"], str(folder.description)), newest[1]
