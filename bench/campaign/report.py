"""The tables and curves of docs/results.md, made from a campaign's results alone.

The same rows give the same bytes, so that a test can tell whether the page says what was measured. Nothing is rounded
before it is compared, and a figure that has not been measured is a dash.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.campaign.plan import Arm, Plan, arms
from bench.campaign.results import (
    Exchange,
    Row,
    arm_seconds,
    best_rate,
    compared,
    costs_of,
    exchange,
    reported,
    seeds_needed,
    step_costs,
)
from jigsaw_pretrain.detect.comparison.report import difference_text, markdown_table, spread_text
from jigsaw_pretrain.detect.comparison.results import Difference, spread
from jigsaw_pretrain.html import chart

BEGIN, END = "<!-- campaign: begin -->", "<!-- campaign: end -->"

SCORE = "AP50"
"""What detectors are compared by; AP stands beside it."""

PROBED = "class_mean"

SVG = "http://www.w3.org/2000/svg"


def page(text: str, plan: Plan, rows: Mapping[str, Row]) -> str:
    """A page with what lies between its two markers made anew; raises ValueError where it has none."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{tables(plan, rows)}\n{END}{after}"


def tables(plan: Plan, rows: Mapping[str, Row]) -> str:
    """Everything that a campaign has found, as Markdown: a section per question."""
    parts = [_costs(plan, rows)]
    scratch = _scratch(plan, rows)
    for name, question in plan.questions.items():
        chosen = list(arms(plan, name))
        found = {arm: reported(plan, arm, rows) for arm in chosen}
        if not any(found.values()):
            parts.append(f"### {name}\n\n{question.about} Open: nothing has been measured.\n")
            continue
        told = _probes(found) if not question.detect_steps else _detectors(plan, found, rows, scratch)
        parts.append(f"### {name}\n\n{question.about}\n\n{told}\n{_sources(found)}\n")
    return "\n".join(parts)


def curves(plan: Plan, rows: Mapping[str, Row], question: str) -> dict[str, str]:
    """By regime: AP50 over device-seconds of training, pre-training included, a line per pre-training length (SVG)."""
    costs, made = step_costs(plan, rows), {}
    for regime in plan.questions[question].regimes:
        usual, *others = plan.questions[question].variants
        lines: dict[tuple[int, str], list[tuple[float, float]]] = {}
        for arm in arms(plan, question):
            found = reported(plan, arm, rows)
            if arm.regime == regime and found:
                seconds = sum(arm_seconds(plan, arm, found, costs_of(found, costs)))
                if math.isnan(seconds):
                    continue
                steps = f"{arm.pretrain_steps:,} pre-training steps"
                label = _start(arm, usual) if others or not arm.pretrain_steps else steps
                lines.setdefault((arm.pretrain_steps, label), []).append((seconds, 100 * _mean(found, SCORE)))

        def draw(axes: object, lines: Mapping[tuple[int, str], Sequence[tuple[float, float]]] = lines) -> None:
            for (_, label), points in sorted(lines.items()):
                axes.plot(*zip(*sorted(points), strict=True), "o-", label=label)  # type: ignore[attr-defined]
            axes.set(xlabel="device-seconds, pre-training included", ylabel="AP50 (hundredths)")  # type: ignore[attr-defined]
            axes.legend(frameon=False)  # type: ignore[attr-defined]

        if lines:
            # A picture of its own needs the namespace that one inside a page does without.
            markup = str(chart(draw, f"AP50 over cost, {regime}").markup)
            made[regime] = markup if "xmlns=" in markup else markup.replace("<svg ", f'<svg xmlns="{SVG}" ', 1)
    return made


def _costs(plan: Plan, rows: Mapping[str, Row]) -> str:
    found = step_costs(plan, rows)
    machines = sorted({machine for _, machine in found})
    body = []
    for name, regime in plan.regimes.items():
        for machine in machines:
            if (name, machine) not in found:
                continue
            before, after = found[name, machine]
            per_jigsaw = before / _batch(plan.pretrain, regime.pretrain)
            per_image = after / _batch(plan.detect, regime.detect)
            figures = (before, after, 1e3 * per_jigsaw, 1e3 * per_image, per_image / per_jigsaw)
            body.append([name, regime.about, machine.split(",")[0], *(_digits(one) for one in figures)])
    head = [
        "regime",
        "images",
        "processor",
        "s per pre-training step",
        "s per detector step",
        "ms per jigsaw",
        "ms per image",
        "ratio",
    ]
    return (
        "### What a step costs\n\n"
        + _table(head, body)
        + "\nMedians over the runs that change nothing, device-seconds of one thread.\n"
    )


def _scratch(plan: Plan, rows: Mapping[str, Row]) -> dict[tuple[str, int], Mapping[int, Row]]:
    """Rows from scratch by regime and detector steps, of the first question that has them all."""
    found: dict[tuple[str, int], Mapping[int, Row]] = {}
    for name, question in plan.questions.items():
        usual = next(iter(question.variants))
        for arm in arms(plan, name):
            if arm.detect_steps and not arm.pretrain_steps and arm.variant == usual:
                mine = reported(plan, arm, rows)
                if len(mine) == question.seeds:
                    found.setdefault((arm.regime, arm.detect_steps), mine)
    return found


def _detectors(
    plan: Plan,
    found: Mapping[Arm, Mapping[int, Row]],
    rows: Mapping[str, Row],
    elsewhere: Mapping[tuple[str, int], Mapping[int, Row]],
) -> str:
    costs, parts, body, rates = step_costs(plan, rows), [], [], []
    usual = next(iter(found)).variant
    for arm, mine in found.items():
        if not mine:
            continue
        rivals = {one.variant: them for one, them in found.items() if _rival(one, arm)}
        scratch = rivals.get(arm.variant, next(iter(rivals.values()), {}))
        delta = compared(mine, scratch, SCORE) if scratch and scratch is not mine else None
        lr = best_rate(plan, arm, rows)
        step_seconds = costs_of(mine, costs)
        spent = arm_seconds(plan, arm, mine, step_seconds)
        figures = [
            _scores(mine, SCORE),
            _scores(mine, "AP"),
            "–" if math.isnan(sum(spent)) else f"{sum(spent):,.0f}",
            difference_text(delta),
            _needed(mine, scratch, delta),
        ]
        body.append(
            [
                arm.regime,
                _start(arm, usual),
                str(arm.pretrain_steps),
                str(arm.detect_steps),
                f"{lr:g}",
                str(len(mine)),
                *figures,
            ]
        )
        if arm.pretrain_steps:
            lengths = {steps: them for (regime, steps), them in elsewhere.items() if regime == arm.regime}
            own = (one for one in found if _scratch_of(one, arm) and one.variant == usual and found[one])
            lengths |= {one.detect_steps: found[one] for one in own}
            worth = exchange(lengths, mine, SCORE, step_seconds[1], spent)
            if worth is not None:
                rate, low, high = (_rate(one, worth.measured) for one in (worth.rate, worth.low, worth.high))
                what = [arm.regime, arm.variant, str(arm.pretrain_steps), str(arm.detect_steps)]
                rates.append([*what, rate, f"{low} to {high}", str(worth.seeds), _served(worth)])
    head = ["regime", "start", "pre-training steps", "detector steps", "lr", "seeds", SCORE, "AP", "s in all"]
    parts.append(_table([*head, f"{SCORE} minus scratch's, 95 %", "seeds to tell"], body))
    if rates:
        head = ["regime", "start", "pre-training steps", "detector steps", "detector s per pre-training s", "95 %"]
        head += ["seeds", "detectors until it pays"]
        parts.append("What a second of pre-training saved of a detector from scratch:\n\n" + _table(head, rates))
    return "\n".join(parts)


def _probes(found: Mapping[Arm, Mapping[int, Row]]) -> str:
    body = []
    for arm, mine in found.items():
        if not mine:
            continue
        first = next(
            them for one, them in found.items() if (one.regime, one.pretrain_steps) == (arm.regime, arm.pretrain_steps)
        )
        delta = compared(mine, first, PROBED) if first and first is not mine else None
        base = {seed: one for seed, one in first.items() if seed in mine}
        gain = f"{delta.mean / _mean(base, PROBED):+.0%}" if delta is not None else "–"
        seconds = sum(one.pretrain_seconds for one in mine.values()) / len(mine)
        figures = [
            _scores(mine, PROBED),
            _scores(mine, f"random_{PROBED}"),
            f"{seconds:,.0f}",
            difference_text(delta),
            gain,
        ]
        body.append([arm.regime, arm.variant, str(arm.pretrain_steps), str(len(mine)), *figures])
    head = [
        "regime",
        "variant",
        "steps",
        "seeds",
        "class mean",
        "of random features",
        "s",
        "minus the first's, 95 %",
        "gain",
    ]
    return _table(head, body)


def _start(arm: Arm, usual: str) -> str:
    """What a detector of an arm starts from, in words."""
    return arm.variant if arm.pretrain_steps else "scratch" if arm.variant == usual else f"scratch, {arm.variant}"


def _rival(one: Arm, arm: Arm) -> bool:
    """Whether it is an arm from scratch with as many detector steps."""
    return _scratch_of(one, arm) and one.detect_steps == arm.detect_steps


def _scratch_of(one: Arm, arm: Arm) -> bool:
    return one.regime == arm.regime and one.pretrain_steps == 0


def _batch(common: Sequence[str], own: Sequence[str]) -> int:
    given = [one.split("=")[1] for one in (*common, *own) if one.startswith("data.batch=")]
    return int(given[-1])


def _mean(rows: Mapping[int, Row], score: str) -> float:
    return spread([one.scores[score] for one in rows.values()])[0]


def _scores(rows: Mapping[int, Row], score: str) -> str:
    return spread_text([one.scores[score] for one in rows.values()])


def _needed(mine: Mapping[int, Row], theirs: Mapping[int, Row], found: Difference | None) -> str:
    """Seeds that would tell a difference as large as the one measured from none."""
    if found is None or found.half_width is None:
        return "–"
    if abs(found.mean) > found.half_width:
        return "told"
    deviation = spread([mine[seed].scores[SCORE] - theirs[seed].scores[SCORE] for seed in mine if seed in theirs])[1]
    needed = seeds_needed(deviation or 0.0, found.mean)
    return str(needed) if needed < 1000 else "over 1,000"


def _rate(value: float, measured: float) -> str:
    return f"more than {measured:.2f}" if math.isinf(value) else f"{value:.2f}"


def _served(worth: Exchange) -> str:
    """How many detectors one pre-training must serve until it has saved what it took."""
    rate = min(worth.rate, worth.measured)
    if rate <= 0:
        return "unknown" if math.isinf(worth.rate) else "never"
    return f"{'at most ' if math.isinf(worth.rate) and rate < 1 else ''}{math.ceil(1 / rate):,}"


def _digits(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3g}"


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    return markdown_table(head, body) + "\n"


def _sources(found: Mapping[Arm, Mapping[int, Row]]) -> str:
    """Where the figures come from, in one line."""
    rows = [row for mine in found.values() for row in mine.values()]
    dates, commits, machines = (sorted({getattr(one, key) for one in rows}) for key in ("date", "commit", "hardware"))
    days = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"`{rows[0].command}`, {days}; commits {', '.join(commits)}; {'; '.join(machines)}."


def write(plan: Plan, rows: Mapping[str, Row], document: Path, pictures: Path) -> None:
    """Write the tables into a page and the curves of every question beside it."""
    document.write_text(page(document.read_text(encoding="utf-8"), plan, rows), encoding="utf-8")
    for name, question in plan.questions.items():
        if question.detect_steps and len(question.pretrain_steps) > 1:
            for regime, svg in curves(plan, rows, name).items():
                (pictures / f"pays-{name}-{regime}.svg").write_text(svg + "\n", encoding="utf-8")
