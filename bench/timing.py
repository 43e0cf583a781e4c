"""Side-by-side timing: interleaved repeats, medians and spreads, ratios to a floor, and goals met or missed.

Cases are run in turn, again and again, so that a machine that slows down slows all of them. CPU seconds of this
process are what is compared where one process does the work: other programs on the machine then hardly matter.
"""

import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Goal:
    """A limit on a case's ratio to the floor (or on another figure): at most, or at least."""

    limit: float
    at_least: bool = False

    def met(self, value: float) -> bool:
        """Whether the value keeps the limit."""
        return value >= self.limit if self.at_least else value <= self.limit

    def verdict(self, value: float) -> str:
        """The goal, and whether the value meets it, in words."""
        return f"{self} {'met' if self.met(value) else 'missed'}"

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.limit:g}"


def interleaved(
    cases: Mapping[str, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.process_time
) -> dict[str, list[float]]:
    """Seconds of each case's repeats, after one run of each to warm up."""
    found: dict[str, list[float]] = {name: [] for name in cases}
    for case in cases.values():
        case()
    for _ in range(repeats):
        for name, case in cases.items():
            begun = clock()
            case()
            found[name].append(clock() - begun)
    return found


def show(
    title: str,
    times: Mapping[str, list[float]],
    floor: str,
    per: int,
    unit: str,
    goals: Mapping[str, Goal] | None = None,
) -> dict[str, dict[str, object]]:
    """Print a table of medians a ``unit`` (there are ``per`` in a run) and ratios to the floor; returns its rows."""
    goals = goals or {}
    table = Table(title=title)
    for head in ("case", f"us / {unit}", "spread", "ratio", "goal"):
        table.add_column(head, justify="left" if head == "case" else "right")
    rows: dict[str, dict[str, object]] = {}
    for name, seconds in times.items():
        # Ratios within a repeat, then their median: what slows one repeat slows its floor too.
        ratio = statistics.median(a / b for a, b in zip(seconds, times[floor], strict=True))
        middle = statistics.median(seconds)
        spread = (max(seconds) - min(seconds)) / middle
        goal = goals.get(name)
        verdict = "" if goal is None else goal.verdict(ratio)
        table.add_row(name, f"{1e6 * middle / per:,.1f}", f"{spread:.0%}", f"{ratio:.2f}", verdict)
        rows[name] = {
            "us": 1e6 * middle / per,
            "spread": spread,
            "ratio": ratio,
            "goal": str(goal) if goal else None,
            "met": goal.met(ratio) if goal else None,
        }
    Console().print(table)
    return rows


def judged(what: str, value: float, goal: Goal, shown: str = ".3f", note: str = "") -> dict[str, object]:
    """Print a figure beside its goal; returns it as bench/summary.py finds it among a script's results.

    shown: the figure's format. note: what keeps this figure from being what the goal is about.
    """
    print(f"{what}: {value:{shown}} (goal {goal.verdict(value)}{'; ' + note if note else ''})")
    return {"what": what, "measured": value, "goal": str(goal), "met": goal.met(value), "note": note}


def write(name: str, results: object) -> None:
    """Write bench/results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(results, indent=2) + "\n")
