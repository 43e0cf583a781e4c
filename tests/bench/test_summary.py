"""Goals found in the results of all measurements."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench import summary
from bench.timing import Goal, judged, show


def test_all_goals_of_all_results_are_in_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    least = judged("of the same speed", 0.951, Goal(0.95, at_least=True))
    rows = show("t", {"floor": [1.0, 1.0], "ours": [1.5, 2.1]}, "floor", 1, "image", {"ours": Goal(1.7)})
    (tmp_path / "a.json").write_text(json.dumps({"inner": {"goals": [least]}, "other": {"goal": None, "ratio": 2}}))
    (tmp_path / "b.json").write_text(json.dumps(rows))
    assert "of the same speed: 0.951 (goal >= 0.95 met)" in capsys.readouterr().out
    found = [row for name in "ab" for row in summary.goals_in(json.loads((tmp_path / f"{name}.json").read_text()))]
    assert found == [
        ("of the same speed", 0.951, ">= 0.95", True, ""),
        ("ours", pytest.approx(1.8), "<= 1.7", False, ""),
    ]
    said = CliRunner().invoke(summary.main, ["--results", str(tmp_path)])
    assert said.exit_code == 0 and "1 of 2 goals met" in said.output
