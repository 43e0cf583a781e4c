"""What is streamed and how it is augmented: the options that decide every batch (section 4.1's augmentation)."""

from dataclasses import dataclass

from jigsaw_pretrain.errors import UserError

FITS = ("crop", "warp", "resize")

BALANCES = ("none", "sqrt", "uniform")


@dataclass(frozen=True)
class StreamOptions:
    """Options of the stream of jigsaws; together with the dataset they determine every batch of a run.

    batch: jigsaws in a global batch. lanes: streams that the run is made of, kept for its whole life; None takes the
    largest divisor of the batch not above 64. fit: how a crop meets its region (Table 1). resize_low, resize_high:
    the range of the one resize ratio. flip: the probability of a horizontal flip. augment: False for evaluation
    (ratio 1, no flip, centred). max_repeat: how many times as often as a crop of the best-supplied group one of a thin
    group may be drawn. balance: which classes are drawn more often than they occur (train.balance).
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
