"""The one rule that fits a recipe written for COCO to another dataset.

A recipe states what its paper did on COCO train2017: 118,287 images with a median short side of 480 pixels, resized to
800, at batch 16. For a dataset of n images with a median short side of s pixels:

- *Length.* The images seen are the paper's times sqrt(n / 118,287): half way (on a logarithmic scale) between the
  paper's epochs, which starve a small dataset of steps, and the paper's steps, which overfit it. So 13 epochs become
  13 sqrt(118,287 / n). Drops keep their share of the whole, the warm-up is 500 steps and at most a tenth.
- *Size.* Images are enlarged as COCO's are: short side 800 s / 480, long side at most 1333 s / 480 (the square of
  large-scale jitter 1024 s / 480), never above the paper's. Anchors and the pyramid's levels shrink alike.
- *Rate.* The learning rate is the paper's times batch / 16.

On COCO itself the rule changes nothing. The recipe's steps, warmup_steps, short_side, long_side and anchor_scale
overrule it one by one. Pure arithmetic; the run prints what came out before it starts.
"""

import math
from dataclasses import dataclass

from jigsaw_pretrain.detect.recipe import Recipe

COCO_IMAGES = 118_287
COCO_SHORT_SIDE = 480
COCO_BATCH = 16
SQUARE = 1024
"""Side of the square that large-scale jitter fills, pixels, on COCO."""


@dataclass(frozen=True)
class Plan:
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


def fit(recipe: Recipe, images: int, short_side: float) -> Plan:
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
    return Plan(
        steps=steps,
        warmup_steps=warmup,
        drops=drops,
        lr=recipe.lr * recipe.batch / COCO_BATCH,
        short_side=short,
        long_side=long,
        anchor_scale=recipe.anchor_scale or scale,
        epochs=steps * recipe.batch / images,
    )


def rate(plan: Plan, step: int, warmup_factor: float, gamma: float) -> float:
    """The learning rate of a step: linear warm-up from ``warmup_factor`` of it, then drops by ``gamma``."""
    warm = 1.0
    if step < plan.warmup_steps:
        warm = warmup_factor + (1 - warmup_factor) * step / plan.warmup_steps
    return float(plan.lr * warm * gamma ** sum(step >= drop for drop in plan.drops))
