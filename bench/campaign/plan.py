"""What a campaign trains: regimes, questions and arms from a TOML file, as a list of units in the order they are run.

A unit is one detector trained once, or one probe of a pre-training. Its key says everything that decides its result, so
that finished work is known again whoever asks for it: two questions share the units that they have in common, and a
changed setting is another unit. Pure; see recipes in bench/campaign/*.toml.
"""

import hashlib
import json
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from jigsaw_pretrain.config import Count, CountOrZero, Positive
from jigsaw_pretrain.errors import UserError

SWEEP_SEED = 1000
"""First seed of the trainings that choose a learning rate; none of them is reported."""


class Regime(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Images of one size, and how a detector and a backbone are trained on them."""

    about: str
    """What it stands for."""

    data: str
    """Name of the dataset (bench/campaign/data.py)."""

    pretrained_in: str | None = None
    """The regime whose pre-trainings it takes, where only the detector or its classes differ: one serves both. None for
    its own."""

    pretrain: tuple[str, ...] = ()
    """Settings of `train pretrain` over the campaign's."""

    detect: tuple[str, ...] = ()
    """Settings of `detect train` over the campaign's."""


class Variant(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """What an arm changes."""

    about: str = ""

    peer: str = ""
    """A method of LightlyTrain that takes the place of our pre-training, for the seconds that ours took."""

    start: Literal["any", "pre-trained"] = "any"
    """Whether there is such an arm from scratch too: what was never trained is not to be frozen."""

    prep: tuple[str, ...] = ()
    """Options of `prep shards` for the crops that it is pre-trained on; those that it is probed on stay the same."""

    pretrain: tuple[str, ...] = ()
    detect: tuple[str, ...] = ()

    same_cost: bool = False
    """Whether what ``detect`` changes leaves a step's cost as it is: what was measured then is the machine's hour."""


class Question(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """What is asked: every variant at every pre-training length and every detector length, over seeds."""

    about: str
    """The question."""

    regimes: tuple[str, ...]
    """Names of the regimes it is asked in."""

    pretrain_steps: tuple[CountOrZero, ...]
    """Lengths of the pre-training; 0 is a detector from scratch, which variants of the pre-training do not have."""

    detect_steps: tuple[Count, ...] = ()
    """Lengths of the detector's training; none at all probes the pre-training instead."""

    probe: tuple[str, ...] = ()
    """Options of `train probe` where it is one."""

    rates: tuple[Positive, ...] = ()
    """Learning rates that every arm is tried at, on a seed that is not reported."""

    sweep_seeds: Annotated[int, msgspec.Meta(ge=1, le=100)] = 2
    """How many seeds each rate is tried with; one seed chooses a rate that is too high now and then."""

    seeds: Annotated[int, msgspec.Meta(ge=1, le=100)] = 3
    """How many seeds are reported, from 0."""

    variants: dict[str, Variant] = msgspec.field(default_factory=lambda: {"paper": Variant()})
    """The variants by name."""


class Plan(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """A campaign."""

    backbone: str
    """The network, as `--set model.backbone=` takes it."""

    pretrain: tuple[str, ...]
    """Settings of `train pretrain` in every unit."""

    detect: tuple[str, ...]
    """Settings of `detect train` in every unit."""

    regimes: dict[str, Regime]
    questions: dict[str, Question]


@dataclass(frozen=True)
class Pretraining:
    """A backbone to train: the settings over the campaign's dataset, and the seed."""

    regime: str
    data: str
    steps: int
    settings: tuple[str, ...]
    seed: int

    @property
    def key(self) -> str:
        """A name for its folder that tells it from every other."""
        return f"{self.regime}-p{self.steps}-seed{self.seed}-{_digest(asdict(self))}"


@dataclass(frozen=True)
class OtherCropsPretraining(Pretraining):
    """A pre-training on crops that prep cuts with options of its own."""

    prep: tuple[str, ...]


@dataclass(frozen=True)
class PeerPretraining(Pretraining):
    """Another library's training of the backbone, for as many seconds as the pre-training of the same values takes."""

    method: str

    @property
    def ours(self) -> Pretraining:
        """The pre-training whose seconds it is given."""
        return Pretraining(self.regime, self.data, self.steps, self.settings, self.seed)


@dataclass(frozen=True)
class Unit:
    """A detector to train, or (with detect_steps 0) a backbone to probe.

    settings: of the detector, its rate and its seed apart; or options of the probe. lr: for a batch of 16, as in the
    recipes; 0 for a probe.
    """

    regime: str
    data: str
    variant: str
    pretraining: Pretraining | None
    detect_steps: int
    settings: tuple[str, ...]
    lr: float
    seed: int

    @property
    def pretrain_steps(self) -> int:
        """Steps of the pre-training, 0 for none."""
        return 0 if self.pretraining is None else self.pretraining.steps

    @property
    def key(self) -> str:
        """What it is known by among the results."""
        known = {**asdict(self), "variant": None}
        what = f"d{self.detect_steps}-lr{self.lr:g}" if self.detect_steps else "probe"
        name = self.variant if self.pretraining else "scratch"
        return f"{self.regime}-{name}-p{self.pretrain_steps}-{what}-seed{self.seed}-{_digest(known)}"


@dataclass(frozen=True)
class Arm:
    """Units that differ by seed and rate alone: what one number of a table is made of."""

    question: str
    regime: str
    variant: str
    pretrain_steps: int
    detect_steps: int


def _digest(values: object) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def read_plan(path: Path) -> Plan:
    """The campaign of a TOML file; raises UserError that names what is wrong with it."""
    try:
        plan = msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), Plan)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): name a campaign's TOML file") from error
    except (ValueError, msgspec.ValidationError) as error:
        raise UserError(f"{path}: {error}") from error
    for name, regime in plan.regimes.items():
        other = plan.regimes.get(regime.pretrained_in or name)
        if other is None or (regime.pretrained_in and (regime.pretrain or other.pretrained_in)):
            raise UserError(f"{path}: regime {name} takes the pre-trainings of no other regime that has its own")
    for name, question in plan.questions.items():
        if unknown := set(question.regimes) - set(plan.regimes):
            raise UserError(f"{path}: question {name}: there is no regime {sorted(unknown)[0]!r}")
        if question.detect_steps and not question.rates:
            raise UserError(f"{path}: question {name} trains detectors and names no rates")
        if not question.detect_steps and 0 in question.pretrain_steps:
            raise UserError(f"{path}: question {name}: a probe has its own backbone at random, leave out 0 steps")
        if question.detect_steps and question.probe:
            raise UserError(f"{path}: question {name} trains detectors, so options of a probe say nothing")
        if both := [variant for variant, what in question.variants.items() if what.peer and what.prep]:
            raise UserError(f"{path}: question {name}: {both[0]} is a peer's, which sees whole images and no crops")
    return plan


def arms(plan: Plan, name: str) -> Iterator[Arm]:
    """The arms of a question, in its own order."""
    question = plan.questions[name]
    for regime in question.regimes:
        for detect_steps in question.detect_steps or (0,):
            for pretrain_steps in question.pretrain_steps:
                seen = set()
                for variant, what in question.variants.items():
                    # Without a pre-training, variants of it are one and the same.
                    if pretrain_steps == 0 and (what.detect in seen or what.start == "pre-trained"):
                        continue
                    seen.add(what.detect)
                    yield Arm(name, regime, variant, pretrain_steps, detect_steps)


def swept(plan: Plan, arm: Arm) -> dict[float, list[Unit]]:
    """The units that choose an arm's rate, by rate; none where there is one rate."""
    question = plan.questions[arm.question]
    rates = question.rates if len(question.rates) > 1 else ()
    seeds = range(SWEEP_SEED, SWEEP_SEED + question.sweep_seeds)
    return {rate: [unit(plan, arm, seed, rate) for seed in seeds] for rate in rates}


def unit(plan: Plan, arm: Arm, seed: int, lr: float) -> Unit:
    """The unit of an arm at a seed and a rate. The sweep's seeds take the pre-trainings of the first ones reported."""
    question, regime = plan.questions[arm.question], plan.regimes[arm.regime]
    variant = question.variants[arm.variant]
    pretraining = None
    if arm.pretrain_steps:
        where = regime.pretrained_in or arm.regime
        source = plan.regimes[where]
        settings = (*plan.pretrain, *source.pretrain, *variant.pretrain)
        own = seed - SWEEP_SEED if seed >= SWEEP_SEED else seed
        pretraining = Pretraining(where, source.data, arm.pretrain_steps, settings, own)
        if variant.prep:
            pretraining = OtherCropsPretraining(**asdict(pretraining), prep=variant.prep)
        if variant.peer:
            pretraining = PeerPretraining(**asdict(pretraining), method=variant.peer)
    settings = (*plan.detect, *regime.detect, *variant.detect) if arm.detect_steps else question.probe
    return Unit(arm.regime, regime.data, arm.variant, pretraining, arm.detect_steps, settings, lr, seed)
