"""Recipes: everything that decides a run's result, as one flat TOML file of typed keys.

A key that is not given has the paper's value, so an empty recipe is the paper's. What does not change the result
(workers, folders, GPUs) is on the command line instead. A recipe is checked whole before anything is loaded: unknown
keys are refused with the nearest known one, wrong types and impossible values by name.

StreamOptions are the part of it that decides every batch: what is streamed and how it is augmented (section 4.1).
"""

import difflib
import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.dataset.dataset import Dataset
from jigsaw_pretrain.formats.jigsaw import Template

STRATEGIES = ("erf-adaptive", "block-wise", "global")

MEAN = (0.485, 0.456, 0.406)
"""Of pixels in 0..1, red, green, blue (section 4.1)."""

STD = (0.229, 0.224, 0.225)

NECKS = ("none", "fpn")

NORMS = ("bn", "gn")

PRECISIONS = ("fp32", "bf16", "fp16")

FITS = ("crop", "warp", "resize")

BALANCES = ("none", "sqrt", "uniform")


def scaled_rate(rate: float, batch: int, reference_batch: int) -> float:
    """The linear scaling rule: ``rate * batch / reference_batch``. The paper's 0.2 and 0.8 are for 512 jigsaws."""
    return rate * batch / reference_batch


@dataclass(frozen=True)
class StreamOptions:
    """Options of the stream of jigsaws; together with the dataset they determine every batch of a run.

    batch: jigsaws in a global batch. lanes: streams that the run is made of, kept for its whole life; None takes the
    largest divisor of the batch not above 64. fit: how a crop meets its region (Table 1). resize_low, resize_high:
    the range of the one resize ratio. flip: the probability of a horizontal flip. augment: False for evaluation
    (ratio 1, no flip, centred). max_repeat: how many times as often as a crop of the best-supplied group one of a thin
    group may be drawn. balance: which classes are drawn more often than they occur (data/lanes.py).
    """

    seed: int = 0
    batch: int = 512
    lanes: int | None = None
    fit: str = "crop"
    resize_low: float = 0.8
    resize_high: float = 1.5
    flip: float = 0.5
    augment: bool = True
    max_repeat: int = 20
    balance: str = "none"

    def __post_init__(self) -> None:
        """Refuse what cannot be streamed, naming the remedy."""
        if self.batch < 1:
            raise UserError(f"batch {self.batch} must be at least 1")
        if self.fit not in FITS:
            raise UserError(f"fit {self.fit!r} is not one of {', '.join(FITS)}")
        if self.balance not in BALANCES:
            raise UserError(f"balance {self.balance!r} is not one of {', '.join(BALANCES)}")
        if not 0 < self.resize_low <= self.resize_high:
            raise UserError(f"resize ratios {self.resize_low} to {self.resize_high} must be positive and in order")
        if not 0 <= self.flip <= 1:
            raise UserError(f"flip {self.flip} is a probability between 0 and 1")
        if self.max_repeat < 1:
            raise UserError(f"max-repeat {self.max_repeat} must be at least 1")
        if self.lane_count < 1 or self.batch % self.lane_count:
            divisors = [n for n in range(1, self.batch + 1) if self.batch % n == 0]
            raise UserError(f"a batch of {self.batch} is not divisible by {self.lanes} lanes: choose one of {divisors}")

    @property
    def lane_count(self) -> int:
        """L: the lanes given, or the largest divisor of the batch not above 64."""
        if self.lanes is not None:
            return self.lanes
        return max(n for n in range(1, min(64, self.batch) + 1) if self.batch % n == 0)

    @property
    def chunk(self) -> int:
        """Jigsaws of one lane in a global batch: k = batch / L."""
        return self.batch // self.lane_count


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run's settings; the defaults are the paper's (section 4.1).

    backbone: a torchvision classification model, timm:NAME, or module:callable (models/backbones.py). norm: bn, or gn
    in its place, for detectors that are fine-tuned with it. init: a weights file to begin from (models/weights.py).
    neck: one of NECKS, with neck_channels on every level. template_size, template_split: pixels (figure 4b). batch:
    jigsaws over all ranks. lanes: streams of the run; none takes the largest divisor of the batch not above 64. fit,
    resize_low, resize_high, flip, max_repeat, balance: what the jigsaws are made of and how (StreamOptions). mean, std:
    of pixels in 0..1; none takes ImageNet's for 8-bit RGB, else the dataset's own.

    strategy: one of STRATEGIES; tau, erf_every: equation 2's threshold and the steps between refreshes of its table.
    steps: optimizer steps. lr_start, lr_peak, warmup_steps: the schedule, its rates being for a batch of lr_batch and
    scaled linearly to others.

    micro_batch: jigsaws a GPU takes at once, which is what batch norm's statistics are made of; none takes its whole
    share of the batch, else gradients are accumulated over its share. sync_bn: statistics over all GPUs. precision: one
    of PRECISIONS; tf32: whether float32 products on a GPU may be rounded to it. ema: the decay of an exponential moving
    average of the weights, which is then what is exported; 0 keeps none. clip_norm: the gradient's largest norm; 0
    leaves it as it is.

    checkpoint_every: steps between checkpoints, of which the newest keep_checkpoints stay. log_every: steps between
    fetches of metrics from the device (every step has its row all the same).
    """

    backbone: str = "resnet50"
    norm: str = "bn"
    init: str | None = None
    neck: str = "none"
    neck_channels: int = 256
    template_size: int = 224
    template_split: int = 64
    seed: int = 0
    batch: int = 512
    lanes: int | None = None
    fit: str = "crop"
    resize_low: float = 0.8
    resize_high: float = 1.5
    flip: float = 0.5
    max_repeat: int = 20
    balance: str = "none"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    strategy: str = "erf-adaptive"
    tau: float = 0.7
    erf_every: int = 5_000
    steps: int = 64_000
    lr_start: float = 0.2
    lr_peak: float = 0.8
    lr_batch: int = 512
    warmup_steps: int = 1_250
    momentum: float = 0.9
    weight_decay: float = 1e-4
    micro_batch: int | None = None
    sync_bn: bool = False
    precision: str = "fp32"
    tf32: bool = True
    ema: float = 0.0
    clip_norm: float = 0.0
    checkpoint_every: int = 1_000
    keep_checkpoints: int = 2
    log_every: int = 10

    def __post_init__(self) -> None:
        """Refuse values that cannot be trained with; UserError names the key."""
        counts = (
            "steps",
            "erf_every",
            "lr_batch",
            "checkpoint_every",
            "keep_checkpoints",
            "log_every",
            "neck_channels",
        )
        for key in counts:
            _require(getattr(self, key) >= 1, key, getattr(self, key), "at least 1")
        for key in ("lr_start", "lr_peak", "weight_decay", "warmup_steps", "clip_norm"):
            _require(getattr(self, key) >= 0, key, getattr(self, key), "not negative")
        _require(0 < self.tau <= 1, "tau", self.tau, "above 0 and at most 1")
        _require(0 <= self.momentum < 1, "momentum", self.momentum, "at least 0 and below 1")
        _require(0 <= self.ema < 1, "ema", self.ema, "at least 0 and below 1")
        _require(self.micro_batch is None or self.micro_batch >= 1, "micro_batch", self.micro_batch, "at least 1")
        _require(self.neck in NECKS, "neck", self.neck, f"one of {', '.join(NECKS)}")
        _require(self.precision in PRECISIONS, "precision", self.precision, f"one of {', '.join(PRECISIONS)}")
        _require(self.norm in NORMS, "norm", self.norm, f"one of {', '.join(NORMS)}")
        _require(self.strategy in STRATEGIES, "strategy", self.strategy, f"one of {', '.join(STRATEGIES)}")
        for key in ("mean", "std"):
            given = getattr(self, key)
            must = "a number for each channel, for RGB three numbers" + (", all positive" if key == "std" else "")
            _require(given is None or len(given) > 0, key, [], must)
            _require(key == "mean" or given is None or min(given) > 0, key, given, must)
        if self.mean is not None and self.std is not None:
            _require(len(self.mean) == len(self.std), "mean", list(self.mean), "as many numbers as std")
        _ = self.template, self.stream  # refuse what they refuse

    @property
    def template(self) -> Template:
        """The jigsaw's template."""
        return Template(self.template_size, self.template_split)

    @property
    def stream(self) -> StreamOptions:
        """What decides the batches."""
        return StreamOptions(
            seed=self.seed,
            batch=self.batch,
            lanes=self.lanes,
            fit=self.fit,
            resize_low=self.resize_low,
            resize_high=self.resize_high,
            flip=self.flip,
            max_repeat=self.max_repeat,
            balance=self.balance,
        )

    @property
    def rates(self) -> tuple[float, float]:
        """The first and the highest learning rate for this batch (linear scaling)."""
        return tuple(scaled_rate(rate, self.batch, self.lr_batch) for rate in (self.lr_start, self.lr_peak))  # type: ignore[return-value]

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and std: ImageNet's where the recipe has none."""
        return self.mean or MEAN, self.std or STD

    def resolved(self, dataset: Dataset | None = None) -> "Recipe":
        """The same with lanes, mean and std written out, as the run folder keeps it.

        Raises UserError for a mean or std of another number of channels than the dataset has.
        """
        channels, (mean, std) = 3, self.normalisation
        if dataset is not None and not dataset.pixels.is_rgb8:
            channels, (own_mean, own_std) = dataset.pixels.channels, dataset.measured
            # A channel that never changes becomes zero, whatever it is divided by.
            mean, std = self.mean or own_mean, self.std or tuple(value or 1.0 for value in own_std)
        for key, given in (("mean", mean), ("std", std)):
            _require(len(given) == channels, key, list(given), f"{channels} numbers, one for each channel of the crops")
        return replace(self, lanes=self.stream.lane_count, mean=mean, std=std)

    def to_dict(self) -> dict[str, Any]:
        """Plain values (lists for tuples), for JSON and checkpoints."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def to_toml(self) -> str:
        """A recipe file that gives this recipe again."""
        return "".join(f"{key} = {_toml(value)}\n" for key, value in self.to_dict().items() if value is not None)

    def differences(self, other: "Recipe") -> list[str]:
        """``key: mine, not theirs`` for every key that differs."""
        mine, theirs = self.to_dict(), other.to_dict()
        return [f"{key} = {mine[key]}, was {theirs[key]}" for key in mine if mine[key] != theirs[key]]


def load_recipe(path: Path | None, settings: Iterable[str] = (), base: Recipe | None = None) -> Recipe:
    """The recipe of a TOML file (without one: ``base``, or the paper's) with ``key=value`` settings laid over it.

    Raises UserError naming the file or ``--set``, the key and the remedy.
    """
    values: dict[str, Any] = {}
    if path is not None:
        values = _checked(_read_toml(path), str(path))
    elif base is not None:
        values = asdict(base)
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise UserError(f"--set {setting}: write it as key=value, such as --set steps=200")
        values |= _checked({key.strip(): _value(text.strip())}, f"--set {setting}")
    return Recipe(**values)


def recipe_from(values: Mapping[str, Any], where: str) -> Recipe:
    """The recipe of plain values as to_dict gave them; ``where`` is named in errors."""
    return Recipe(**_checked(values, where))


def _require(holds: bool, key: str, value: object, must: str) -> None:
    if not holds:
        raise UserError(f"recipe: {key} = {value} must be {must}")


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"recipe {path} cannot be read ({error.strerror}): name a TOML file, see recipes/") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} is not valid TOML: {error}") from error


def _value(text: str) -> Any:
    """A setting's text as TOML reads it; a bare word is a string, ``none`` is no value (or the word: _converted)."""
    if text == "none":
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _checked(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values with their declared types; UserError for an unknown key or another type."""
    hints = get_type_hints(Recipe)
    known = [field.name for field in fields(Recipe)]
    result = {}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}?" if near else f"the known ones are {', '.join(known)}."
            raise UserError(f"{where}: unknown key {key}; {hint}")
        result[key] = _converted(value, hints[key], f"{where}: {key}")
    return result


def _converted(value: Any, kind: Any, where: str) -> Any:
    """The value as ``kind``: integers pass for numbers, and no value for the word "none", nothing else is converted."""
    if get_origin(kind) is UnionType:
        if value is None:
            return None
        (kind,) = (one for one in get_args(kind) if one is not NoneType)
    if get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{where} must be a list of numbers such as [0.5, 0.5, 0.5], not {value!r}")
        return tuple(_converted(one, float, where) for one in value)
    if kind is str and value is None:
        return "none"
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is float and isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where} must be a finite number, not {value!r}")
    if isinstance(value, bool) is not (kind is bool) or not isinstance(value, kind):
        wanted = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}[kind]
        raise UserError(f"{where} must be {wanted}, not {value!r}")
    return value


def _toml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_toml(one) for one in value)}]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return repr(value)
