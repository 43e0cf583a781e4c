"""What decides a detector run's result, and how a recipe written for COCO is fitted to another dataset.

The recipe has the sections of the pre-training recipe (train/recipe.py), and the same key for the same thing. The
defaults are the Jigsaw paper's (section 4.1).

A recipe states what its paper did on COCO train2017: 118,287 images with a median short side of 480 pixels, resized to
800, at batch 16. For a dataset of n images with a median short side of s pixels (the scaling rule):

- *Length.* The images seen are the paper's times sqrt(n / 118,287): half way (on a logarithmic scale) between the
  paper's epochs, which starve a small dataset of steps, and the paper's steps, which overfit it. So 13 epochs become
  13 sqrt(118,287 / n). Drops keep their share of the whole, the warm-up is 500 steps and at most a tenth.
- *Size.* Images are enlarged as COCO's are: short side 800 s / 480, long side at most 1333 s / 480 (the square of
  large-scale jitter 1024 s / 480), never above the paper's. Anchors and the pyramid's levels shrink alike.
- *Rate.* The learning rate is the paper's times batch / 16.

On COCO itself the rule changes nothing. The keys optim.steps, optim.warmup_steps, data.short_side, data.long_side and
model.anchor_scale overrule it one by one. Pure arithmetic; the run prints what came out before it starts.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec

from jigsaw_pretrain.config import Count, CountOrZero, Positive, PositiveOrZero, Record, Share, ShareBelowOne
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.train.recipe import Channels, Optimizer, PositiveChannels, PositiveShare, StoredConfig

DetectorName = Literal["faster-rcnn-c4", "faster-rcnn-fpn", "mask-rcnn-fpn", "retinanet", "cascade-rcnn-fpn"]

DetectorNorm = Literal["frozen-bn", "sync-bn", "gn"]

Freeze = Literal["none", "stem", "backbone"]

Side = Annotated[int, msgspec.Meta(ge=1, le=16_384)]
"""A side of a resized image in pixels."""

Width = Annotated[int, msgspec.Meta(ge=1, le=16_384)]
"""Channels of a layer."""

Schedule = Literal["1x", "2x", "3x", "6x"]

DetectorPrecision = Literal["fp32", "bf16"]

CONFIG = "config.json"
"""In a run's folder, what the run is, its recipe first of all (run.py)."""

COCO_IMAGES = 118_287
COCO_SHORT_SIDE = 480
COCO_BATCH = 16

SQUARE = 1024
"""Side of the square that large-scale jitter fills, pixels, on COCO."""


class DetectorDataOptions(Record, frozen=True, kw_only=True):
    """The images: their order, size and augmentation."""

    seed: int = 0
    """Seed of the initial weights, the order of images, augmentation and the sampling of regions."""

    batch: Count = 16
    """Images in a global batch, over all ranks."""

    short_side: Side | None = None
    """Short side of a resized image, pixels (the side of the square under large-scale jitter). `none` takes what the
    scaling rule gives, on COCO 800 (1024 under jitter)."""

    long_side: Side | None = None
    """Longest that the long side may be, pixels. `none` takes what the scaling rule gives, on COCO 1333."""

    train_short_sides: tuple[Count, ...] | None = None
    """Multi-scale training: the short side of each image is drawn from these, written for COCO's 800 and fitted to the
    dataset as short_side is. `none` trains at short_side alone."""

    test_short_sides: tuple[Count, ...] | None = None
    """Multi-scale test: images are evaluated at each of these, written as those of training, and the detections merged
    by non-maximum suppression. `none` tests at short_side alone."""

    images_limit: Count | None = None
    """Train on so many images, drawn without regard to their classes; a smaller number's are among a larger one's.
    `none` takes all."""

    subset_seed: int = 0
    """Seed of which images these are."""

    subset_schedule: Literal["own", "whole"] = "own"
    """How long a run on a subset is: "own", as the scaling rule fits it to the subset; "whole", as to all images."""

    flip: Share = 0.5
    """Probability that an image is flipped horizontally."""

    pixels: str | None = None
    """What images are read as: "rgb8", or channels and type such as "1xuint16", as for prep's --pixels. `none` takes
    what the weights were trained on; where they do not say, what the images hold."""

    mean: Channels | None = None
    """Mean of each channel, of pixels in 0..1. `none` takes that which the weights were trained with, and any other is
    refused; where they do not say, ImageNet's for 8-bit RGB, else the training images' own."""

    std: PositiveChannels | None = None
    """Standard deviation of each channel, of pixels in 0..1; as `mean`."""

    jitter_low: PositiveOrZero = 0.0
    """Smallest ratio of large-scale jitter, which resizes images at random and cuts or pads them to a square.
    There is none with jitter_high = 0, as in the paper."""

    jitter_high: PositiveOrZero = 0.0
    """Largest ratio of large-scale jitter; 0 for none."""

    copy_paste: Share = 0.0
    """Probability that objects of another image are pasted on an image (Copy-Paste); needs large-scale jitter, whose
    square both fill. Each object is taken with a probability of a half, by its mask; where there is none, its box."""

    def __post_init__(self) -> None:
        """Refuse values that do not go together."""
        super().__post_init__()
        if self.jitters and not 0 < self.jitter_low <= self.jitter_high:
            raise UserError(
                f"data.jitter_low = {self.jitter_low} must be above 0 and not above jitter_high = {self.jitter_high}"
            )
        if self.copy_paste and not self.jitters:
            raise UserError("data.copy_paste needs large-scale jitter: set data.jitter_low and data.jitter_high")
        if self.jitters and self.train_short_sides:
            raise UserError("data.train_short_sides and data.jitter_high both change the size of images: set one")
        for key in ("train_short_sides", "test_short_sides"):
            if getattr(self, key) == ():
                raise UserError(f"data.{key} = [] names no size: leave it out")

    @property
    def jitters(self) -> bool:
        """Whether images are jittered in scale and cut or padded to a square."""
        return self.jitter_high > 0


class DetectorModelOptions(Record, frozen=True, kw_only=True):
    """The detector, and what it takes of the weights it starts from."""

    name: DetectorName = "faster-rcnn-c4"
    """The detector."""

    backbone: str = "resnet50"
    """What pre-training takes: a torchvision classification model, `timm:NAME`, `ultralytics:FILE.yaml`,
    `transformers:TYPE`, or `module:callable` of your own."""

    norm: DetectorNorm = "frozen-bn"
    """Normalisation in the place of batch norm, and of what the detector adds. "frozen-bn" keeps the statistics of the
    weights and so needs weights that have them. A backbone without batch norm keeps its own."""

    freeze: Freeze = "none"
    """What stays as the weights have it. "stem": the first convolution and its norm. "backbone": everything that the
    weights can bring, the last stage in a C4 head included."""

    head: Literal["default", "2fc", "4conv1fc"] = "default"
    """Box head of the FPN models: "2fc", or "4conv1fc" with more capacity. "default" is 2fc, and for C4 the backbone's
    last stage."""

    neck: Literal["fpn", "nas-fpn"] = "fpn"
    """The pyramid: "fpn" on strides 4 to 32, or "nas-fpn" with more capacity (detect/models/nas_fpn.py), on strides 8
    to 128; a pre-trained neck is of the first. Without meaning for C4."""

    neck_channels: Width = 256
    """Channels of the feature pyramid and of the convolutional heads."""

    fc: Width = 1024
    """Width of the fully connected layers of the box head."""

    anchor_scale: Positive | None = None
    """Size of the anchors relative to COCO's at a short side of 800 pixels. `none` takes short side / 800."""

    deform: bool = False
    """Deformable 3 x 3 convolutions in the stages of strides 8 to 32 (stages 2 to 4 of figure 8). Their offsets begin
    at 0, so that they begin as the plain convolutions of the weights."""

    rois: Count = 512
    """Regions per image that the box head is trained on."""

    proposals: Count = 1000
    """Proposals per image that the first stage keeps (twice as many in training)."""

    score_threshold: Share = 0.05
    """Boxes with a lower score are not predicted."""

    detections: Count = 100
    """Most boxes predicted per image."""

    partial: bool = False
    """Take weights that match the backbone only in part; otherwise they are refused."""

    pretrained_neck: Literal["auto", "none"] = "auto"
    """"auto" starts the pyramid from the neck that the weights come with, where they do; "none" starts it at random."""

    def __post_init__(self) -> None:
        """Refuse values that do not go together."""
        super().__post_init__()
        if self.head != "default" and self.name in ("faster-rcnn-c4", "retinanet"):
            raise UserError(f"model.head = {self.head} is for the FPN models with a box head; {self.name} has its own")


class DetectorOptimOptions(Record, frozen=True, kw_only=True):
    """The optimizer and its schedule."""

    schedule: Schedule = "1x"
    """Length of the run, in multiples of `length`."""

    unit: Literal["epochs", "iterations"] = "epochs"
    """Unit of `length` and `drops`: epochs of COCO train2017, or iterations of batch 16."""

    length: Positive = 13.0
    """Length of the 1x schedule on COCO, before the scaling rule."""

    drops: tuple[Positive, ...] = (9.0, 12.0)
    """When the learning rate drops, in the 1x schedule."""

    drops_from: Literal["start", "end"] = "start"
    """From "start", drops grow with the schedule; from "end", they stay that far before its end."""

    gamma: Share = 0.1
    """Factor of each drop."""

    steps: Count | None = None
    """Optimizer steps of the whole run, in place of what the schedule and the scaling rule give."""

    warmup_steps: CountOrZero | None = None
    """Steps of linear warm-up. `none` takes 500, and at most a tenth of the steps."""

    warmup_factor: Share = 1e-3
    """Share of the learning rate at which the warm-up begins."""

    lr: PositiveOrZero = 0.02
    """Learning rate for batch 16; it scales linearly with `data.batch`."""

    name: Optimizer = "sgd"
    """torch's "sgd", the papers', or its "adamw", for networks that are trained with it (ConvNeXt, Swin, ViT)."""

    momentum: ShareBelowOne = 0.9
    """Momentum of SGD."""

    beta1: ShareBelowOne = 0.9
    """AdamW's decay of the mean of gradients."""

    beta2: ShareBelowOne = 0.999
    """AdamW's decay of the mean of their squares."""

    weight_decay: PositiveOrZero = 1e-4
    """Weight decay of every parameter that no other key names; AdamW's is decoupled from the gradient."""

    norm_decay: PositiveOrZero | None = 0.0
    """Weight decay of norm layers. `none` takes `weight_decay`."""

    bias_decay: PositiveOrZero | None = None
    """Weight decay of what is no layer's weight: biases, position embeddings, tokens, scales. `none` takes
    `weight_decay`."""

    layer_decay: PositiveShare = 1.0
    """Factor of the backbone's learning rate per block from the last to the first; 1 is none."""

    backbone_rate: PositiveShare = 1.0
    """Factor of the whole backbone's learning rate: below 1, what was pre-trained changes more slowly than what begins
    at random."""

    clip_norm: PositiveOrZero = 0.0
    """Largest norm of the gradient; a longer one is scaled down to it. 0 clips nothing."""

    @property
    def factor(self) -> int:
        """k of the kx schedule."""
        return int(self.schedule.rstrip("x"))


class DetectorRunOptions(Record, frozen=True, kw_only=True):
    """Arithmetic, checkpoints and records."""

    precision: DetectorPrecision = "fp32"
    """Arithmetic of the forward and backward pass; bf16 needs a recent GPU to be of use."""

    tf32: bool = True
    """Let a GPU round the factors of fp32 products to TF32."""

    checkpoint_every: Count = 1000
    """Steps between checkpoints."""

    keep_checkpoints: Count = 2
    """Checkpoints that stay, the newest ones."""

    val_every: CountOrZero = 0
    """Steps between evaluations on the validation set; 0 evaluates at the end only."""

    log_every: Count = 20
    """Steps between rows of metrics.jsonl."""


class DetectorRecipe(StoredConfig, frozen=True, kw_only=True):
    """Settings of a detector's training in sections; ``None`` leaves a value to the scaling rule (above)."""

    data: DetectorDataOptions = DetectorDataOptions()
    model: DetectorModelOptions = DetectorModelOptions()
    optim: DetectorOptimOptions = DetectorOptimOptions()
    run: DetectorRunOptions = DetectorRunOptions()

    def __post_init__(self) -> None:
        """Refuse values that do not go together."""
        super().__post_init__()
        if self.model.anchor_scale is None and self.data.short_side is None and self.data.long_side is not None:
            raise UserError("data.long_side is set without data.short_side: set both, or neither")


@dataclass(frozen=True)
class ScaledRecipe:
    """A recipe fitted to a dataset.

    steps, warmup_steps: optimiser steps. drops: the steps from which each drop holds. lr: at its height.
    short_side, long_side: of a resized image, pixels (both the square's side under large-scale jitter).
    anchor_scale: anchors' size against COCO's. epochs: passes over the dataset, for information. train_short_sides,
    test_short_sides: of multi-scale training and test, pixels; empty for none.
    """

    steps: Count
    warmup_steps: CountOrZero
    drops: tuple[CountOrZero, ...]
    lr: PositiveOrZero
    short_side: Side
    long_side: Side
    anchor_scale: Positive
    epochs: PositiveOrZero
    train_short_sides: tuple[int, ...] = ()
    test_short_sides: tuple[int, ...] = ()


def fit_to_dataset(
    recipe: DetectorRecipe, images: int, short_side: float, trained_on: int | None = None
) -> ScaledRecipe:
    """Fit a recipe to ``images`` images whose median short side is ``short_side`` pixels.

    trained_on: how many of them are trained on, where that is a subset and the run as long as on all.
    """
    per_epoch = COCO_IMAGES / COCO_BATCH if recipe.optim.unit == "epochs" else 1.0
    whole = recipe.optim.length * recipe.optim.factor
    share = min(1.0, images / COCO_IMAGES)
    steps = recipe.optim.steps or max(1, round(whole * per_epoch * math.sqrt(share) * COCO_BATCH / recipe.data.batch))
    if recipe.optim.drops_from == "start":
        places = [drop / recipe.optim.length for drop in recipe.optim.drops]
    else:
        places = [1 - drop / whole for drop in recipe.optim.drops]
    drops = tuple(round(steps * min(1.0, max(0.0, place))) for place in places)
    warmup = recipe.optim.warmup_steps if recipe.optim.warmup_steps is not None else min(500, steps // 10)
    shrink = min(1.0, short_side / COCO_SHORT_SIDE)
    if recipe.data.jitters:
        square = recipe.data.short_side or max(32, 32 * round(SQUARE * shrink / 32))
        short, long, scale = square, square, square / SQUARE
    else:
        short = recipe.data.short_side or max(32, round(800 * shrink))
        long = recipe.data.long_side or max(short, round(short * 1333 / 800))
        scale = short / 800
    return ScaledRecipe(
        steps=steps,
        warmup_steps=warmup,
        drops=drops,
        lr=recipe.optim.lr * recipe.data.batch / COCO_BATCH,
        short_side=short,
        long_side=long,
        anchor_scale=recipe.model.anchor_scale or scale,
        epochs=steps * recipe.data.batch / (trained_on or images),
        train_short_sides=_fitted(recipe.data.train_short_sides, short),
        test_short_sides=_fitted(recipe.data.test_short_sides, short),
    )


def _fitted(sides: tuple[int, ...] | None, short_side: int) -> tuple[int, ...]:
    """Short sides that are written for COCO's 800, for a dataset whose own is ``short_side``."""
    return tuple(max(32, round(side * short_side / 800)) for side in sides or ())


def learning_rate(plan: ScaledRecipe, step: int, warmup_factor: float, gamma: float) -> float:
    """The learning rate of a step: linear warm-up from ``warmup_factor`` of it, then drops by ``gamma``."""
    warm = 1.0
    if step < plan.warmup_steps:
        warm = warmup_factor + (1 - warmup_factor) * step / plan.warmup_steps
    return float(plan.lr * warm * gamma ** sum(step >= drop for drop in plan.drops))
