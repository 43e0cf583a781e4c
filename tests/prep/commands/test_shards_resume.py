"""Killed at any moment, the same command goes on and ends in the tree of an undisturbed run."""

import contextlib
import multiprocessing
import os
import shutil
import signal
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from jigsaw_pretrain.prep import pipeline
from jigsaw_pretrain.prep.commands.shards import shards
from jigsaw_pretrain.prep.parts import PartTask, run_part
from jigsaw_pretrain.prep.records import PartRecord
from jigsaw_pretrain.storage.files import temporary_beside
from tests.helpers.prepped import Drawn, Run, Small, run_shards, tree
from tests.helpers.settings import SOAK

KILLS = 50 if SOAK else 5
STATES = ("before the first tar", "between its tars", "before its rows", "before its record", "during finish")

# A server that has imported everything forks each run: starting Python costs more than the runs.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["jigsaw_pretrain.prep.commands.shards", "jigsaw_pretrain.prep.manifests"])


def command(arguments: list[str], log: str) -> None:
    os.setsid()
    with open(log, "w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        shards.main(arguments, standalone_mode=True)


def start(arguments: list[str], log: Path) -> Any:
    process = FORKS.Process(target=command, args=(arguments, str(log)))
    process.start()
    return process


def names_in(folder: Path) -> set[str]:
    with contextlib.suppress(FileNotFoundError):
        return set(os.listdir(folder))
    return set()


class Watch:
    """Sees in which state an output is, by its files alone."""

    def __init__(self, out: Path, reference: Any) -> None:
        self.out = out
        self.tars: dict[str, int] = Counter(
            name.split("/")[1][2:-4] for name in reference if name.startswith("shards/")
        )

    def states(self) -> dict[str, set[str]]:
        """The parts (or "all") that are in each of STATES."""
        shards, parts = names_in(self.out / "shards"), names_in(self.out / "manifests" / "parts")
        found: dict[str, set[str]] = defaultdict(set)
        have = Counter(name[2:-4] for name in shards if name.endswith(".tar") and not name.startswith("."))
        done = {part for part in self.tars if f"{part}.json" in parts}
        for part, wanted in self.tars.items():
            if part in done or f"{part}.running" not in parts:
                continue
            if f"{part}.parquet" in parts:
                found[STATES[3]].add(part)
            elif have[part] == wanted:
                found[STATES[2]].add(part)
            elif have[part]:
                found[STATES[1]].add(part)
            else:
                found[STATES[0]].add(part)
        if len(done) == len(self.tars) and not (self.out / "manifests" / "dataset.json").exists():
            found[STATES[4]].add("all")
        return found


def kill_in(state: str, small: Small, out: Path, after: int, workers: int) -> bool:
    """Run until ``state`` is seen with ``after`` parts done at least, and kill; whether it was still so afterwards."""
    watch = Watch(out, small.tree)
    process = start(small.arguments(out, "--workers", str(workers)), out.with_suffix(".log"))
    try:
        while process.is_alive():
            done = sum(name.endswith(".json") for name in names_in(out / "manifests" / "parts"))
            if (state == STATES[4] or done >= after) and watch.states()[state]:
                os.killpg(process.pid, signal.SIGKILL)
                break
            time.sleep(0.0005)
    finally:
        process.join(60)
    assert process.exitcode is not None
    # Worker processes die with the group; until the last has gone, files may still change.
    time.sleep(0.02)
    return process.exitcode == -signal.SIGKILL and bool(watch.states()[state])


@pytest.mark.slow(seconds=40)
@pytest.mark.parametrize("state", STATES)
def test_killed_in_every_state(small: Small, tmp_path: Path, state: str) -> None:
    kills = tries = 0
    while kills < KILLS:
        tries += 1
        assert tries < 20 * KILLS, f"only {kills} kills hit {state!r}"
        out = tmp_path / f"out{tries}"
        parts = sum(name.endswith(".json") for name in small.tree if "/parts/" in name)
        if kill_in(state, small, out, after=tries % max(1, parts - 1), workers=2 if SOAK and tries % 5 == 0 else 1):
            kills += 1
            result = small.run(out)
            assert result.exit_code == 0, result.output
            assert tree(out) == small.tree
        shutil.rmtree(out, ignore_errors=True)


@pytest.mark.slow(seconds=5)
def test_killed_again_and_again_on_one_output(small: Small, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for turn in range(KILLS):
        process = start(small.arguments(out, "--workers", "1"), tmp_path / "log")
        time.sleep(0.05 + 0.1 * turn % 0.4)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
    assert small.run(out).exit_code == 0
    assert tree(out) == small.tree


@pytest.mark.slow(seconds=3)
def test_two_runs_at_once_do_no_harm(small: Small, tmp_path: Path) -> None:
    out = tmp_path / "out"
    runs = [start(small.arguments(out, "--workers", "1"), tmp_path / f"{number}.log") for number in range(2)]
    for process in runs:
        process.join(120)
    assert [process.exitcode for process in runs] == [0, 0], (tmp_path / "0.log").read_text()
    assert tree(out) == small.tree


def test_a_signal_is_answered_with_the_parts_that_are_kept(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def cut(task: PartTask, **told: Any) -> PartRecord:
        if task.number == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return run_part(task, **told)

    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "run_part", cut)
        stopped = small.run(out)
    parts = len([name for name in small.tree if name.startswith("manifests/parts/") and name.endswith(".json")])
    assert stopped.exit_code == 3 and f"1 of {parts} parts are kept" in stopped.output
    assert not list((out / "manifests" / "parts").glob("*.running"))
    assert small.run(out).exit_code == 0 and tree(out) == small.tree


def test_litter_goes_and_files_being_written_stay(small: Small, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert small.run(out).exit_code == 0
    left = temporary_beside(out / "shards" / "S-000000.tar")
    left.write_bytes(b"half")
    mine = out / "shards" / ".notes.tmp"
    mine.write_bytes(b"the user's own")
    (out / "manifests" / "parts" / "000000.running").write_bytes(b"{}\n")
    assert "nothing to do" in small.run(out).output
    mine.unlink()
    assert tree(out) == small.tree


@pytest.mark.parametrize("finished", [True, False])
def test_overwrite_starts_anew(drawn: Drawn, prepped: Run, finished: bool) -> None:
    for number in range(6):
        drawn.add(f"{number}.jpg", (300, 200), [(10 * number, 10, 50, 40), (100, 50, 90, 30)])
    prepped("--crops-per-part", "3")
    out = drawn.folder / "out"
    if not finished:
        (out / "manifests" / "dataset.json").unlink()
        (out / "manifests" / "parts" / "000001.json").unlink()
    (out / "shards" / "README.md").write_text("kept")
    assert "--overwrite" in run_shards(drawn.write(), drawn.folder / "images", out, "--seed", "4").output
    prepped("--seed", "4", "--overwrite")
    prepped("--seed", "4", out="fresh")
    assert tree(out) == {**tree(drawn.folder / "fresh"), "shards/README.md": b"kept"}


def test_a_record_of_other_versions_is_refused_by_name(small: Small, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert small.run(out).exit_code == 0
    (out / "manifests" / "dataset.json").unlink()
    record = out / "manifests" / "parts" / "000000.json"
    record.write_text(record.read_text().replace('"pillow": "', '"pillow": "1.'))
    result = small.run(out)
    assert result.exit_code == 2 and "versions.pillow was 1." in result.output and "Traceback" not in result.output
    plan = out / "manifests" / "plan.json"
    plan.write_text(plan.read_text().replace('"numpy": "', '"numpy": "1.'))
    result = small.run(out)
    assert result.exit_code == 2 and "versions.numpy was 1." in result.output
