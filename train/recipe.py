"""The pre-training recipe: everything that decides a run's result, in sections of typed keys.

A key that is not given has the paper's value (section 4.1), so an empty recipe is the paper's. What does not change the
result (workers, folders, GPUs) is on the command line instead. A recipe is checked whole before anything is loaded.

``Recipe.load("recipes/paper-r50.toml", ["loss.tau=0.6"])`` reads one; ``recipe.data`` alone decides every batch.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal, Self

import msgspec

from jigsaw_pretrain.config import (
    Config,
    Count,
    CountOrZero,
    Number,
    Positive,
    PositiveOrZero,
    Record,
    Share,
    ShareBelowOne,
    parse_toml,
)
from jigsaw_pretrain.errors import UserError, redacted
from jigsaw_pretrain.formats.dataset.dataset import Dataset
from jigsaw_pretrain.formats.jigsaw import MAX_REPEAT, RESIZE_HIGH, RESIZE_LOW, Fit, Template, usual_lanes
from jigsaw_pretrain.storage.store import Storage

Pad = Literal["random", "centre"]

Balance = Literal["none", "sqrt", "uniform"]

Norm = Literal["bn", "gn"]

Neck = Literal["none", "fpn"]

Strategy = Literal["erf-adaptive", "block-wise", "global"]

Precision = Literal["fp32", "bf16", "fp16"]

Optimizer = Literal["sgd", "adamw"]

Device = Literal["auto", "cpu", "cuda"]
"""The device of a process. Like Compile it is no key of a recipe; it stands here so that command lines need not import
torch for it."""

Compile = Literal["auto", "on", "off"]
"""When torch.compile is used; auto: on GPUs."""

PositiveShare = Annotated[float, msgspec.Meta(gt=0, le=1)]

Channels = Annotated[tuple[Number, ...], msgspec.Meta(min_length=1)]

PositiveChannels = Annotated[tuple[Positive, ...], msgspec.Meta(min_length=1)]

MICRO_BATCH = 64
"""Jigsaws on each of the paper's 8 GPUs (section 4.1), of which its batch statistics are."""

MEAN = (0.485, 0.456, 0.406)
"""The mean of pixels in 0..1, red, green, blue (section 4.1)."""

STD = (0.229, 0.224, 0.225)


def scaled_rate(rate: float, batch: int, reference_batch: int) -> float:
    """The linear scaling rule: ``rate * batch / reference_batch``. The paper's 0.2 and 0.8 are for 512 jigsaws."""
    return rate * batch / reference_batch


class DataOptions(Record, frozen=True, kw_only=True):
    """The jigsaws: together with the dataset, these keys determine every batch of a run."""

    seed: int = 0
    """Seed of all that is random: the order of crops, augmentation, the initial weights, dropout."""

    batch: Annotated[int, msgspec.Meta(ge=1, le=10**6)] = 512
    """Jigsaws in a global batch, over all ranks."""

    lanes: Count | None = None
    """Streams that the run is made of, fixed for its whole life; a divisor of `batch` and a multiple of the number of
    ranks. `none` takes the largest divisor of `batch` not above 64."""

    template_size: Annotated[int, msgspec.Meta(ge=1, le=2048)] = Template.size
    """Side of a jigsaw, pixels (figure 4b)."""

    template_split: Annotated[int, msgspec.Meta(ge=1, le=2048)] = Template.split
    """Where the template is cut: width of the tall region and height of the wide one, pixels (figure 4b)."""

    fit: Fit = "crop"
    """How a crop meets its region (Table 1). "crop": resized by a random ratio, then padded or cropped. "warp": resized
    to the region, whatever its aspect. "resize": resized to fit into the region, then padded."""

    resize_low: Positive = RESIZE_LOW
    """Smallest random resize ratio of "crop"."""

    resize_high: Positive = RESIZE_HIGH
    """Largest random resize ratio of "crop"."""

    pad: Pad = "random"
    """Where a crop smaller than its region lies in it: "random", or "centre" with zeros evenly on both sides, as figure
    4c is drawn. The paper does not say."""

    flip: Share = 0.5
    """Probability that a crop is flipped horizontally."""

    jitter: ShareBelowOne = 0.0
    """Colour jitter: each crop's contrast, and the gain of each of its channels, are multiplied by factors from 1 -
    jitter to 1 + jitter. 0 changes no colour, as in the paper."""

    augment: bool = True
    """False draws nothing at random: ratio 1, no flip, no jitter, everything centred. Evaluation uses it."""

    max_repeat: Count = MAX_REPEAT
    """How many times as often a crop of a thin group may be drawn as one of the best-supplied group; beyond it, crops
    of other groups fill the thin group's slots. Also the largest weight that `balance` gives a class. The paper has no
    limit."""

    balance: Balance = "none"
    """Draw rare classes more often than they occur: "sqrt" in proportion to the square root of their frequency,
    "uniform" all alike. The paper uses "none"."""

    mean: Channels | None = None
    """Mean of each channel, of pixels in 0..1. `none` takes ImageNet's for 8-bit RGB, else the dataset's own."""

    std: PositiveChannels | None = None
    """Standard deviation of each channel, of pixels in 0..1. `none` takes ImageNet's for 8-bit RGB, else the dataset's
    own."""

    def __post_init__(self) -> None:
        """Refuse values that do not go together."""
        super().__post_init__()
        if self.resize_low > self.resize_high:
            raise UserError(f"data.resize_low = {self.resize_low} must not be above resize_high = {self.resize_high}")
        if self.batch % self.lane_count:
            divisors = [n for n in range(1, self.batch + 1) if self.batch % n == 0]
            raise UserError(
                f"data.lanes = {self.lanes} must divide the batch of {self.batch}: choose one of {divisors}"
            )
        if self.mean is not None and self.std is not None and len(self.mean) != len(self.std):
            raise UserError(
                f"data.mean has {len(self.mean)} numbers and data.std {len(self.std)}: give each one per channel"
            )
        _ = self.template  # refuses what it refuses

    @property
    def template(self) -> Template:
        """The jigsaw's template."""
        return Template(self.template_size, self.template_split)

    @property
    def lane_count(self) -> int:
        """L: the lanes given, or the largest divisor of the batch not above 64."""
        if self.lanes is not None:
            return self.lanes
        return usual_lanes(self.batch)

    @property
    def chunk(self) -> int:
        """Jigsaws of one lane in a global batch: k = batch / L."""
        return self.batch // self.lane_count

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and std: ImageNet's where there are none."""
        return self.mean or MEAN, self.std or STD


class ModelOptions(Record, frozen=True, kw_only=True):
    """The network that is pre-trained."""

    backbone: str = "resnet50"
    """A torchvision classification model, `timm:NAME`, `ultralytics:FILE.yaml`, `transformers:TYPE`, or
    `module:callable` of your own."""

    norm: Norm = "bn"
    """Normalisation: batch norm, or GN(32) in its place, for detectors that are fine-tuned with it. Weights trained
    under one norm are worth little under another."""

    init: str | None = None
    """A weights file to begin from, read without unpickling code and matched key by key or refused; `none` begins at
    random, as the paper does."""

    neck: Neck = "none"
    """"fpn" pre-trains a feature pyramid too, which the paper leaves for future work."""

    neck_channels: Annotated[int, msgspec.Meta(ge=1, le=16_384)] = 256
    """Channels of each level of the neck."""

    sync_bn: bool = False
    """Compute batch norm's statistics over all GPUs (not on CPUs)."""


class LossOptions(Record, frozen=True, kw_only=True):
    """The dense classification loss."""

    strategy: Strategy = "erf-adaptive"
    """"erf-adaptive" weighs the four labels at each position by what its effective receptive field covers (equations 1
    and 2). "block-wise" classifies each region by its averaged logits, "global" the whole jigsaw by one soft label."""

    tau: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.7
    """Smallest weight that the label of a position's own region has there (equation 2); 1 learns that label alone."""

    label_smoothing: ShareBelowOne = 0.0
    """Share of every label that is spread evenly over all classes and the background. 0, as in the paper, is none."""

    erf_every: Count = 5_000
    """Steps between refreshes of the table of receptive fields."""


class OptimOptions(Record, frozen=True, kw_only=True):
    """The optimizer and its schedule."""

    steps: Count = 64_000
    """Optimizer steps of the whole run."""

    lr_start: PositiveOrZero = 0.2
    """Learning rate at the first step of the warm-up, for a batch of `lr_batch`."""

    lr_peak: PositiveOrZero = 0.8
    """Learning rate at the end of the warm-up, from where it falls along a cosine to 0; for a batch of `lr_batch`."""

    lr_batch: Count = 512
    """The batch that the learning rates are for; they scale linearly to `data.batch`."""

    warmup_steps: CountOrZero = 1_250
    """Steps of linear warm-up."""

    name: Optimizer = "sgd"
    """torch's "sgd", the paper's, or its "adamw", for networks that are trained with it (ConvNeXt, Swin, ViT)."""

    momentum: ShareBelowOne = 0.9
    """Momentum of SGD."""

    beta1: ShareBelowOne = 0.9
    """AdamW's decay of the mean of gradients."""

    beta2: ShareBelowOne = 0.999
    """AdamW's decay of the mean of their squares."""

    weight_decay: PositiveOrZero = 1e-4
    """Weight decay of every parameter that no other key names; AdamW's is decoupled from the gradient."""

    norm_decay: PositiveOrZero | None = None
    """Weight decay of norm layers. `none` takes `weight_decay`, as in the paper."""

    bias_decay: PositiveOrZero | None = None
    """Weight decay of what is no layer's weight: biases, position embeddings, tokens, scales. `none` takes
    `weight_decay`, as in the paper."""

    layer_decay: PositiveShare = 1.0
    """Factor of the backbone's learning rate per block from the last to the first. 1, as in the paper, is none."""

    micro_batch: Count | None = None
    """Jigsaws that a GPU takes at once, which is also what batch norm's statistics are of (64 in the paper: 512 over 8
    GPUs). Gradients are accumulated over a GPU's share of the batch and exchanged once per step. `none` takes the
    divisor of the share that is nearest to 64: 64 of 512, 256 or 128, and a share of at most 64 whole."""

    clip_norm: PositiveOrZero = 0.0
    """Largest norm of the gradient; a longer one is scaled down to it. 0 clips nothing, as in the paper."""

    ema: ShareBelowOne = 0.0
    """Decay per step of an exponential moving average of the weights, kept in checkpoints, which is then what is
    exported. 0 keeps none, as in the paper."""


class RunOptions(Record, frozen=True, kw_only=True):
    """Arithmetic, checkpoints and records."""

    precision: Precision = "fp32"
    """Arithmetic of the forward and backward pass; fp16 scales the loss, so that small gradients survive."""

    tf32: bool = True
    """Let a GPU round the factors of fp32 products to TF32."""

    checkpoint_every: Count = 1_000
    """Steps between checkpoints."""

    keep_checkpoints: Count = 2
    """How many of the newest checkpoints stay."""

    log_every: Count | None = None
    """Steps between fetches of metrics from the device; every step has its row all the same. `none` takes 50 on GPUs,
    which wait at each, and 10 on CPUs."""


class StoredConfig(Config, frozen=True):
    """A configuration whose file may lie in a store, as OUT/recipe.toml does beside shards in one."""

    @classmethod
    def load(cls, path: str | Path | None = None, settings: Iterable[str] = ()) -> Self:
        """Read a configuration as Config.load does, and from a URL too.

        Args:
            path: the TOML file or its URL, or the name of one that comes with the program (``sample``); None for the
                defaults.
            settings: ``section.key=value`` each; a later one wins.

        Raises:
            UserError: naming the file or ``--set``, the key with its section, and the remedy.
        """
        if "://" not in str(path):
            return super().load(path, settings)
        where = redacted(str(path))
        folder, _, name = str(path).rpartition("/")
        try:
            values = parse_toml(Storage(folder).read(name), where)
        except FileNotFoundError as error:
            raise UserError(f"{where} is not there: name another --recipe") from error
        return cls()._with(values, settings, (where,))


class Recipe(StoredConfig, frozen=True, kw_only=True):
    """Settings of a pre-training run in sections; the defaults are the paper's (section 4.1)."""

    data: DataOptions = DataOptions()
    model: ModelOptions = ModelOptions()
    loss: LossOptions = LossOptions()
    optim: OptimOptions = OptimOptions()
    run: RunOptions = RunOptions()

    @property
    def rates(self) -> tuple[float, float]:
        """The first and the highest learning rate for this batch (linear scaling)."""
        start, peak = (
            scaled_rate(rate, self.data.batch, self.optim.lr_batch)
            for rate in (self.optim.lr_start, self.optim.lr_peak)
        )
        return start, peak

    def resolved(self, dataset: Dataset | None = None) -> "Recipe":
        """The same with lanes, mean and std written out, as the run folder keeps it.

        Raises UserError for a mean or std of another number of channels than the dataset has.
        """
        channels, (mean, std) = 3, self.data.normalisation
        if dataset is not None and not dataset.pixels.is_rgb8:
            channels, (own_mean, own_std) = dataset.pixels.channels, dataset.measured
            # A channel that never changes becomes zero, whatever it is divided by.
            mean, std = self.data.mean or own_mean, self.data.std or tuple(value or 1.0 for value in own_std)
        for key, given in (("mean", mean), ("std", std)):
            if len(given) != channels:
                raise UserError(
                    f"data.{key} = {list(given)} must be {channels} numbers, one for each channel of the crops"
                )
        data = msgspec.structs.replace(self.data, lanes=self.data.lane_count, mean=mean, std=std)
        return msgspec.structs.replace(self, data=data)
