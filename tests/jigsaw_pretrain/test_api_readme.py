"""The README's Python snippet, from a plan to an exported backbone and a detector's AP, without the command line."""

import logging
import random
import re
import signal
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from jigsaw_pretrain.prep.commands.sample_data import sample_data
from tests.helpers.settings import REPOSITORY

TOY = {
    "evaluate(held_out)": "evaluate(held_out, jigsaws=16)",
    "optim.steps=2_000": 'optim.steps=2", "optim.warmup_steps=1", "data.batch=4", "data.lanes=4',
    'detect-sample.toml"': 'detect-sample.toml", ["optim.steps=2", "data.batch=2", "data.short_side=64"]',
    "recipes/": f"{REPOSITORY}/recipes/",
}
"""What makes the snippet small."""


def snippet() -> str:
    """The Python code of the README's section."""
    section = (REPOSITORY / "README.md").read_text().split("## From Python")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, flags=re.S)
    for text, small in TOY.items():
        assert text in code, f"the snippet has no {text} any more"
        code = str(code).replace(text, small)
    return str(code)


def process_state() -> dict[str, Any]:
    """What a library must leave to its caller."""
    root, own = logging.getLogger(), logging.getLogger("jigsaw_pretrain")
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": str(np.random.get_state()),  # noqa: NPY002
        "random": random.getstate(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads(), cv2.getNumThreads()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "backends": (torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32),
        "grad": torch.is_grad_enabled(),
        "logging": [(one.level, list(one.handlers), one.propagate, one.disabled) for one in (root, own)],
        "signals": [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)],
    }


@pytest.mark.slow(seconds=25)
def test_the_readmes_snippet_runs_and_leaves_the_process_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seed in (("instances", 0), ("val", 1)):
        sample_data.main(["--out", str(tmp_path / name), "--images", "8", "--seed", str(seed)], standalone_mode=False)
        (tmp_path / name / "annotations.json").rename(tmp_path / f"{name}.json")
    (tmp_path / "instances" / "images").rename(tmp_path / "images")
    (tmp_path / "val" / "images").rename(tmp_path / "val-images")
    monkeypatch.chdir(tmp_path)
    code = snippet().replace('"val/"', '"val-images/"')
    before = process_state()
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert process_state() == before
    assert len(names["plan"].crops) == sum(shard.crops for shard in names["dataset"].shards)
    weights = torch.load(tmp_path / "backbone.pth", weights_only=True)
    own = names["backbone"].state_dict()
    assert weights.keys() == own.keys() and all(torch.equal(weights[key], own[key]) for key in own)
