"""Ranks in one process: who reports an error, and what is said of the device."""

from pathlib import Path

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.train.engine import distributed
from jigsaw_pretrain.train.engine.distributed import rank_zero_errors, start
from tests.helpers.commands import call


def test_only_rank_0_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        with rank_zero_errors():
            raise UserError("no")

    with pytest.raises(UserError):
        refuse()
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as ending:
        refuse()
    assert ending.value.code == 2


def test_a_machine_without_a_gpu_is_told_once_and_refused_where_one_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    distributed._tell_of_no_gpu.cache_clear()
    assert start("cpu").device.type == "cpu" and not caplog.records
    for _ in range(2):
        assert start("auto").device.type == "cpu"
    (said,) = caplog.records
    assert said.levelname == "WARNING" and "no GPU" in said.message
    with pytest.raises(UserError, match="--device cuda"):
        start("cuda")


def test_torchruns_own_end_of_a_run_repeats_what_its_rank_has_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    assert call("pretrain", "--data", tmp_path / "nothing", "--run", tmp_path / "run").exit_code == 2
    told = str(ChildFailedError("main", {0: ProcessFailure(0, 1, 2, str(file))}))
    assert "Error: " in told and "nothing" in told and "Traceback" not in told
