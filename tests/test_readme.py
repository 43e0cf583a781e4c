"""Every command of the README, in its order, on a small dataset: what make would run is run in this process.

The README's Python runs in tests/jigsaw_pretrain/test_api_readme.py, the examples' commands in tests/test_examples.py.
"""

import json
import re
import shlex
import subprocess
from pathlib import Path

import cv2
import pytest
import torch
from torch.distributed.run import get_args_parser

from jigsaw_pretrain.detect.cli import main as detect
from jigsaw_pretrain.prep.cli import main as prep
from jigsaw_pretrain.prep.sample.scenes import sample_data
from jigsaw_pretrain.train.cli import main as train
from tests.helpers.commands import run_command
from tests.helpers.detection import SETTINGS, TINY, set_options
from tests.helpers.jobs import BASE, SMALL
from tests.helpers.settings import REPOSITORY, sets

STAGES = {"prep": prep, "train": train, "detect": detect}

TOY = {
    "prep shards": ["--workers", "1"],
    "train pretrain": [*BASE, "--workers", "0", "--no-page", "--device", "cpu"],
    "train preview": [*sets(*SMALL[1:5]), "--count", "4"],
    "train evaluate": ["--jigsaws", "8", "--workers", "0"],
    "detect train": [*set_options(**SETTINGS, backbone=TINY), "--workers", "0", "--device", "cpu"],
}
"""What makes a command small; the last of an option that is given twice counts."""

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def lines() -> list[str]:
    """The commands of the README's shell blocks and of its sentence about containers, without comments."""
    shell = "".join(re.findall(r"```sh\n(.*?)```", README, flags=re.S)) + "\n".join(
        re.findall(r"`(docker .*?)`", README)
    )
    return [line for whole in shell.splitlines() if (line := whole.split("#")[0].strip())]


def made(folder: Path, line: str) -> list[list[str]]:
    """The commands that a line stands for: those of make, which prints them, or itself."""
    if not line.startswith("make "):
        return [shlex.split(line)]
    command = [
        "make",
        "-n",
        "--no-print-directory",
        "-f",
        str(REPOSITORY / "Makefile"),
        "--assume-old",
        ".venv/.ready",
        *shlex.split(line)[1:],
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0 and "exit 2" not in done.stdout, f"{line}\n{done.stdout}{done.stderr}"
    return [shlex.split(one) for one in done.stdout.replace("\\\n", " ").splitlines()]


def of_a_stage(words: list[str]) -> list[str] | None:
    """The stage and the arguments of a command of this project, also below torchrun; None for any other."""
    words = words[next(i for i, word in enumerate(words) if "=" not in word) :]
    program = Path(words[0]).name
    if program == "torchrun":
        own = get_args_parser().parse_args(words[1:])
        assert own.module
        return [own.training_script, *(word for word in own.training_script_args if word != "--")]
    if program == "python" and words[1:3] == ["-m", "jigsaw_pretrain.train.engine.launch"]:
        return of_a_stage(["torchrun", *words[3:]])
    if program.startswith("jigsaw-"):
        return [program.removeprefix("jigsaw-"), *words[1:]]
    return words[2:] if program == "python" and words[1] == "-m" else None


def draw(folder: Path) -> None:
    """The files that the README names: photos with boxes, others to judge by, and pictures of a thermal camera."""
    for name, seed in (("instances", 0), ("val", 1)):
        sample_data(folder / "drawn" / name, 6, seed)
        (folder / "drawn" / name / "annotations.json").rename(folder / f"{name}.json")
    (folder / "drawn" / "instances" / "images").rename(folder / "images")
    (folder / "drawn" / "val" / "images").rename(folder / "val")
    document = json.loads((folder / "instances.json").read_text())
    (folder / "thermal").mkdir()
    for image in document["images"]:
        grey = cv2.imread(str(folder / "images" / image["file_name"]), cv2.IMREAD_GRAYSCALE)
        assert grey is not None
        image["file_name"] = image["file_name"].replace(".jpg", ".png")
        cv2.imwrite(str(folder / "thermal" / image["file_name"]), grey.astype("uint16") * 256)
    (folder / "thermal.json").write_text(json.dumps(document))


@pytest.mark.slow(seconds=8)
def test_every_command_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    draw(tmp_path)
    others, done = [], []
    for line in lines():
        if line in ("make pretrain", "make test", "make venv"):
            # The first takes minutes, on the sample that it draws; by the others this test came to run.
            assert made(tmp_path, line) or line == "make venv"
            continue
        for words in made(tmp_path, line.replace("/data/", f"{tmp_path}/data/")):
            command = of_a_stage(words)
            if command is None:
                others.append(words)
                continue
            stage, *arguments = command
            named = f"{stage} {arguments[0]}"
            result = run_command(STAGES[stage], *arguments, *TOY.get(named, []))
            assert result.exit_code == 0, f"{line}\n{result.output}"
            done.append(named)
    assert set(done) == {
        "prep shards",
        "prep report",
        *(f"train {one}" for one in ("preview", "pretrain", "evaluate", "export")),
        "detect train",
    }
    assert {words[0] for words in others if words[0] != "rm"} <= {"docker", "touch", "echo", ".venv/bin/python"}
    assert (tmp_path / "data" / "thermal" / "recipe.toml").is_file()
    weights = torch.load(tmp_path / "backbone.pth", weights_only=True)
    thermal = torch.load(tmp_path / "runs" / "thermal" / "backbone.pth", weights_only=True)
    assert weights["conv1.weight"].shape[1] == 3 and thermal["conv1.weight"].shape[1] == 1


def test_the_readmes_table_of_commands_names_them_all() -> None:
    listed = set(re.findall(r"`python -m (\w+ [\w-]+)`", README.split("## Commands")[1].split("\n## ")[0]))
    there = {f"{name} {command}" for name, stage in STAGES.items() for command in stage.list_commands(None)}  # type: ignore[arg-type]
    assert listed <= there
    assert there == listed
