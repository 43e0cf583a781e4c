"""The campaign of bench/pays.py: what it plans, that it runs nothing twice, what it reports, and its page."""

import json
import math
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.campaign import plan as plans
from bench.campaign import report
from bench.campaign import results as found
from bench.campaign.data import Images, Prepared, restricted
from bench.campaign.runs import Campaign
from jigsaw_pretrain.detect.comparison.runner import TaskRunner
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.dataset.dataset import open_dataset
from tests.helpers.detection import draw
from tests.helpers.settings import SOAK

ROOT = Path(__file__).resolve().parents[2]

SMALL = """
backbone = "bench.campaign.networks:resnet18_half"
pretrain = ["data.template_size=64", "data.template_split=32", "data.batch=4", "optim.warmup_steps=0"]
detect = ["model.name=retinanet", "model.norm=sync-bn", "model.neck_channels=8", "data.batch=2"]

[regimes.small]
about = "rectangles"
data = "bccd"
detect = ["data.short_side=64"]

[questions.steps]
about = "?"
regimes = ["small"]
pretrain_steps = [0, 1]
detect_steps = [1, 2]
rates = [0.1, 0.2]
sweep_seeds = 1
seeds = 2
variants = { paper = {}, warp = { pretrain = ["data.fit=warp"] } }
"""


def plan_of(folder: Path, text: str = SMALL) -> plans.Plan:
    path = folder / "plan.toml"
    path.write_text(text)
    return plans.read_plan(path)


def row_of(unit: plans.Unit, score: float, seconds: float = 1.0) -> found.Row:
    return found.Row(
        key=unit.key,
        scores={"AP50": score, "AP": score / 2},
        pretrain_steps=unit.pretrain_steps,
        detect_steps=unit.detect_steps,
        pretrain_seconds=seconds * unit.pretrain_steps,
        detect_seconds=seconds * unit.detect_steps,
        regime=unit.regime,
        commit="0",
        command="c",
        date="2026-01-01",
        hardware="h",
    )


def test_every_unit_has_a_key_of_its_own_and_scratch_has_no_variants(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    arms = list(plans.arms(plan, "steps"))
    assert sorted((one.pretrain_steps, one.detect_steps, one.variant) for one in arms) == [
        (0, 1, "paper"),
        (0, 2, "paper"),
        *((1, steps, name) for steps, name in product((1, 2), ("paper", "warp"))),
    ]
    units = [plans.unit(plan, arm, seed, lr) for arm in arms for seed in (0, 1) for lr in (0.1, 0.2)]
    assert len({one.key for one in units}) == len(units)
    # A pre-training is shared by the detectors that start from it, and by the sweep's.
    shared = {one.pretraining.key for one in units if one.pretraining and one.seed == 0 and one.variant == "warp"}
    assert len(shared) == 1
    swept = plans.unit(plan, arms[-1], plans.SWEEP_SEED, 0.1)
    assert swept.pretraining == plans.unit(plan, arms[-1], 0, 0.2).pretraining


def test_what_was_never_trained_is_not_frozen(tmp_path: Path) -> None:
    frozen = 'frozen = { start = "pre-trained", detect = ["model.norm=frozen-bn"] }, warp = {'
    arms = list(plans.arms(plan_of(tmp_path, SMALL.replace("warp = {", frozen)), "steps"))
    assert [one.pretrain_steps for one in arms if one.variant == "frozen"] == [1, 1]


def test_another_setting_is_another_unit_and_another_question_is_not(tmp_path: Path) -> None:
    before = plan_of(tmp_path)
    after = plan_of(tmp_path, SMALL.replace("data.short_side=64", "data.short_side=96"))
    asked = plan_of(tmp_path, SMALL.replace("questions.steps", "questions.other"))
    [one, other] = [plans.unit(plan, next(plans.arms(plan, "steps")), 0, 0.1) for plan in (before, after)]
    assert one.key != other.key
    assert plans.unit(asked, next(plans.arms(asked, "other")), 0, 0.1).key == one.key


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("regimes = [", 'regimes = ["large", '), "large"),
        (("rates = [0.1, 0.2]", "rates = []"), "rates"),
        (("detect_steps = [1, 2]", "detect_steps = []"), "0 steps"),
        (('data = "bccd"', 'data = "bccd"\npretrained_in = "nowhere"'), "regime small"),
        (('data = "bccd"', 'data = "bccd"\npretrained_in = "small"'), "regime small"),
        (("\nseeds = 2", '\nseeds = 2\nprobe = ["--fit", "crop"]'), "probe"),
        (("paper = {}", 'paper = { peer = "dino", prep = ["--context-at", "train"] }'), "paper"),
        (("\nseeds = 2", "\nseed = 2"), "seed"),
        (("\nseeds = 2", "\nseeds = ["), "plan.toml"),
    ],
)
def test_a_plan_that_cannot_be_run_is_refused(tmp_path: Path, change: tuple[str, str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        plan_of(tmp_path, SMALL.replace(*change))


def test_regimes_share_a_pretraining_that_is_the_same_in_both(tmp_path: Path) -> None:
    larger = '[regimes.large]\nabout = "?"\ndata = "bccd"\npretrained_in = "small"\ndetect = ["data.short_side=96"]\n\n'
    text = SMALL.replace("[questions.steps]", larger + "[questions.steps]").replace('["small"]', '["small", "large"]')
    plan = plan_of(tmp_path, text)
    units = [plans.unit(plan, arm, 0, 0.1) for arm in plans.arms(plan, "steps") if arm.pretrain_steps]
    assert len({one.key for one in units}) == len(units) == 8
    assert len({one.pretraining.key for one in units if one.pretraining}) == 2
    # Or the detector is of other classes of the same images.
    fewer = plan_of(tmp_path, text.replace('data = "bccd"\npretrained_in', 'data = "voc-people"\npretrained_in'))
    others = [plans.unit(fewer, arm, 0, 0.1) for arm in plans.arms(fewer, "steps") if arm.pretrain_steps]
    assert {one.pretraining for one in others} == {one.pretraining for one in units}
    assert {one.data for one in others if one.regime == "large"} == {"voc-people"}


PEER = SMALL.replace("warp = {", 'simclr = { peer = "simclr" }, warp = {')


def test_a_peer_has_units_of_its_own_and_leaves_the_others_theirs(tmp_path: Path) -> None:
    plan, without = plan_of(tmp_path, PEER), plan_of(tmp_path)
    units = {one.key: one for arm in plans.arms(plan, "steps") for one in [plans.unit(plan, arm, 0, 0.1)]}
    others = {plans.unit(without, arm, 0, 0.1).key for arm in plans.arms(without, "steps")}
    peers = [one.pretraining for key, one in units.items() if key not in others]
    assert others < set(units) and len(peers) == 2
    for one in peers:
        assert isinstance(one, plans.PeerPretraining) and one.method == "simclr"
        assert one.ours in [unit.pretraining for key, unit in units.items() if key in others]


def test_a_variant_of_prep_is_trained_on_crops_of_its_own(tmp_path: Path) -> None:
    other = SMALL.replace('warp = { pretrain = ["data.fit=warp"] }', 'context = { prep = ["--context-at", "train"] }')
    plan, without = plan_of(tmp_path, other), plan_of(tmp_path)
    units = {one.key: one for arm in plans.arms(plan, "steps") for one in [plans.unit(plan, arm, 0, 0.1)]}
    others = {plans.unit(without, arm, 0, 0.1).key for arm in plans.arms(without, "steps")}
    mine = {one.pretraining for key, one in units.items() if key not in others}
    assert len(mine) == 1 and len(others & set(units)) == 4
    [one] = mine
    assert isinstance(one, plans.OtherCropsPretraining)
    annotations, images = draw(tmp_path / "bccd", 8, 0)
    data = Prepared(Images(annotations, images), Images(annotations, images), tmp_path / "crops")
    contexts = [open_dataset(str(data.shards_by(options))).drawn_context for options in ((), one.prep)]
    assert contexts[0] is None and contexts[1] == 2


def test_another_way_to_probe_is_another_unit_of_the_same_pretraining(tmp_path: Path) -> None:
    text = SMALL.replace("[0, 1]", "[1]").replace("[1, 2]", "[]")
    other = text.replace("sweep_seeds", 'probe = ["--fit", "resize"]\nsweep_seeds')
    plain, padded = (
        plans.unit(plan, next(plans.arms(plan, "steps")), 0, 0.1)
        for plan in (plan_of(tmp_path, text), plan_of(tmp_path, other))
    )
    assert plain.pretraining == padded.pretraining and plain.key != padded.key
    assert (plain.settings, padded.settings) == ((), ("--fit", "resize"))


def test_a_peer_without_its_environment_is_left_and_told_of(tmp_path: Path) -> None:
    plan, path = plan_of(tmp_path, PEER), tmp_path / "results.jsonl"
    for python in (None, tmp_path / "python"):
        campaign = Campaign(plan, tmp_path / "runs", path, TaskRunner(None, 1), None, python)
        asked = [one for one in campaign.todo(["steps"]) if isinstance(one.pretraining, plans.PeerPretraining)]
        assert bool(asked) == bool(python) and campaign.needs_peer("steps") == (not python)


def filled(plan: plans.Plan, path: Path, score: dict[tuple[int, int], float]) -> None:
    """Rows of every unit: AP50 by the steps of both trainings, the second rate a little better, seeds apart."""
    for arm in plans.arms(plan, "steps"):
        for seed, rate in product((plans.SWEEP_SEED, 0, 1), (0.1, 0.2)):
            height = score[arm.pretrain_steps, arm.detect_steps] + rate / 100 + (seed == 1) * 0.001
            found.append(path, row_of(plans.unit(plan, arm, seed, rate), height))


def test_sweeps_come_first_then_the_seeds_at_the_best_rate_and_nothing_twice(tmp_path: Path) -> None:
    plan, path = plan_of(tmp_path), tmp_path / "results.jsonl"
    campaign = Campaign(plan, tmp_path / "runs", path, TaskRunner(None, 1))
    everything = []
    while todo := list(campaign.todo(["steps"])):
        everything.append(todo[0])
        found.append(path, row_of(todo[0], todo[0].lr))
        assert campaign.left("steps") == 6 * (2 + 2) - len(everything)
    assert [one.seed for one in everything] == [plans.SWEEP_SEED] * 12 + [0] * 6 + [1] * 6
    assert {one.lr for one in everything[12:]} == {0.2}
    assert len({one.key for one in everything}) == len(everything)


def test_a_damaged_line_of_results_is_named(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"key": 1}\n')
    with pytest.raises(UserError, match="line 1"):
        found.read_rows(path)


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=5), st.floats(0.001, 1.2))
def test_steps_to_reach_a_height_agree_with_a_walk_along_the_curve(heights: list[float], height: float) -> None:
    curve = [(100 * 2**place, score) for place, score in enumerate(heights)]
    steps = found.steps_to_reach(curve, height)
    highest = 0.0
    for place, (at, score) in enumerate(curve):
        if max(highest, score) >= height:
            earlier = curve[place - 1][0] if place else 0
            assert earlier <= steps <= at or math.isclose(steps, at)
            return
        highest = max(highest, score)
    assert steps == math.inf


def test_the_exchange_rate_is_what_it_says(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    chosen = {(one.pretrain_steps, one.detect_steps, one.variant): one for one in plans.arms(plan, "steps")}

    def rows(arm: plans.Arm, score: float) -> dict[int, found.Row]:
        return {seed: row_of(plans.unit(plan, arm, seed, 0.1), score) for seed in (0, 1)}

    scratch = {steps: rows(chosen[0, steps, "paper"], 0.1 * steps) for steps in (1, 2)}
    # As good after one step as scratch after two: one detector step saved, worth 3 s, for one of 4 s.
    worth = found.exchange(scratch, rows(chosen[1, 1, "paper"], 0.2), "AP50", 3.0, (4.0, 3.0))
    assert worth is not None
    assert (worth.rate, worth.low, worth.high) == pytest.approx((0.75, 0.75, 0.75))
    above = found.exchange(scratch, rows(chosen[1, 1, "paper"], 0.3), "AP50", 3.0, (4.0, 3.0))
    assert above is not None
    # Two steps of 3 s are known to be too few: more than one of them saved.
    assert above.rate == math.inf and above.measured == pytest.approx(0.75)
    alone = found.exchange({1: scratch[1]}, rows(chosen[1, 1, "paper"], 0.3), "AP50", 3.0, (4.0, 3.0))
    assert alone is not None and alone.rate == math.inf and alone.measured == 0
    worse = found.exchange(scratch, rows(chosen[1, 1, "paper"], 0.05), "AP50", 3.0, (4.0, 3.0))
    assert worse is not None
    assert worse.rate < 0


@pytest.mark.parametrize(
    ("rate", "measured", "told"),
    [
        (0.25, 3.0, "4"),
        (2.0, 3.0, "1"),
        (-0.1, 3.0, "never"),
        (math.inf, 3.0, "1"),
        (math.inf, 0.25, "at most 4"),
        (math.inf, 0.0, "unknown"),
    ],
)
def test_what_scratch_never_reached_is_no_figure(rate: float, measured: float, told: str) -> None:
    worth = found.Exchange(rate, rate, rate, measured, 5)
    assert report._served(worth) == told
    assert ("more than" in report._rate(rate, measured)) == math.isinf(rate)


def test_a_variant_costs_what_it_took_and_leaves_the_usual_cost(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, SMALL.replace("warp = {", 'frozen = { detect = ["model.freeze=stem"] }, warp = {'))
    rows = {}
    for arm in plans.arms(plan, "steps"):
        seconds = {"paper": 1.0, "warp": 5.0, "frozen": 0.25}[arm.variant]
        for seed in (0, 1):
            one = row_of(plans.unit(plan, arm, seed, 0.1), 0.1, seconds)
            rows[one.key] = one
    costs = found.step_costs(plan, rows)
    assert costs == {("small", "h"): (1.0, 1.0)}
    for arm in plans.arms(plan, "steps"):
        mine = {seed: rows[plans.unit(plan, arm, seed, 0.1).key] for seed in (0, 1)}
        before, after = found.arm_seconds(plan, arm, mine, found.costs_of(mine, costs))
        assert before == arm.pretrain_steps * {"paper": 1, "frozen": 1, "warp": 5}[arm.variant]
        assert after == arm.detect_steps * {"paper": 1, "frozen": 0.25, "warp": 1}[arm.variant]


def test_a_detector_from_scratch_costs_the_usual_where_all_pretrainings_are_variants(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, SMALL.replace("paper = {}, ", ""))
    units = [plans.unit(plan, arm, 0, 0.1) for arm in plans.arms(plan, "steps")]
    rows = {one.key: row_of(one, 0.1, 5.0 if one.pretrain_steps else 1.0) for one in units}
    (costs,) = found.step_costs(plan, rows).values()
    assert math.isnan(costs[0]) and costs[1] == 1.0


def test_costs_of_two_kinds_of_machine_are_kept_apart(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    rows = {}
    for arm in plans.arms(plan, "steps"):
        for seed, (hardware, seconds) in enumerate([("slow", 4.0), ("fast", 1.0)]):
            one = msgspec.structs.replace(
                row_of(plans.unit(plan, arm, seed, 0.1), 0.1 * arm.detect_steps, seconds), hardware=hardware
            )
            rows[one.key] = one
    costs = found.step_costs(plan, rows)
    assert costs == {("small", "slow"): (4.0, 4.0), ("small", "fast"): (1.0, 1.0)}
    arm = plans.Arm("steps", "small", "paper", 1, 1)
    both = {seed: rows[plans.unit(plan, arm, seed, 0.1).key] for seed in (0, 1)}
    assert found.costs_of({1: both[1]}, costs) == (1.0, 1.0)
    mixed = found.costs_of(both, costs)
    assert all(math.isnan(one) for one in mixed)
    scratch = {
        1: {seed: rows[plans.unit(plan, plans.Arm("steps", "small", "paper", 0, 1), seed, 0.1).key] for seed in both}
    }
    assert found.exchange(scratch, both, "AP50", 1.0, (1.0, 1.0)) is not None
    assert found.exchange(scratch, both, "AP50", mixed[1], found.arm_seconds(plan, arm, both, mixed)) is None
    told = report.tables(plan, rows)
    assert [line.split("|")[3].strip() for line in told.splitlines() if "| rectangles |" in line] == ["fast", "slow"]
    assert "nan" not in told


def test_one_kind_of_object_comes_with_the_images_that_show_it(tmp_path: Path) -> None:
    annotations, _ = draw(tmp_path / "all", 8, 0)
    whole = json.loads(annotations.read_text())
    for category in whole["categories"]:
        part = restricted(annotations, slice(None), category["name"])
        kept = [one for one in whole["annotations"] if one["category_id"] == category["id"]]
        shown = {one["image_id"] for one in kept}
        assert part["categories"] == [category] and part["annotations"] == kept
        assert part["images"] == [image for image in whole["images"] if image["id"] in shown]
        half = restricted(annotations, slice(None, None, 2), category["name"])
        assert half["images"] == part["images"][::2]
        assert half["annotations"] == [
            one for one in kept if one["image_id"] in {image["id"] for image in half["images"]}
        ]


def test_the_report_says_the_difference_and_is_the_same_twice(tmp_path: Path) -> None:
    plan, path, page = plan_of(tmp_path), tmp_path / "results.jsonl", tmp_path / "results.md"
    filled(plan, path, {(0, 1): 0.1, (0, 2): 0.2, (1, 1): 0.15, (1, 2): 0.3})
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    (tmp_path / "images").mkdir()
    rows = found.read_rows(path)
    report.write(plan, rows, page, tmp_path / "images")
    once = page.read_bytes()
    report.write(plan, rows, page, tmp_path / "images")
    assert page.read_bytes() == once
    text = once.decode()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    [line] = [one for one in text.splitlines() if one.startswith("| small | warp | 1 | 2 | 0.2 |")]
    assert "+10.0 [+10.0, +10.0]" in line
    assert "<svg" in (tmp_path / "images" / "pays-steps-small.svg").read_text()


def test_the_committed_page_is_what_its_results_say() -> None:
    plan = plans.read_plan(ROOT / "bench" / "campaign" / "plan.toml")
    rows = found.read_rows(ROOT / "docs" / "results" / "pays.jsonl")
    text = (ROOT / "docs" / "results.md").read_text()
    assert report.page(text, plan, rows) == text


@pytest.mark.skipif(not SOAK, reason="starts nine processes that load torch; make soak runs it")
def test_a_stopped_campaign_goes_on_and_trains_each_unit_once(tmp_path: Path) -> None:
    # A whole unit from annotations to a row: the split, the shards, a pre-training, a detector, its AP.
    data = tmp_path / "data" / "bccd"
    annotations, _ = draw(data, 8, 0)
    annotations.rename(data / "annotations.json")
    text = SMALL.replace("[0.1, 0.2]", "[0.1]").replace("seeds = 2", "seeds = 1").replace("[1, 2]", "[1]")
    plan_of(tmp_path, text[: text.index("variants")])
    command = [sys.executable, str(ROOT / "bench" / "pays.py"), "--plan", str(tmp_path / "plan.toml")]
    command += ["--results", str(tmp_path / "r.jsonl"), "--out", str(tmp_path / "out"), "--data", str(data.parent)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    stopped = subprocess.run([*command, "--budget", "0"], capture_output=True, text=True, env=environment, check=True)
    assert "2 units left" in stopped.stdout
    subprocess.run(command, check=True, capture_output=True, env=environment)
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [(one["pretrain_steps"], one["detect_steps"]) for one in lines] == [(0, 1), (1, 1)]
    assert lines[1]["pretrain_seconds"] > 0
    again = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    assert "0 units left" in again.stdout
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 2
