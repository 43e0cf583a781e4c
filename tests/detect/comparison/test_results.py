"""Differences between arms, paired by seed."""

import statistics
from typing import Any

import pytest

from jigsaw_pretrain.detect.comparison.report import cost_table, main_table, markdown
from jigsaw_pretrain.detect.comparison.results import RunResult, difference, tell_apart


def run(arm: str, seed: int, ap: float, **more: Any) -> RunResult:
    values = {
        "lr": 0.02,
        "steps": 10,
        "pretrain_seconds": 0.0,
        "detect_seconds": 5.0,
        "seconds_per_step": 0.5,
        "memory": None,
        "device": "cpu",
        "curve": ((5.0, ap),),
    }
    return RunResult(arm, seed, ap={"AP": ap, "AP50": ap, "AP75": ap}, **{**values, **more})


def test_finished_runs_are_named_by_what_tells_them_apart() -> None:
    arms = (
        "scratch, faster-rcnn-fpn, gn, lr 0.02",
        "mine, faster-rcnn-fpn, gn, lr 0.02",
        "mine, faster-rcnn-fpn, gn, lr 0.04",
    )
    found, shared = tell_apart([run(arm, 0, 0.1) for arm in arms])
    assert [one.arm for one in found] == ["scratch, lr 0.02", "mine, lr 0.02", "mine, lr 0.04"]
    assert shared == ["faster-rcnn-fpn", "gn"]
    assert [one.arm for one in tell_apart(found[:1])[0]] == ["scratch"]


def test_differences_are_paired_by_seed_with_students_interval() -> None:
    scratch = [run("scratch", seed, ap) for seed, ap in enumerate((0.10, 0.20, 0.30))]
    jigsaw = [run("jigsaw", seed, ap, pretrain_seconds=2.0) for seed, ap in enumerate((0.13, 0.22, 0.34))]
    found = difference(jigsaw, scratch)
    assert found is not None and found.pairs == 3 and found.mean == pytest.approx(0.03)
    assert found.half_width == pytest.approx(4.303 * statistics.stdev([0.03, 0.02, 0.04]) / 3**0.5)
    one = difference(jigsaw[:1], scratch)
    assert one is not None and one.half_width is None and difference(jigsaw, [run("scratch", 7, 0.1)]) is None
    arms = {"scratch": scratch, "jigsaw": jigsaw, "scratch-equal-cost": [run("scratch-equal-cost", 0, 0.2, steps=14)]}
    table = markdown([main_table(arms), cost_table(arms)])
    assert "| jigsaw | 3 | 0.02 | 10 | 23.0 ± 10.5 |" in table and "+3.0 [+0.5, +5.5]" in table
    assert "-7.0 (one pair, no interval)" in table
