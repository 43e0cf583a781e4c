"""What decides a detector run's result, and how a recipe written for COCO is fitted to another dataset.

A recipe is one frozen record, read from TOML, ``--set key=value`` and the command's own options. The defaults are the
Jigsaw paper's (section 4.1). Unknown keys are refused with the nearest one that exists.

A recipe states what its paper did on COCO train2017: 118,287 images with a median short side of 480 pixels, resized to
800, at batch 16. For a dataset of n images with a median short side of s pixels (the scaling rule):

- *Length.* The images seen are the paper's times sqrt(n / 118,287): half way (on a logarithmic scale) between the
  paper's epochs, which starve a small dataset of steps, and the paper's steps, which overfit it. So 13 epochs become
  13 sqrt(118,287 / n). Drops keep their share of the whole, the warm-up is 500 steps and at most a tenth.
- *Size.* Images are enlarged as COCO's are: short side 800 s / 480, long side at most 1333 s / 480 (the square of
  large-scale jitter 1024 s / 480), never above the paper's. Anchors and the pyramid's levels shrink alike.
- *Rate.* The learning rate is the paper's times batch / 16.

On COCO itself the rule changes nothing. The recipe's steps, warmup_steps, short_side, long_side and anchor_scale
overrule it one by one. Pure arithmetic; the run prints what came out before it starts.
"""

import difflib
import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from jigsaw_pretrain.errors import UserError

MODELS = ("faster-rcnn-c4", "faster-rcnn-fpn", "mask-rcnn-fpn", "retinanet", "cascade-rcnn-fpn")
NORMS = ("frozen-bn", "sync-bn", "gn")
FREEZES = ("none", "stem", "backbone")
SCHEDULES = ("1x", "2x", "3x", "6x")
HEADS = ("default", "2fc", "4conv1fc")
UNITS = ("epochs", "iterations")
PRECISIONS = ("float32", "bf16")
PRETRAINED_NECKS = ("auto", "none")

_CHOICES = {
    "model": MODELS,
    "norm": NORMS,
    "freeze": FREEZES,
    "schedule": SCHEDULES,
    "head": HEADS,
    "unit": UNITS,
    "precision": PRECISIONS,
    "neck": PRETRAINED_NECKS,
    "drops_from": ("start", "end"),
}

COCO_IMAGES = 118_287
COCO_SHORT_SIDE = 480
COCO_BATCH = 16

SQUARE = 1024
"""Side of the square that large-scale jitter fills, pixels, on COCO."""


@dataclass(frozen=True)
class DetectorRecipe:
    """Every option that decides a run's result; ``None`` leaves a value to the scaling rule (above).

    model, backbone, norm, freeze, schedule: as on the command line. freeze "stem" is the first convolution and its
    norm; "backbone" is everything that weights can bring, layer4 in a C4 head included.
    head: the box head of the FPN models ("2fc", or "4conv1fc" with more capacity); "default" is 2fc, layer4 for C4.
    width: channels of the pyramid and of the convolutional heads; fc: of the fully connected layers.
    unit, length, drops, drops_from: the 1x schedule on COCO at batch 16. From "start", drops grow with the schedule;
    from "end" they stay that far before its end (the scratch paper's). gamma: the factor of each drop.
    steps, warmup_steps, short_side, long_side: set to overrule the scaling rule.
    lr is for batch 16 and scales linearly with the batch. norm_decay: weight decay of norm layers.
    clip: largest gradient norm, 0 for none. jitter_low, jitter_high: large-scale jitter, both 0 for none.
    eval_every: steps between evaluations on the validation set, 0 for only at the end; save_every: checkpoints.
    anchor_scale: size of anchors against COCO's at 800 pixels; None takes short side / 800.
    partial: take weights that match the backbone only in part. neck: "auto" starts the pyramid from the neck that the
    weights come with, where they do; "none" leaves it out.
    """

    model: str = "faster-rcnn-c4"
    backbone: str = "resnet50"
    norm: str = "frozen-bn"
    freeze: str = "none"
    schedule: str = "1x"
    head: str = "default"
    width: int = 256
    fc: int = 1024
    batch: int = 16
    lr: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 1e-4
    norm_decay: float = 0.0
    clip: float = 0.0
    unit: str = "epochs"
    length: float = 13.0
    drops: tuple[float, ...] = (9.0, 12.0)
    drops_from: str = "start"
    gamma: float = 0.1
    steps: int | None = None
    warmup_steps: int | None = None
    warmup_factor: float = 1e-3
    short_side: int | None = None
    long_side: int | None = None
    anchor_scale: float | None = None
    flip: float = 0.5
    jitter_low: float = 0.0
    jitter_high: float = 0.0
    rois: int = 512
    proposals: int = 1000
    score_threshold: float = 0.05
    detections: int = 100
    eval_every: int = 0
    save_every: int = 1000
    log_every: int = 20
    precision: str = "float32"
    seed: int = 0
    partial: bool = False
    neck: str = "auto"

    def __post_init__(self) -> None:
        """Refuse what cannot be trained, naming the key and what it may be."""
        for key, allowed in _CHOICES.items():
            if getattr(self, key) not in allowed:
                raise UserError(f"{key} {getattr(self, key)!r} is not one of {', '.join(allowed)}")
        positive = ("width", "fc", "batch", "length", "rois", "proposals", "detections", "save_every", "log_every")
        for key in positive:
            if getattr(self, key) <= 0:
                raise UserError(f"{key} {getattr(self, key)} must be above 0")
        for key in ("steps", "short_side", "long_side", "anchor_scale"):
            if getattr(self, key) is not None and getattr(self, key) <= 0:
                raise UserError(f"{key} {getattr(self, key)} must be above 0")
        if not 0 <= self.flip <= 1:
            raise UserError(f"flip {self.flip} is a probability between 0 and 1")
        if self.jitters and not 0 < self.jitter_low <= self.jitter_high:
            raise UserError(f"jitter {self.jitter_low} to {self.jitter_high} must be positive and in order")
        if self.head != "default" and self.model in ("faster-rcnn-c4", "retinanet"):
            raise UserError(f"head {self.head!r} is for the FPN models with a box head; {self.model} has its own")
        if self.anchor_scale is None and self.short_side is None and self.long_side is not None:
            raise UserError("long_side is set without short_side: set both, or neither")

    @property
    def jitters(self) -> bool:
        """Whether images are jittered in scale and cut or padded to a square."""
        return self.jitter_high > 0

    @property
    def factor(self) -> int:
        """k of the kx schedule."""
        return int(self.schedule.rstrip("x"))


def read_recipe(
    path: Path | None, sets: Iterable[str] = (), overrides: Mapping[str, Any] | None = None
) -> DetectorRecipe:
    """The recipe of a TOML file (None for the defaults), then ``key=value`` strings, then options that are not None.

    Raises UserError for a missing file, a key that does not exist (naming the nearest), a value of the wrong type.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(
                f"{path} cannot be read ({error.strerror}): name a recipe, such as recipes/detect-paper.toml"
            ) from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not TOML ({error})") from error
    checked = {key: _checked(key, value, str(path)) for key, value in values.items()}
    for item in sets:
        key, sign, text = item.partition("=")
        if not sign:
            raise UserError(f"--set {item!r} is not key=value, such as --set lr=0.01")
        checked[key.strip()] = _checked(key.strip(), _parse(text.strip()), "--set")
    # Built once from everything: keys are judged together (a head fits some models only).
    return DetectorRecipe(
        **{**checked, **{key: value for key, value in (overrides or {}).items() if value is not None}}
    )


def from_mapping(values: Mapping[str, Any], source: str) -> DetectorRecipe:
    """The recipe of a TOML table or a saved configuration; raises UserError as read_recipe does."""
    checked = {key: _checked(key, value, source) for key, value in values.items()}
    return DetectorRecipe(**checked)


_TYPES = {field.name: field.type for field in fields(DetectorRecipe)}
_WRONG = object()


def _checked(key: str, value: Any, source: str) -> Any:
    """The value as the recipe's field wants it."""
    if key not in _TYPES:
        near = difflib.get_close_matches(key, _TYPES, n=1, cutoff=0.0)
        raise UserError(f"{source}: unknown key {key}; did you mean {near[0]}?")
    wanted = str(_TYPES[key])
    if value is None or (value == "none" and "None" in wanted):
        good: Any = None if "None" in wanted else _WRONG
    elif "tuple" in wanted:
        numbers = value if isinstance(value, (list, tuple)) else [value]
        good = tuple(float(one) for one in numbers) if all(_is_number(one) for one in numbers) else _WRONG
    elif "bool" in wanted:
        good = value if isinstance(value, bool) else _WRONG
    elif "int" in wanted:
        good = value if isinstance(value, int) and not isinstance(value, bool) else _WRONG
    elif "float" in wanted:
        good = float(value) if _is_number(value) else _WRONG
    else:
        good = value if isinstance(value, str) else _WRONG
    if good is _WRONG:
        raise UserError(f"{source}: {key} = {value!r} is not of type {wanted}")
    return good


def _parse(text: str) -> Any:
    """A TOML value, or else the bare string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass(frozen=True)
class ScaledRecipe:
    """A recipe fitted to a dataset.

    steps, warmup_steps: optimiser steps. drops: the steps from which each drop holds. lr: at its height.
    short_side, long_side: of a resized image, pixels (both the square's side under large-scale jitter).
    anchor_scale: anchors' size against COCO's. epochs: passes over the dataset, for information.
    """

    steps: int
    warmup_steps: int
    drops: tuple[int, ...]
    lr: float
    short_side: int
    long_side: int
    anchor_scale: float
    epochs: float


def fit_to_dataset(recipe: DetectorRecipe, images: int, short_side: float) -> ScaledRecipe:
    """Fit a recipe to ``images`` training images whose median short side is ``short_side`` pixels."""
    per_epoch = COCO_IMAGES / COCO_BATCH if recipe.unit == "epochs" else 1.0
    whole = recipe.length * recipe.factor
    share = min(1.0, images / COCO_IMAGES)
    steps = recipe.steps or max(1, round(whole * per_epoch * math.sqrt(share) * COCO_BATCH / recipe.batch))
    if recipe.drops_from == "start":
        places = [drop / recipe.length for drop in recipe.drops]
    else:
        places = [1 - drop / whole for drop in recipe.drops]
    drops = tuple(round(steps * min(1.0, max(0.0, place))) for place in places)
    warmup = recipe.warmup_steps if recipe.warmup_steps is not None else min(500, steps // 10)
    shrink = min(1.0, short_side / COCO_SHORT_SIDE)
    if recipe.jitters:
        square = recipe.short_side or max(32, 32 * round(SQUARE * shrink / 32))
        short, long, scale = square, square, square / SQUARE
    else:
        short = recipe.short_side or max(32, round(800 * shrink))
        long = recipe.long_side or max(short, round(short * 1333 / 800))
        scale = short / 800
    return ScaledRecipe(
        steps=steps,
        warmup_steps=warmup,
        drops=drops,
        lr=recipe.lr * recipe.batch / COCO_BATCH,
        short_side=short,
        long_side=long,
        anchor_scale=recipe.anchor_scale or scale,
        epochs=steps * recipe.batch / images,
    )


def learning_rate(plan: ScaledRecipe, step: int, warmup_factor: float, gamma: float) -> float:
    """The learning rate of a step: linear warm-up from ``warmup_factor`` of it, then drops by ``gamma``."""
    warm = 1.0
    if step < plan.warmup_steps:
        warm = warmup_factor + (1 - warmup_factor) * step / plan.warmup_steps
    return float(plan.lr * warm * gamma ** sum(step >= drop for drop in plan.drops))
