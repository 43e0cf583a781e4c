"""A stranger's run: whatever its files say, every command that reads it ends in time, with one line at most."""

import json
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from jigsaw_pretrain.train.cli import main
from tests.helpers.attacks import attack, bounded, in_store, listing, undrawn, withstands
from tests.helpers.commands import call
from tests.helpers.jobs import BASE
from tests.helpers.settings import SOAK
from tests.helpers.tiny import make_dataset


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset, a finished run on it with all that runs write, and one that has stopped on its way."""
    folder = tmp_path_factory.mktemp("place")
    make_dataset(folder / "data", {"S": [30], "T": [10], "W": [12]})
    more = (*BASE, "--set", "run.checkpoint_every=1", "--set", "optim.ema=0.9")
    for name, stop in (("finished", 4), ("stopped", 3)):
        with undrawn():
            shown = call(
                *("pretrain", "--data", folder / "data", "--run", folder / name, "--workers", 0, "--log-digest", *more),
                *("--stop-after", stop),
            )
        assert shown.exit_code == 0, shown.output
    return folder


DATA = ("--data", "DATA", "--workers", "0")
# A recipe without its steps is one of the usual 64,000, which is long and no hang.
AT_MOST = ("--stop-after", "4")
QUICK = {
    "export": ("export", "--run", "RUN", "--to", "safetensors", "--out", "OUT/x.safetensors"),
    "export torchvision": ("export", "--run", "RUN", "--to", "torchvision", "--out", "OUT/x.pth"),
    "evaluate": ("evaluate", "--run", "RUN", *DATA, "--jigsaws", "16"),
    "resume": ("pretrain", *DATA, "--run", "RUN", "--resume", "--no-page", "--log", "none", *AT_MOST),
}
COMMANDS = {
    **QUICK,
    "probe": ("probe", "--run", "RUN", "--data", "DATA", "--crops", "16"),
    "erf": ("erf", "--weights", "RUN", "--data", "DATA", "--count", "1", "--out", "OUT/erf.html", *BASE),
    "erf of weights": ("erf", *("--weights", "RUN/backbone.pth"), "--data", "DATA", "--out", "OUT/erf.html", *BASE),
    "report": ("report", "--run", "RUN", "--out", "OUT/report.html"),
    "resume with page": ("pretrain", *DATA, "--run", "RUN", "--resume", "--log-digest", *AT_MOST),
    "init": (
        *("pretrain", *DATA, "--run", "OUT/next", "--stop-after", "1", "--no-page", "--log", "none", *BASE),
        *("--set", "model.init=RUN/backbone.pth"),
    ),
}
AT_URL = (*QUICK, "report")
DRAWN = (*5 * sorted(QUICK), *sorted(COMMANDS))


def arguments(name: str, run: str, place: Path, out: Path) -> list[str]:
    """The words of a command."""
    found = []
    for word in COMMANDS[name]:
        for part, path in (("RUN", run), ("DATA", str(place / "data")), ("OUT", str(out))):
            word = path if word == part else word.replace(f"{part}/", f"{path}/")
        found.append(word)
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_take_what_nobody_harmed(place: Path, tmp_path: Path, name: str) -> None:
    run = Path(shutil.copytree(place / "finished", tmp_path / "run"))
    (tmp_path / "out").mkdir()
    result = call(*arguments(name, str(run), place, tmp_path / "out"))
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("folder", ["checkpoints", "looks"])
def test_nothing_is_written_through_a_linked_folder(place: Path, tmp_path: Path, folder: str) -> None:
    run, elsewhere = Path(shutil.copytree(place / "stopped", tmp_path / "run")), tmp_path / "elsewhere"
    (run / folder).rename(elsewhere)
    (run / folder).symlink_to(elsewhere)
    before = listing(tmp_path, [])
    result = call(*arguments("resume", str(run), place, tmp_path / "out"))
    assert result.exit_code == 2 and str(run / folder) in result.output
    assert listing(tmp_path, []) == before


@pytest.mark.parametrize("name", ["vit_h_14", "timm:eva02_enormous_patch14_clip_224"])
def test_a_network_that_no_checkpoint_can_be_of_is_not_built(place: Path, tmp_path: Path, name: str) -> None:
    run = Path(shutil.copytree(place / "finished", tmp_path / "run"))
    described = json.loads((run / "run.json").read_text())
    described["recipe"]["model"]["backbone"] = name
    (run / "run.json").write_text(json.dumps(described))
    with bounded():
        result = call(*arguments("export", str(run), place, tmp_path / "out"))
    assert result.exit_code == 2 and name in result.output and "MB" in result.output


@pytest.mark.slow(seconds=20)
# An attack is as small as it can be; shrinking would only cost time.
@settings(max_examples=800 if SOAK else 70, phases=(Phase.explicit, Phase.generate))
@given(draw=st.data())
def test_any_attack_on_a_run_costs_a_line(place: Path, draw: st.DataObject) -> None:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch, undrawn() as patch:
        around = Path(scratch)
        run, out, cache = around / "a" / "run", around / "a" / "out", around / "a" / "cache"
        patch.setenv("XDG_CACHE_HOME", str(cache))
        out.mkdir(parents=True)
        (around / "victim").write_text("private")
        shutil.copytree(place / draw.draw(st.sampled_from(["finished", "stopped"])), run)
        done = attack(run, draw)
        name = draw.draw(st.sampled_from(DRAWN), label="command")
        named = str(run)
        if name in AT_URL and draw.draw(st.booleans(), label="at a URL"):
            named = "memory://bucket/run"
            done += in_store(run, named, draw)
        withstands(done, main, arguments(name, named, place, out), around, (run, out, cache))
