"""The results of finished runs: AP and cost by seed, means, spreads, paired differences with their intervals.

Intervals are Student's t at 95 % over the seeds' paired differences; with one seed there is none. Three seeds make wide
ones, and that is what three seeds are worth.
"""

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from jigsaw_pretrain.detect.coco_eval import AP_FILE
from jigsaw_pretrain.detect.recipe import DetectorRecipe
from jigsaw_pretrain.detect.run import METRICS, SUMMARY, DetectorConfig, Stratum, read_config, read_file, read_summary
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.train.engine.metrics import read_rows

_T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


DISTINGUISHING = (
    ("model", "backbone"),
    ("model", "head"),
    ("model", "neck"),
    ("model", "deform"),
    ("data", "images_limit"),
    ("data", "subset_seed"),
    ("data", "subset_schedule"),
    ("data", "copy_paste"),
    ("data", "jitter_high"),
    ("data", "train_short_sides"),
    ("data", "test_short_sides"),
    ("optim", "name"),
)
"""Keys that a run's name tells where they are not the default's."""


@dataclass(frozen=True)
class RunResult:
    """A finished detector run.

    pretrain_seconds, detect_seconds: device-seconds of training. ap: by name (AP, AP50, ...), 0 to 1. curve: (seconds
    with pre-training, AP) at each evaluation, by_step: (steps, AP) there. memory: bytes of GPU memory at most, None on
    a CPU. flops: of a training step per image, None where a run did not count them. strata: AP of classes by how many
    annotations they have in training.
    """

    arm: str
    seed: int
    lr: float
    steps: int
    ap: dict[str, float]
    pretrain_seconds: float
    detect_seconds: float
    seconds_per_step: float | None
    memory: int | None
    device: str
    curve: tuple[tuple[float, float], ...]
    by_step: tuple[tuple[int, float], ...] = ()
    flops: float | None = None
    strata: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """Paired by seed: the mean difference, and half the width of its 95 % interval (None with one pair)."""

    pairs: int
    mean: float
    half_width: float | None


def pretrain_seconds(source: Path) -> float:
    """Device-seconds of the pre-training run in a folder; 0 for a file, whose cost is not known here."""
    metrics = source / "metrics.jsonl"
    if not metrics.exists():
        return 0.0
    return float(sum(row["device_seconds"] for row in read_rows(metrics) if "device_seconds" in row))


def read_result(run: Path, arm: str | None = None) -> RunResult:
    """The result of a finished run; ``arm`` is derived from its settings where it is not given.

    Raises UserError for a run that has not finished, or was trained without a validation set.
    """
    config = read_config(run)
    if not (run / SUMMARY).exists():
        raise UserError(f"{run} has not finished: continue it with `detect train --resume`")
    summary = read_summary(run)
    if summary.AP is None:
        raise UserError(f"{run} has no AP: it was trained without --val-annotations")
    # A comparison pre-trains and fine-tunes on the same number of devices.
    before = 0.0 if config.init == "scratch" else pretrain_seconds(Path(config.init)) * summary.world
    scored = [row for row in read_rows(run / METRICS) if {"AP", "seconds"} <= row.keys()]
    return RunResult(
        # One that was trained longer, for equal cost, is another arm.
        arm=arm or f"{arm_name(config)}, {summary.steps:,} steps",
        seed=config.recipe.data.seed,
        lr=config.recipe.optim.lr,
        steps=summary.steps,
        ap=summary.AP,
        pretrain_seconds=before,
        detect_seconds=summary.device_seconds,
        seconds_per_step=summary.seconds_per_step,
        memory=summary.gpu_memory,
        device=summary.device,
        curve=tuple((before + row["seconds"] * summary.world, row["AP"]) for row in scored),
        by_step=tuple((row["step"] + 1, row["AP"]) for row in scored),
        flops=summary.flops_per_image,
        strata={
            name: msgspec.structs.asdict(one)
            for name, one in read_file(run / AP_FILE, _Strata).by_training_annotations.items()
        },
    )


class _Strata(msgspec.Struct):
    """What is read of ap.json."""

    by_training_annotations: dict[str, Stratum] = {}


def arm_name(config: DetectorConfig) -> str:
    """What distinguishes a run but for its seed: where it started (a trailing number dropped) and its settings."""
    recipe = config.recipe
    start = re.sub(r"[-_.]?\d+$", "", Path(config.init).stem) or config.init
    model = f"{recipe.model.name}, {config.norm_built}, freeze {recipe.model.freeze}"
    own, usual = recipe.to_dict(), DetectorRecipe().to_dict()
    told = [
        f"{key} {own[section][key]}"
        for section, key in DISTINGUISHING
        if own[section].get(key) != usual[section].get(key)
    ]
    return ", ".join([start, model, f"lr {recipe.optim.lr:g}", recipe.optim.schedule, *told])


def tell_apart(results: Sequence[RunResult]) -> tuple[list[RunResult], list[str]]:
    """The runs, their arms without the settings that all of them name, and these settings."""
    named = [one.arm.split(", ") for one in results]
    shared = [word for word in named[0][1:] if all(word in words for words in named)] if named else []
    short = [", ".join([words[0], *(word for word in words[1:] if word not in shared)]) for words in named]
    return [replace(one, arm=arm) for one, arm in zip(results, short, strict=True)], shared


def by_arm(results: Sequence[RunResult]) -> dict[str, list[RunResult]]:
    """Results by arm, in the order of their first run, each in the order of seeds."""
    found: dict[str, list[RunResult]] = {}
    for one in results:
        found.setdefault(one.arm, []).append(one)
    return {arm: sorted(runs, key=lambda one: one.seed) for arm, runs in found.items()}


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (None for one value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def difference(runs: Sequence[RunResult], rivals: Sequence[RunResult], name: str = "AP") -> Difference | None:
    """The difference of two arms over the seeds they share; None where they share none."""
    theirs = {one.seed: one.ap[name] for one in rivals}
    return paired([one.ap[name] - theirs[one.seed] for one in runs if one.seed in theirs])


def paired(differences: Sequence[float]) -> Difference | None:
    """The mean of paired differences and half its interval; None where there are none."""
    if not differences:
        return None
    mean, deviation = spread(differences)
    if deviation is None:
        return Difference(1, mean, None)
    pairs = len(differences)
    quantile = _T975[pairs - 2] if pairs - 2 < len(_T975) else 1.96 + 2.5 / (pairs - 1)
    return Difference(pairs, mean, quantile * deviation / math.sqrt(pairs))


def to_json(results: Sequence[RunResult]) -> list[dict[str, Any]]:
    """Plain values."""
    return [asdict(one) for one in results]
