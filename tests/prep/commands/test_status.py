"""Status needs only OUT: how far a run is, what failed, and when it has finished."""

import os
import time
from pathlib import Path

import pytest

from jigsaw_pretrain.prep import records as run
from jigsaw_pretrain.prep.commands.status import status
from jigsaw_pretrain.prep.records import mark_begun, mark_failed, require_plan
from jigsaw_pretrain.storage.store import Storage
from tests.helpers.prepped import invoke


def test_status_of_a_run_under_way(made: Path) -> None:
    out = Storage(str(made))
    plan = require_plan(out)
    (made / "manifests" / "dataset.json").unlink()
    records = sorted((made / "manifests" / "parts").glob("[0-9]*.json"))
    now = time.time()
    for number, record in enumerate(records):
        os.utime(record, (now - 1000 + 10 * number, now - 1000 + 10 * number))
    for record in records[-3:]:
        record.unlink()
    mark_begun(out, plan.parts - 3)
    mark_begun(out, plan.parts - 2)
    old = made / "manifests" / "parts" / f"{plan.parts - 2:06d}.running"
    os.utime(old, (now - 7200, now - 7200))
    mark_failed(out, plan.parts - 1, OSError(28, "No space left on device"))
    found = run.status(str(made), now)
    assert (found.parts, found.done, found.running, found.lost) == (plan.parts, plan.parts - 3, 1, 1)
    assert found.failed == {plan.parts - 1: "OSError No space left on device"}
    if found.done > 1:
        assert found.parts_per_second == pytest.approx(0.1) and found.seconds_left == pytest.approx(30)
    text = invoke(status, "--out", str(made)).output
    assert "No space left" in text and f"{plan.parts - 3:,} of {plan.parts:,}" in text


def test_status_of_a_finished_one(made: Path) -> None:
    assert "finished" in invoke(status, "--out", str(made)).output
