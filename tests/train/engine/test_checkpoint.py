"""Checkpoints come back as they were, whole or not at all, and run no code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.train.engine.checkpoint import (
    backbone_state,
    list_checkpoints,
    newest_checkpoint,
    read_checkpoint,
    remove_leftovers,
    save_checkpoint,
)
from tests.helpers.settings import REPOSITORY

KILLED = """
import os, pathlib, sys, torch
from jigsaw_pretrain.train.engine.checkpoint import save_checkpoint
pathlib.Path.replace = lambda self, target: os._exit(9)
save_checkpoint(pathlib.Path(sys.argv[1]), 2, {"model": torch.zeros(1000)}, keep=2)
"""


def test_checkpoints_come_back_as_they_were_and_the_oldest_go(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, step, {"value": torch.arange(3), "text": ["a"]}, keep=2)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [2, 10]
    content = read_checkpoint(list_checkpoints(tmp_path)[-1][1])
    assert content["step"] == 10 and content["text"] == ["a"] and torch.equal(content["value"], torch.arange(3))


@pytest.mark.slow(seconds=6)
def test_a_kill_between_writing_and_renaming_leaves_the_former_one_the_newest(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, {"model": torch.ones(3)}, keep=2)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env=environment, check=False)
    assert killed.returncode == 9
    assert len(list(tmp_path.iterdir())) == 2
    found = newest_checkpoint(tmp_path, pytest.fail)
    assert found is not None and found[1]["step"] == 1
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.pt"]


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path, 1, {}, keep=2)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "none", pytest.fail) is None
    save_checkpoint(tmp_path, 1, {}, keep=5)
    path = save_checkpoint(tmp_path, 2, {"model": torch.zeros(1000)}, keep=5)
    path.write_bytes(path.read_bytes()[:1000])
    warnings: list[str] = []
    found = newest_checkpoint(tmp_path, warnings.append)
    assert found is not None and found[1]["step"] == 1
    assert len(warnings) == 1 and "step-00000002.pt is not a readable checkpoint" in warnings[0]
    list_checkpoints(tmp_path)[0][1].write_bytes(b"")
    with pytest.raises(UserError, match="step-00000001.pt"):
        newest_checkpoint(tmp_path, warnings.append)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (os.mkdir, (str(tmp_path / "harm"),))

    torch.save({"format": 1, "step": 1, "x": Harmful()}, tmp_path / "step-00000001.pt")
    with pytest.raises(UserError, match="not a readable checkpoint"):
        read_checkpoint(tmp_path / "step-00000001.pt")
    assert not (tmp_path / "harm").exists()


def test_another_format_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    torch.save({"format": 99}, tmp_path / "step-00000001.pt")
    with pytest.raises(UserError, match="format 99"):
        read_checkpoint(tmp_path / "step-00000001.pt")
    with pytest.raises(UserError, match="shared storage"):
        read_checkpoint(tmp_path / "step-00000002.pt")


def test_the_backbones_part_is_contiguous_and_in_its_own_names() -> None:
    weight = torch.rand(4, 3, 2, 2).to(memory_format=torch.channels_last)
    found = backbone_state({"backbone.conv.weight": weight, "head.bias": torch.zeros(2)})
    assert list(found) == ["conv.weight"] and found["conv.weight"].is_contiguous()
    assert torch.equal(found["conv.weight"], weight)
