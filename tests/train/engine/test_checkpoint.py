"""Checkpoints come back as they were, whole or not at all, and run no code."""

import copy
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.storage.files import sweep
from jigsaw_pretrain.train.engine.checkpoint import (
    BackgroundWriter,
    backbone_state,
    check_fits,
    check_values,
    list_checkpoints,
    newest_checkpoint,
    read_checkpoint,
    save_checkpoint,
    snapshot,
)
from tests.helpers.jobs import same
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
    found = newest_checkpoint(tmp_path)
    assert found is not None and found[1]["step"] == 1
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.pt"]


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path, 1, {}, keep=2)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert newest_checkpoint(tmp_path / "none") is None
    save_checkpoint(tmp_path, 1, {}, keep=5)
    path = save_checkpoint(tmp_path, 2, {"model": torch.zeros(1000)}, keep=5)
    path.write_bytes(path.read_bytes()[:1000])
    found = newest_checkpoint(tmp_path)
    assert found is not None and found[1]["step"] == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "step-00000002.pt" in caplog.text
    list_checkpoints(tmp_path)[0][1].write_bytes(b"")
    with pytest.raises(UserError, match="step-00000001.pt"):
        newest_checkpoint(tmp_path)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (os.mkdir, (str(tmp_path / "harm"),))

    torch.save({"format": 1, "step": 1, "x": Harmful()}, tmp_path / "step-00000001.pt")
    with pytest.raises(UserError, match="objects other than tensors"):
        read_checkpoint(tmp_path / "step-00000001.pt")
    assert not (tmp_path / "harm").exists()


class Plain(msgspec.Struct):
    """Values of the types that checkpoints hold beside tensors."""

    names: dict[str, str] = {}
    rows: list[dict[str, Any]] | dict[str, Any] | None = None
    number: float = 0.0


@pytest.mark.parametrize("tensor", [torch.zeros(()), torch.zeros(2), torch.zeros(2, device="meta")])
@pytest.mark.parametrize("field", ["names", "names of", "rows", "rows of", "number"])
def test_a_tensor_in_place_of_a_plain_value_is_refused(tmp_path: Path, field: str, tensor: torch.Tensor) -> None:
    inside = {"names of": {"a": tensor}, "rows of": [tensor]}
    content = {field.removesuffix(" of"): inside.get(field, tensor)}
    with pytest.raises(UserError, match=r"step-00000001.pt is damaged"):
        check_values(tmp_path / "step-00000001.pt", content, Plain)


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


def test_a_snapshot_shares_no_memory_and_keeps_forms() -> None:
    weight = torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    numbers = torch.arange(3)
    value = {"a": [weight, (1, "text", None)], "b": {"c": numbers}}
    taken = snapshot(value)
    assert same(taken, value) and taken["a"][0].stride() == weight.stride() and not taken["a"][0].requires_grad
    with torch.no_grad():
        weight.zero_()
    numbers.zero_()
    assert taken["a"][0].any() and taken["b"]["c"].tolist() == [0, 1, 2]
    again = snapshot({**value, "more": torch.ones(2)}, taken)
    assert again["a"][0] is taken["a"][0] and not again["a"][0].any() and again["more"].tolist() == [1, 1]
    other = snapshot({"b": {"c": torch.ones(4)}}, again)
    assert other["b"]["c"].tolist() == [1, 1, 1, 1]


def test_the_writer_runs_one_action_at_a_time_and_tells_of_the_first_failure() -> None:
    writer, done = BackgroundWriter(), []
    go_on = threading.Event()
    writer.submit(lambda: done.append(go_on.wait(10)))
    assert not done and not writer.failed
    threading.Timer(0.05, go_on.set).start()
    writer.submit(lambda: done.append(False))
    assert done[0] is True
    writer.wait()
    assert done == [True, False]

    def fail() -> None:
        raise UserError("no room")

    writer.submit(fail)
    writer.submit(lambda: done.append(True))
    assert writer.failed
    with pytest.raises(UserError, match="no room"):
        writer.wait()
    assert len(done) == 2 and not writer.failed
    writer.close()


FOREIGN: dict[str, Callable[[dict[str, Any]], object]] = {
    "a momentum of another shape": lambda found: found["state"][0].update(momentum_buffer=torch.zeros(3)),
    "a momentum that is not finite": lambda found: found["state"][0]["momentum_buffer"].fill_(float("nan")),
    "another parameter": lambda found: found["state"].update({7: {}}),
    "a tensor among the parameters": lambda found: found["param_groups"][0]["params"].__setitem__(0, torch.zeros(3)),
    "another setting": lambda found: found["param_groups"][0].update(momentum=0.5),
    "no groups": lambda found: found.pop("param_groups"),
}


@pytest.mark.parametrize("kind", [None, *FOREIGN])
def test_a_foreign_optimizer_is_refused(kind: str | None) -> None:
    model = torch.nn.Linear(2, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    content: dict[str, Any] = {
        "step": 1,
        "model": model.state_dict(),
        "optimizer": copy.deepcopy(optimizer.state_dict()),
    }
    if kind is None:
        check_fits(Path("x.pt"), content, model.state_dict(), 4, {}, optimizer)
        return
    FOREIGN[kind](content["optimizer"])
    with pytest.raises(UserError, match="x.pt"):
        check_fits(Path("x.pt"), content, model.state_dict(), 4, {}, optimizer)
