"""The digest command."""

from pathlib import Path

from click.testing import CliRunner

from jigsaw_pretrain.train.cli import main
from tests.helpers.settings import FIRST_VERSION, sets
from tests.helpers.tiny import make_dataset

SIZE = sets("data.batch=8", "data.lanes=4", "data.template_size=96", "data.template_split=32")


def test_the_command(tmp_path: Path) -> None:
    make_dataset(tmp_path, {"S": [20], "T": [9], "W": [8]})
    runner = CliRunner()

    def run(*more: str) -> list[str]:
        arguments = ["digest", "--data", str(tmp_path), *SIZE]
        result = runner.invoke(main, [*arguments, *more], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout.splitlines()

    lines = run("--steps", "4")
    assert [line.split()[0] for line in lines] == ["0", "1", "2", "3"]
    assert all(len(field) == 64 for line in lines for field in line.split()[1:])
    assert run("--steps", "4", "--world", "2", "--workers", "1") == lines
    assert run("--from-step", "3", "--steps", "1") == lines[3:]
    assert run("--set", "data.seed=1") != lines
    assert run("--set", "data.seed=1", "--steps", "1") != lines[:1]


def test_the_commands_mistakes_are_one_line(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "set", {"S": [20]})
    runner = CliRunner()
    for arguments, message in (
        (["--data", dataset.url, *sets("data.batch=8", "data.lanes=3")], "data.lanes = 3 must divide"),
        (["--data", dataset.url, *sets("data.batch=8"), "--world", "3"], "cannot be shared equally"),
        (["--data", str(tmp_path / "none")], "no dataset has been finished"),
        (["--data", dataset.url, *sets("data.template_split=300")], "must lie inside the size"),
    ):
        result = runner.invoke(main, ["digest", *arguments])
        assert result.exit_code == 2 and message in result.output and "Traceback" not in result.output
    result = runner.invoke(main, ["digest", "--data", dataset.url, *sets("data.batch=4"), "--steps", "1"])
    assert "no crops" in result.stderr and result.stdout.startswith("0 ")


def test_the_first_versions_dataset_gives_the_lines_it_gave() -> None:
    result = CliRunner().invoke(
        main, ["digest", "--data", str(FIRST_VERSION), *SIZE, "--steps", "6"], catch_exceptions=False
    )
    lines = (FIRST_VERSION / "digest.txt").read_text().splitlines()
    # Pixels are promised under one lock and class of processor only.
    assert [line.split()[:2] for line in result.stdout.splitlines()] == [line.split()[:2] for line in lines]
