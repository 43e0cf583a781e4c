"""A rank killed again and again under torchrun: the run ends as if nothing had happened."""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from jigsaw_pretrain.train.cli import main
from jigsaw_pretrain.train.engine.checkpoint import list_checkpoints, read_checkpoint
from tests.helpers.jobs import SMALL, same, untimed
from tests.helpers.settings import REPOSITORY, SOAK
from tests.helpers.tiny import make_dataset

STEPS = 40 if SOAK else 12
KILLS = [(nth % 2, random.Random(nth).randrange(2 * nth, STEPS - 1)) for nth in range(20)] if SOAK else []
KILLS = sorted(KILLS, key=lambda kill: kill[1]) or [(1, 1), (0, 7)]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("killed")
    make_dataset(folder / "data", {"S": [30, 12], "T": [10], "W": [12]})
    settings = [*SMALL, f"optim.steps={STEPS}", "data.batch=8", "run.checkpoint_every=3", "run.log_every=2"]
    options = [part for setting in settings for part in ("--set", setting)]
    return ["--data", str(folder / "data"), "--log-digest", "--no-page", "--device", "cpu", *options]


@pytest.fixture(scope="module")
def played(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    kills = ",".join(f"{rank}:{step}" for rank, step in KILLS)
    launch = [sys.executable, "-m"]
    if SOAK:
        launch += ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        launch += ["--max-restarts", str(len(KILLS)), "-m", "tests.helpers.killed_ranks", "--"]
    else:
        # The same agent, but its ranks are forked: see there.
        launch += ["tests.helpers.killed_ranks"]
    done = subprocess.run(
        [*launch, str(folder), kills, *command, "--workers", "1"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        cwd=REPOSITORY, capture_output=True, text=True, timeout=3000, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (folder / "errors.txt").write_text(done.stderr)
    return folder


def moment(note: Path) -> float:
    """Seconds at which a rank noted something (killed_ranks.py)."""
    return float(note.read_text())


def newest(folder: Path) -> dict[str, object]:
    return read_checkpoint(list_checkpoints(folder / "checkpoints")[-1][1])


@pytest.mark.slow(seconds=55)
def test_the_killed_run_ends_as_the_whole_one(played: Path) -> None:
    assert same(newest(played / "whole"), newest(played / "killed"))
    assert untimed(played / "whole") == untimed(played / "killed")
    assert (played / "whole" / "digest.txt").read_text() == (played / "killed" / "digest.txt").read_text()
    log = (played / "errors.txt").read_text()
    assert log.count("a rank is gone") >= len(KILLS) - 1
    # The other rank ends by itself or by torchrun's word as soon as one is dead: all begin anew within a minute.
    for start in range(len(KILLS)):
        assert moment(played / f"began-{start + 1}") - moment(played / f"killed-{start}") < 60


@pytest.mark.slow(seconds=5)
def test_one_rank_goes_on_with_the_same_batches(played: Path, command: list[str]) -> None:
    run = played / "alone"
    shutil.copytree(played / "whole", run)
    for step, path in list_checkpoints(run / "checkpoints"):
        if step > 6:
            path.unlink()
    result = CliRunner().invoke(main, ["pretrain", *command, "--run", str(run), "--resume", "--workers", "0"])
    assert result.exit_code == 0, result.output
    assert "steps 6 to" in result.output
    assert (played / "whole" / "digest.txt").read_text() == (run / "digest.txt").read_text()
