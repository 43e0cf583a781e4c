"""Curves of a run's metrics over its steps, for its page; several runs are drawn into the same axes.

Long runs are thinned to about 600 points by averaging neighbours, so a page's size does not grow with the run.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jigsaw_pretrain.formats.jigsaw import REGIONS
from jigsaw_pretrain.html import Figure, chart

POINTS = 600
SMOOTH = 50
"""Points of an accuracy curve: a batch's own is too coarse to follow."""
_STYLES = ("-", "--", ":", "-.")

F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Metrics:
    """metrics.jsonl as arrays [n], accuracy [n, 4] by region; ``name`` labels the run's curves."""

    name: str
    step: F64
    loss: F64
    accuracy: F64
    lr: F64
    images_per_second: F64
    data_wait: F64

    def tail(self, values: F64, share: float = 0.05) -> float:
        """The mean over the last part of the steps, at least ten."""
        return float(values[-max(10, int(len(values) * share)) :].mean())


def read_metrics(path: Path, name: str) -> Metrics | None:
    """The rows of a metrics.jsonl, a half-written last line aside; None where there are none."""
    rows: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                rows.append(json.loads(line))
    if not rows:
        return None

    def column(key: str) -> F64:
        return np.array([row[key] for row in rows], dtype=np.float64)

    accuracy = np.array([[row["accuracy"][region] for region in REGIONS] for row in rows], dtype=np.float64)
    return Metrics(
        name,
        column("step"),
        column("loss"),
        accuracy,
        column("lr"),
        column("images_per_second"),
        column("data_wait"),
    )


def thinned(values: F64, points: int = POINTS) -> F64:
    """Means of equal stretches of the first axis, at most ``points`` of them."""
    stretch = max(1, -(-len(values) // points))
    whole = len(values) // stretch * stretch
    parts = values[:whole].reshape(-1, stretch, *values.shape[1:]).mean(axis=1)
    return parts if whole == len(values) else np.concatenate([parts, values[whole:].mean(axis=0, keepdims=True)])


def curves(runs: Sequence[Metrics]) -> list[Figure]:
    """Loss, accuracy by region, learning rate, speed and data wait over the steps."""
    several = len(runs) > 1

    def plain(
        pick: Callable[[Metrics], F64], label: str, top: float | None = None, log: bool = False
    ) -> Callable[[Any], None]:
        def draw(axes: Any) -> None:
            for run, style in zip(runs, _STYLES * len(runs), strict=False):
                axes.plot(thinned(run.step), thinned(pick(run)), style, linewidth=1.3, label=run.name)
            axes.set_xlabel("step")
            axes.set_ylabel(label)
            if log:
                axes.set_yscale("log")
            else:
                axes.set_ylim(bottom=0, top=top)
            if several:
                axes.legend(frameon=False)

        return draw

    def by_region(axes: Any) -> None:
        for run in runs:
            for i, (region, style) in enumerate(zip(REGIONS, _STYLES, strict=True)):
                label = f"{run.name} {region}" if several else region
                steps, shares = thinned(run.step, SMOOTH), thinned(100 * run.accuracy[:, i], SMOOTH)
                axes.plot(steps, shares, style, linewidth=1.4, label=label)
        axes.set_xlabel("step")
        axes.set_ylabel("crops named right, %")
        axes.set_ylim(0, 100)
        axes.legend(frameon=False, fontsize=7 if several else 8)

    named = ", ".join(run.name for run in runs)
    return [
        chart(plain(lambda run: run.loss, "loss, nats"), f"loss over steps of {named}", "Loss on the batch"),
        chart(by_region, f"accuracy by region over steps of {named}", "Accuracy on the batch, by region"),
        chart(plain(lambda run: run.lr, "learning rate"), f"learning rate over steps of {named}", "Learning rate"),
        chart(
            plain(lambda run: run.images_per_second, "jigsaws / s"), f"speed over steps of {named}", "Jigsaws a second"
        ),
        chart(
            plain(lambda run: 100 * run.data_wait, "time waiting for data, %", 100),
            f"share of time waiting for data of {named}",
            "Data wait: near 0 the data keeps up; raise --workers where it does not",
        ),
    ]
