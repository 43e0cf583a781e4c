"""A stranger's detector run: whatever its files say, every command ends in time, with one line at most."""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from jigsaw_pretrain.detect.cli import main
from tests.helpers.attacks import attack, bounded, in_store, undrawn, withstands
from tests.helpers.commands import run_command
from tests.helpers.detection import SETTINGS, TINY, set_options
from tests.helpers.settings import SOAK

MORE = {"name": "faster-rcnn-fpn", "norm": "gn", "val_every": 1, "checkpoint_every": 1, "steps": 2}


@pytest.fixture(scope="module")
def runs(detect: Callable[..., Result], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with all that runs write, and one that has stopped on its way."""
    folder = tmp_path_factory.mktemp("runs")
    with undrawn():
        detect(folder / "finished", **MORE)
        detect(folder / "stopped", "--stop-after", "1", **MORE)
    return folder


def commands(run: str, data: Path, out: Path) -> dict[str, list[str]]:
    """Every command that reads a run."""
    train, val = (
        ["--" + kind + "annotations", str(folder / "annotations.json"), "--" + kind + "images", str(folder / "images")]
        for kind, folder in (("", data / "train"), ("val-", data / "val"))
    )
    resume = ["train", *train, *val, "--workers", "0", "--device", "cpu", "--backbone", TINY]
    resume += set_options(**{**SETTINGS, **MORE})
    return {
        "eval": ["eval", "--run", run, "--workers", "0", "--device", "cpu", "--out", str(out)],
        "compare": ["compare", run],
        "compare into": ["compare", run, "--out", str(out)],
        "resume": [*resume, "--run", run, "--resume"],
        "init": [*resume, "--run", str(out / "next"), "--init", run, "--stop-after", "1"],
    }


NAMES = sorted(commands("", Path(), Path()))
AT_URL = ("eval", "resume")


@pytest.mark.parametrize("name", NAMES)
def test_commands_take_what_nobody_harmed(runs: Path, tiny_data: Path, tmp_path: Path, name: str) -> None:
    run = Path(shutil.copytree(runs / "finished", tmp_path / "run"))
    result = run_command(main, *commands(str(run), tiny_data, tmp_path)[name])
    assert result.exit_code == 0, result.output


def test_a_network_that_no_weights_can_be_of_is_not_built(runs: Path, tiny_data: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs / "finished", tmp_path / "run"))
    config = json.loads((run / "config.json").read_text())
    config["recipe"]["model"]["backbone"] = "regnet_y_128gf"
    (run / "config.json").write_text(json.dumps(config))
    with bounded():
        result = run_command(main, *commands(str(run), tiny_data, tmp_path)["eval"])
    assert result.exit_code == 2 and "regnet_y_128gf" in result.output and "MB" in result.output


@pytest.mark.slow(seconds=10)
# An attack is as small as it can be; shrinking would only cost time.
@settings(max_examples=200 if SOAK else 20, phases=(Phase.explicit, Phase.generate))
@given(draw=st.data())
def test_any_attack_on_a_detectors_run_costs_a_line(runs: Path, tiny_data: Path, draw: st.DataObject) -> None:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch, undrawn() as patch:
        around = Path(scratch)
        run, out, cache = (around / "a" / name for name in ("run", "out", "cache"))
        patch.setenv("XDG_CACHE_HOME", str(cache))
        out.mkdir(parents=True)
        (around / "victim").write_text("private")
        name = draw.draw(st.sampled_from(NAMES), label="command")
        kept = "stopped" if name == "resume" and draw.draw(st.booleans()) else "finished"
        shutil.copytree(runs / kept, run)
        done, named = attack(run, draw), str(run)
        if name in AT_URL and draw.draw(st.booleans(), label="at a URL"):
            named = "memory://bucket/run"
            done += in_store(run, named, draw)
        withstands(done, main, commands(named, tiny_data, out)[name], around, (run, out, cache))
