"""The digest command and its pure functions."""

import hashlib
from pathlib import Path

import pytest
from click.testing import CliRunner

from jigsaw_pretrain.train.cli import main
from jigsaw_pretrain.train.data.digest import batch_digest, digest_line, interleave
from tests.helpers.tiny import make_dataset


def pair(number: int) -> tuple[bytes, bytes]:
    return hashlib.sha256(b"i%d" % number).digest(), hashlib.sha256(b"p%d" % number).digest()


def test_interleave_puts_lanes_in_global_order() -> None:
    lanes, chunk = 6, 2
    everything = [[pair(lane * chunk + nth) for nth in range(chunk)] for lane in range(lanes)]
    flat = [digest for lane in everything for digest in lane]
    for world in (1, 2, 3, 6):
        per_rank = [[digest for lane in everything[rank::world] for digest in lane] for rank in range(world)]
        assert interleave(per_rank, world, lanes, chunk) == flat
    with pytest.raises(ValueError, match="do not make"):
        interleave([flat[:3], flat[3:]], 2, lanes, chunk)


def test_a_line_hashes_the_jigsaws_in_order() -> None:
    pairs = [pair(0), pair(1)]
    identity = hashlib.sha256(pairs[0][0] + pairs[1][0]).hexdigest()
    pixels = hashlib.sha256(pairs[0][1] + pairs[1][1]).hexdigest()
    assert batch_digest(pairs) == (identity, pixels)
    assert digest_line(7, pairs) == f"7 {identity} {pixels}"
    assert batch_digest(pairs[::-1]) != (identity, pixels)


def test_the_command(tmp_path: Path) -> None:
    make_dataset(tmp_path, {"S": [20], "T": [9], "W": [8]})
    runner = CliRunner()

    def run(*more: str) -> list[str]:
        arguments = ["digest", "--data", str(tmp_path), "--batch", "8", "--lanes", "4", "--size", "96", "--split", "32"]
        result = runner.invoke(main, [*arguments, *more], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout.splitlines()

    lines = run("--steps", "4")
    assert [line.split()[0] for line in lines] == ["0", "1", "2", "3"]
    assert all(len(field) == 64 for line in lines for field in line.split()[1:])
    assert run("--steps", "4", "--world", "2", "--workers", "1") == lines
    assert run("--from-step", "3", "--steps", "1") == lines[3:]
    assert run("--seed", "1") != lines
    assert run("--seed", "1", "--steps", "1") != lines[:1]


def test_the_commands_mistakes_are_one_line(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "set", {"S": [20]})
    runner = CliRunner()
    for arguments, message in (
        (["--data", dataset.url, "--batch", "8", "--lanes", "3"], "not divisible by 3 lanes"),
        (["--data", dataset.url, "--batch", "8", "--world", "3"], "cannot be shared equally"),
        (["--data", str(tmp_path / "none")], "no dataset has been finished"),
        (["--data", dataset.url, "--split", "300"], "must lie inside the size"),
    ):
        result = runner.invoke(main, ["digest", *arguments])
        assert result.exit_code == 2 and message in result.output and "Traceback" not in result.output
    result = runner.invoke(main, ["digest", "--data", dataset.url, "--batch", "4", "--steps", "1"])
    assert "no crops" in result.stderr and result.stdout.startswith("0 ")
