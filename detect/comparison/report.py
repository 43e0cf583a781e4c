"""A comparison's tables and curves: Markdown for people and diffs, one HTML page, JSON for programs."""

import itertools
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jigsaw_pretrain import html
from jigsaw_pretrain.detect.comparison.arms import EQUAL_COST, SCRATCH
from jigsaw_pretrain.detect.comparison.results import Difference, RunResult, by_arm, difference, spread, to_json
from jigsaw_pretrain.html import Figure, Section, chart, render
from jigsaw_pretrain.storage.store import Storage
from jigsaw_pretrain.words import number

MARKDOWN = "comparison.md"
HTML = "report.html"
JSON = "comparison.json"

Table = dict[str, Any]


def spread_text(values: Sequence[float]) -> str:
    """Mean ± standard deviation of APs, in hundredths."""
    mean, deviation = spread([100 * value for value in values])
    return f"{mean:.1f}" if deviation is None else f"{mean:.1f} ± {deviation:.1f}"


def _seconds(values: Sequence[float]) -> str:
    """Mean ± standard deviation of times."""
    return " ± ".join(number(float(one)) for one in spread(values) if one is not None)


def difference_text(found: Difference | None) -> str:
    """Mean with the ends of its interval, in hundredths of AP."""
    if found is None:
        return "–"
    mean = 100 * found.mean
    if found.half_width is None:
        return f"{mean:+.1f} (one pair, no interval)"
    half = 100 * found.half_width
    return f"{mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}]"


BOXES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
MASKS = ("mask_AP", "mask_AP50", "mask_AP75")


def _ap(runs: Sequence[RunResult], name: str) -> str:
    """The spread of an AP; a dash where any run has none (no ground truth of that size)."""
    found = [one.ap.get(name, -1) for one in runs]
    return "–" if min(found) < 0 else spread_text(found)


def main_table(arms: dict[str, list[RunResult]]) -> Table:
    """AP with its spread, and the paired difference from the reference at equal detector steps."""
    reference = SCRATCH if SCRATCH in arms else next(iter(arms))
    has_masks = any("mask_AP" in one.ap for runs in arms.values() for one in runs)
    names = BOXES + (MASKS if has_masks else ())
    shown = [name.replace("mask_", "mask ") for name in names]
    head = ["arm", "seeds", "lr", "detector steps", *shown, f"AP minus {reference}'s, 95 %"]
    rows = []
    for name, runs in arms.items():
        comparable = name != reference and runs[0].steps == arms[reference][0].steps
        found = difference(runs, arms[reference]) if comparable else None
        rates = ", ".join(f"{rate:g}" for rate in sorted({one.lr for one in runs}))
        figures = [_ap(runs, one) for one in names]
        rows.append([name, str(len(runs)), rates, str(runs[0].steps), *figures, difference_text(found)])
    return {
        "caption": "At equal detector steps (AP in hundredths, mean ± standard deviation)",
        "head": head,
        "rows": rows,
    }


def cost_table(arms: dict[str, list[RunResult]]) -> Table:
    """What each arm cost, and its difference from scratch trained for as long as it took with its pre-training."""
    head = [
        "arm",
        "pre-training s",
        "detector s",
        "in all s",
        "wall-clock s per step",
        "GPU memory",
        "GFLOPs per image and step",
        f"AP minus {EQUAL_COST}'s, 95 %",
    ]
    rows = []
    for name, runs in arms.items():
        totals = [one.pretrain_seconds + one.detect_seconds for one in runs]
        memory = [one.memory for one in runs if one.memory]
        speeds = [one.seconds_per_step for one in runs if one.seconds_per_step is not None]
        pretrained = bool(runs[0].pretrain_seconds) and EQUAL_COST in arms
        rows.append(
            [
                name,
                _seconds([one.pretrain_seconds for one in runs]),
                _seconds([one.detect_seconds for one in runs]),
                _seconds(totals),
                number(spread(speeds)[0]) if speeds else "–",
                f"{number(max(memory) / 2**30)} GiB" if memory else "–",
                number(runs[0].flops / 1e9) if runs[0].flops else "–",
                difference_text(difference(runs, arms[EQUAL_COST])) if pretrained else "–",
            ]
        )
    return {"caption": "At equal total cost (device-seconds of training, measured)", "head": head, "rows": rows}


def strata_table(arms: dict[str, list[RunResult]]) -> Table | None:
    """AP of classes by how many annotations they have in training; None where all are of one stratum."""
    names = list(dict.fromkeys(name for runs in arms.values() for one in runs for name in one.strata))
    if len(names) < 2:
        return None
    rows = []
    for arm, runs in arms.items():
        figures = []
        for name in names:
            found = [one.strata[name]["AP"] for one in runs if name in one.strata]
            figures.append(spread_text(found) if found else "–")
        rows.append([arm, *figures])
    caption = "AP of classes by their annotations in training (hundredths)"
    return {"caption": caption, "head": ["arm", *names], "rows": rows}


def tables(results: Sequence[RunResult]) -> list[Table]:
    """The tables of some results."""
    arms = by_arm(results)
    strata = strata_table(arms)
    return [main_table(arms), cost_table(arms), *([strata] if strata else [])]


def markdown(made: Sequence[Table]) -> str:
    """Tables as Markdown."""
    parts = []
    for table in made:
        parts.append(f"**{table['caption']}**\n\n{markdown_table(table['head'], table['rows'])}")
    return "\n\n".join(parts) + "\n"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """One table as Markdown, without a line's end at its end."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def cost_figure(arms: dict[str, list[RunResult]]) -> Figure:
    """AP over device-seconds, pre-training included: the mean over seeds at each evaluation."""
    curves = {}
    for name, runs in arms.items():
        length = min(len(one.curve) for one in runs)
        points = [[one.curve[place] for one in runs] for place in range(length)]
        seconds = [spread([one[0] for one in at])[0] for at in points]
        curves[name] = seconds, [spread([one[1] for one in at])[0] for at in points]
    return _figure(curves, "device-seconds, pre-training included", "AP over cost, mean over seeds")


def steps_figure(arms: dict[str, list[RunResult]]) -> Figure:
    """AP over the detector's steps: the mean over seeds at each evaluation (Rethinking's curves)."""
    curves = {}
    for name, runs in arms.items():
        length = min(len(one.by_step) for one in runs)
        steps = [float(runs[0].by_step[place][0]) for place in range(length)]
        curves[name] = steps, [spread([one.by_step[place][1] for one in runs])[0] for place in range(length)]
    return _figure(curves, "steps of the detector", "AP over steps, mean over seeds")


def _figure(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], across: str, caption: str) -> Figure:
    """A curve of AP for each arm; the names stand below, where the longest hides no curve."""

    def draw(axes: Any) -> None:
        for (name, (places, heights)), marker in zip(curves.items(), itertools.cycle("osD^vPX*"), strict=False):
            axes.plot(places, [100 * height for height in heights], f"{marker}-", label=textwrap.fill(name, 60))
        axes.set(xlabel=across, ylabel="AP (hundredths)", xlim=(0, None), ylim=(0, None))
        columns = 3 if max(map(len, curves), default=0) <= 20 else 1
        axes.figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize="small")

    return chart(draw, caption, caption, size=(5.2, 3.2 + 0.25 * -(-len(curves) // 2)))


def _whole(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Rows whose numbers a browser breaks nowhere."""
    return [[cell.replace(" ± ", "\u00a0±\u00a0") for cell in row] for row in rows]


def write_report(folder: Path, results: Sequence[RunResult], notes: Sequence[str] = ()) -> str:
    """Write comparison.md, comparison.json and the page report.html; returns the Markdown."""
    arms, made = by_arm(results), tables(results)
    devices = sorted({one.device for one in results})
    sizes = "APs, APm and APl: of small, medium and large objects."
    lines = [f"Device: {', '.join(devices)}.", sizes, *notes]
    text = markdown(made) + "\n" + "\n".join(f"- {line}" for line in lines) + "\n"
    storage = Storage(folder)
    storage.publish(MARKDOWN, text.encode())
    sections = [Section(one["caption"], tables=[html.Table(one["head"], _whole(one["rows"]))]) for one in made]
    sections.append(Section("Curves", figures=[steps_figure(arms), cost_figure(arms)]))
    sections.append(Section("Notes", " ".join(lines)))
    lead = "Average precision (AP) on the validation images, in hundredths."
    page = render("Does the pre-training pay?", lead, sections)
    storage.publish(HTML, page.encode())
    storage.publish(JSON, json.dumps({"runs": to_json(results), "notes": lines}, indent=2).encode() + b"\n")
    return text
