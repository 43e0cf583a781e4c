"""Two gloo ranks under torchrun: the slow part of a launch is the start, so one launch plays many scenes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from jigsaw_pretrain.train.cli import main
from jigsaw_pretrain.train.engine.checkpoint import list_checkpoints, read_checkpoint
from jigsaw_pretrain.train.engine.pretraining import execute
from tests.helpers.jobs import SMALL, plain_for_vgg11, rows, same, small_job, synthetic, untimed
from tests.helpers.settings import REPOSITORY, SOAK, sets
from tests.helpers.tiny import make_dataset
from tests.helpers.two_ranks import BN_FREE

pytestmark = pytest.mark.slow(seconds=65)

LAUNCH = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    make_dataset(folder / "data", {"S": [30], "T": [10], "W": [12]})
    settings = [part for setting in (*SMALL, "optim.steps=3", "data.batch=8") for part in ("--set", setting)]
    command = [sys.executable, "-m", "tests.helpers.two_ranks", str(folder), "--log-digest", "--workers", "1"]
    command += ["--data", str(folder / "data"), "--run", str(folder / "run"), *settings]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (folder / "out.txt").write_text(done.stderr)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    job = small_job(folder, *BN_FREE)
    with plain_for_vgg11():
        execute(job, synthetic(job))
    return folder


def newest(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return read_checkpoint(list_checkpoints(folder / "checkpoints")[-1][1])


def test_two_ranks_follow_the_curve_of_one(played: Path, alone: Path) -> None:
    one, two = rows(alone), rows(played / "two")
    assert [row["step"] for row in two] == list(range(8))
    for left, right in zip(one, two, strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-4)
        assert left["lr"] == right["lr"]
    assert one[0]["accuracy"] == two[0]["accuracy"]
    single, double = newest(alone), newest(played / "two")
    torch.testing.assert_close(single["erf"]["masses"], double["erf"]["masses"], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(single["erf"]["weights"], double["erf"]["weights"], rtol=1e-3, atol=1e-5)
    for name, value in single["model"].items():
        torch.testing.assert_close(value, double["model"][name], rtol=1e-3, atol=1e-4)


def test_a_signal_to_one_rank_stops_both_at_the_same_step(played: Path) -> None:
    told = [(played / f"interrupted-{rank}.txt").read_text() for rank in (0, 1)]
    assert told[0] == told[1] and "SIGTERM after step 5 of 8" in told[0]
    assert "broadcast_buffers" not in (played / "out.txt").read_text()
    assert same(newest(played / "two"), newest(played / "cut"))
    assert untimed(played / "two") == untimed(played / "cut")


def test_an_error_on_one_rank_ends_both_after_a_checkpoint(played: Path) -> None:
    assert (played / "failed-1.txt").read_text() == "RuntimeError: broken at step 3"
    assert "rank 1 failed: RuntimeError: broken at step 3" in (played / "failed-0.txt").read_text()
    assert newest(played / "failing")["step"] == 3


def test_compiled_bf16_with_accumulation_on_two_ranks_follows_the_plain_curve(played: Path, alone: Path) -> None:
    for left, right in zip(rows(alone), rows(played / "accumulated"), strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=0.01)
        assert left["lr"] == right["lr"]
    single, double = newest(alone), newest(played / "accumulated")
    for name, value in single["model"].items():
        assert double["model"][name].dtype == torch.float32
        torch.testing.assert_close(value, double["model"][name], rtol=0.05, atol=0.01)
    assert double["average"].keys() == single["model"].keys() and not same(double["average"], double["model"])
    assert "does not work here" not in (played / "out.txt").read_text()
    # Compiled before it was joined to the other rank's, its gradients would be exchanged after the whole backward pass;
    # and one compilation serves the dry run and all steps.
    for rank in (0, 1):
        assert (played / f"compiled-{rank}.txt").read_text() == "True\n"


def test_refusals_reach_every_rank(played: Path) -> None:
    texts = [(played / f"error-{rank}.txt").read_text().splitlines() for rank in (0, 1)]
    assert texts[0] == texts[1]
    first, second, memory = texts[0]
    assert (first, second) == ("refused by rank 0", "refused by rank 1")
    assert "out of memory with 4 jigsaws of 64 x 64 pixels at once: 2 fit" in memory
    assert not (played / "crowded" / "run.json").exists()


def test_the_command_logs_the_digests_of_one_process(played: Path) -> None:
    assert (played / "out.txt").read_text().count("step 3/3") == 1
    command = ["digest", "--data", str(played / "data"), *sets(*SMALL, "data.batch=8")]
    printed = CliRunner().invoke(main, [*command, "--steps", "3"]).output
    assert (played / "run" / "digest.txt").read_text() in printed
    assert len(rows(played / "run")) == 3


@pytest.mark.skipif(not SOAK, reason="a minute; make soak runs it")
def test_torchrun_restarts_after_a_killed_rank(tmp_path: Path) -> None:
    make_dataset(tmp_path / "data", {"S": [30], "T": [10], "W": [12]})
    chosen = (*SMALL, "optim.steps=20", "data.batch=8", "run.checkpoint_every=2")
    settings = [part for setting in chosen for part in ("--set", setting)]
    command = [*LAUNCH, "--max-restarts", "2", "-m", "tests.helpers.dying_rank", "--", str(tmp_path / "run")]
    command += ["--data", str(tmp_path / "data"), "--workers", "1", *settings]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "steps 0 to 20 of 20" in done.stderr and "steps 4 to 20 of 20" in done.stderr
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(20))
