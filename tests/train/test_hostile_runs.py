"""A stranger's run: whatever its files say, every command that reads it ends in time, with one line at most."""

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from jigsaw_pretrain.train.cli import main
from tests.helpers.attacks import attack, withstands
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
        shown = call(
            *("pretrain", "--data", folder / "data", "--run", folder / name, "--workers", 0, "--log-digest", *more),
            *("--stop-after", stop),
        )
        assert shown.exit_code == 0, shown.output
    return folder


COMMANDS = {
    "export": ("export", "--run", "RUN", "--to", "safetensors", "--out", "OUT/x.safetensors"),
    "export torchvision": ("export", "--run", "RUN", "--to", "torchvision", "--out", "OUT/x.pth"),
    "evaluate": ("evaluate", "--run", "RUN", "--data", "DATA", "--workers", "0", "--jigsaws", "16"),
    "probe": ("probe", "--run", "RUN", "--data", "DATA", "--crops", "16"),
    "erf": ("erf", "--weights", "RUN", "--data", "DATA", "--count", "1", "--out", "OUT/erf.html", *BASE),
    "report": ("report", "--run", "RUN", "--out", "OUT/report.html"),
    "resume": ("pretrain", "--data", "DATA", "--run", "RUN", "--workers", "0", "--resume"),
}


def arguments(name: str, run: str, place: Path, out: Path) -> list[str]:
    given = {"RUN": run, "DATA": str(place / "data"), "OUT": str(out)}
    return ["/".join(given.get(part, part) for part in word.split("/")) for word in COMMANDS[name]]


def test_commands(place: Path, tmp_path: Path) -> None:
    """Each command works on runs that nobody harmed."""
    import time
    for name in COMMANDS:
        t=time.time(); c=time.process_time()
        (tmp_path / "out").mkdir(exist_ok=True)
        result = call(*arguments(name, str(place / "finished"), place, tmp_path / "out"))
        print(name, time.time()-t, time.process_time()-c, result.exit_code, result.output[-300:])


@pytest.mark.slow(seconds=20)
# An attack is as small as it can be; shrinking would only cost time.
@settings(max_examples=int(__import__('os').environ.get('HUNT', 80)), phases=(Phase.explicit, Phase.generate))
@given(draw=st.data())
def test_any_attack_on_a_run_costs_a_line(place: Path, draw: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        around = Path(scratch)
        run, out = around / "a" / "run", around / "a" / "out"
        out.mkdir(parents=True)
        (around / "victim").write_text("private")
        shutil.copytree(place / draw.draw(st.sampled_from(["finished", "stopped"])), run)
        done = attack(run, draw)
        name = draw.draw(st.sampled_from(sorted(COMMANDS)), label="command")
        withstands(done, main, arguments(name, str(run), place, out), around, (run, out))
