"""Runs a campaign's units one after the other within a budget, each once, whoever else runs the same campaign.

A unit is a command of the product (`train pretrain`, `detect train`, `train probe`) in a process of its own, which
continues where it was stopped. Two calls at once, one per core, share the work: each locks the unit that it runs.
"""

import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

from bench.campaign import peer
from bench.campaign.data import Prepared, prepare
from bench.campaign.plan import OtherCropsPretraining, PeerPretraining, Plan, Pretraining, Unit, arms, swept, unit
from bench.campaign.results import Row, append, best_rate, read_rows, reported
from bench.sample import ROOT, checked_out
from jigsaw_pretrain.detect.comparison.results import pretrain_seconds
from jigsaw_pretrain.detect.comparison.runner import OutOfTime, Task, TaskRunner
from jigsaw_pretrain.detect.models.weights import BACKBONE_FILE
from jigsaw_pretrain.detect.run import SUMMARY, read_summary
from jigsaw_pretrain.errors import UserError

PROBE = "probe.json"


@dataclass
class Campaign:
    """A plan, the folder of its runs, and the file of its results.

    given: the folder of datasets, None for the usual places. runner: what keeps to the budget. python: of the
    environment in which the peer is installed; without one its units are left.
    """

    plan: Plan
    folder: Path
    results: Path
    runner: TaskRunner
    given: Path | None = None
    python: Path | None = None
    failed: dict[str, str] = field(default_factory=dict)
    """Units that failed in this call, with what they said: others go on, and the next call tries them again."""

    _prepared: dict[str, Prepared] = field(default_factory=dict)

    def run(self, questions: Sequence[str]) -> bool:
        """Run what is left of some questions; False where the budget ended first.

        Units that another call is running are waited for where nothing else is left.
        """
        try:
            while todo := list(self.todo(questions)):
                # One unit, then look again: a finished sweep decides what comes next.
                if not any(self._finished(one) for one in todo):
                    self.runner.check()
                    time.sleep(2)
        except OutOfTime:
            return False
        return True

    def todo(self, questions: Sequence[str]) -> Iterator[Unit]:
        """The units that can be run now, in their order: per question its sweeps, then seed after seed."""
        finished, can_be_run = read_rows(self.results), self._can_be_run
        rows = finished.keys() | self.failed.keys()
        for name in questions:
            question, chosen = self.plan.questions[name], list(arms(self.plan, name))
            sweeps = (one for arm in chosen for units in swept(self.plan, arm).values() for one in units)
            yield from (one for one in sweeps if one.key not in rows and can_be_run(one))
            for seed in range(question.seeds):
                for arm in chosen:
                    rate = best_rate(self.plan, arm, finished)
                    one = None if rate is None else unit(self.plan, arm, seed, rate)
                    if one is not None and one.key not in rows and can_be_run(one):
                        yield one

    def _can_be_run(self, one: Unit) -> bool:
        return self.python is not None or not isinstance(one.pretraining, PeerPretraining)

    def left(self, name: str) -> int:
        """How many units of a question are not finished, its sweeps included."""
        rows, question = read_rows(self.results), self.plan.questions[name]
        chosen = list(arms(self.plan, name))
        found = 0
        for arm in chosen:
            sweep = [one for units in swept(self.plan, arm).values() for one in units]
            found += sum(one.key not in rows for one in sweep)
            found += question.seeds - len(reported(self.plan, arm, rows))
        return found

    def needs_peer(self, name: str) -> bool:
        """Whether a question has arms of a peer, and no environment of it was named."""
        return self.python is None and any(one.peer for one in self.plan.questions[name].variants.values())

    def _finished(self, one: Unit) -> bool:
        """Run a unit and note its row; False where another call has it, or the pre-training that it needs."""
        with _locked(self.folder / "locks" / one.key) as mine:
            if not mine:
                return False
            # Another call may have finished it since the list was made.
            if one.key in read_rows(self.results):
                return True
            start, before = "scratch", 0.0
            if one.pretraining is not None:
                if (found := self._started(one.pretraining)) is None:
                    return False
                start, before = str(found[0]), found[1]
            task = self._detector(one, start) if one.detect_steps else self._probe(one, start)
            try:
                self.runner.run(task)
            except UserError as error:
                # A rate at which an arm diverges is its own and not the campaign's end.
                self.failed[one.key] = str(error)
                return True
            append(self.results, self._row(one, task, before))
            return True

    def _started(self, one: Pretraining) -> tuple[Path, float] | None:
        """What a detector starts from, and the seconds it took; None where another call is making it."""
        ours = one.ours if isinstance(one, PeerPretraining) else one
        with _locked(self.folder / "locks" / ours.key) as free:
            if not free:
                return None
            folder = self._pretrained(ours)
        seconds = pretrain_seconds(folder)
        if not isinstance(one, PeerPretraining):
            return folder, seconds
        with _locked(self.folder / "locks" / one.key) as free:
            return self._by_peer(one, seconds) if free else None

    def _data(self, name: str) -> Prepared:
        if name not in self._prepared:
            with FileLock(self.folder / "locks" / "data"):
                self._prepared[name] = prepare(name, self.folder / "data", self.given)
                self._prepared[name].shards_by()
        return self._prepared[name]

    def _shards(self, one: Pretraining) -> Path:
        data = self._data(one.data)
        if not isinstance(one, OtherCropsPretraining):
            return data.shards_by()
        with FileLock(self.folder / "locks" / "data"):
            return data.shards_by(one.prep)

    def _pretrained(self, one: Pretraining) -> Path:
        folder = self.folder / "pretrain" / one.key
        arguments = [
            "pretrain",
            "--data",
            str(self._shards(one)),
            "--run",
            str(folder),
            "--resume",
            "--no-page",
        ]
        settings = (f"model.backbone={self.plan.backbone}", *one.settings, f"optim.steps={one.steps}")
        for item in (*settings, f"data.seed={one.seed}"):
            arguments += ["--set", item]
        arguments += ["--workers", "0", "--device", "cpu"]
        self.runner.run(Task(f"pre-train {one.key}", "jigsaw_pretrain.train", tuple(arguments), folder, BACKBONE_FILE))
        return folder

    def _by_peer(self, one: PeerPretraining, seconds: float) -> tuple[Path, float]:
        assert self.python is not None
        folder, train = self.folder / "pretrain" / one.key, self._data(one.data).train
        if not (folder / peer.SUMMARY).exists():
            command = [str(self.python), str(Path(peer.__file__)), "--method", one.method, "--seconds", str(seconds)]
            command += ["--annotations", str(train.annotations), "--images", str(train.images)]
            command += ["--seed", str(one.seed), "--out", str(folder)]
            with folder.with_suffix(".log").open("w") as log:
                if subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode:
                    raise UserError(f"the peer failed: see {log.name}")
        return folder / peer.WEIGHTS, float(json.loads((folder / peer.SUMMARY).read_text())["seconds"])

    def _detector(self, one: Unit, start: str) -> Task:
        data, folder = self._data(one.data), self.folder / "detect" / one.key
        arguments = ["train", "--run", str(folder), "--init", start, "--resume"]
        arguments += ["--annotations", str(data.train.annotations), "--images", str(data.train.images)]
        arguments += ["--val-annotations", str(data.val.annotations), "--val-images", str(data.val.images)]
        settings = (f"model.backbone={self.plan.backbone}", *one.settings, f"optim.steps={one.detect_steps}")
        for item in (*settings, f"optim.lr={one.lr!r}", f"data.seed={one.seed}"):
            arguments += ["--set", item]
        arguments += ["--workers", "0", "--device", "cpu"]
        return Task(f"detect {one.key}", "jigsaw_pretrain.detect", tuple(arguments), folder, SUMMARY)

    def _probe(self, one: Unit, start: str) -> Task:
        folder = self.folder / "probe" / one.key
        options = ["--data", str(self._data(one.data).val_shards), "--json", str(folder / PROBE), "--device", "cpu"]
        options += one.settings
        if isinstance(one.pretraining, PeerPretraining):
            # A probe is of a run's backbone, and of other weights of it beside.
            options += ["--run", str(self.folder / "pretrain" / one.pretraining.ours.key), "--weights", start]
        else:
            options += ["--run", start]
        return Task(
            f"probe {one.key}",
            "jigsaw_pretrain.train",
            ("probe", *options, "--backbone", self.plan.backbone),
            folder,
            PROBE,
        )

    def _row(self, one: Unit, task: Task, before: float) -> Row:
        if one.detect_steps:
            summary = read_summary(task.folder)
            scores, seconds = dict(summary.AP or {}), summary.device_seconds
        else:
            scores, seconds = _probe_scores(task.folder / PROBE), 0.0
        return Row(
            key=one.key,
            scores=scores,
            # A peer's steps are not ours.
            pretrain_steps=0 if isinstance(one.pretraining, PeerPretraining) else one.pretrain_steps,
            detect_steps=one.detect_steps,
            pretrain_seconds=round(before, 3),
            detect_seconds=round(seconds, 3),
            regime=one.regime,
            commit=_commit(),
            command="python bench/pays.py --budget SECONDS",
            date=time.strftime("%Y-%m-%d"),
            hardware=hardware(),
        )


def _probe_scores(path: Path) -> dict[str, float]:
    """The shares that a probe named right: of the run, or of the peer's weights, and of the same backbone at random."""
    found = json.loads(path.read_text())
    [judged] = found["weights"].values() or [found["run"]]
    shares = {"class_mean": judged["class_mean"], "top1": judged["top1"]}
    return {**shares, **{f"random_{key}": found["random"][key] for key in ("class_mean", "top1")}}


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Whether the lock of that name was free; it is held inside."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _commit() -> str:
    """The commit that is checked out, with a + where tracked files but the results and their page were changed."""
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", ".", ":!docs"], cwd=ROOT, check=False).returncode
    return (checked_out() or "no commit") + ("+" if changed else "")


def hardware() -> str:
    """The processor in words, one thread a training."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, one thread a training"
