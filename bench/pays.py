"""Does the pre-training pay at the size that two cores can reach? One campaign of small trainings, spread over days.

    python bench/pays.py --budget 3600          # continue, for so many seconds; call it twice for two cores
    python bench/pays.py --report               # write docs/results.md's tables and curves from the results
    python bench/pays.py --list                 # what is left

The plan is bench/campaign/plan.toml: regimes (small images; large ones with many small objects), questions, arms,
seeds. Every finished training is a line of docs/results/pays.jsonl with its commit, date and hardware, and is never run
again; one that was stopped continues from its checkpoint where its folder (bench/results/pays) is still there. Answers
at the size of a GPU: bench/quality.py.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# Trainings are measured in computing time, which threads would blur.
os.environ["OMP_NUM_THREADS"] = "1"

from bench.campaign.plan import read_plan
from bench.campaign.report import write
from bench.campaign.results import read_rows
from bench.campaign.runs import Campaign
from bench.sample import ROOT
from bench.timing import RESULTS
from jigsaw_pretrain.detect.comparison.runner import TaskRunner
from jigsaw_pretrain.errors import Interrupted, UserError


def main(arguments: list[str] | None = None) -> None:
    """Run, list or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, help="seconds after which to stop; no limit by default")
    parser.add_argument("--questions", help="names, separated by commas; all of the plan by default")
    parser.add_argument("--report", action="store_true", help="write the tables and curves, run nothing")
    parser.add_argument("--list", action="store_true", help="tell what is left, run nothing")
    parser.add_argument("--plan", type=Path, default=ROOT / "bench" / "campaign" / "plan.toml")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results" / "pays.jsonl")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results.md")
    parser.add_argument("--out", type=Path, default=RESULTS / "pays", help="folder of the trainings")
    parser.add_argument("--data", type=Path, help="folder of the datasets")
    parser.add_argument(
        "--peer", type=Path, help="python of an environment with LightlyTrain: for the arms that ask it"
    )
    options = parser.parse_args(arguments)
    try:
        _run(options)
    except UserError as error:
        sys.exit(f"Error: {error}")
    except Interrupted as stopped:
        print(stopped)
        sys.exit(3)


def _run(options: argparse.Namespace) -> None:
    plan, results = read_plan(options.plan), options.results.resolve()
    names = options.questions.split(",") if options.questions else list(plan.questions)
    if unknown := set(names) - set(plan.questions):
        raise UserError(f"--questions: there is no {sorted(unknown)[0]!r}; the plan asks {', '.join(plan.questions)}")
    if options.report:
        write(plan, read_rows(results), options.page.resolve(), options.page.resolve().parent / "images")
        return
    out = options.out.resolve()
    campaign = Campaign(plan, out, results, TaskRunner(options.budget, 1), options.data, options.peer)
    if not options.list:
        # Trainings are started as `python -m`, and the network lies in this repository.
        os.chdir(ROOT)
        print("finished" if campaign.run(names) else "stopped before the end: the same command continues")
    for name in names:
        peers = " (some of them need --peer)" if campaign.needs_peer(name) else ""
        print(f"{name}: {campaign.left(name)} units left{peers}")
    if campaign.failed:
        raise UserError("; ".join([f"{len(campaign.failed)} units failed", *campaign.failed.values()]))


if __name__ == "__main__":
    main()
