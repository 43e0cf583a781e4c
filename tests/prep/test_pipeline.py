"""Prep from Python: the same bytes as by command, and nothing of the process is changed."""

import logging
import random
from pathlib import Path

import numpy as np
import pytest

import jigsaw_pretrain as jp
from tests.helpers.prepped import Small, tree


def state() -> tuple[object, ...]:
    """What a library must leave alone."""
    legacy = np.random.get_state(legacy=False)  # noqa: NPY002
    return random.getstate(), str(legacy), logging.getLogger("jigsaw_pretrain").handlers[:], logging.root.handlers[:]


def test_from_plan_to_dataset(small: Small, tmp_path: Path) -> None:
    before = state()
    given, out = (str(small.annotations), str(small.images)), str(tmp_path / "out")
    planned = jp.plan(*given, crops_per_part=small.crops_per_part)
    with pytest.raises(jp.UserError):
        jp.open_dataset(out)
    made = jp.shards(*given, out, workers=1, crops_per_part=small.crops_per_part)
    assert tree(tmp_path / "out") == small.tree
    assert made == jp.shards(*given, out, workers=1, crops_per_part=small.crops_per_part) == jp.open_dataset(out)
    assert made.description.totals["crops"] == planned.summary().crops == len(planned.crops)
    assert made.description.totals["shards"] == planned.summary().shards == len(made.shards)
    assert jp.verify(out, workers=1) == [] and jp.status(out).finished
    assert state() == before
