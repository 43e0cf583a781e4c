"""What a campaign has found: one JSON line per finished unit, and what is worked out of the lines.

The file is the memory of a campaign that is spread over days and machines: a unit whose key is in it is not run again.
Costs are device-seconds, as trainings record them (on a CPU the computing time of the trainer's process). A report
takes the median seconds per step over all runs of a regime as what a step costs, since shared cores slow one run and
not the next; what each run took stays in its line.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from bench.campaign.plan import SWEEP_SEED, Arm, Plan, Variant, arms, swept, unit
from jigsaw_pretrain.detect.comparison.results import Difference, paired
from jigsaw_pretrain.errors import UserError

RESAMPLES = 2_000
"""Bootstrap draws of an interval."""

CHOSEN_BY = "AP50"
"""The score that chooses a rate."""


class Row(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """A finished unit.

    scores: AP, AP50, ... of a detector; class_mean, top1 and the same of the backbone at random of a probe; 0 to 1.
    pretrain_seconds, detect_seconds: device-seconds of training. commit, command, date, hardware: where it comes from.
    """

    key: str
    scores: dict[str, float]
    pretrain_steps: int
    detect_steps: int
    pretrain_seconds: float
    detect_seconds: float
    regime: str
    commit: str
    command: str
    date: str
    hardware: str


def read_rows(path: Path) -> dict[str, Row]:
    """The rows by key; none where there is no file. Raises UserError for a line that cannot be read."""
    found: dict[str, Row] = {}
    if not path.exists():
        return found
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            row = msgspec.json.decode(line, type=Row)
        except msgspec.MsgspecError as error:
            raise UserError(
                f"{path}, line {number}: {error}: mend or remove the line, its unit is run again"
            ) from error
        found.setdefault(row.key, row)
    return found


def append(path: Path, row: Row) -> None:
    """Add a row at the end, in one write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(msgspec.json.encode(row) + b"\n")


def best_rate(plan: Plan, arm: Arm, rows: Mapping[str, Row]) -> float | None:
    """The rate of the highest mean AP50 of an arm's sweep (the lowest such rate); None while that is not finished.

    AP50, since short trainings differ in it long before they differ in AP. A probe has no rate: 0.
    """
    rates = plan.questions[arm.question].rates
    if not arm.detect_steps:
        return 0.0
    if len(rates) == 1:
        return rates[0]
    sweep = swept(plan, arm)
    if any(one.key not in rows for units in sweep.values() for one in units):
        return None
    return max(sorted(sweep), key=lambda rate: sum(rows[one.key].scores[CHOSEN_BY] for one in sweep[rate]))


def reported(plan: Plan, arm: Arm, rows: Mapping[str, Row]) -> dict[int, Row]:
    """The finished rows of an arm at its rate, by seed."""
    rate = best_rate(plan, arm, rows)
    if rate is None:
        return {}
    keys = {seed: unit(plan, arm, seed, rate).key for seed in range(plan.questions[arm.question].seeds)}
    return {seed: rows[key] for seed, key in keys.items() if key in rows}


Costs = Mapping[tuple[str, str], tuple[float, float]]
"""By regime and hardware: seconds of a pre-training step and of a detector step; nan where there is none."""


def step_costs(plan: Plan, rows: Mapping[str, Row]) -> Costs:
    """The median of each step's seconds, apart for each kind of machine that a campaign was run on.

    Of arms that change nothing; a variant's own steps may cost more or less (arm_seconds).
    """
    usual = {
        one.key
        for name, question in plan.questions.items()
        for arm in arms(plan, name)
        for what in [question.variants[arm.variant]]
        if what == Variant() or (arm.pretrain_steps == 0 and not what.detect)
        for rate in question.rates or (0.0,)
        for seed in (*range(question.seeds), *range(SWEEP_SEED, SWEEP_SEED + question.sweep_seeds))
        for one in [unit(plan, arm, seed, rate)]
    }
    found: dict[tuple[str, str], tuple[list[float], list[float]]] = {}
    for row in (rows[key] for key in rows if key in usual):
        before, after = found.setdefault((row.regime, row.hardware), ([], []))
        if row.pretrain_steps:
            before.append(row.pretrain_seconds / row.pretrain_steps)
        if row.detect_steps:
            after.append(row.detect_seconds / row.detect_steps)
    return {
        name: (statistics.median(before or [math.nan]), statistics.median(after or [math.nan]))
        for name, (before, after) in found.items()
    }


def costs_of(mine: Mapping[int, Row], costs: Costs) -> tuple[float, float]:
    """What a step costs on the machine that an arm was trained on; nan where that was more than one kind."""
    machines = {(row.regime, row.hardware) for row in mine.values()}
    return costs.get(machines.pop(), (math.nan, math.nan)) if len(machines) == 1 else (math.nan, math.nan)


def arm_seconds(plan: Plan, arm: Arm, mine: Mapping[int, Row], costs: tuple[float, float]) -> tuple[float, float]:
    """Seconds of an arm's pre-training and of its detector: its steps at their usual cost, or what its variant took.

    A peer was given the seconds of ours, measured beside it, and costs what ours does.
    """
    variant = plan.questions[arm.question].variants[arm.variant]
    before = arm.pretrain_steps * costs[0] if arm.pretrain_steps else 0.0
    after = arm.detect_steps * costs[1]
    if arm.pretrain_steps and variant.pretrain:
        before = statistics.median(row.pretrain_seconds for row in mine.values())
    if variant.detect and not variant.same_cost:
        after = statistics.median(row.detect_seconds for row in mine.values())
    return before, after


def compared(mine: Mapping[int, Row], theirs: Mapping[int, Row], score: str) -> Difference | None:
    """The difference of two arms over the seeds that both have."""
    return paired([mine[seed].scores[score] - theirs[seed].scores[score] for seed in mine if seed in theirs])


def steps_to_reach(curve: Sequence[tuple[int, float]], height: float) -> float:
    """Steps at which a curve of (steps, score) reaches a height: between its points straight in log steps.

    Below the first point the curve is taken to come from 0 at no steps. Infinity where it never does.
    """
    before = (0, 0.0)
    for steps, score in curve:
        if score >= height:
            if before[0] == 0:
                return steps * height / score if score else 0.0
            share = (height - before[1]) / (score - before[1])
            return math.exp(math.log(before[0]) + share * (math.log(steps) - math.log(before[0])))
        before = (steps, max(score, before[1]))
    return math.inf


class Exchange(msgspec.Struct, frozen=True):
    """Detector seconds that one pre-training second saved, with the ends of a 95 % interval.

    Infinity: scratch never got there with as many steps as it was given, so that all that is known is the rate that
    reaching it with the last of them would have been, ``measured``. Below 1 the pre-training does not pay.
    """

    rate: float
    low: float
    high: float
    measured: float
    seeds: int


def exchange(
    scratch: Mapping[int, Mapping[int, Row]],
    arm: Mapping[int, Row],
    score: str,
    step_seconds: float,
    spent: tuple[float, float],
) -> Exchange | None:
    """What a second of pre-training was worth in seconds of a detector from scratch.

    Args:
        scratch: rows by detector steps, then by seed.
        arm: the pre-trained rows, by seed.
        score: name of the score.
        step_seconds: of a detector from scratch.
        spent: the arm's seconds of pre-training and of its detector.

    Returns:
        The rate at the means, and the 2.5 and 97.5 % quantiles of it over seeds drawn with replacement; None with
        fewer than two seeds in common, or where a cost was not measured.
    """
    seeds = sorted(seed for seed in arm if scratch and all(seed in rows for rows in scratch.values()))
    if len(seeds) < 2 or math.isnan(step_seconds + sum(spent)):
        return None
    lengths = sorted(scratch)
    heights = np.array([[scratch[steps][seed].scores[score] for seed in seeds] for steps in lengths])
    mine = np.array([arm[seed].scores[score] for seed in seeds])

    def worth(steps: float) -> float:
        return (steps * step_seconds - spent[1]) / spent[0]

    def rate(chosen: npt.NDArray[np.int64]) -> float:
        curve = list(zip(lengths, heights[:, chosen].mean(1).tolist(), strict=True))
        return worth(steps_to_reach(curve, float(mine[chosen].mean())))

    rng = np.random.default_rng(0)
    draws = sorted(rate(rng.integers(0, len(seeds), len(seeds))) for _ in range(RESAMPLES))
    low, high = draws[int(0.025 * RESAMPLES)], draws[int(0.975 * RESAMPLES) - 1]
    return Exchange(rate(np.arange(len(seeds))), low, high, worth(lengths[-1]), len(seeds))


def seeds_needed(deviation: float, effect: float) -> int:
    """Seeds after which a paired difference of ``effect`` excludes 0 at 95 %, from the differences' deviation."""
    return max(2, math.ceil((1.96 * deviation / effect) ** 2) + 2) if effect else 10**6
