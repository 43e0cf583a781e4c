"""The script for the first GPU works: its cheap phases here, all of them at toy size in `make soak`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import BUDGET, PHASES, PREPARATION, Place, found_by, run_here, show
from tests.helpers.settings import REPOSITORY, SOAK
from tests.helpers.tiny import make_dataset


def test_phases_pass_say_why_they_are_left_out_or_fail_with_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_dataset(tmp_path / "out", {"S": [30], "T": [10], "W": [12]})
    place = Place("cpu", tmp_path, str(tmp_path / "out"), tmp_path / "drawn", True)
    found = {name: run_here(name, place) for name in ("card", "copies", "waits", "ring")}
    assert all(one["passed"] for one in found.values()) and "left out" in found["waits"]["figures"]
    monkeypatch.setattr("bench.gpu.digest_of", lambda images: str(id(images)))
    wrong = run_here("ring", place)
    assert not wrong["passed"] and "other pixels" in wrong["figures"]["failed"]
    speed = {"passed": True, "seconds": 1.0, "figures": {"real / synthetic, 2 workers": 0.5}}
    show({"where": "x", "commit": "y", "date": "z", "toy": True, "phases": {**found, "speed": speed}})
    printed = capsys.readouterr().out
    assert "missed" in printed and "no measurement" in printed and json.dumps(found)


def test_all_limits_are_within_the_budget() -> None:
    assert sum(limit for limit, _ in PHASES.values()) + PREPARATION <= BUDGET


def test_a_phase_that_hangs_or_dies_costs_itself_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, beyond = Place("cpu", tmp_path, "", tmp_path, True), tmp_path / "beyond"

    def hang(_: Place) -> dict[str, Any]:
        started = subprocess.Popen(["sleep", "600"])
        beyond.write_text(str(started.pid))
        started.wait()
        return {}

    monkeypatch.setitem(PHASES, "card", (1, hang))
    monkeypatch.setitem(PHASES, "copies", (1, lambda _: os._exit(1)))
    hung, died = found_by("card", place, 1.0), found_by("copies", place, 30.0)
    assert not hung["passed"] and "not done after 1 s" in hung["figures"]["failed"]
    assert not died["passed"] and "died" in died["figures"]["failed"]
    # What it had started is ended too.
    stat = Path(f"/proc/{beyond.read_text()}/stat")
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.skipif(not SOAK, reason="five minutes; make soak runs it")
def test_the_whole_script_passes_at_toy_size() -> None:
    done = subprocess.run(
        [sys.executable, "bench/gpu.py", "--toy", "--again"], cwd=REPOSITORY, timeout=900, check=False
    )
    assert done.returncode == 0
    found = json.loads((REPOSITORY / "bench" / "results" / "gpu-toy.json").read_text())
    assert found["phases"].keys() == PHASES.keys()
